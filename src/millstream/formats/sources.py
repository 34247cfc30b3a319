"""What a corpus is made of: sources named on the command line become input shards, and input shards become bytes."""

import glob
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import BinaryIO

from millstream.errors import RequestError

READ = 1 << 20
"""Bytes read at once. Blocks of 1 MiB tokenize faster than larger ones, which fall out of the processor's cache."""

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_PACKED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_END = 1 << 20


class Truncated(Exception):
    """A compressed shard ends early or is damaged; everything before the damage has been handed out."""


@dataclass(frozen=True)
class InputShard:
    """One file (or standard input) of the corpus.

    `uri` opens it, `name` is what outputs call it: it starts at the last component of what the user gave, so that a
    corpus can be moved, and never is an absolute path.
    """

    uri: str
    name: str
    kind: str
    packed: str | None = None

    @property
    def seekable(self) -> bool:
        return self.packed is None and self.uri != "-"


_EXPANDS = 4  # times: what packed text and Parquet become, roughly


def rough_size(shard: InputShard) -> int:
    """Bytes of text in an input shard, roughly; 0 where it cannot be told."""
    if shard.uri == "-":
        return 0
    try:
        return os.path.getsize(shard.uri) * (_EXPANDS if shard.packed or shard.kind == "parquet" else 1)
    except OSError:
        return 0


def rough_total(shards: Iterable[InputShard]) -> int | None:
    """Bytes of text in all of them, roughly; None with standard input among them."""
    shards = list(shards)
    return None if any(shard.uri == "-" for shard in shards) else sum(map(rough_size, shards))


def expand(sources: Iterable[str | os.PathLike[str]]) -> list[InputShard]:
    """The input shards of `sources`, in order; within a folder or a glob, sorted.

    A source is a file, a folder (its .jsonl, .ndjson, .parquet, .txt and .md files, the first two and plain text also
    as .gz and .zst), a glob, ``-`` for JSONL on standard input, or ``stdlib:``. A file of any other ending, named or
    matched by a glob, is plain text: one document.
    """
    shards = [shard for source in sources for shard in _expand(os.fspath(source))]
    if not shards:
        raise RequestError("no source given: name a file, a folder, a glob, '-' or 'stdlib:'")
    if sum(shard.uri == "-" for shard in shards) > 1:
        raise RequestError("standard input ('-') can be read only once")
    return shards


def _expand(source: str) -> list[InputShard]:
    if source == "-":
        return [InputShard("-", "-", "jsonl")]
    if source == "stdlib:":
        return [InputShard(path, f"stdlib:{name}", "python") for path, name in standard_library()]
    if source.startswith("file://"):
        source = source[len("file://") :]
    if "://" in source:
        raise RequestError(
            f"cannot open {source}: only files, 'stdlib:' and '-' are readable so far; copy it here first"
        )
    if os.path.isdir(source):
        return _folder(source)
    if os.path.exists(source):
        if not os.path.isfile(source):
            raise RequestError(f"{source} is a pipe or a device; pipe JSONL in as '-' instead")
        return [_shard(source, os.path.basename(source))]
    if glob.has_magic(source):
        base = PurePath(*[part for part in PurePath(source).parts[:-1] if not glob.has_magic(part)] or ["."])
        found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        if found:
            return [_shard(path, _name(path, str(base))) for path in found]
        raise RequestError(f"no file matches {source}")
    raise RequestError(f"no such file or folder: {source}")


def _folder(root: str) -> list[InputShard]:
    root = os.path.normpath(root)
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(folder, name) for name in files if not name.startswith(".") and _known(name)]
    if not paths:
        endings = " ".join(_KINDS)
        raise RequestError(
            f"nothing to read in {root}: a folder is searched for {endings} (and .gz, .zst of them); "
            f"for other plain text name a glob such as '{root}/**/*.log'"
        )
    return [_shard(path, _name(path, root)) for path in sorted(paths)]


def _name(path: str, base: str) -> str:
    top = os.path.basename(os.path.abspath(base))
    return PurePath(top, os.path.relpath(path, base)).as_posix()


def _known(name: str) -> bool:
    kind, packed = _kind(name)
    return kind is not None and not (kind == "parquet" and packed)


def _kind(name: str) -> tuple[str | None, str | None]:
    stem, ending = os.path.splitext(name.lower())
    packed = _PACKED.get(ending)
    if packed:
        ending = os.path.splitext(stem)[1]
    return _KINDS.get(ending), packed


