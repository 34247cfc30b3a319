"""The journal of an ask run: which requests are answered, and with what; append-only, and the truth.

One line an outcome: ``{"key":"<32 hex digits>",`` and then the outcome's row as it goes to the output, its id and index
first. A line is written before its outcome is handed out. Before the first row of a run stands its `Header`, a line
that begins with ``{"millstream":"ask/1"``; older journals have none. Going on reads the keys and whether an outcome is
a fault, in 24 bytes of memory for each, and rows only as they are wanted. A damaged line costs what it held, no more.
"""

import binascii
import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from millstream.errors import RequestError, RunError
from millstream.records import Ids

JOURNAL = "journal.jsonl"
SPENT = "spent.jsonl"
"""What stands beside it where a run has a bound on its cost."""

_HEAD = b'{"key":"'
_DIGITS = slice(len(_HEAD), len(_HEAD) + 32)
_ROW = _DIGITS.stop + 2
"""Where a line's row goes on after its opening brace: behind the key, its quote and a comma."""
_ID = b'"id":'
"""How every row begins after its opening brace."""
_HEADER = b'{"millstream":"ask/'
_FIRST = b'{"key":"%032d",' % 0

_KINDS = np.uint64, np.uint64, np.int64
_BLOCK = 256 << 10
_READ_LEAST, _READ_MOST = 8 << 10, 1 << 20
_MOST_TOLD = 10  # damaged lines by their number

_KEYED = re.compile(rb'\{"key":"[0-9a-f]{32}",')
_NAMED = re.compile(rb'"id":(?:null|"(?:[^"\\]++|\\.)*+"),"index":\d+,')
_FAULT = re.compile(rb',"fault":')
_encode = msgspec.json.Encoder().encode
_any_json = msgspec.json.Decoder(msgspec.Raw).decode
_json_lines = msgspec.json.Decoder(msgspec.Raw).decode_lines


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="millstream", tag="ask/1"):
    """What the journal keeps of a run's settings, in a line before the first row of that run.

    To keep more, add a field with a default: headers of before have none, and what a later version adds is not looked
    at. Only where lines can no longer be read as they are now does the tag change; this version then refuses them.

    >>> _encode(Header(model="m", params={"b": 1, "a": 2}))
    b'{"millstream":"ask/1","model":"m","params":{"b":1,"a":2}}'
    """

    out: str | None = None
    """Where the rows go, seen from the journal's folder; None: to standard output."""
    model: str | None = None
    params: dict[str, Any] = {}
    """In the order in which they were given."""
    system: str | None = None
    template: str | None = None
    row_params: tuple[str, ...] = ()
    retry_finish: tuple[str, ...] = ()
    """How replies had ended that were asked again."""


class _Outcome(msgspec.Struct, gc=False):
    fault: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_header = msgspec.json.Decoder(Header).decode
