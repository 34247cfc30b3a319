"""gzip and zstd files as others write them: padding, members, frames, dictionaries and large windows."""

import gzip
import io
import os
import shutil
import subprocess

import pytest
import runs
import zstandard
from helpers import TEXTS, faults, gpt2_ids, jsonl, pack, read_little, rows, stream, without_fsync
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.corpus import sources
from millstream.corpus.unpacking import unpacking_memory
from millstream.errors import DataError, RequestError, Unusable
from millstream.runs.plan.plan import make_plan

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

DATA = jsonl(rows(TEXTS))


def skippable(size, number=0):
    return bytes([0x50 + number]) + b"\x2a\x4d\x18" + size.to_bytes(4, "little") + b"s" * size


def unpacked(kind, data):
    return b"".join({"gzip": sources.gunzip, "zstd": sources.unzstd}[kind](io.BytesIO(data)))


# --- padding, members and frames --------------------------------------------


@pytest.mark.parametrize("padding", [1, 512, 10_000, (1 << 20) - 5, 3 << 20])
def test_zeros_behind_gzip_are_padding_however_many(tmp_path, padding):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(DATA) + b"\0" * padding)
    if shutil.which("gzip"):
        subprocess.run(["gzip", "-t", tmp_path / "a.jsonl.gz"], check=True, capture_output=True)
    pack(tmp_path / "out", tmp_path / "a.jsonl.gz", seq_len=32)
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)


@settings(deadline=None, max_examples=150)
@given(
    parts=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=4),
    read=st.integers(1, 64),
)
def test_gzip_members_with_padding_between_any_two_reads(parts, read):
    data, wanted = b"", b""
    for size, padding in parts:
        text = os.urandom(size)
        data += gzip.compress(text) + b"\0" * padding
        wanted += text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "READ", read)
        assert unpacked("gzip", data) == wanted


@pytest.mark.parametrize("data", [b"\0" * 100, b"\0" + gzip.compress(DATA), gzip.compress(DATA) + b"\0\0rest"])
@pytest.mark.parametrize("read", [1, 7, 1 << 20])
def test_zeros_before_gzip_and_other_bytes_behind_it_are_damage(monkeypatch, data, read):
    read_little(monkeypatch, read)
    with pytest.raises(Unusable, match="gzip data"):
        unpacked("gzip", data)


@settings(deadline=None, max_examples=150)
@given(
    parts=st.lists(st.one_of(st.binary(max_size=300), st.integers(0, 300)), max_size=6),
    read=st.integers(1, 64),
    cut=st.integers(0, 40),
)
def test_zstd_frames_with_others_to_be_skipped_between_any_two_reads(parts, read, cut):
    frames = [skippable(part, part % 16) if isinstance(part, int) else zstandard.compress(part) for part in parts]
    wanted = b"".join(part for part in parts if isinstance(part, bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_ZSTD_READ", read)
        assert unpacked("zstd", b"".join(frames)) == wanted
        if frames and 0 < cut < len(frames[-1]):
            with pytest.raises(Unusable, match="ends early"):
                unpacked("zstd", b"".join(frames)[:-cut])


@pytest.mark.parametrize("padding", [1, 4, 5000])
def test_zeros_behind_zstd_are_damage_as_zstd_has_it(tmp_path, padding):
    (tmp_path / "a.zst").write_bytes(zstandard.compress(DATA) + b"\0" * padding)
    if shutil.which("zstd"):
        assert subprocess.run(["zstd", "-t", tmp_path / "a.zst"], capture_output=True).returncode != 0
    with pytest.raises(Unusable):
        unpacked("zstd", (tmp_path / "a.zst").read_bytes())


# --- dictionaries and windows -----------------------------------------------


def framed(data, window_log, sized=False):
    asked = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=asked)
    if sized:
        return packer.compress(data)
    one = packer.compressobj()
    return one.compress(data) + one.flush()


def test_a_zstd_dictionary_is_named(tmp_path):
    words = zstandard.train_dictionary(2000, [os.urandom(20) + b"abcdefgh" * 10 for _ in range(300)])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(dict_data=words).compress(DATA))
    with pytest.raises(DataError, match="packed with a zstd dictionary: unpack it first"):
        pack(tmp_path / "out", tmp_path / "a.jsonl.zst")
    assert pack(tmp_path / "skip", tmp_path / "a.jsonl.zst", on_error="skip").ledger["faults"] == {"unreadable": 1}


