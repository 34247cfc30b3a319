"""The journal: events of a run, appended only; all that differs from run to run. Whoever holds it open has the folder.

Each line is one of the `Event` structs, by its tag. How far a run was is `Measured` once a second at first, and half as
often after every `LINES` such lines, so that a night fills no disk and a report can still be drawn of it.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from millstream.folder.manifest import JOURNAL, is_journal, journal_name
from millstream.records import Cursor
from millstream.store import Store, at

_SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time of change tells whether it was changed again: clocks of file systems are
coarse."""

LINES = 2048
"""Lines after which the interval between them is doubled."""


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    time: float = 0.0
    """Seconds since 1970."""


class Started(_Event, frozen=True, kw_only=True, tag="start"):
    """A run begins: so many workers; `ordinal` is the first document's."""

    workers: int
    ordinal: int


class Resumed(_Event, frozen=True, kw_only=True, tag="resume"):
    """A run goes on, from document `ordinal` on. Behind where it had `read` inputs may be others than they were."""

    workers: int
    ordinal: int
    read: Cursor | None = None


class Joined(_Event, frozen=True, kw_only=True, tag="join"):
    """A process takes part in a run of several that share a folder, with so many workers, as `by`."""

    workers: int
    by: str


class Committed(_Event, frozen=True, kw_only=True, tag="commit"):
    """Output shards got their records, when so many documents and bytes had been read."""

    ordinal: int
    bytes: int


class Stopped(_Event, frozen=True, kw_only=True, tag="stop"):
    """The run failed or was interrupted."""

    reason: str


class Finished(_Event, frozen=True, kw_only=True, tag="done"):
    """The manifest is written; this call took so many seconds."""

    seconds: float


class WorkerReplaced(_Event, frozen=True, kw_only=True, tag="worker died"):
    """A worker ended by itself, and another one does its work again."""

    why: str


class NodeChanged(_Event, frozen=True, kw_only=True, tag="node"):
    """A node of a cluster is gone, or one that came later is left out, as it will not do."""

    why: str


class Spilled(_Event, frozen=True, kw_only=True, tag="spill"):
    """Workers leave pieces for one another in a folder outside the run's."""

    folder: str


class PieceRemade(_Event, frozen=True, kw_only=True, tag="piece lost"):
    """A piece was missing or damaged, and is made again."""

    name: str


class NotCompared(_Event, frozen=True, kw_only=True, tag="not compared"):
    """Documents that only the fast engine can encode: what the reference said, by their ids."""

    documents: dict[str, str]


class FileState(NamedTuple):
    """What changes with a file, as a rule: size, times of writing and of any change, inode; `seen`: when that was."""

    size: int
    written: int
    changed: int
    inode: int
    seen: int

    def is_that_of(self, now: "FileState") -> bool:
        """Whether the file is known to be the same `now`, unread."""
        return self[:4] == now[:4] and self.changed + _SETTLED < self.seen


class Used(msgspec.Struct, frozen=True):
    """The hash of what was read of an input, and the state of its file at that time."""

    input: int
    name: str
    start: int
    stop: int
    sha256: str
    file: FileState


class InputUsed(_Event, frozen=True, kw_only=True, tag="used"):
    """What was read of a large input, before a record says that the run has used it."""

    used: Used


class Process(msgspec.Struct, frozen=True):
    """A process of the run: bytes of memory that it has now (where the system tells no more, at most so far), and
    seconds of CPU time that it has taken."""

    pid: int
    memory: int
    cpu: float


class NodeTaken(msgspec.Struct, frozen=True):
    """So many workers on a node of a cluster, and what they have taken: bytes of memory, each at most so far, and
    seconds of CPU time. One for all of them, as a cluster may have thousands."""

    node: str
    workers: int
    memory: int
    cpu: float


class Measured(_Event, frozen=True, kw_only=True, tag="measured"):
    """How far a run is, since this call began: `seconds`, and what was read and written in them.

    `stages`: seconds of work by stage, over all processes. `queue`: units of work handed out and not done; `spilled`:
    bytes of pieces that lie about. `processes`: this one first, and those that it has started;
    `nodes`: those on a cluster.
    """

    seconds: float
    share: float | None
    documents: int
    ids: int
    bytes: int
    faults: int
    stages: dict[str, float]
    queue: int
    spilled: int
    processes: list[Process]
    nodes: list[NodeTaken] = []


Event = (
    Started
    | Resumed
    | Joined
    | Committed
    | Stopped
    | Finished
    | WorkerReplaced
    | NodeChanged
    | PieceRemade
    | Spilled
    | NotCompared
    | InputUsed
    | Measured
)
_E = TypeVar("_E", bound=_Event)


class Journal:
    """A run's journal, opened to be written. Raises RequestError if another millstream writes to the folder.

    Of several that write to it at once, each has its own, which is named `by` whose it is.
    """

    def __init__(self, folder: str, by: str | None = None) -> None:
        lock = f"to {folder}" if by is None else None
        self._file = at(folder).append(journal_name(by), lock=lock)
        size = self._file.size()
        if size and self._file.read(size - 1, size) != b"\n":
            self._file.write(b"\n")  # a crash cut the last line, and the next is none of it

    def write(self, event: Event) -> None:
        """Append an event, with the time that it is now."""
        told = {**msgspec.to_builtins(event), "time": round(time.time(), 3)}
        self._file.write(json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def flush(self) -> None:
        """What was written survives this process; in a bucket, where each line at once would be a request each."""
        self._file.flush()

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def events(store: Store, kind: type[_E]) -> Iterator[_E]:
    """The events of one kind in a folder's journals, as `all_events`."""
    for event in all_events(store):
        if isinstance(event, kind):
            yield event


def all_events(store: Store) -> Iterator[Any]:
    """All events of a folder's journals that this version knows: the one of a run by itself first, and then those of
    all that took part in one; each oldest first. A line that a crash cut is passed over."""
    decode = msgspec.json.Decoder(Event).decode
    for name in sorted(
        (name for name, _ in store.entries() if is_journal(name)), key=lambda name: (name != JOURNAL, name)
    ):
        with store.open(name) as file:
            for line in file:
                try:
                    yield decode(line)
                except msgspec.MsgspecError:
                    continue


class Rhythm:
    """When the next `Measured` is due, by a clock of seconds: at once, and then each second, until there are `LINES`
    lines; then every two seconds, for as many lines again, and so on. `lines` were written by earlier calls.

    >>> rhythm = Rhythm()
    >>> [rhythm.due(now) for now in (0.0, 0.5, 1.0, 1.9, 2.0)]
    [True, False, True, False, True]
    >>> late = Rhythm(lines=3 * LINES)
    >>> [now for now in range(20) if late.due(now)]
    [0, 8, 16]
    """

    def __init__(self, lines: int = 0) -> None:
        self._lines, self._next = lines, float("-inf")

    def due(self, now: float) -> bool:
        """Whether to write a line now; it counts as written."""
        if now < self._next:
            return False
        self._next = now + float(1 << self._lines // LINES)
        self._lines += 1
        return True
