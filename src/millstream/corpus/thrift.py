"""Thrift's compact protocol, as far as Parquet is written in it: what a file says of itself, read without Arrow."""

from collections.abc import Iterator

STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_DEEPEST = 32  # structs within structs; Parquet has six
_LONGEST = 63  # bits of a number before its last seven


class Compact:
    """Reads `data` from its beginning; `at` is the next byte. Whatever is damaged or cut raises IndexError.

    The form: thrift-compact-protocol.md.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of the fields of a struct, each before its value, which is to be read or passed."""
        field = 0
        while (byte := self._byte()) != STOP:
            field = field + (byte >> 4) if byte >> 4 else self.number()
            yield field, byte & 15

    def number(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def items(self, kind: int) -> Iterator[int]:
        """The type of each item of a list, before its value."""
        if kind not in (LIST, SET):
            raise IndexError
        byte = self._byte()
        count = byte >> 4 if byte >> 4 < 15 else self._unsigned()
        for _ in range(count):
            yield byte & 15

    def skip(self, kind: int, deep: int = 0) -> None:
        """Passes a field's value over."""
        if deep > _DEEPEST:
            raise IndexError
        if kind == STRUCT:
            for _, inner in self.fields():
                self.skip(inner, deep + 1)
        elif kind in (LIST, SET):
            for inner in self.items(kind):
                self.skip(BYTE if inner in (TRUE, FALSE) else inner, deep + 1)
        elif kind == BINARY:
            length = self._unsigned()
            self.at += length
        elif kind in (DOUBLE, BYTE):
            self.at += 8 if kind == DOUBLE else 1
        elif kind == MAP or kind > STRUCT:
            raise IndexError  # Parquet has none
        elif kind not in (TRUE, FALSE):
            self._unsigned()

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        found = shift = 0
        while shift <= _LONGEST:
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found & 0xFFFF_FFFF_FFFF_FFFF
            shift += 7
        raise IndexError