_outcome = msgspec.json.Decoder(_Outcome).decode


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
        self._file = _opened(folder, self.path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            self.close()
            raise RequestError(
                f"another millstream is writing to {folder}; wait for it, or give another --out"
            ) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Outcomes that earlier runs have written."""
        return len(self._places)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # Writing --------------------------------------------------------------------------------------------------------

    def begin(self, header: Header) -> None:
        """Write the header of this run, unless an earlier one had the same. Raises as `append` does."""
        line = _encode(header)
        if line not in map(_encode, self.headers):
            self._write(line + b"\n")

    def append(self, key: bytes, row: bytes) -> None:
        """Write an outcome; when this returns, it survives this process.

        `row` is one line of JSON that begins as in ``{"id":"a","index":0,"text":``; the row of a fault has "fault"
        among its fields. Raises RunError if the disk does not take it; nothing of it is left then.
        """
        self._write(b'{"key":"%b",%b\n' % (key.hex().encode(), row[1:]))

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(
                f"{self.path}: {error.strerror}. All before is kept: make room, then run the same command again"
            ) from error

    # Finding --------------------------------------------------------------------------------------------------------

    def find_many(self, keys: Sequence[bytes]) -> Ids:
        """For each key the place of its row, the last if it has several, or -1 (int64); places are for `row`."""
        places = np.full(len(keys), -1, np.int64)
        if not len(self) or not keys:
            return places
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
        return places

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
        at += _ROW
        named = _named(request_id, index)
        if self._window.startswith(named, at):
            return b"{" + self._window[at:end]
        if other := _NAMED.match(self._window, at, end):
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
        named = list(map(_named, ids, range(first, first + len(ids))))
        if size > _READ_MOST:  # they lie too far apart to read all that is between
            rows = list(map(self.row, places, ids, range(first, first + len(ids))))
            return None if None in rows else b"\n".join(rows)  # type: ignore[arg-type]
        window = self._read_lines(start, size)
        ends = np.flatnonzero(np.frombuffer(window, np.uint8) == ord("\n"))
        numbers = ends.searchsorted(offsets - start).tolist()
        lines = window.split(b"\n")
        pieces = [lines[number][_ROW:] for number in numbers]
        if not all(map(bytes.startswith, pieces, named)):
            found = [_NAMED.match(piece) for piece in pieces]
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
            data = os.pread(self._file, size + more, start)
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
            self._window = os.pread(self._file, self._size, self._start)
            if self._window.find(b"\n", offset - self._start) >= 0:
                return
            if len(self._window) < self._size:
                raise RunError(f"{self.path} became shorter while it was read")
            self._size *= 2

    def _number_of(self, offset: int) -> int:
        """The number of the line at `offset`, from 1."""
        starts = range(0, offset, _BLOCK)
        return 1 + sum(os.pread(self._file, min(_BLOCK, offset - at), at).count(b"\n") for at in starts)

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
        position, size, total, lines = 0, _BLOCK, os.fstat(self._file).st_size, 0
        while position < total:
            data = os.pread(self._file, size, position)
            if not position and not _may_begin(data):
                raise RequestError(f"the first line of {self.path} is none of millstream's: give another --journal")
            end = data.rfind(b"\n") + 1
            if end:
                starts, ends = _lines_in(data, end)
                yield self._outcomes_in(data, starts, ends, place=(position, lines))
                position, size, lines = position + end, _BLOCK, lines + len(starts)
            elif position + len(data) < total:
                size *= 2
            else:
                os.truncate(self._file, position)
                return

    def _outcomes_in(self, data: bytes, starts: Ids, ends: Ids, *, place: tuple[int, int]) -> tuple[Ids, Ids, Ids]:
        """The same of the lines of `data`, which stands at `place`: (position in the file, how many lines before)."""
        position, lines = place
        keys, good = _keys_in(data, starts, ends)
        places = (starts + position) << 1
        told = [found.start() for found in _FAULT.finditer(data, 0, int(ends[-1]))]
        for line in np.unique(np.searchsorted(ends, told)).tolist():
            try:
                # In a row, the same letters may also stand deeper, in what a server sent.
                places[line] |= _outcome(data[starts[line] : ends[line]]).fault is not msgspec.UNSET
            except msgspec.DecodeError:
                good[line] = False
        if not good.all() or not _are_json(data[: ends[-1] + 1], len(ends)):
            good &= [_is_json(data[start:end]) for start, end in zip(starts, ends, strict=True)]
            for line in np.flatnonzero(~good).tolist():
                self._take_other(data[starts[line] : ends[line]], lines + line + 1)
            keys, places = keys[good], places[good]
        return keys[:, 0], keys[:, 1], places

    def _take_other(self, line: bytes, number: int) -> None:
        """A line without an outcome: a header, or a damaged one."""
        if line.startswith(_HEADER):
            try:
                self.headers.append(_header(line))
                return
            except msgspec.DecodeError as error:
                if not line.startswith(_HEADER + b'1"') and _is_json(line):
                    raise RequestError(f"{self.path} was written by a newer millstream: use that one") from error
        self._note_damage(number)


def is_fault(place: int) -> bool:
    """Whether a fault is at a place of `AnswerJournal.find_many`."""
    return place >= 0 and bool(place & 1)


def is_ours(folder: str) -> bool:
    """Whether the folder has a journal of ours, be it an empty one."""
    return holds_journal(path := os.path.join(folder, JOURNAL)) or (os.path.isfile(path) and not os.path.getsize(path))


def holds_journal(path: str) -> bool:
    """Whether a file begins as a journal of ours."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return _may_begin(file.read(_ROW))


def _opened(folder: str, path: str) -> int:
    """The journal's file, which is the lock, too. It is not put among other files."""
    try:
        os.makedirs(folder, exist_ok=True)
        others = [name for name in os.listdir(folder) if not name.startswith(".")]
        if others and JOURNAL not in others:
            raise RequestError(f"{folder} holds no journal but {min(others)}: give an empty folder, or a new one")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)  # it is the lock, too
    except OSError as error:
        why = "it is a file" if os.path.isfile(folder) else error.strerror
        raise RequestError(f"cannot keep a journal in {folder}: {why}; --journal names a folder") from error


def _named(request_id: str | None, index: int) -> bytes:
    """How a row goes on after its opening brace."""
    return b'"id":%b,"index":%d,' % (b"null" if request_id is None else _encode(request_id), index)


def _may_begin(data: bytes) -> bool:
    """Whether a journal of ours may begin so; its first line may be torn, and a file with nothing in it is none.

    >>> _may_begin(b'{"ke'), _may_begin(b'{"key":"value"}'), _may_begin(b"")
    (True, False, False)
    """
    if not data:
        return False
    whole = data if b"\n" in data else data + _FIRST[len(data) :]
    return (data + _HEADER[len(data) :]).startswith(_HEADER) or bool(_KEYED.match(whole))


def _is_json(line: bytes) -> bool:
    try:
        _any_json(line)
        return line.isascii() or bool(line.decode())
    except ValueError:
        return False


def _are_json(lines: bytes, count: int) -> bool:
    """Whether each of so many lines that begin like an outcome's is JSON."""
    try:
        # One value for each: so none goes on in the next line, where another begins, and none is followed by another.
        return len(_json_lines(lines)) == count and (lines.isascii() or bool(lines.decode()))
    except ValueError:
        return False


def _lines_in(data: bytes, end: int) -> tuple[Ids, Ids]:
    """Where each line of data[:end] starts and ends; the last byte there is a line's end."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8, end) == ord("\n"))
    return np.concatenate([[0], ends[:-1] + 1]), ends


def _keys_in(data: bytes, starts: Ids, ends: Ids) -> tuple[Ids, Ids]:
    """The key of each line in two halves, and whether the line looks like that of an outcome."""
    size = _ROW + len(_ID)
    good = ends - starts > size
    if not good.any():
        return np.zeros((len(starts), 2), np.uint64), good
    chosen = np.where(good, starts, starts[good.argmax()])  # any that is long enough in place of one that is not
    heads = np.ndarray((len(data) - size + 1,), f"V{size}", data, strides=(1,))[chosen].view(np.uint8).reshape(-1, size)
    good &= (heads[:, : len(_HEAD)] == np.frombuffer(_HEAD, np.uint8)).all(axis=1)
    good &= (heads[:, _DIGITS.stop :] == np.frombuffer(b'",' + _ID, np.uint8)).all(axis=1)
    good &= np.frombuffer(data, np.uint8)[ends - 1] == ord("}")
    heads[~good, _DIGITS] = ord("0")
    try:
        keys = binascii.unhexlify(heads[:, _DIGITS].tobytes())
    except binascii.Error:
        good &= np.isin(heads[:, _DIGITS], np.frombuffer(b"0123456789abcdef", np.uint8)).all(axis=1)
        heads[~good, _DIGITS] = ord("0")
        keys = binascii.unhexlify(heads[:, _DIGITS].tobytes())
    return np.frombuffer(keys, np.uint64).reshape(-1, 2), good
