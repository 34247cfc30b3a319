"""The input shards of a corpus, and how they become bytes."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from millstream.corpus.kinds import wide_encoding
from millstream.errors import Unusable
from millstream.store import State, file_at, is_far
from millstream.store.pipe import standard_input

READ = 1 << 20
"""Bytes read at once. Blocks of 1 MiB tokenize faster than larger ones, which fall out of the processor's cache."""

USUAL_WINDOW = 128 << 20
"""Bytes that any frame of a zstd file may hold at once: as much as the zstd program takes without being asked."""

_LARGEST_WINDOW = 1 << 31
_ZSTD_READ = 1 << 10  # 32 MiB unpacked at most: four bytes can become 128 KiB
_SIP = 1 << 14  # behind the end of a range, where as a rule a line end comes soon
ENDS = 1 << 20
"""Bytes of each end of a file that its fingerprint covers."""


@dataclass(frozen=True)
class InputShard:
    """One file (or standard input) of the corpus.

    `uri` opens it, `name` is what outputs call it: it starts at the last component of what the user gave, so that a
    corpus can be moved, and never is an absolute path. `kind` is jsonl, text, parquet or python; `alias` is what
    messages call it, where several have one name. `known`: what a store far away said of it when it was found, so that
    it need not be asked again, and tells if that has changed. `held`: its bytes, if they have been fetched already.
    """

    uri: str
    name: str
    kind: str
    packed: str | None = None
    alias: str = ""
    known: State | None = None
    held: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def called(self) -> str:
        return self.alias or self.name

    @property
    def seekable(self) -> bool:
        return self.packed is None and self.uri != "-"

    @property
    def far(self) -> bool:
        """Whether it is not on this machine."""
        return is_far(self.uri)

    def open(self, buffer: int = -1, *, until: int | None = None) -> BinaryIO:
        """The file itself, as it is packed; it is none of standard input. Little is read behind `until` by itself.
        Raises OSError."""
        if self.held is not None:
            return io.BytesIO(self.held)
        return file_at(self.uri).open(buffer, until=until, known=self.known)

    def state(self) -> State:
        """What it is. Raises OSError."""
        return self.known or file_at(self.uri).state()

    def size(self) -> int:
        """Its bytes, as it is packed. Raises OSError."""
        return self.known.size if self.known else file_at(self.uri).size()


_EXPANDS = 4  # times: what packed text and Parquet become, roughly


def rough_size(shard: InputShard) -> int:
    """Bytes of text in an input shard, roughly; 0 where it cannot be told."""
    if shard.uri == "-":
        return 0
    try:
        return shard.size() * (_EXPANDS if shard.packed or shard.kind == "parquet" else 1)
    except OSError:
        return 0


def rough_total(shards: Iterable[InputShard]) -> int | None:
    """Bytes of text in all of them, roughly; None with standard input among them."""
    shards = list(shards)
    return None if any(shard.uri == "-" for shard in shards) else sum(map(rough_size, shards))


def chunks(shard: InputShard, start: int = 0, size: int | None = None, *, stop: int | None = None) -> Generator[bytes]:
    """The shard's bytes, decompressed, in pieces; from byte `start` where it is seekable, else from the beginning.
    About `size` bytes are read at once, and few where a seekable one is read on behind `stop`.

    Raises OSError if it cannot be opened, and Unusable after the last good byte of a damaged one, or at once if its
    byte order mark names an encoding that is not read.
    """
    pieces = _unpacked(shard, start, size or READ, stop)
    yield from pieces if start else _not_wide(pieces)


def _unpacked(shard: InputShard, start: int, size: int, stop: int | None) -> Iterator[bytes]:
    if shard.uri == "-":
        yield from _pieces(standard_input(), size)
        return
    with shard.open(until=stop if shard.seekable else None) as file:
        if shard.packed == "gzip":
            yield from gunzip(file, size)
        elif shard.packed == "zstd":
            yield from unzstd(file)
        else:
            file.seek(start)
            yield from _pieces(file, size) if stop is None else _pieces_around(file, size, stop)


