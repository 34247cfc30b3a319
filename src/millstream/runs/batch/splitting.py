"""Request files split into what a batch API takes."""

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from millstream.corpus.sources import InputShard
from millstream.errors import DataError, RequestError, RunError, setting
from millstream.llm.batch import LONGEST_ID
from millstream.runs.ask.output import refuse_inputs
from millstream.runs.batch.custom_ids import CustomIds
from millstream.runs.batch.reading import lines, request_files, request_of
from millstream.store import Store, Writer, at, kind_at

MAX_LINES = 50_000
MAX_BYTES = 200_000_000
"""What OpenAI takes in one file."""

_PART = re.compile(r"requests-\d{5,}\.jsonl")
_MOST_GROUPS = 256  # of one url and one model: each has a file open


@dataclass
class SplitFile:
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
    files: list[SplitFile]
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
    shards = request_files(requests)
    former = _parts_in(out)
    if former and not overwrite:
        raise RequestError(
            f"{out} has {former[0]} already: give another {setting('out')}, or {setting('overwrite', True)}"
        )
    for name in former:
        refuse_inputs(os.path.join(out, name), [shard.uri for shard in shards])
    new, store = kind_at(out) is None, at(out)
    try:
        store.make()
        with store.lock("", f"to {out}"):
            store.sweep()
            try:
                return _split(shards, store, former, max_lines, max_bytes)
            except BaseException:
                if new:
                    store.unmake()
                raise
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error


def _split(shards: list[InputShard], store: Store, former: list[str], max_lines: int, max_bytes: int) -> SplitReport:
    ids, long_ids = CustomIds(), 0
    with contextlib.closing(_Parts(store, max_lines, max_bytes)) as parts:
        for shard in shards:
            for number, _, line in lines(shard):
                request, url = request_of(shard, number, line)
                ids.add(request.custom_id, shard, number)
                long_ids += len(request.custom_id) > LONGEST_ID
                model = request.body.get("model")
                if not isinstance(model, str) or not model:
                    raise DataError(f"{shard.name}, line {number}: no 'model' in 'body', and a batch has exactly one")
                if len(line) >= max_bytes:
                    raise DataError(f"{shard.name}, line {number}: {len(line) + 1:,} bytes do not fit in a file")
                parts.write(url, model, line)
        ids.sort()
        parts.settle()
        for name in former:
            store.delete(name)
        parts.finish()
    return SplitReport(store.url, len(ids), parts.all, long_ids)


class _Parts:
    """The files of a split, all of which get their names in the end; closed before, nothing of them is left."""

    def __init__(self, store: Store, max_lines: int, max_bytes: int) -> None:
        self._store, self.max_lines, self.max_bytes = store, max_lines, max_bytes
        self.all: list[SplitFile] = []
        self._files: list[Writer] = []
        self._open: dict[tuple[str, str], tuple[SplitFile, Writer]] = {}

    def write(self, url: str, model: str, line: bytes) -> None:
        part, file = self._open.get((url, model), (None, None))
        if part is None or part.lines == self.max_lines or part.bytes + len(line) + 1 > self.max_bytes:
            if file:
                file.settle()
                del self._open[url, model]
            part, file = self._open[url, model] = self._next(url, model)
        assert file
        file.write(line + b"\n")
        part.lines += 1
        part.bytes += len(line) + 1

    def _next(self, url: str, model: str) -> tuple[SplitFile, Writer]:
        if len(self._open) == _MOST_GROUPS:
            raise DataError(f"the requests name over {_MOST_GROUPS} models: is 'model' what it should be?")
        part = SplitFile(f"requests-{len(self.all):05d}.jsonl", 0, 0, model, url)
        self.all.append(part)
        self._files.append(self._store.write(part.file))
        return part, self._files[-1]

    def settle(self) -> None:
        for file in self._files:
            file.settle()

    def finish(self) -> None:
        for file in self._files:
            file.finish()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _parts_in(folder: str) -> list[str]:
    try:
        return [entry.name for entry in at(folder).entries() if _PART.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}") from error


def _shown(text: str) -> str:
    """Text from a file, for a terminal."""
    return text if text.isprintable() else repr(text)
