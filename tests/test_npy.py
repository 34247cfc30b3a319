"""NumPy's files as we write and read them are those of NumPy itself."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.folder.npy import NpyWriter, header, load
from millstream.folder.shards import Shape, ShardWriter, arrow_column
from millstream.records import SEGMENT
from millstream.store import at

DTYPES = [np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(bool), SEGMENT]
NAMED = st.integers(1, 130).map(lambda size: np.dtype([("x" * size, np.uint16)]))  # headers of all lengths


@settings(deadline=None)
@given(st.sampled_from(DTYPES) | NAMED, st.integers(0, 1 << 62), st.integers(1, 1 << 20) | st.none())
def test_the_header_is_that_of_numpy(dtype, rows, columns):
    shape = (rows,) if columns is None else (rows, columns)
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    assert header(dtype, shape) == file.getvalue()
    assert len(header(dtype, shape, 256)) == 256


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.sampled_from([None, 3]), st.integers(-1, 9))
def test_what_is_written_is_what_numpy_and_we_read(tmp_path_factory, dtype, sizes, columns, expected):
    """Whether the rows were known before, were others in the end, or were not known at all."""
    store = at(tmp_path_factory.mktemp("store"))
    columns = None if dtype == SEGMENT else columns
    file = NpyWriter(store, "a.npy", dtype, columns, None if expected < 0 else expected)
    parts = [np.arange(size * (columns or 1)).astype(np.uint16).astype(dtype) for size in sizes]
    parts = [part.reshape(-1, columns) if columns else part for part in parts]
    for part in parts:
        file.write(part)
    written = file.finish()
    whole = np.concatenate([np.zeros((0, columns) if columns else 0, dtype), *parts])
    assert written.bytes == store.size("a.npy") == (128 if columns else 256) + whole.nbytes
    for found in (np.load(f"{store.url}/a.npy"), load(f"{store.url}/a.npy")):
        assert found.dtype == dtype
        assert found.shape == whole.shape
        assert (found == whole).all()
    assert not load(f"{store.url}/a.npy").flags.writeable or not whole.size


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_files_are_read_with_the_header_that_they_have(tmp_path, version):
    """A header that was seen before is not parsed again, and one of the same length is not taken for it."""
    for rows in (3, 4, 3):
        with open(tmp_path / "a.npy", "wb") as file:
            np.lib.format.write_array(file, np.arange(2 * rows, dtype=np.uint16).reshape(rows, 2), version)
        assert load(tmp_path / "a.npy").tolist() == [[2 * row, 2 * row + 1] for row in range(rows)]


@pytest.mark.parametrize("cut", [0, 5, 100, 200])
def test_a_file_that_is_cut_is_none(tmp_path, cut):
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.int32))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"read|buffer"):
        load(tmp_path / "a.npy")


@pytest.mark.parametrize("rows", [2, 4])
def test_a_shard_is_the_same_whether_it_was_expected_to_be_full(tmp_path, rows):
    entries = []
    for fills in (True, False):
        (tmp_path / str(fills)).mkdir()
        writer = ShardWriter(str(tmp_path / str(fills)), "train", 0, Shape(3, np.dtype(np.uint16), 4), fills=fills)
        writer.write(np.arange(3 * rows, dtype=np.uint16).reshape(rows, 3), np.zeros(rows, SEGMENT))
        entries.append(writer.seal())
    assert entries[0] == entries[1]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["uint32", "uint64", "bool"]), st.lists(st.integers(0, 1 << 31), max_size=20), st.integers(1, 3))
def test_columns_become_those_that_pyarrow_makes_of_them(kind, values, step):
    kind = pa.bool_() if kind == "bool" else pa.type_for_alias(kind)
    given_kind = bool if pa.types.is_boolean(kind) else np.int64
    column = np.array(values, np.int64).astype(given_kind)[::step]
    made = arrow_column(column, kind)
    made.validate(full=True)
    assert made.equals(pa.array(column, kind))
