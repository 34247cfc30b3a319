"""A line of the journal of an ask run: how it is written, and what many of them together say of themselves."""

import binascii
import re
from typing import Any

import msgspec
import numpy as np

from millstream.records import Ids

_HEAD = b'{"key":"'
_DIGITS = slice(len(_HEAD), len(_HEAD) + 32)
ROW = _DIGITS.stop + 2
"""Where a line's row goes on after its opening brace: behind the key, its quote and a comma."""
_ID = b'"id":'
"""How every row begins after its opening brace."""
HEADER = b'{"millstream":"ask/'
"""How the line of a `Header` begins, of whatever version."""
_FIRST = b'{"key":"%032d",' % 0

_KEYED = re.compile(rb'\{"key":"[0-9a-f]{32}",')
FRONT = re.compile(rb'"id":(?:null|"(?:[^"\\]++|\\.)*+"),"index":\d+,')
"""What `front` gives."""
_FAULT = re.compile(rb',"fault":')
encode = msgspec.json.Encoder().encode
_any_json = msgspec.json.Decoder(msgspec.Raw).decode
_json_lines = msgspec.json.Decoder(msgspec.Raw).decode_lines


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="millstream", tag="ask/1"):
    """What the journal keeps of a run's settings, in a line before the first row of that run.

    To keep more, add a field with a default: headers of before have none, and what a later version adds is not looked
    at. Only where lines can no longer be read as they are now does the tag change; this version then refuses them.

    >>> encode(Header(model="m", params={"b": 1, "a": 2}))
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


header_of = msgspec.json.Decoder(Header).decode
_outcome = msgspec.json.Decoder(_Outcome).decode


def outcome_line(key: bytes, row: bytes) -> bytes:
    """The line of an outcome, of whose row the opening brace goes first.

    >>> outcome_line(bytes(16), b'{"id":"a","index":0,"text":"yes"}')[:50]
    b'{"key":"00000000000000000000000000000000","id":"a"'
    """
    return b'{"key":"%b",%b\n' % (key.hex().encode(), row[1:])


def front(request_id: str | None, index: int) -> bytes:
    """How a row goes on after its opening brace."""
    return b'"id":%b,"index":%d,' % (b"null" if request_id is None else encode(request_id), index)


def may_begin(data: bytes) -> bool:
    """Whether a journal of ours may begin so; its first line may be torn, and a file with nothing in it is none.

    >>> may_begin(b'{"ke'), may_begin(b'{"key":"value"}'), may_begin(b"")
    (True, False, False)
    """
    if not data:
        return False
    whole = data if b"\n" in data else data + _FIRST[len(data) :]
    return (data + HEADER[len(data) :]).startswith(HEADER) or bool(_KEYED.match(whole))


def is_json(line: bytes) -> bool:
    try:
        _any_json(line)
        return line.isascii() or bool(line.decode())
    except ValueError:
        return False


def are_json(lines: bytes, count: int) -> bool:
    """Whether each of so many lines that begin like an outcome's is JSON."""
    try:
        # One value for each: so none goes on in the next line, where another begins, and none is followed by another.
        return len(_json_lines(lines)) == count and (lines.isascii() or bool(lines.decode()))
    except ValueError:
        return False


def lines_in(data: bytes, end: int) -> tuple[Ids, Ids]:
    """Where each line of data[:end] starts and ends; the last byte there is a line's end."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8, end) == ord("\n"))
    return np.concatenate([[0], ends[:-1] + 1]), ends


def keys_in(data: bytes, starts: Ids, ends: Ids) -> tuple[Ids, Ids]:
    """The key of each line in two halves, and whether the line looks like that of an outcome."""
    size = ROW + len(_ID)
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


def faults_in(data: bytes, starts: Ids, ends: Ids) -> tuple[Ids, Ids]:
    """The numbers of the lines that are those of faults, and of those that look so and are damaged."""
    told = [found.start() for found in _FAULT.finditer(data, 0, int(ends[-1]))]
    faults, damaged = [], []
    for line in np.unique(np.searchsorted(ends, told)).tolist():
        try:
            # In a row, the same letters may also stand deeper, in what a server sent.
            if _outcome(data[starts[line] : ends[line]]).fault is not msgspec.UNSET:
                faults.append(line)
        except msgspec.DecodeError:
            damaged.append(line)
    return np.array(faults, np.int64), np.array(damaged, np.int64)
