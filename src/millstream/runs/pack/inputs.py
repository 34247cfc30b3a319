"""What a run has read of its inputs, and whether that is still the same when it goes on.

The manifest has the size of each input and a hash of its ends, which covers small ones. Of larger ones the journal has
a hash of all that was read, and by what the file could be known then: its size, times and inode. While these are the
same nothing is read again; if they differ, which they do for a corpus that was moved, the hashes are compared.
"""

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from millstream.errors import RunError
from millstream.formats.manifest import JOURNAL, Journal
from millstream.formats.slices import content_hash
from millstream.formats.sources import ENDS, InputShard, fingerprint, prefix_hash
from millstream.records import Cursor, Seen, Slice

USED = "used"
"""The journal's event for what has been read of an input."""

_SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time of change tells whether it was changed again: clocks of file systems are
coarse."""


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
    """A line of the journal: the hash of what was read of an input, and the state of its file at that time."""

    input: int
    name: str
    start: int
    stop: int
    sha256: str
    file: FileState


class _Line(msgspec.Struct):
    """Any line of the journal, as far as it matters here."""

    event: str
    used: Used | None = None


class Inputs:
    """The input shards of this call, with their fingerprints taken once, and what has been read of them."""

    def __init__(self, shards: list[InputShard], columns: tuple[str, ...]) -> None:
        self.shards, self._columns = shards, columns
        self._known: dict[int, dict[str, Any]] = {}
        self._states: dict[int, FileState] = {}
        self._unwritten: dict[int, Used] = {}

    def fingerprint(self, number: int) -> dict[str, Any]:
        if number not in self._known:
            shard = self.shards[number]
            try:
                self._known[number] = fingerprint(shard)
            except OSError:
                self._known[number] = {"name": shard.name, "kind": shard.kind, "unreadable": True}
        return self._known[number]

    def entries(self, used: int) -> list[dict[str, Any]]:
        """For the manifest: the first `used` shards with their fingerprints, the others by name."""
        return [
            self.fingerprint(number) if number < used else {"name": shard.name, "kind": shard.kind}
            for number, shard in enumerate(self.shards)
        ]

    def with_prefix(self, cursor: Cursor) -> Cursor:
        """`cursor` with what identifies the bytes before it; that of what cannot be sought is there already."""
        if cursor.source < len(self.shards) and cursor.offset:
            shard = self.shards[cursor.source]
            if shard.seekable and shard.kind != "parquet":
                return cursor._replace(prefix=prefix_hash(shard, cursor.offset))
        return cursor

    # What has been read

    def read(self, unit: Iterable[Slice]) -> list[Used]:
        """What has been read by the end of a unit of the inputs that it is of, those whose ends do not cover them."""
        latest: dict[int, Seen] = {piece.seen.source: piece.seen for piece in unit if piece.seen}
        found = []
        for seen in latest.values():
            state = self._state(seen.source)
            if state and state.size > 2 * ENDS:
                name = self.shards[seen.source].name
                found.append(Used(seen.source, name, seen.start, seen.stop, seen.sha256, state))
        return found

    def _state(self, number: int) -> FileState | None:
        """That of a file when its first slice was read; None where there is none."""
        if number not in self._states:
            found = _state_of(self.shards[number])
            if found is None:
                return None
            self._states[number] = found
        return self._states[number]

    def use(self, read: Iterable[Used]) -> None:
        """Note what the run has used, to be written by `write`."""
        self._unwritten |= {used.input: used for used in read}

    def write(self, journal: Journal) -> None:
        """Write what was noted to the journal, before a manifest says that the run has used it."""
        for used in self._unwritten.values():
            journal.write(USED, used=msgspec.to_builtins(used))
        if self._unwritten:
            journal.sync()
        self._unwritten.clear()

    # Whether it is the same

    def changed(self, out: str, found: dict[str, Any]) -> list[str]:
        """What differs from the inputs that the run in `out` had read when it sealed its last shard; later ones may.

        What cannot be sought is compared when it is read again (`formats.slices`).
        """
        then, names = found["inputs"], [shard.name for shard in self.shards]
        cursor = Cursor(len(then)) if found["complete"] else Cursor(*found["read"])
        wrong = []
        for number, entry in enumerate(then[: cursor.source + 1]):
            if number >= len(names) or names[number] != entry["name"]:
                now = names[number] if number < len(names) else "not given"
                wrong.append(f"input {number + 1} was {entry['name']}, is {now}")
            elif (kind := self.shards[number].kind) != entry["kind"]:
                wrong.append(f"{self.shards[number].called} was read as {entry['kind']}, and looks like {kind} now")
            elif number < cursor.source and entry != self.fingerprint(number):
                wrong.append(f"{self.shards[number].called} has changed since it was packed")
        if found["complete"] and len(names) > len(then):
            wrong.append(f"input {len(then) + 1} was not given, is {names[len(then)]}")
        try:
            return wrong or self._changed_in_the_middle(out, cursor)
        except OSError as error:
            raise RunError(f"{error.filename or 'an input'} cannot be read: {error.strerror}") from error

    def _changed_in_the_middle(self, out: str, cursor: Cursor) -> list[str]:
        if cursor.source < len(self.shards) and self.with_prefix(cursor) != cursor:
            name = self.shards[cursor.source].called
            return [f"{name} has changed before byte {cursor.offset:,}, which the run has read"]
        wrong = []
        for used in self._to_compare(out, cursor):
            shard, now = self.shards[used.input], _state_of(self.shards[used.input])
            if now is None or used.file.is_that_of(now):
                continue
            if content_hash(shard, self._columns, used.start, used.stop) != used.sha256:
                what = "row" if shard.kind == "parquet" else "byte"
                wrong.append(f"{shard.called} has changed before {what} {used.stop:,}, which the run has read")
            else:  # so that it need not be read again next time
                self._unwritten[used.input] = msgspec.structs.replace(used, file=now)
        return wrong

    def _to_compare(self, out: str, cursor: Cursor) -> list[Used]:
        """What the journal says of the run up to `cursor`, the last of each stretch."""
        last: dict[tuple[int, int], Used] = {}
        for line in _lines(out):
            if line.event == "start":
                last.clear()
            used = line.used
            if used and used.input < len(self.shards) and self.shards[used.input].name == used.name:
                here = self.shards[used.input].seekable and used.stop <= cursor.offset
                if used.input < cursor.source or (used.input == cursor.source and here):
                    last[used.input, used.start] = used
        return list(last.values())


def _lines(out: str) -> Iterator[_Line]:
    """The lines of a journal that can be read: a crash may have cut one."""
    decode = msgspec.json.Decoder(_Line).decode
    with open(os.path.join(out, JOURNAL), "rb") as file:
        for line in file:
            try:
                yield decode(line)
            except msgspec.MsgspecError:
                continue


def _state_of(shard: InputShard) -> FileState | None:
    if shard.uri == "-":  # and no file of this name
        return None
    try:
        found = os.stat(shard.uri)
    except OSError:
        return None
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, time.time_ns())
