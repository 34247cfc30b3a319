"""Files for a batch API: requests split into what it takes, and what comes back joined with them again.

Everything is read line by line. Of a request only its line's number, 16 bytes of hash of its custom_id and the place of
its outcome stay in memory.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import IO, Any, TypeAlias

import numpy as np

from millstream.errors import DataError, RequestError, RunError, Unusable
from millstream.formats.batch import (
    LONGEST_ID,
    MISSING,
    BatchOutcome,
    BatchRequest,
    failure_row,
    is_request,
    output_row,
    parse_line,
    parse_request,
    read_outcome,
    render_line,
)
from millstream.formats.corpus import expand
from millstream.formats.sources import InputShard, chunks
from millstream.records import Ids
from millstream.runs.ask.output import opened, refuse_existing, refuse_inputs, refuse_journal

Line: TypeAlias = tuple[int, int, bytes]
"""Number of the line from 1, where it begins in the unpacked bytes, and the line without its end."""

MAX_LINES = 50_000
MAX_BYTES = 200_000_000
"""What OpenAI takes in one file."""

_PART = re.compile(r"requests-\d{5,}\.jsonl")
_KIND = re.compile(r"[\w.:/-]{1,64}")
_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 256 << 20
_MOST_GROUPS = 256  # of one url and one model: each has a file open
_MISSING, _OK = 0, 1
_UNKNOWN = -1


@dataclass
class Part:
    """One file of a split: requests of one `url` and one `model`."""

    file: str
    lines: int
    bytes: int
    model: str
    url: str


@dataclass(frozen=True)
class SplitReport:
    """What a split has written. `long_ids` counts custom_ids of over 64 characters, which some servers refuse."""

    out: str
    requests: int
    files: list[Part]
    long_ids: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        lines = [
            f"{part.file}  {part.lines:,} lines  {part.bytes:,} bytes  {_shown(part.model)}" for part in self.files
        ]
        if self.long_ids:
            lines.append(f"{self.long_ids:,} custom_ids have over {LONGEST_ID} characters, which some servers refuse")
        return "\n".join(lines)


@dataclass(frozen=True)
class JoinReport:
    """How outcomes fit requests: `requests` = `ok` + all `failed` + `missing`.

    Every outcome counts once: as that of a request, or as `superseded` by another of the same request, or as `unknown`
    (no request has its custom_id). `unreadable` counts lines without one. `first` has the first place of the last two.
    """

    out: str
    requests: int
    ok: int
    failed: dict[str, int]
    missing: int
    superseded: int
    unknown: int
    unreadable: int
    first: dict[str, str]

    @property
    def faults(self) -> int:
        """Requests without a reply."""
        return self.requests - self.ok

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        failed = sum(self.failed.values())
        lines = [f"requests     {self.requests:,} = {self.ok:,} ok + {failed:,} failed + {self.missing:,} missing"]
        lines += [f"failed       {count:,} {kind}" for kind, count in self.failed.items()]
        if self.superseded:
            lines.append(f"superseded   {self.superseded:,} by another outcome of the same request")
        if self.unknown:
            lines.append(f"unknown      {self.unknown:,} of no request, the first at {self.first['unknown']}")
        if self.unreadable:
            lines.append(f"unreadable   {self.unreadable:,}, the first at {self.first['unreadable']}")
        return "\n".join(lines)


# The three commands -------------------------------------------------------------------------------------------------


def split(
    requests: Iterable[str | os.PathLike[str]],
    out: str,
    *,
    max_lines: int = MAX_LINES,
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
) -> SplitReport:
    """Write the lines of request files, unchanged, to requests-00000.jsonl and so on in the folder `out`.

    Each file has one url and one model, at most `max_lines` lines and `max_bytes` bytes. Raises RequestError for wrong
    settings, DataError for a line that is no request and for a custom_id that comes twice; then nothing is written.
    """
    if max_lines < 1 or max_bytes < 1:
        raise RequestError("a file has at least one line and one byte")
    shards = _expand(requests)
    former = _parts_in(out)
    if former and not overwrite:
        raise RequestError(f"{out} has {former[0]} already: give another --out, or --overwrite")
    for name in former:
        refuse_inputs(os.path.join(out, name), [shard.uri for shard in shards])
    new = not os.path.isdir(out)
    try:
        os.makedirs(out, exist_ok=True)
        try:
            return _split(shards, out, former, max_lines, max_bytes)
        except BaseException:
            if new:
                with contextlib.suppress(OSError):
                    os.rmdir(out)
            raise
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error


def merge(
    requests: Iterable[str | os.PathLike[str]],
    outputs: Iterable[str | os.PathLike[str]],
    out: str,
    *,
    overwrite: bool = False,
) -> JoinReport:
    """Write to `out` ("-": standard output) exactly one outcome a request, in the requests' order.

    A success is written byte for byte; a failure in OpenAI's shape; a missing outcome as an error of code "missing". Of
    several outcomes of a request the last success counts, else the last failure. Raises DataError for a line of the
    requests that is none and for a custom_id that comes twice, RequestError if `out` is an input, or is there already
    and not to be overwritten.
    """
    with _Join(requests, outputs, out, overwrite=overwrite) as join:
        join.read(keep=True)
        with opened(out) as target:
            for number, line in enumerate(join.request_lines()):
                target.write(join.outcome(number, line), 1)
            target.publish(durable=True)
        return join.report()


def retry_failed(
    requests: Iterable[str | os.PathLike[str]],
    outputs: Iterable[str | os.PathLike[str]],
    out: str,
    *,
    overwrite: bool = False,
) -> JoinReport:
    """Write to `out` ("-": standard output) the lines of requests without a success, unchanged, in order.

    Raises as `merge` does.
    """
    with _Join(requests, outputs, out, overwrite=overwrite) as join:
        join.read(keep=False)
        with opened(out) as target:
            for number, line in enumerate(join.request_lines()):
                if join.kind[number] != _OK:
                    target.write(line + b"\n", 1)
            target.publish(durable=True)
        return join.report()


# Splitting ----------------------------------------------------------------------------------------------------------


def _split(shards: list[InputShard], out: str, former: list[str], max_lines: int, max_bytes: int) -> SplitReport:
    ids, long_ids = CustomIds(), 0
    with (
        tempfile.TemporaryDirectory(prefix=".split-", dir=out) as folder,
        contextlib.closing(_Parts(folder, max_lines, max_bytes)) as parts,
    ):
        for shard in shards:
            for number, _, line in _lines(shard):
                request, url = _request(shard, number, line)
                ids.add(request.custom_id, shard, number)
                long_ids += len(request.custom_id) > LONGEST_ID
                model = request.body.get("model")
                if not isinstance(model, str) or not model:
                    raise DataError(f"{shard.name}, line {number}: no 'model' in 'body', and a batch has exactly one")
                if len(line) >= max_bytes:
                    raise DataError(f"{shard.name}, line {number}: {len(line) + 1:,} bytes do not fit in a file")
                parts.write(url, model, line)
        ids.sort()
        parts.close()
        for name in former:
            os.unlink(os.path.join(out, name))
        for part in parts.all:
            os.replace(os.path.join(folder, part.file), os.path.join(out, part.file))
    return SplitReport(out, len(ids), parts.all, long_ids)


class _Parts:
    """The files of a split, under their names but in the temporary `folder`; closed, they are on the disk."""

    def __init__(self, folder: str, max_lines: int, max_bytes: int) -> None:
        self.folder, self.max_lines, self.max_bytes = folder, max_lines, max_bytes
        self.all: list[Part] = []
        self._open: dict[tuple[str, str], tuple[Part, IO[bytes]]] = {}

    def write(self, url: str, model: str, line: bytes) -> None:
        part, file = self._open.get((url, model), (None, None))
        if part is None or part.lines == self.max_lines or part.bytes + len(line) + 1 > self.max_bytes:
            if part:
                _finish(self._open.pop((url, model))[1])
            part, file = self._open[url, model] = self._next(url, model)
        assert file
        file.write(line + b"\n")
        part.lines += 1
        part.bytes += len(line) + 1

    def _next(self, url: str, model: str) -> tuple[Part, IO[bytes]]:
        if len(self._open) == _MOST_GROUPS:
            raise DataError(f"the requests name over {_MOST_GROUPS} models: is 'model' what it should be?")
        part = Part(f"requests-{len(self.all):05d}.jsonl", 0, 0, model, url)
        self.all.append(part)
        return part, open(os.path.join(self.folder, part.file), "wb")

    def close(self) -> None:
        while self._open:
            _finish(self._open.popitem()[1][1])


def _finish(file: IO[bytes]) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _parts_in(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if _PART.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}") from error


# Joining ------------------------------------------------------------------------------------------------------------


class CustomIds:
    """custom_ids in order, by hash; after `sort`, `find` tells the numbers of many at once.

    >>> ids, shard = CustomIds(), InputShard("a.jsonl", "a.jsonl", "jsonl")
    >>> for line, custom_id in enumerate("xyz", 1):
    ...     ids.add(custom_id, shard, line)
    >>> ids.sort()
    >>> ids.find(["z", "w", "x"]).tolist()
    [2, -1, 0]
    """

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._lines = array("Q")
        self._shards: list[tuple[int, InputShard]] = []  # with the number of the first custom_id in each

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, custom_id: str, shard: InputShard, line: int) -> None:
        if not self._shards or self._shards[-1][1] is not shard:
            self._shards.append((len(self), shard))
        self._hashes += _hash(custom_id)
        self._lines.append(line)

    def sort(self) -> None:
        """Call it once, before `find`. Raises DataError if a custom_id came twice, RequestError if none came."""
        # Compared as text of 16 bytes: zeros at the end count for nothing, and all are of one length.
        hashes = np.frombuffer(self._hashes, "S16")
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._hashes = bytearray()
        if not len(self._order):
            raise RequestError("there are no requests: the input is empty")
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            first = twice[np.argmin(self._order[twice + 1])]
            before, again = (self._place(int(number)) for number in self._order[first : first + 2])
            raise DataError(f"{again}: the same custom_id as {before}; each must be unique")

    def find(self, custom_ids: Sequence[str]) -> Ids:
        """i64 (n,): the number of each custom_id in order of adding, -1 where it was not added."""
        hashes = np.frombuffer(b"".join(map(_hash, custom_ids)), "S16")
        where = np.minimum(np.searchsorted(self._sorted, hashes), len(self) - 1)
        return np.where(self._sorted[where] == hashes, self._order[where], _UNKNOWN)

    def _place(self, number: int) -> str:
        shard = next(shard for first, shard in reversed(self._shards) if first <= number)
        return f"{shard.name}, line {self._lines[number]}"


def _hash(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


class _Join:
    """Requests and what became of them: ``with _Join(...) as join``.

    `kind` says it of each request: 0 for missing, 1 for ok, or the number of a failure in `kinds`.
    """

    def __init__(
        self,
        requests: Iterable[str | os.PathLike[str]],
        outputs: Iterable[str | os.PathLike[str]],
        out: str,
        *,
        overwrite: bool,
    ) -> None:
        self.out, self.requests, self.outputs = out, _expand(requests), _expand(outputs)
        if any(shard.uri == "-" for shard in self.requests):
            raise RequestError("the requests are read twice, so they cannot come from standard input")
        refuse_inputs(out, [shard.uri for shard in [*self.requests, *self.outputs]])
        refuse_journal(out)
        refuse_existing(out, overwrite=overwrite)
        if os.path.isdir(out):
            raise RequestError(f"{out} is a folder: --out names a file, or '-' for standard output")
        if out != "-" and not os.path.isdir(os.path.dirname(os.path.realpath(out))):
            raise RequestError(f"cannot write {out}: there is no such folder")
        self.ids = CustomIds()
        for shard in self.requests:
            for number, _, line in _lines(shard):
                self.ids.add(_request(shard, number, line)[0].custom_id, shard, number)
        self.ids.sort()
        self.kinds: dict[str, int] = {}
        self.kind = np.full(len(self.ids), _MISSING, np.int32)
        self.file = np.zeros(len(self.ids), np.int32)
        self.start = np.zeros(len(self.ids), np.int64)
        self.size = np.zeros(len(self.ids), np.int32)
        self.found = self.unknown = self.unreadable = 0
        self.first: dict[str, str] = {}  # the place of the first unknown and the first unreadable line
        self._stack = contextlib.ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> "_Join":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, keep: bool) -> None:
        """Read all outputs; with `keep`, so that `outcome` can fetch their lines again."""
        folder = None if self.out == "-" else os.path.dirname(os.path.realpath(self.out))
        for number, shard in enumerate(self.outputs):
            copy = None
            if keep and shard.seekable:
                self._files.append(self._stack.enter_context(_opened(shard)))
            elif keep:  # what cannot be sought is fetched from an unpacked copy, which has no name
                copy = self._stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  the stack does
                self._files.append(copy)
            for lines in _blocks(shard, copy):
                self._take(number, shard, lines)
            if copy:
                copy.flush()

    def _take(self, file: int, shard: InputShard, lines: list[Line]) -> None:
        """Note the outcomes of some lines of output number `file`."""
        custom_ids: list[str] = []
        rows: list[tuple[int, int, int, int]] = []  # kind, start, size, number of the line
        for number, start, line in lines:
            try:
                row = parse_line(line)
                outcome = read_outcome(row)
            except ValueError as error:
                self.unreadable += 1
                self.first.setdefault("unreadable", f"{shard.name}, line {number}: {error}")
                continue
            if not outcome.ok and is_request(row):
                raise RequestError(f"{shard.name}, line {number}: a request; --outputs takes what came back")
            if outcome.code != MISSING:  # which an earlier merge has written
                custom_ids.append(outcome.custom_id)
                rows.append((self._kind(outcome), start, len(line), number))
        if not rows:
            return
        requests = self.ids.find(custom_ids)
        kind, start, size, number = np.array(rows, np.int64).T
        known = requests != _UNKNOWN
        if not known.all():
            self.unknown += int((~known).sum())
            self.first.setdefault("unknown", f"{shard.name}, line {number[~known][0]}")
        self.found += int(known.sum())
        # Failures first, so that a success of the same request overwrites them; the last of several values stays.
        for chosen in (known & (kind != _OK) & (self.kind[requests] != _OK), known & (kind == _OK)):
            where = requests[chosen]
            self.kind[where], self.file[where] = kind[chosen], file
            self.start[where], self.size[where] = start[chosen], size[chosen]

    def _kind(self, outcome: BatchOutcome) -> int:
        if outcome.ok:
            return _OK
        code = outcome.code if outcome.code and _KIND.fullmatch(outcome.code) else "error"
        return self.kinds.setdefault(code, _OK + 1 + len(self.kinds))

    def request_lines(self) -> Iterator[bytes]:
        """The requests' lines once more."""
        count = 0
        for shard in self.requests:
            for _, _, line in _lines(shard):
                count += 1
                if count <= len(self.ids):
                    yield line
        if count != len(self.ids):
            raise DataError("the requests changed while they were read")

    def outcome(self, number: int, request: bytes) -> bytes:
        """The line to write for a request, its line end included."""
        if self.kind[number] == _MISSING:
            custom_id = parse_line(request)["custom_id"]
            error = {"code": MISSING, "message": "no output has an outcome of this request"}
            return render_line(output_row(custom_id, name=f"batch_req_{custom_id}", error=error))
        file, size = int(self.file[number]), int(self.size[number])
        line = os.pread(self._files[file].fileno(), size, int(self.start[number]))
        if len(line) != size:
            raise DataError(f"{self.outputs[file].name} became shorter while it was read")
        return line + b"\n" if self.kind[number] == _OK else render_line(failure_row(parse_line(line)))

    def report(self) -> JoinReport:
        counts = np.bincount(self.kind, minlength=_OK + 1 + len(self.kinds)).tolist()
        failed = {code: counts[kind] for code, kind in self.kinds.items() if counts[kind]}
        return JoinReport(
            out=self.out,
            requests=len(self.ids),
            ok=counts[_OK],
            failed=dict(sorted(failed.items(), key=lambda pair: -pair[1])),
            missing=counts[_MISSING],
            superseded=self.found - (len(self.ids) - counts[_MISSING]),
            unknown=self.unknown,
            unreadable=self.unreadable,
            first=self.first,
        )


