"""What came back from a batch API joined with the requests again; nothing is sorted, and few bytes a request are kept.

Of a request only its line's number, 16 bytes of hash of its custom_id and the place of its outcome stay in memory.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np

from millstream.corpus.sources import InputShard
from millstream.errors import DataError, RequestError, setting
from millstream.llm.batch import (
    MISSING,
    BatchOutcome,
    failure_row,
    is_request,
    output_row,
    parse_line,
    read_outcome,
    render_line,
)
from millstream.runs.ask.output import opened, refuse_existing, refuse_inputs, refuse_journal
from millstream.runs.batch.custom_ids import UNKNOWN, CustomIds
from millstream.runs.batch.reading import Line, blocks, file_of, lines, request_files, request_of
from millstream.store import kind_at, scratch, target_of

_KIND = re.compile(r"[\w.:/-]{1,64}")
_MISSING, _OK = 0, 1


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
        self.out, self.requests, self.outputs = out, request_files(requests), request_files(outputs)
        if any(shard.uri == "-" for shard in self.requests):
            raise RequestError("the requests are read twice, so they cannot come from standard input")
        refuse_inputs(out, [shard.uri for shard in [*self.requests, *self.outputs]])
        refuse_journal(out)
        refuse_existing(out, overwrite=overwrite)
        if kind_at(out) == "folder":
            raise RequestError(f"{out} is a folder: {setting('out')} names a file, or '-' for standard output")
        if out != "-" and kind_at(os.path.dirname(target_of(out))) != "folder":
            raise RequestError(f"cannot write {out}: there is no such folder")
        self.ids = CustomIds()
        for shard in self.requests:
            for number, _, line in lines(shard):
                self.ids.add(request_of(shard, number, line)[0].custom_id, shard, number)
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
        folder = None if self.out == "-" else os.path.dirname(target_of(self.out))
        for number, shard in enumerate(self.outputs):
            copy = None
            if keep and shard.seekable:
                self._files.append(self._stack.enter_context(file_of(shard)))
            elif keep:  # what cannot be sought is fetched from an unpacked copy, which has no name
                copy = self._stack.enter_context(scratch(folder))
                self._files.append(copy)
            for some in blocks(shard, copy):
                self._take(number, shard, some)
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
                raise RequestError(f"{shard.name}, line {number}: a request; {setting('outputs')} takes what came back")
            if outcome.code != MISSING:  # which an earlier merge has written
                custom_ids.append(outcome.custom_id)
                rows.append((self._kind(outcome), start, len(line), number))
        if not rows:
            return
        requests = self.ids.find(custom_ids)
        kind, start, size, number = np.array(rows, np.int64).T
        known = requests != UNKNOWN
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
            for _, _, line in lines(shard):
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
