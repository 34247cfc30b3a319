"""The journal of an ask run: which requests are answered, and with what; append-only, and the truth.

One line an outcome: ``{"key":"<32 hex digits>",`` and then the outcome's row as it goes to the output, its id and index
first. A line is written before its outcome is handed out. Before the first row of a run stands its `Header`, a line
that begins with ``{"millstream":"ask/1"``; older journals have none. Going on reads the keys and whether an outcome is
a fault, in 24 bytes of memory for each, and rows only as they are wanted. A damaged line costs what it held, no more.
"""

import os
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from millstream.errors import RequestError, RunError, setting
from millstream.records import Ids
from millstream.runs.ask.answer_lines import (
    FRONT,
    HEADER,
    ROW,
    Header,
    are_json,
    encode,
    faults_in,
    front,
    header_of,
    is_json,
    keys_in,
    lines_in,
    may_begin,
    outcome_line,
)
from millstream.store import Appender, at, file_at, kind_at

JOURNAL = "journal.jsonl"
SPENT = "spent.jsonl"
"""What stands beside it where a run has a bound on its cost."""

_KINDS = np.uint64, np.uint64, np.int64
_BLOCK = 256 << 10
_READ_LEAST, _READ_MOST = 8 << 10, 1 << 20
_FRESH = 1 << 16  # rows of this run that are found by a dict, which takes 200 bytes for each
_MOST_TOLD = 10  # damaged lines by their number