# Reading and writing ------------------------------------------------------------------------------------------------


def _expand(sources: Iterable[str | os.PathLike[str]]) -> list[InputShard]:
    shards = expand(sources)
    for shard in shards:
        if shard.kind not in ("jsonl", "text"):
            raise RequestError(f"{shard.name}: requests and outputs are JSONL")
    return shards


def _blocks(shard: InputShard, copy: IO[bytes] | None = None) -> Iterator[list[Line]]:
    """The lines of a file that are not blank, some at a time. `copy` gets all bytes, unpacked. Raises DataError."""
    number = offset = held = 0
    pieces: list[bytes] = []  # of a line that has no end yet
    try:
        for chunk in chunks(shard):
            if copy:
                copy.write(chunk)
            first, *more = chunk.split(b"\n")
            pieces.append(first)
            held += len(first)
            if held > _LONGEST_LINE:
                raise DataError(f"{shard.name}, line {number + 1}: over {_LONGEST_LINE >> 20} MiB, which is no request")
            if more:
                whole = [b"".join(pieces), *more[:-1]]
                yield _numbered(whole, number, offset)
                number += len(whole)
                offset += sum(map(len, whole)) + len(whole)
                pieces, held = more[-1:], len(more[-1])
    except (Unusable, OSError) as error:
        raise DataError(f"{shard.name}: {error}") from error
    yield _numbered([b"".join(pieces)], number, offset)


def _numbered(lines: list[bytes], number: int, offset: int) -> list[Line]:
    found = []
    for line in lines:
        number += 1
        begin = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        if line and not line.isspace():
            found.append((number, offset + begin, line[begin:]))
        offset += len(line) + 1
    return found


def _lines(shard: InputShard) -> Iterator[Line]:
    return chain.from_iterable(_blocks(shard))


def _request(shard: InputShard, number: int, line: bytes) -> tuple[BatchRequest, str]:
    """The request of a line, and its url as it stands there."""
    try:
        row = parse_line(line)
        return parse_request(row), row["url"]
    except ValueError as error:
        raise DataError(f"{shard.name}, line {number}: {error}") from None


def _opened(shard: InputShard) -> IO[bytes]:
    try:
        return open(shard.uri, "rb")
    except OSError as error:
        raise DataError(f"{shard.name}: {error.strerror}") from error


def _shown(text: str) -> str:
    """Text from a file, for a terminal."""
    return text if text.isprintable() else repr(text)
