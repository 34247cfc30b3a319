"""How large the pages of Parquet files are, which are unpacked as a whole: told by their headers, without reading them.

A writer that counts rows and not bytes makes pages of GBs, and equal texts pack to almost nothing.
"""

from collections.abc import Iterator
from typing import BinaryIO

from millstream.corpus.footer import Leaf
from millstream.corpus.thrift import Compact

_HEADER = 1 << 14


def page_sizes(file: BinaryIO, leaf: Leaf) -> Iterator[int]:
    """Bytes of each page of a column in a row group (`leaf`, of the footer), unpacked; those whose headers can be read.

    Raises OSError.
    """
    at = min(leaf.data_at, leaf.once_at) if leaf.once_at else leaf.data_at
    end = at + leaf.packed
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
    """A page's header (parquet.thrift, PageHeader): its own length and the page's size, packed and unpacked.

    Raises IndexError where it is cut.
    """

    def __init__(self, data: bytes) -> None:
        self.unpacked = self.packed = -1
        read = Compact(data)
        for field, kind in read.fields():
            if field == 2:
                self.unpacked = read.number()
            elif field == 3:
                self.packed = read.number()
            else:
                read.skip(kind)
        self.length = read.at
