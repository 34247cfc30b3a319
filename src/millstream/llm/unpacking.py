"""Replies that come compressed although nobody asked for it, unpacked a bounded piece at a time."""

import zlib

_AT_ONCE = 1 << 20  # bytes that are unpacked at a time
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class BadPacking(Exception):
    """What cannot be unpacked."""


class Unpacker:
    """gzip or deflate, fed with pieces, cut anywhere; `chunk` gives at most 1 MiB of what they hold at a time.

    Raises BadPacking for anything else.

    >>> import gzip
    >>> unpacker = Unpacker("gzip")
    >>> unpacker.feed(gzip.compress(bytes(3 << 20)))
    >>> [len(unpacker.chunk()) for _ in range(4)]
    [1048576, 1048576, 1048576, 0]
    """

    def __init__(self, packing: str) -> None:
        if packing not in ("gzip", "x-gzip", "deflate"):
            raise BadPacking(f"it comes compressed as {packing!r:.40}, which nobody asked for")
        self._inner = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._may_be_raw = packing == "deflate"  # without the head that zlib gives it
        self._packed = b""

    def feed(self, packed: bytes) -> None:
        self._packed += packed

    def chunk(self) -> bytes:
        """What is unpacked next; none if there has to be more to unpack."""
        if self._may_be_raw and self._packed:
            self._may_be_raw = False
            if self._packed[0] & 0x0F != zlib.DEFLATED:
                self._inner = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            found = b"" if self._inner.eof else self._inner.decompress(self._packed, _AT_ONCE)
        except zlib.error:
            raise BadPacking("it comes compressed, and cannot be unpacked") from None
        self._packed = self._inner.unconsumed_tail
        return found

    def end(self) -> None:
        if not self._inner.eof:
            raise BadPacking("it comes compressed, and its end is missing")
