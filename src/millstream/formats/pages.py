"""How large the pages of Parquet files are, which are unpacked as a whole: told by their headers, without reading them.

A writer that counts rows and not bytes makes pages of GBs, and equal texts pack to almost nothing.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

_HEADER = 1 << 14
_STOP, _TRUE, _FALSE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 7, 8, 9, 10, 11, 12


def page_sizes(file: BinaryIO, leaf: Any) -> Iterator[int]:
    """Bytes of each page of a column in a row group (`leaf`, of the footer), unpacked; those whose headers can be read.

    Raises OSError.
    """
    at = leaf.data_page_offset
    if leaf.has_dictionary_page and leaf.dictionary_page_offset:
        at = min(at, leaf.dictionary_page_offset)
    end = at + leaf.total_compressed_size
    while at < end:
        file.seek(at)
        try:
            header = _Header(file.read(_HEADER))
        except IndexError:  # damaged, or longer than any is
            return
        if header.packed < 0 or header.unpacked < 0:
            return
        yield header.unpacked
        at += header.length + header.packed


class _Header:
    """A page's header, in Thrift's compact protocol: its own length and the page's size, packed and unpacked.

    The form: parquet.thrift, PageHeader; thrift-compact-protocol.md. Raises IndexError where it is cut.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self.unpacked = self.packed = -1
        for field, kind in self._fields():
            if field in (2, 3):
                value = self._number()
                value = (value >> 1) ^ -(value & 1)
                if field == 2:
                    self.unpacked = value
                else:
                    self.packed = value
            else:
                self._pass(kind)
        self.length = self._at

    def _fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of the fields of a struct, each before its value."""
        field = 0
        while (byte := self._byte()) != _STOP:
            if byte >> 4:
                field += byte >> 4
            else:
                number = self._number()
                field = (number >> 1) ^ -(number & 1)
            yield field, byte & 15

    def _pass(self, kind: int) -> None:
        if kind == _STRUCT:
            for _, inner in self._fields():
                self._pass(inner)
        elif kind == _BINARY:
            length = self._number()
            self._at += length
        elif kind == _DOUBLE:
            self._at += 8
        elif kind in (_LIST, _SET, _MAP):
            raise IndexError  # no header has any
        elif kind == 3:
            self._at += 1
        elif kind not in (_TRUE, _FALSE):
            self._number()

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _number(self) -> int:
        found = shift = 0
        while True:
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
            shift += 7
