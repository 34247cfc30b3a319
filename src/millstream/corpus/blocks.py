"""The lines of an input, in blocks of whole ones as they come; of one that is too long, only what tells it from others.

Packing reads lines by ranges, with a running hash of them: see `corpus.lines`.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

from millstream.corpus.sources import InputShard, chunks


class LongLine(NamedTuple):
    """A line that is longer than it may be, which is not kept: 16 bytes of its hash."""

    digest: bytes


def digest_of(line: bytes) -> bytes:
    """What a `LongLine` keeps of a line, without its end."""
    return blake2b(line, digest_size=16).digest()


def whole_lines(shard: InputShard, longest: int) -> Iterator[bytes | LongLine]:
    """Blocks of lines, as large as they come; only the last may lack its line end. Of standard input, what is there.

    A line of over `longest` bytes that is not in one piece with its end is a `LongLine`. Raises OSError, and Unusable
    where the input is damaged.
    """
    held, length = [b""], 0  # the line that goes on
    skipped: Any = None  # the hash of one that goes on and is too long
    for chunk in chunks(shard):
        if skipped is not None:
            line, ended, chunk = chunk.partition(b"\n")
            skipped.update(line)
            if not ended:
                continue
            yield LongLine(skipped.digest())
            skipped = None
        end = chunk.rfind(b"\n") + 1
        held.append(chunk[:end] or chunk)
        length += len(held[-1])
        if end:
            yield b"".join(held)
            held, length = [chunk[end:]], len(chunk) - end
        if length > longest:
            skipped = blake2b(b"".join(held), digest_size=16)
            held, length = [b""], 0
    if skipped is not None:
        yield LongLine(skipped.digest())
    elif length:
        yield b"".join(held)
