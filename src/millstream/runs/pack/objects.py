"""Pieces that an engine hands from worker to worker: they stay where they were made, until somebody needs them."""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from millstream.records import Ref
from millstream.runs.pack.pieces import PieceLost, StoredPieces
from millstream.store import Store, at


class Shelves(Protocol):
    """What an engine keeps for those who put it, by name; in a worker what the unit at hand was given and has put."""

    def put(self, name: str, data: Any) -> None: ...

    def get(self, name: str) -> Any:
        """None for what is lost, or was not asked for among the `needs` of a unit."""
        ...

    def has(self, name: str) -> bool: ...

    def drop(self, name: str) -> None: ...


@dataclass(frozen=True)
class ObjectPieces:
    """Pieces on a `shelf`, which are lost with the machine that they lie on; those that have to outlast it are files.

    Workers take turns on each machine.
    """

    files: StoredPieces
    shelf: Shelves

    @property
    def store(self) -> Store:
        return self.files.store

    @property
    def lasting(self) -> StoredPieces:
        return self.files

    def put(self, name: str, chunks: Iterable[Any]) -> Ref:
        from isal import isal_zlib

        views = [memoryview(chunk).cast("B") for chunk in chunks]
        data = np.empty(sum(map(len, views)), np.uint8)
        at = 0
        for view in views:
            data[at : at + len(view)] = view
            at += len(view)
        self.shelf.put(name, data)
        return Ref(name, len(data), isal_zlib.crc32(data))

    def get(self, ref: Ref) -> memoryview:
        from isal import isal_zlib

        data = self.shelf.get(ref.name)
        if data is None:
            return self.files.get(ref)
        if len(data) != ref.size or isal_zlib.crc32(data) != ref.crc:
            raise PieceLost(ref.name, "is damaged")
        return memoryview(data)

    def has(self, ref: Ref) -> bool:
        return self.shelf.has(ref.name) or self.files.has(ref)

    def drop(self, ref: Ref) -> None:
        if self.shelf.has(ref.name):
            self.shelf.drop(ref.name)
        else:
            self.files.drop(ref)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        here = at(os.environ.get("TMPDIR") or "/tmp").below(f"millstream-{os.getuid()}")
        here.make()
        with here.turn("turn"):
            yield

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Of the files: what is on the shelf was put by this call."""
        self.files.sweep(keep)