@pytest.mark.parametrize("front", [b"", skippable(100)])
def test_a_large_window_needs_memory_or_is_refused(tmp_path, front):
    (tmp_path / "a.jsonl.zst").write_bytes(front + framed(DATA, 31))
    for call in (lambda **named: pack(tmp_path / "out", tmp_path / "a.jsonl.zst", **named), planned(tmp_path)):
        with pytest.raises(
            RequestError, match=r"a\.jsonl\.zst was packed with a window of 2,048 MiB.* give memory=4 << 30,"
        ):
            call()
    assert not (tmp_path / "out").exists()
    pack(tmp_path / "out", tmp_path / "a.jsonl.zst", seq_len=32, memory=5 << 30)
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)


def planned(tmp_path):
    return lambda **named: make_plan(tmp_path / "a.jsonl.zst", seq_lens=[32], strategies=["concat"], **named)


def test_a_window_that_zstd_never_makes_is_damage(tmp_path):
    data = bytearray(framed(DATA, 31))
    data[5] = 0xFF  # the descriptor of the window: 3.75 TiB
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert pack(tmp_path / "out", tmp_path / "a.jsonl.zst", on_error="skip").ledger["faults"] == {"unreadable": 1}


def test_a_window_is_no_larger_than_what_is_in_it(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(framed(DATA, 31, sized=True))
    pack(tmp_path / "out", tmp_path / "a.jsonl.zst", seq_len=32)
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)


def test_a_window_takes_the_place_of_workers(tmp_path):
    for name, window in (("small", 23), ("large", 28)):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(framed(DATA, window))
        shard = sources.InputShard(str(tmp_path / f"{name}.jsonl.zst"), name, "jsonl", "zstd")
        assert unpacking_memory([shard], ("text", "id"), 1 << 30) == (1 << window if window > 23 else 0)


def test_a_later_frame_with_a_window_that_was_not_counted_is_a_fault(tmp_path):
    half = len(TEXTS) // 2
    parts = [framed(jsonl(rows(TEXTS)[:half]), 20), framed(jsonl(rows(TEXTS)[half:]), 27), framed(DATA, 28)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    report = pack(tmp_path / "out", tmp_path / "a.jsonl.zst", seq_len=32, on_error="skip")
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)
    assert report.ledger["faults"] == {"unreadable": 1}
    assert "window of over 128 MiB" in faults(tmp_path / "out")[0]["message"]


def test_what_one_read_unpacks_to_is_bounded():
    sizes = [len(piece) for piece in sources.unzstd(io.BytesIO(zstandard.compress(b"\0" * (1 << 28))))]
    assert sum(sizes) == 1 << 28
    assert max(sizes) <= 32 << 20
    sizes = [len(piece) for piece in sources.gunzip(io.BytesIO(gzip.compress(b"\0" * (1 << 24), 1)))]
    assert (sum(sizes), max(sizes)) == (1 << 24, 1 << 20)


@runs.needs_proc
@pytest.mark.slow
def test_memory_of_a_window(tmp_path):
    from test_memory import check

    lines = b"".join(runs.lines(1, 60_000_000))
    (tmp_path / "a.jsonl.zst").write_bytes(framed(lines * 5, 28))
    check("a window of 256 MiB", 1 << 30, "pack", tmp_path / "a.jsonl.zst", "--out", tmp_path / "out")