def _not_wide(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same pieces, once their first bytes are known to be no byte order mark of UTF-16 or UTF-32."""
    head, failure = b"", None
    try:
        while len(head) < 4 and (piece := next(pieces, b"")):
            head += piece
    except Unusable as unusable:
        failure = unusable
    if wide := wide_encoding(head):
        told = f"{wide}, and text has to be UTF-8: convert it, as with iconv -f {wide} -t UTF-8"
        raise Unusable("invalid_utf8", told)
    if head:
        yield head
    if failure:
        raise failure
    yield from pieces


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    read: Callable[[int], bytes] = getattr(file, "read1", file.read)
    while piece := read(size):
        yield piece


def _pieces_around(file: BinaryIO, size: int, stop: int) -> Iterator[bytes]:
    """The same, with an end at `stop`, and behind it in small pieces."""
    position = file.tell()
    while piece := file.read(min(size, stop - position) if position < stop else min(size, _SIP)):
        yield piece
        position += len(piece)


def gunzip(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """What gzip data in a file unpacks to, over all its members. Zeros behind one are padding, as gzip(1) takes them.

    Raises Unusable where it is damaged or ends early.
    """
    from isal import isal_zlib

    decoder, fed, whole = isal_zlib.decompressobj(wbits=31), False, False
    size = size or READ
    for piece in _pieces(file, size):
        while piece:
            if whole and not fed:
                piece = piece.lstrip(b"\0")
                if not piece:
                    break
            try:
                out = decoder.decompress(piece, size)
            except isal_zlib.error as error:  # type: ignore[misc]  # its stubs miss that this is an exception
                raise Unusable("truncated", f"damaged gzip data ({error})") from error
            fed = True
            if out:
                yield out
            if decoder.eof:  # another member may follow at once
                piece, decoder, fed, whole = decoder.unused_data, isal_zlib.decompressobj(wbits=31), False, True
            else:
                piece = decoder.unconsumed_tail
                if not piece and not out:
                    break
    if fed:
        while out := decoder.decompress(b"", size):
            yield out
        raise Unusable("truncated", "the gzip data ends early")


def unzstd(file: BinaryIO) -> Iterator[bytes]:
    """What zstd data in a file unpacks to, over all its frames.

    Raises Unusable where it is damaged or ends early, or needs a dictionary; and at a frame that holds more at once
    than the first one and `USUAL_WINDOW`, as memory was counted without it.
    """
    import zstandard

    most = max(USUAL_WINDOW, zstd_window(file))
    unpack = zstandard.ZstdDecompressor(max_window_size=most)
    # Small pieces bound what one call can unpack to; python-zstandard's reader would hide a truncated frame.
    decoder, fed = unpack.decompressobj(), False
    for piece in _pieces(file, _ZSTD_READ):
        while piece:
            try:
                out = decoder.decompress(piece)
            except zstandard.ZstdError as error:
                raise Unusable(*_zstd_fault(str(error), most)) from error
            fed = True
            if out:
                yield out
            piece = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder, fed = unpack.decompressobj(), False
    if fed:
        raise Unusable("truncated", "the zstd data ends early")


def _zstd_fault(error: str, most: int) -> tuple[str, str]:
    if "Dictionary mismatch" in error:
        return "unreadable", "it was packed with a zstd dictionary: unpack it first, with zstd -d -D DICTIONARY"
    if "too much memory" in error:
        told = f"a zstd frame in it needs a window of over {most >> 20:,} MiB: unpack it first, with zstd -d --long=31"
        return "unreadable", told
    return "truncated", f"damaged zstd data ({error})"


def zstd_window(file: BinaryIO) -> int:
    """Bytes that unpacking the first frame of a zstd file holds at once; 0 where there is none. The file is at its
    beginning before and after.

    Frames that are to be skipped come before it in what pzstd writes. The form: RFC 8878, section 3.1.
    """
    import zstandard

    at, window = 0, 0
    head = file.read(18)
    while head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        at += 8 + int.from_bytes(head[4:8], "little")
        file.seek(at)
        head = file.read(18)
    with contextlib.suppress(zstandard.ZstdError):  # damaged, which the reader says
        found = zstandard.get_frame_parameters(head)
        window = min(found.window_size, found.content_size)  # an unknown size is the largest number
    file.seek(0)
    return int(window) if window <= _LARGEST_WINDOW else 0  # a larger one is none that zstd makes


def fingerprint(shard: InputShard) -> dict[str, object]:
    """What identifies a whole input shard: its kind, its size in bytes and `span_hash`, of its first and last MiB.

    Raises OSError; standard input has no size, only its running hash counts.
    """
    if shard.uri == "-":
        return {"name": shard.name, "kind": shard.kind}
    size = shard.size()
    return {"name": shard.name, "kind": shard.kind, "bytes": size, "ends_sha256": span_hash(shard, size)}


def span_hash(shard: InputShard, size: int) -> str:
    """SHA-256 over the first and the last MiB of the first `size` bytes; of a shorter file, of what there is."""
    with shard.open() as file:
        digest = hashlib.sha256(file.read(min(ENDS, size)))
        file.seek(max(0, size - ENDS))
        digest.update(file.read(min(ENDS, size)))
    return digest.hexdigest()