def _shard(path: str, name: str) -> InputShard:
    kind, packed = _kind(path)
    if kind == "parquet" and packed:
        raise RequestError(f"{path}: a compressed Parquet file cannot be read; Parquet compresses inside, unpack it")
    # A file name need not be UTF-8, but everything we write is.
    return InputShard(path, os.fsencode(name).decode("utf-8", "backslashreplace"), kind or "text", packed)


@cache
def standard_library() -> list[tuple[str, str]]:
    """(path, name) of the standard library's own modules, sorted by name; without site-packages and tests."""
    import sysconfig

    root = sysconfig.get_path("stdlib")
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                found.append((path, os.path.relpath(path, root).replace(os.sep, "/")))
    return sorted(found, key=lambda pair: pair[1])


def place(name: str, offset: int) -> str:
    """Where a document stands, in words: the name of its input shard and the offset that a run keeps.

    >>> place("a.jsonl.gz", 34), place("b.parquet", 5), place("c.txt", 0), place("-", 7)
    ('a.jsonl.gz at byte 34, unpacked', 'b.parquet, row 5', 'c.txt', 'standard input at byte 7')
    """
    kind, packed = ("jsonl", None) if name == "-" else _kind(name)
    if kind == "parquet":
        return f"{name}, row {offset:,}"
    if kind == "jsonl":
        named = "standard input" if name == "-" else name
        return f"{named} at byte {offset:,}{', unpacked' if packed else ''}"
    return name


def chunks(shard: InputShard, start: int = 0) -> Iterator[bytes]:
    """The shard's bytes, decompressed, in pieces; from byte `start` where it is seekable, else from the beginning.

    Raises OSError if it cannot be opened, and Truncated after the last good byte of a damaged one.
    """
    if shard.uri == "-":
        yield from _pieces(sys.stdin.buffer, READ)
        return
    with open(shard.uri, "rb") as file:
        if shard.packed == "gzip":
            yield from gunzip(file)
        elif shard.packed == "zstd":
            yield from unzstd(file)
        else:
            file.seek(start)
            yield from _pieces(file, READ)


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    read: Callable[[int], bytes] = getattr(file, "read1", file.read)
    while piece := read(size):
        yield piece


def gunzip(file: BinaryIO) -> Iterator[bytes]:
    from isal import isal_zlib

    decoder, fed = isal_zlib.decompressobj(wbits=31), False
    for piece in _pieces(file, READ):
        while piece:
            try:
                out = decoder.decompress(piece, READ)
            except isal_zlib.error as error:  # type: ignore[misc]  # its stubs miss that this is an exception
                raise Truncated(f"damaged gzip data ({error})") from error
            fed = True
            if out:
                yield out
            if decoder.eof:
                # Another member may follow at once; zeros are padding, as gzip(1) takes them.
                piece, decoder, fed = (
                    decoder.unused_data.lstrip(b"\0"),
                    isal_zlib.decompressobj(wbits=31),
                    False,
                )
            else:
                piece = decoder.unconsumed_tail
                if not piece and not out:
                    break
    if fed:
        while out := decoder.decompress(b"", READ):
            yield out
        raise Truncated("the gzip data ends early")


def unzstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # Small pieces bound what one call can unpack to; python-zstandard's reader would hide a truncated frame.
    decoder, fed = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), False
    for piece in _pieces(file, 1 << 13):
        while piece:
            try:
                out = decoder.decompress(piece)
            except zstandard.ZstdError as error:
                raise Truncated(f"damaged zstd data ({error})") from error
            fed = True
            if out:
                yield out
            piece = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder, fed = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), False
    if fed:
        raise Truncated("the zstd data ends early")


def fingerprint(shard: InputShard) -> dict[str, object]:
    """What identifies a whole input shard: its size in bytes and the SHA-256 of its first and last MiB.

    Raises OSError; standard input has no size, only its running hash counts.
    """
    if shard.uri == "-":
        return {"name": shard.name}
    with open(shard.uri, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return {"name": shard.name, "bytes": size, "sha256": span_hash(file.fileno(), size)}


def span_hash(fd: int, size: int) -> str:
    """SHA-256 over the first and the last MiB of the first `size` bytes."""
    digest = hashlib.sha256(os.pread(fd, min(_END, size), 0))
    digest.update(os.pread(fd, min(_END, size), max(0, size - _END)))
    return digest.hexdigest()


def prefix_hash(shard: InputShard, size: int) -> str:
    """`span_hash` of a seekable shard's first `size` bytes; of a shorter file, of what there is."""
    with open(shard.uri, "rb") as file:
        return span_hash(file.fileno(), size)
