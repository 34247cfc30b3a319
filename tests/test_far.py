"""Arrays far away: what is asked for, and how much of it is kept."""

import tracemalloc

import numpy as np
import pytest

from millstream.folder.far import BLOCK, KEPT, Blocks, FarRows
from millstream.folder.npy import header

ROWS = np.arange(6 * BLOCK, dtype=np.uint16).reshape(-1, 64)


class Far:
    """A file far away, and the ranges of it that were asked for."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def fetch(self, start, stop):
        self.asked.append((start, stop))
        return self.data[start:stop]


def file_of(rows):
    return Far(header(rows.dtype, rows.shape, 128) + rows.tobytes())


@pytest.mark.parametrize("row", [0, 1, len(ROWS) // 2, len(ROWS) - 1])
def test_a_row_is_one_request_where_shape_and_type_are_known(row):
    file = file_of(ROWS)
    far = FarRows(file.fetch, len(file.data), (ROWS.shape, ROWS.dtype))
    assert file.asked == []
    assert (far[row] == ROWS[row]).all()
    assert len(file.asked) == 1


@pytest.mark.parametrize("wrong", [((len(ROWS) + 1, 64), "<u2"), ((len(ROWS) - 99, 64), "<u2"), (ROWS.shape, "<u4")])
def test_what_cannot_be_so_is_looked_up(wrong):
    file = file_of(ROWS)
    shape, dtype = wrong
    far = FarRows(file.fetch, len(file.data), (shape, np.dtype(dtype)))
    assert (far.shape, far.dtype) == (ROWS.shape, ROWS.dtype)
    assert (far[-1 % len(far)] == ROWS[-1]).all()


def test_no_more_is_kept_than_may_be_and_what_was_used_last():
    blocks, size, asked = Blocks(), 2 * KEPT, []

    def fetch(start, stop):
        asked.append(start // BLOCK)
        return bytearray(stop - start)

    def read(number):
        """Of two files in turn, and with gaps, so that nothing is fetched ahead."""
        begin = number // 2 * 2 * BLOCK
        return blocks.read("ab"[number % 2], fetch, size, begin, begin + 1)

    most = KEPT // BLOCK
    tracemalloc.start()
    try:
        for number in range(most + 50):
            read(number)
            read(0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(asked) == most + 50
    assert 0.95 * KEPT < held < 1.05 * KEPT
    for number in (0, *range(52, most + 50)):
        read(number)
    assert len(asked) == most + 50
    read(1)
    assert len(asked) == most + 51
