"""The lines of a corpus in many files of one kind, as corpora lie about; kept in the cache folder."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path

from bench.contenders import say

FILES = 32
LINES = 256
"""So many go into one file of a folder at once, and then into the next: all files are alike."""
LETTERS = 400

Write = Callable[[bytes], object]
"""Writes some lines."""


def in_files(whole: Path, kind: str) -> Path:
    """The same lines in a folder of `FILES` files of a kind, in the same order for all kinds."""
    folder = whole.with_name(f"{whole.stem}-{kind}")
    if not folder.exists():
        say(f"writing {folder.name}")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with ExitStack() as stack, open(whole, "rb") as lines:
            writes = [stack.enter_context(KINDS[kind](partial / f"part-{number:02d}")) for number in range(FILES)]
            for write in cycle(writes):
                some = b"".join(islice(lines, LINES))
                if not some:
                    break
                write(some)
        partial.replace(folder)
    return folder


def first_lines(whole: Path, count: int) -> Path:
    """The beginnings of so many texts, in a file of their own: nothing to speak of, but for a start."""
    path = whole.with_name(f"{whole.stem}-lines-{count}.jsonl")
    with open(whole, "rb") as lines, open(path, "w") as out:
        for line in islice(lines, count):
            row = json.loads(line)
            out.write(json.dumps({**row, "text": row["text"][:LETTERS]}) + "\n")
    return path


@contextmanager
def jsonl(path: Path) -> Iterator[Write]:
    with open(f"{path}.jsonl", "wb") as out:
        yield out.write


@contextmanager
def gz(path: Path) -> Iterator[Write]:
    """At gzip's usual level."""
    with gzip.open(f"{path}.jsonl.gz", "wb", compresslevel=6) as out:
        yield out.write


@contextmanager
def zst(path: Path) -> Iterator[Write]:
    import pyarrow as pa

    with pa.CompressedOutputStream(f"{path}.jsonl.zst", "zstd") as out:
        yield out.write


@contextmanager
def parquet(path: Path) -> Iterator[Write]:
    """A row group for each call, packed with zstd as well."""
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    with pyarrow.parquet.ParquetWriter(f"{path}.parquet", schema, compression="zstd") as writer:

        def write(some: bytes) -> None:
            options = pyarrow.json.ReadOptions(block_size=len(some) + 1)
            table = pyarrow.json.read_json(pa.BufferReader(some), options)
            writer.write_table(table.cast(schema))

        yield write


KINDS: dict[str, Callable[[Path], AbstractContextManager[Write]]] = {
    "jsonl": jsonl,
    "gz": gz,
    "zst": zst,
    "parquet": parquet,
}