class AnswerJournal:
    """The journal in `folder`, opened for one writer: ``with AnswerJournal(folder) as journal``.

    What earlier runs have written is found; what this one appends is for the next. `headers` are those of earlier runs,
    oldest first. `damaged` counts the lines that nothing can be made of, `damaged_lines` are the numbers of the first;
    what they held is not found. Raises RequestError if another run has it open, or if it is no journal of ours.

    >>> import tempfile
    >>> key, row = b"sixteen bytes...", b'{"id":"a","index":0,"text":"yes"}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with AnswerJournal(folder) as journal:
    ...         journal.begin(Header(model="m"))
    ...         journal.append(key, row)
    ...     with AnswerJournal(folder) as journal:
    ...         known, unknown = journal.find_many([key, bytes(16)]).tolist()
    ...         journal.row(known, "a", 0) == row, journal.row(known, "a", 7), unknown, journal.headers[0].model
    (True, b'{"id":"a","index":7,"text":"yes"}', -1, 'm')
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.path = folder, os.path.join(folder, JOURNAL)
        self.headers: list[Header] = []
        self.damaged, self.damaged_lines = 0, list[int]()
        self._window, self._start, self._size = b"", 0, _READ_LEAST
        self._high, self._low, self._places = (np.zeros(0, kind) for kind in _KINDS)
        self._fresh: dict[bytes, int] = {}  # that this run has appended, and wants to find again
        self._file = _opened(folder)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Outcomes that earlier runs have written, and what this one has taken in."""
        return len(self._places)

    def close(self) -> None:
        self._file.close()

    # Writing --------------------------------------------------------------------------------------------------------

    def begin(self, header: Header) -> None:
        """Write the header of this run, unless an earlier one had the same. Raises as `append` does."""
        line = encode(header)
        if line not in map(encode, self.headers):
            self._write(line + b"\n")

    def append(self, key: bytes, row: bytes, *, find: bool = False) -> None:
        """Write an outcome; when this returns, it survives this process.

        `row` is one line of JSON that begins as in ``{"id":"a","index":0,"text":``; the row of a fault has "fault"
        among its fields. With `find`, `find_many` knows it from now on. Raises RunError if the disk does not take it;
        nothing of it is left then.
        """
        start = self._file.size() if find else 0
        self._write(outcome_line(key, row))
        if find:
            self._fresh[key] = start << 1 | (b',"fault":' in row and "fault" in msgspec.json.decode(row))
            if len(self._fresh) >= max(_FRESH, len(self) // 4):
                self._take_in()

    def _take_in(self) -> None:
        """Have the fresh ones among the rest, where each takes a few bytes."""
        keys = np.frombuffer(b"".join(self._fresh), np.uint64).reshape(-1, 2)
        columns = keys[:, 0], keys[:, 1], np.fromiter(self._fresh.values(), np.int64, len(keys))
        held = self._high, self._low, self._places
        self._high, self._low, self._places = map(np.concatenate, zip(held, columns, strict=True))
        self._fresh = {}
        self._keep_last()

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
        except OSError as error:
            raise RunError(
                f"{self.path}: {error.strerror}. All before is kept: make room, then run the same command again"
            ) from error

    # Finding --------------------------------------------------------------------------------------------------------

    def find_many(self, keys: Sequence[bytes]) -> Ids:
        """For each key the place of its row, the last if it has several, or -1 (int64); places are for `row`."""
        places = np.full(len(keys), -1, np.int64)
        if not keys:
            return places
        if len(self):
            self._find(keys, places)
        if self._fresh:
            fresh = np.fromiter((self._fresh.get(key, -1) for key in keys), np.int64, len(keys))
            np.copyto(places, fresh, where=fresh >= 0)
        return places

    def _find(self, keys: Sequence[bytes], places: Ids) -> None:
        wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
        order = np.argsort(wanted[:, 0])  # neighbours are found much faster one after the other
        high, low = wanted[order].T
        at = self._high.searchsorted(high, "right") - 1
        while True:
            half = (at >= 0) & (self._high.take(at, mode="clip") == high)
            found = half & (self._low.take(at, mode="clip") == low)
            if (half == found).all():
                break
            at -= half & ~found  # other keys with the same first half
        places[order[found]] = self._places[at[found]]

    def row(self, place: int, request_id: str | None, index: int) -> bytes | None:
        """The row at a place of `find_many`, as it was appended but with this id and index; None if it is damaged.

        An earlier run may have had the prompt in another line. Places that rise, more or less, are read fastest.
        """
        offset = place >> 1
        at = offset - self._start
        end = self._window.find(b"\n", at) if at >= 0 else -1
        if end < 0:
            self._move_window(offset)
            at = offset - self._start
            end = self._window.find(b"\n", at)
        at += ROW
        named = front(request_id, index)
        if self._window.startswith(named, at):
            return b"{" + self._window[at:end]
        if other := FRONT.match(self._window, at, end):
            return b"{" + named + self._window[other.end() : end]
        self._note_damage(self._number_of(offset))
        return None

    def rows(self, places: Sequence[int], ids: Sequence[str | None], first: int) -> bytes | None:
        """The same of several places, for requests with indexes from `first` on, with a line end between two rows.

        None if one of them is damaged.
        """
        offsets = np.array(places, np.int64) >> 1
        start = int(offsets.min())
        size = int(offsets.max()) - start
        named = list(map(front, ids, range(first, first + len(ids))))
        if size > _READ_MOST:  # they lie too far apart to read all that is between
            rows = list(map(self.row, places, ids, range(first, first + len(ids))))
            return None if None in rows else b"\n".join(rows)  # type: ignore[arg-type]
        window = self._read_lines(start, size)
        ends = np.flatnonzero(np.frombuffer(window, np.uint8) == ord("\n"))
        numbers = ends.searchsorted(offsets - start).tolist()
        lines = window.split(b"\n")
        pieces = [lines[number][ROW:] for number in numbers]
        if not all(map(bytes.startswith, pieces, named)):
            found = [FRONT.match(piece) for piece in pieces]
            if None in found:
                self._note_damage(self._number_of(places[found.index(None)] >> 1))
                return None
            pairs = zip(named, found, pieces, strict=True)
            pieces = [name + piece[other.end() :] for name, other, piece in pairs if other]
        return b"{" + b"\n{".join(pieces)

    def _read_lines(self, start: int, size: int) -> bytes:
        """What is from `start` on until the line ends that goes on behind the next `size` bytes."""
        more = _READ_LEAST
        while True:
            data = self._file.read(start, start + size + more)
            end = data.find(b"\n", size)
            if end >= 0:
                return data[: end + 1]
            if len(data) < size + more:
                raise RunError(f"{self.path} became shorter while it was read")
            more *= 4

    def _move_window(self, offset: int) -> None:
        """Hold the line at `offset` and what is near: more of it the longer places follow one another."""
        near = -self._size <= offset - self._start <= len(self._window) + self._size
        self._size = min(4 * self._size, _READ_MOST) if near else _READ_LEAST
        while True:
            # Rows were written as answers came, so some of those that are wanted next lie a little before.
            self._start = max(0, offset - self._size // 4)
            self._window = self._file.read(self._start, self._start + self._size)
            if self._window.find(b"\n", offset - self._start) >= 0:
                return
            if len(self._window) < self._size:
                raise RunError(f"{self.path} became shorter while it was read")
            self._size *= 2

    def _number_of(self, offset: int) -> int:
        """The number of the line at `offset`, from 1."""
        starts = range(0, offset, _BLOCK)
        return 1 + sum(self._file.read(at, min(at + _BLOCK, offset)).count(b"\n") for at in starts)

    def _note_damage(self, number: int) -> None:
        self.damaged += 1
        if len(self.damaged_lines) < _MOST_TOLD:
            self.damaged_lines.append(number)

    # Loading --------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Keys in two halves, sorted, and the place of each: twice the offset of its line, and 1 more for a fault."""
        parts = [bytearray(), bytearray(), bytearray()]  # they grow in place: the peak of memory is low
        for block in self._blocks():
            for part, column in zip(parts, block, strict=True):
                part += column.tobytes()
        columns = [np.frombuffer(part, kind) for part, kind in zip(parts, _KINDS, strict=True)]
        del parts
        order = np.argsort(columns[0], kind="stable")
        self._high, self._low, self._places = (columns.pop(0)[order] for _ in _KINDS)
        if (self._high[1:] == self._high[:-1]).any():
            self._keep_last()

    def _keep_last(self) -> None:
        """Of the lines of each key, the last, now that they stand in order of the keys' first halves."""
        order = np.lexsort((self._low, self._high))
        high, low, places = self._high[order], self._low[order], self._places[order]
        last = np.append((high[1:] != high[:-1]) | (low[1:] != low[:-1]), True)
        self._high, self._low, self._places = high[last], low[last], places[last]

    def _blocks(self) -> Iterator[tuple[Ids, Ids, Ids]]:
        """The two halves of the keys, and the places, of a part of the lines after the other.

        A line that was being written when a run was killed is cut off.
        """
        position, size, total, lines = 0, _BLOCK, self._file.size(), 0
        while position < total:
            data = self._file.read(position, position + size)
            if not position and not may_begin(data):
                raise RequestError(
                    f"the first line of {self.path} is none of millstream's: give another {setting('journal')}"
                )
            end = data.rfind(b"\n") + 1
            if end:
                starts, ends = lines_in(data, end)
                yield self._outcomes_in(data, starts, ends, place=(position, lines))
                position, size, lines = position + end, _BLOCK, lines + len(starts)
            elif position + len(data) < total:
                size *= 2
            else:
                self._file.truncate(position)
                return

    def _outcomes_in(self, data: bytes, starts: Ids, ends: Ids, *, place: tuple[int, int]) -> tuple[Ids, Ids, Ids]:
        """The same of the lines of `data`, which stands at `place`: (position in the file, how many lines before)."""
        position, lines = place
        keys, good = keys_in(data, starts, ends)
        places = (starts + position) << 1
        faults, damaged = faults_in(data, starts, ends)
        places[faults] |= 1
        good[damaged] = False
        if not good.all() or not are_json(data[: ends[-1] + 1], len(ends)):
            good &= [is_json(data[start:end]) for start, end in zip(starts, ends, strict=True)]
            for line in np.flatnonzero(~good).tolist():
                self._take_other(data[starts[line] : ends[line]], lines + line + 1)
            keys, places = keys[good], places[good]
        return keys[:, 0], keys[:, 1], places

    def _take_other(self, line: bytes, number: int) -> None:
        """A line without an outcome: a header, or a damaged one."""
        if line.startswith(HEADER):
            try:
                self.headers.append(header_of(line))
                return
            except msgspec.DecodeError as error:
                if not line.startswith(HEADER + b'1"') and is_json(line):
                    raise RequestError(f"{self.path} was written by a newer millstream: use that one") from error
        self._note_damage(number)


def is_fault(place: int) -> bool:
    """Whether a fault is at a place of `AnswerJournal.find_many`."""
    return place >= 0 and bool(place & 1)


def is_ours(folder: str) -> bool:
    """Whether the folder has a journal of ours, be it an empty one."""
    path = os.path.join(folder, JOURNAL)
    return holds_journal(path) or (kind_at(path) == "file" and not file_at(path).size())


def holds_journal(path: str) -> bool:
    """Whether a file begins as a journal of ours."""
    return kind_at(path) == "file" and may_begin(file_at(path).read(0, ROW))


def _opened(folder: str) -> Appender:
    """The journal's file, which is the lock, too. It is not put among other files."""
    store = at(folder)
    try:
        store.make()
        others = [entry.name for entry in store.entries() if not entry.name.startswith(".")]
        if others and JOURNAL not in others:
            raise RequestError(f"{folder} holds no journal but {min(others)}: give an empty folder, or a new one")
        return store.append(JOURNAL, lock=f"to {folder}")
    except OSError as error:
        why = "it is a file" if kind_at(folder) == "file" else error.strerror
        raise RequestError(f"cannot keep a journal in {folder}: {why}; {setting('journal')} names a folder") from error
