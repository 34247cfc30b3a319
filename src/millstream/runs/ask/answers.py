"""The journal of an ask run: which requests are answered, and with what; append-only, and the truth.

One line an outcome: ``{"key":"<32 hex digits>",`` and then the outcome's row as it goes to the output, its id and index
first. A line is written before its outcome is handed out. Going on reads the keys and whether an outcome is a fault, in
24 bytes of memory for each, and rows only as they are wanted.
"""

import binascii
import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from millstream.errors import RequestError, RunError
from millstream.records import Ids

_HEAD = b'{"key":"'
_DIGITS = slice(len(_HEAD), len(_HEAD) + 32)
_ROW = _DIGITS.stop + 2
"""Where a line's row goes on after its opening brace: behind the key, its quote and a comma."""

_KINDS = np.uint64, np.uint64, np.int64
_BLOCK = 256 << 10
_READ_LEAST, _READ_MOST = 8 << 10, 1 << 20

_NAMED = re.compile(rb'"id":(?:null|"(?:[^"\\]++|\\.)*+"),"index":\d+,')
_FAULT = re.compile(rb',"fault":')
_encode = msgspec.json.Encoder().encode


class _Outcome(msgspec.Struct, gc=False):
    fault: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_outcome = msgspec.json.Decoder(_Outcome).decode


class AnswerJournal:
    """The journal in `folder`, opened for one writer: ``with AnswerJournal(folder) as journal``.

    What earlier runs have written is found; what this one appends is for the next. Raises RequestError if another run
    has it open, RunError if it is no journal of ours.

    >>> import tempfile
    >>> key, row = b"sixteen bytes...", b'{"id":"a","index":0,"text":"yes"}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with AnswerJournal(folder) as journal:
    ...         journal.append(key, row)
    ...     with AnswerJournal(folder) as journal:
    ...         known, unknown = journal.find_many([key, bytes(16)]).tolist()
    ...         journal.row(known, "a", 0) == row, journal.row(known, "a", 7), unknown
    (True, b'{"id":"a","index":7,"text":"yes"}', -1)
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "journal.jsonl")
        self._window, self._start, self._size = b"", 0, _READ_LEAST
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)  # it is the lock, too
        except OSError as error:
            raise RequestError(f"cannot keep a journal in {folder}: {error.strerror}") from error
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

    def append(self, key: bytes, row: bytes) -> None:
        """Write an outcome; when this returns, it survives this process.

        `row` is one line of JSON that begins as in ``{"id":"a","index":0,"text":``; the row of a fault has "fault"
        among its fields. Raises RunError if the disk does not take it; nothing of it is left then.
        """
        line = b'{"key":"%b",%b\n' % (key.hex().encode(), row[1:])
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

    def is_fault(self, places: Ids) -> Ids:
        """For each place of `find_many`, whether a fault is there; False for -1."""
        faults: Ids = (places >= 0) & (places & 1 == 1)
        return faults

    def row(self, place: int, request_id: str | None, index: int) -> bytes:
        """The row at a place of `find_many`, as it was appended but with this id and index.

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
        named = b'"id":%b,"index":%d,' % (_encode(request_id), index)
        if self._window.startswith(named, at):
            return b"{" + self._window[at:end]
        other = _NAMED.match(self._window, at, end)
        if not other:
            raise self._foreign(offset)
        return b"{" + named + self._window[other.end() : end]

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
        position, size, total = 0, _BLOCK, os.fstat(self._file).st_size
        while position < total:
            data = os.pread(self._file, size, position)
            end = data.rfind(b"\n") + 1
            if end:
                yield self._lines_of(data, end, position)
                position, size = position + end, _BLOCK
            elif position + len(data) < total:
                size *= 2
            else:
                if not position and data[: len(_HEAD)] != _HEAD[: len(data)]:
                    raise self._foreign(0)
                os.truncate(self._file, position)
                return

    def _lines_of(self, data: bytes, end: int, position: int) -> tuple[Ids, Ids, Ids]:
        """The same of the whole lines in data[:end], which stands at `position`."""
        letters = np.frombuffer(data, np.uint8, end)
        ends = np.flatnonzero(letters == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        if (ends - starts < _ROW).any():
            raise self._foreign(position)
        heads = np.ndarray((end - _ROW + 1,), f"V{_ROW}", data, strides=(1,))[starts].view(np.uint8).reshape(-1, _ROW)
        if (heads[:, : len(_HEAD)] != np.frombuffer(_HEAD, np.uint8)).any():
            raise self._foreign(position)
        try:
            keys = np.frombuffer(binascii.unhexlify(heads[:, _DIGITS].tobytes()), np.uint64).reshape(-1, 2)
        except binascii.Error:
            raise self._foreign(position) from None
        places = (starts + position) << 1
        told = [found.start() for found in _FAULT.finditer(data, 0, end)]
        for line in np.unique(np.searchsorted(ends, told)).tolist():
            try:
                # In a row, the same letters may also stand deeper, in what a server sent.
                places[line] |= _outcome(data[starts[line] : ends[line]]).fault is not msgspec.UNSET
            except msgspec.DecodeError:
                raise self._foreign(position + int(starts[line])) from None
        return keys[:, 0], keys[:, 1], places

    def _foreign(self, position: int) -> RunError:
        return RunError(f"{self.path} is no journal of millstream's (from byte {position:,} on): give another --out")
