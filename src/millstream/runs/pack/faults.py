"""The faults of a run on their way into faults.jsonl, or the error that the first of them is."""

import json
from collections.abc import Iterable

from millstream.corpus.kinds import fault_place
from millstream.corpus.sources import InputShard
from millstream.errors import DataError, setting
from millstream.folder.manifest import FAULTS
from millstream.records import DocumentFault
from millstream.store import at

_BUFFER = 1 << 16


class Faults:
    """The first `size` bytes of the faults.jsonl in `out` stay, and more is written behind them.

    `on_error` is stop (the first fault is an error) or skip.
    """

    def __init__(self, out: str, size: int, *, shards: list[InputShard], on_error: str) -> None:
        self._file = at(out).append(FAULTS, at=size, buffer=_BUFFER)
        self._shards, self._stops = shards, on_error == "stop"

    def write(self, faults: Iterable[DocumentFault]) -> int:
        """Add faults; how long the file is then. Raises DataError at the first, if a run stops there."""
        for fault in faults:
            if self._stops:
                raise DataError(
                    f"{in_words(fault, self._shards)}\nEverything before it is kept. Mend it and run the same command "
                    f"again to go on, or go on without such documents with {setting('on_error', 'skip')}"
                )
            self._file.write(as_line(fault))
        return self._file.size()

    def sync(self) -> None:
        self._file.sync()

    def finish(self) -> None:
        """All of it is there, in one file."""
        self._file.sync()
        self._file.close()

    def close(self) -> None:
        self._file.close()


def as_line(fault: DocumentFault) -> bytes:
    """A fault as faults.jsonl has it."""
    return json.dumps(fault._asdict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def in_words(fault: DocumentFault, shards: list[InputShard]) -> str:
    """Where a fault is, and what it is."""
    named = f" (id {fault.id!r})" if fault.id else ""
    shard = shards[fault.shard]
    place = fault_place(fault._replace(source=shard.called), shard.kind, shard.name)
    return f"{place}{named}: {fault.message}{'' if fault.message.endswith('?') else '.'}"
