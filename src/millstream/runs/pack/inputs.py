"""What a run has read of its inputs, and whether that is still the same when it goes on.

The manifest has the size of each input and a hash of its ends, which covers small ones. Of larger ones the journal has
a hash of all that was read, and by what the file could be known then: its size, times and inode. While these are the
same nothing is read again; if they differ, which they do for a corpus that was moved, the hashes are compared.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from millstream.corpus.objects import of_each
from millstream.corpus.slices import content_hash
from millstream.corpus.sources import ENDS, InputShard, fingerprint, span_hash
from millstream.errors import RunError
from millstream.folder.entries import InputEntry
from millstream.folder.journal import FileState, InputUsed, Journal, Resumed, Started, Used, all_events
from millstream.folder.records import InputsRecord, record_inputs
from millstream.records import Cursor, Seen, Slice
from millstream.store import Store, at


class Inputs:
    """The input shards of this call, with their fingerprints taken once, and what has been read of them."""

    def __init__(self, shards: list[InputShard], columns: tuple[str, ...]) -> None:
        self.shards, self._columns = shards, columns
        self._known: dict[int, InputEntry] = {}
        self._states: dict[int, FileState] = {}
        self._unwritten: dict[tuple[int, int], Used] = {}
        self._reading: defaultdict[int, dict[int, Used]] = defaultdict(dict)  # of those without a fingerprint
        self.told = self.records = 0  # how many of them records have told of, and in how many records

    def fingerprint(self, number: int) -> InputEntry:
        return self.fingerprints(range(number, number + 1))[0]

    def fingerprints(self, numbers: Sequence[int]) -> list[InputEntry]:
        wanted = [number for number in numbers if number not in self._known]
        found = of_each(_entry, [self.shards[number] for number in wanted])
        self._known |= zip(wanted, found, strict=True)
        return [self._known[number] for number in numbers]

    def entries(self) -> list[InputEntry]:
        """For the manifest: all of them with their fingerprints."""
        return self._as_read(range(len(self.shards)))

    def tell(self, store: Store, read: Cursor) -> None:
        """Record those that no record has told of, now that they have been read to `read`. The last of them is the one
        that is read now: its content is not known yet."""
        if read.source > self.told:
            known = self._as_read(range(self.told, read.source))
            now = self.named()[read.source : read.source + 1]
            record_inputs(store, self.records, InputsRecord(first=self.told, inputs=[*known, *now]))
            self.records, self.told = self.records + 1, read.source

    def _as_read(self, numbers: Sequence[int]) -> list[InputEntry]:
        """The fingerprints of inputs that have been read, if they are. Raises RunError if one is of what was not: of a
        file that was written anew meanwhile, samples hold some of this and some of that."""
        new = [number for number in numbers if number not in self._known]
        found = self.fingerprints(numbers)
        for number in new:
            if self._has_changed(number):
                raise RunError(
                    f"{self.shards[number].called} has changed while it was read. Run the same command again: it goes "
                    "on, or tells what cannot"
                )
            self._reading.pop(number, None)
        return found

    def _has_changed(self, number: int) -> bool:
        """Whether a file is another one than when its first slice was read: by its size and time, and then by what was
        read of it. It may have grown, and nothing was read of one that is behind the limit."""
        then, shard = self._states.get(number), self.shards[number]
        now = then and state_of(shard)
        if then is None or (now and (then.size, then.written) == (now.size, now.written)):
            return False
        with contextlib.suppress(OSError):
            return now is None or any(
                content_hash(shard, self._columns, used.start, used.stop) != used.sha256
                for used in self._reading[number].values()
            )
        return True

    def named(self) -> list[InputEntry]:
        """All of them, by name."""
        return [InputEntry(shard.name, shard.kind) for shard in self.shards]

    def with_prefix(self, cursor: Cursor) -> Cursor:
        """`cursor` with what identifies the bytes before it; that of what cannot be sought is there already."""
        if cursor.source < len(self.shards) and cursor.offset:
            shard = self.shards[cursor.source]
            if shard.seekable and shard.kind != "parquet":
                return cursor._replace(prefix=span_hash(shard, cursor.offset))
        return cursor

    # What has been read

    def read(self, unit: Iterable[Slice]) -> list[Used]:
        """What has been read by the end of a unit of the inputs that it is of."""
        latest: dict[int, Seen] = {piece.seen.source: piece.seen for piece in unit if piece.seen}
        return self.used(latest.values())

    def used(self, some: Iterable[Seen]) -> list[Used]:
        """What has been read of inputs that are files."""
        found = []
        for seen in some:
            state = self.state(seen.source)
            if state:
                name = self.shards[seen.source].name
                found.append(Used(seen.source, name, seen.start, seen.stop, seen.sha256, state))
        return found

    def look_at(self, cursor: Cursor) -> None:
        """Take the state of the file that is read next, before it is."""
        if cursor.source < len(self.shards):
            self.state(cursor.source)

    def state(self, number: int) -> FileState | None:
        """That of a file when its first slice was read; None where there is none."""
        if number not in self._states:
            found = state_of(self.shards[number])
            if found is None:
                return None
            self._states[number] = found
        return self._states[number]

    def use(self, read: Iterable[Used]) -> None:
        """Note what the run has used, to be written by `write` where the ends of a file do not cover it."""
        for used in read:
            if used.file.size > 2 * ENDS:
                self._unwritten[used.input, used.start] = used
            if used.input not in self._known:
                self._reading[used.input][used.start] = used

    def write(self, journal: Journal) -> None:
        """Write what was noted to the journal, before a manifest says that the run has used it."""
        for used in self._unwritten.values():
            journal.write(InputUsed(used=used))
        if self._unwritten:
            journal.sync()
        self._unwritten.clear()

    # Whether it is the same

    def changed(self, out: str, then: list[InputEntry], cursor: Cursor, *, finished: bool) -> list[str]:
        """What differs from the inputs `then` of the run in `out`, which had read them to `cursor` when it sealed its
        last shard; later ones may.

        What cannot be sought is compared when it is read again (`corpus.slices`).
        """
        names = [shard.name for shard in self.shards]
        self.fingerprints(range(min(cursor.source, len(then), len(names))))
        wrong = []
        for number, entry in enumerate(then[: cursor.source + 1]):
            if number >= len(names) or names[number] != entry.name:
                now = names[number] if number < len(names) else "not given"
                wrong.append(f"input {number + 1} was {entry.name}, is {now}")
            elif (kind := self.shards[number].kind) != entry.kind:
                wrong.append(f"{self.shards[number].called} was read as {entry.kind}, and looks like {kind} now")
            elif number < cursor.source and entry != self.fingerprint(number):
                wrong.append(f"{self.shards[number].called} has changed since it was packed")
        if finished and len(names) > len(then):
            wrong.append(f"input {len(then) + 1} was not given, is {names[len(then)]}")
        try:
            return wrong or self._changed_in_the_middle(out, cursor)
        except OSError as error:
            raise RunError(f"{error.filename or 'an input'} cannot be read: {error.strerror}") from error

    def are_known(self, out: str, then: list[InputEntry], cursor: Cursor) -> bool:
        """Whether nothing differs before a cursor that a run had come to, as far as can be told without reading again
        what cannot be sought."""
        if cursor.source < len(self.shards) and cursor.offset and not self.shards[cursor.source].seekable:
            now = state_of(self.shards[cursor.source])
            here = [used for used in _told(out) if used.input == cursor.source]
            if now is None or not here or not here[-1].file.is_that_of(now):
                return False
        return not self.changed(out, then, cursor, finished=False)

    def _changed_in_the_middle(self, out: str, cursor: Cursor) -> list[str]:
        if cursor.source < len(self.shards) and self.with_prefix(cursor) != cursor:
            name = self.shards[cursor.source].called
            return [f"{name} has changed before byte {cursor.offset:,}, which the run has read"]
        wrong = []
        for used in self._to_compare(out, cursor):
            shard, now = self.shards[used.input], state_of(self.shards[used.input])
            if now is None or used.file.is_that_of(now):
                continue
            if content_hash(shard, self._columns, used.start, used.stop) != used.sha256:
                what = "row" if shard.kind == "parquet" else "byte"
                wrong.append(f"{shard.called} has changed before {what} {used.stop:,}, which the run has read")
            else:  # so that it need not be read again next time
                self._unwritten[used.input, used.start] = msgspec.structs.replace(used, file=now)
        return wrong

    def _to_compare(self, out: str, cursor: Cursor) -> list[Used]:
        """What the journal says of the run up to `cursor`, the last of each stretch."""
        last: dict[tuple[int, int], Used] = {}
        for used in _told(out):
            if used.input < len(self.shards) and self.shards[used.input].name == used.name:
                here = used.input < cursor.source or self.shards[used.input].seekable
                if here and _is_before(used, cursor):
                    last[used.input, used.start] = used
        return list(last.values())


def _told(out: str) -> list[Used]:
    """What the journal says of the inputs of the run in a folder."""
    told: list[Used] = []
    for event in all_events(at(out)):
        if isinstance(event, Started):
            told.clear()
        elif isinstance(event, Resumed) and event.read:  # what lies behind was not compared then
            told = [used for used in told if _is_before(used, event.read)]
        elif isinstance(event, InputUsed):
            told.append(event.used)
    return told


def _is_before(used: Used, cursor: Cursor) -> bool:
    """Whether all of a stretch has been read at a cursor."""
    return (used.input, used.stop) <= cursor[:2]


def known_inputs(named: list[InputEntry], records: Iterable[InputsRecord]) -> list[InputEntry]:
    """The inputs of an unfinished run: those that were `named` when it began, with what records tell of them since."""
    found = list(named)
    for record in records:
        found[record.first : record.first + len(record.inputs)] = record.inputs
    return found


def _entry(shard: InputShard) -> InputEntry:
    try:
        return msgspec.convert(fingerprint(shard), InputEntry)
    except OSError:
        return InputEntry(shard.name, shard.kind, unreadable=True)


def state_of(shard: InputShard) -> FileState | None:
    if shard.uri == "-":  # and no file of this name
        return None
    try:
        found = shard.state()
    except OSError:
        return None
    return FileState(found.size, found.changed, found.touched, found.identity[1], time.time_ns())
