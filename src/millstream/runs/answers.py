"""The journal of an ask run: which requests are answered, and with what; append-only, and the truth.

One line an outcome, the key first: ``{"key":"<32 hex digits>",...}``. A line is written before its outcome is handed
out. Going on reads the keys alone, 24 bytes of memory for each, and never the bodies.
"""

import fcntl
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from millstream.errors import RequestError, RunError
from millstream.records import Ids

_HEAD = b'{"key":"'
_HEX = 32
_BLOCK = 8 << 20
_encode = msgspec.json.Encoder(order="sorted").encode


class Keys:
    """Keys of requests: a 128-bit hash of the body and the id, or, without an id, of how often that body came before.

    So an edited prompt is another request, and identical ones stay distinct. Only the body and the id count: how a
    request is sent (timeouts, retries, which server) does not.

    >>> keys = Keys()
    >>> first, again, other = keys.of({"a": 1}), keys.of({"a": 1}), keys.of({"a": 2})
    >>> len({first, again, other}), Keys().of({"a": 1}) == first
    (3, True)
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}  # bodies without an id, by 8 bytes of hash: how often they came

    def of(self, body: Mapping[str, Any], request_id: str | None = None) -> bytes:
        data = _encode(body)
        if request_id is not None:
            mark: Any = request_id
        else:
            short = hashlib.blake2b(data, digest_size=8).digest()
            mark = self._seen.get(short, 0)
            self._seen[short] = mark + 1
        return hashlib.blake2b(_encode([mark]) + data, digest_size=16).digest()


class AnswerJournal:
    """The journal in `folder`, opened for one writer: ``with AnswerJournal(folder) as journal``.

    Raises RequestError if another run has it open, RunError if it is no journal of ours.
    """

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "journal.jsonl")
        self._file = open(self.path, "a+b")  # noqa: SIM115  it is the lock, held to the end
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._keys, self._offsets = self._load()
        except BlockingIOError:
            self._file.close()
            raise RequestError(
                f"another millstream is writing to {folder}; wait for it, or give another --out"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Outcomes that earlier runs have written."""
        return len(self._offsets)

    def close(self) -> None:
        self._file.close()

    def append(self, key: bytes, outcome: Mapping[str, Any]) -> None:
        """Write an outcome; when this returns, it survives this process."""
        body = msgspec.json.encode(outcome)
        rest = body[1:] if body == b"{}" else b"," + body[1:]
        self._file.write(_HEAD + key.hex().encode() + b'"' + rest + b"\n")
        self._file.flush()

    def find(self, key: bytes) -> dict[str, Any] | None:
        """What an earlier run has written for `key`, the last if there are several; None if nothing."""
        high, low = np.frombuffer(key, ">u8")
        begin = int(np.searchsorted(self._keys[:, 0], high))
        for row in range(begin, len(self._offsets)):
            if self._keys[row, 0] != high:
                return None
            if self._keys[row, 1] == low:
                return self._read(int(self._offsets[row]))
        return None

    def _read(self, offset: int) -> dict[str, Any]:
        self._file.seek(offset)
        found: dict[str, Any] = msgspec.json.decode(self._file.readline())
        return found

    def _load(self) -> tuple[Ids, Ids]:
        """(keys u64 (n, 2), sorted; offsets u64 (n,)) of the journal; the last of several lines of one key counts."""
        keys, offsets = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint64)]
        position = 0
        self._file.seek(0)
        held = b""
        while block := self._file.read(_BLOCK):
            data = held + block
            end = data.rfind(b"\n") + 1
            if end:
                found, starts = self._keys_of(data[:end])
                keys.append(found)
                offsets.append(starts + np.uint64(position))
                position += end
            held = data[end:]
        if held:
            os.truncate(self._file.fileno(), position)  # a line that was being written when a run was killed
        every, where = np.concatenate(keys), np.concatenate(offsets)
        order = np.lexsort((where, every[:, 1], every[:, 0]))
        every, where = every[order], where[order]
        last = np.ones(len(where), bool)
        last[:-1] = (every[1:] != every[:-1]).any(axis=1)
        return every[last], where[last]

    def _keys_of(self, data: bytes) -> tuple[Ids, Ids]:
        letters = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(letters == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        whole = ends - starts >= len(_HEAD) + _HEX
        head = np.frombuffer(_HEAD, np.uint8)
        ours = whole.all() and (letters[starts[:, None] + np.arange(len(head))] == head).all()
        digits = letters[starts[:, None] + np.arange(len(_HEAD), len(_HEAD) + _HEX)] if ours else letters[:0]
        values = np.where(digits >= ord("a"), digits - (ord("a") - 10), digits - ord("0"))
        if not ours or (values > 15).any():
            raise RunError(f"{self.path} is no journal of millstream's: give another --out")
        bytes_ = np.ascontiguousarray(values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
        return bytes_.view(">u8").astype(np.uint64), starts.astype(np.uint64)
