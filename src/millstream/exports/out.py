"""Where an export's files go: a folder that appears when all of them are durable, so that nobody sees half of them."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from millstream.store import Onward, Store, Writer, WrittenFile, written_now


@dataclass(frozen=True)
class Place:
    """The folder `name` in `store`, a draft until it is published."""

    store: Store
    name: str

    @property
    def draft(self) -> Store:
        return self.store.draft(self.name)

    def begin(self) -> None:
        """Make the draft, empty, whatever an earlier run has left there."""
        self.draft.delete("")
        self.draft.make()

    def publish(self) -> None:
        self.store.publish(self.name)


class Out:
    """What one task writes of an export; `files` are those that are finished, as the manifest names them."""

    def __init__(self, place: Place) -> None:
        self.files: list[dict[str, Any]] = []
        self._place, self._draft = place, place.draft

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Writer]:
        """A new file, durable after the block; `name` may have folders in it."""
        with self._draft.write(name) as file:
            yield file
        self._name(name, file.written)

    def go_on(self, name: str, size: int) -> AbstractContextManager[Onward]:
        """A file to write on to, behind its first `size` bytes; before `finish` it is not durable, and has no entry."""
        return self._draft.go_on(name, size)

    def finish(self, name: str, size: int) -> None:
        """Make a file that went on durable, as long as that, and read it once more for its hash."""
        self._draft.finish(name, size)
        self._name(name, written_now(self._draft, name))

    def _name(self, name: str, written: WrittenFile) -> None:
        self.files.append({"name": f"{self._place.name}/{name}", **written._asdict()})


def delete_all(store: Store, names: Iterable[str]) -> None:
    """Delete the exports under any of `names`, published or not."""
    for name in names:
        store.withdraw(name)
        store.draft(name).delete("")
