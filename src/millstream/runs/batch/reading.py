"""Files of requests and of what came back, line by line; only what is asked for stays in memory."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, TypeAlias

from millstream.corpus.blocks import LongLine, whole_lines
from millstream.corpus.find import expand
from millstream.corpus.sources import InputShard
from millstream.errors import DataError, RequestError, Unusable
from millstream.llm.batch import BatchRequest, parse_line, parse_request

Line: TypeAlias = tuple[int, int, bytes]
"""Number of the line from 1, where it begins in the unpacked bytes, and the line without its end."""

_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 256 << 20


def request_files(sources: Iterable[str | os.PathLike[str]]) -> list[InputShard]:
    shards = expand(sources)
    for shard in shards:
        if shard.kind not in ("jsonl", "text"):
            raise RequestError(f"{shard.name}: requests and outputs are JSONL")
    return shards


def blocks(shard: InputShard, copy: IO[bytes] | None = None) -> Iterator[list[Line]]:
    """The lines of a file that are not blank, some at a time. `copy` gets all bytes, unpacked. Raises DataError."""
    number = offset = 0
    try:
        for block in whole_lines(shard, _LONGEST_LINE):
            if isinstance(block, LongLine):
                raise DataError(f"{shard.name}, line {number + 1}: over {_LONGEST_LINE >> 20} MiB, which is no request")
            if copy:
                copy.write(block)
            lines = block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            yield _numbered(lines, number, offset)
            number += len(lines)
            offset += len(block)
    except (Unusable, OSError) as error:
        raise DataError(f"{shard.name}: {error}") from error


def _numbered(lines: list[bytes], number: int, offset: int) -> list[Line]:
    found = []
    for line in lines:
        number += 1
        begin = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        if line and not line.isspace():
            found.append((number, offset + begin, line[begin:]))
        offset += len(line) + 1
    return found


def lines(shard: InputShard) -> Iterator[Line]:
    return chain.from_iterable(blocks(shard))


def request_of(shard: InputShard, number: int, line: bytes) -> tuple[BatchRequest, str]:
    """The request of a line, and its url as it stands there."""
    try:
        row = parse_line(line)
        return parse_request(row), row["url"]
    except ValueError as error:
        raise DataError(f"{shard.name}, line {number}: {error}") from None


def file_of(shard: InputShard) -> IO[bytes]:
    try:
        return shard.open()
    except OSError as error:
        raise DataError(f"{shard.name}: {error.strerror}") from error
