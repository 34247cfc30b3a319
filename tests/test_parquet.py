"""Parquet as others write it: text and ids of every type, damage by its right name, and little memory for any file."""

import datetime
import io
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from helpers import (
    TEXTS,
    document_ids,
    faults,
    gpt2_ids,
    pack,
    run_here,
    stream,
    whole,
    without_fsync,
    write_jsonl,
)

from millstream.corpus.find import expand
from millstream.corpus.footer import leaves_by_group
from millstream.corpus.limits import Limits, Manner
from millstream.corpus.pages import page_sizes
from millstream.corpus.parquet import DECODED, batches_of, decoded_sizes
from millstream.corpus.slices import slices
from millstream.corpus.sources import InputShard
from millstream.corpus.stretches import row_groups
from millstream.corpus.unpacking import unpacking_memory
from millstream.errors import DataError, RequestError
from millstream.records import Cursor
from millstream.runs.ask.prompts import Recipe, batches
from millstream.runs.plan.plan import make_plan

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)


@pytest.fixture
def run(monkeypatch, capfd):
    return run_here(monkeypatch, capfd)


def shard_of(path):
    return InputShard(str(path), path.name, "parquet")


# --- types ------------------------------------------------------------------

TYPES = {
    "binary": lambda texts: pa.array([text.encode() for text in texts], pa.binary()),
    "large_binary": lambda texts: pa.array([text.encode() for text in texts], pa.large_binary()),
    "binary_view": lambda texts: pa.array([text.encode() for text in texts]).cast(pa.binary_view()),
    "dictionary of binary": lambda texts: pa.array([text.encode() for text in texts]).dictionary_encode(),
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "string_view": lambda texts: pa.array(texts).cast(pa.string_view()),
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
}


def _writable(kind):
    """Older versions of pyarrow write no views to Parquet, and read none from it."""
    try:
        pq.write_table(pa.table({"text": TYPES[kind](["a"])}), io.BytesIO())
    except pa.ArrowNotImplementedError:
        return False
    return True


@pytest.mark.parametrize("kind", list(filter(_writable, TYPES)))
def test_text_is_text_in_columns_of_every_type(tmp_path, kind):
    names = [f"d{number}" for number in range(len(TEXTS))]
    table = pa.table({"id": TYPES[kind](names), "text": TYPES[kind](TEXTS)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=32, block=100)
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)
    assert document_ids(tmp_path / "out") == names
    assert whole(tmp_path / "out")
    pq.write_table(pa.table({"prompt": TYPES[kind](TEXTS)}), tmp_path / "p.parquet")
    assert sum(map(len, batches(expand([tmp_path / "p.parquet"])[0], Recipe("m")))) == len(TEXTS)


def test_bytes_that_are_no_text_are_a_fault_of_their_row(tmp_path):
    table = pa.table({"id": pa.array([b"a", b"\xff\0", b"c"]), "text": pa.array([b"good", b"too", b"caf\xe9"])})
    pq.write_table(table, tmp_path / "a.parquet")
    pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=2, on_error="skip")
    assert document_ids(tmp_path / "out") == ["a", "\\xff\0"]
    assert [(fault["offset"], fault["reason"]) for fault in faults(tmp_path / "out")] == [(2, "invalid_utf8")]


def test_conversations_in_binary_columns(tmp_path):
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
    kind = pa.list_(pa.struct({"role": pa.binary(), "content": pa.binary()}))
    raw = [{key: value.encode() for key, value in message.items()} for message in messages]
    pq.write_table(pa.table({"messages": pa.array([raw], kind)}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    template = tmp_path / "template"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    for name in ("a.parquet", "a.jsonl"):
        pack(tmp_path / f"{name}.run", tmp_path / name, seq_len=4, chat=True, chat_template=str(template))
    assert stream(tmp_path / "a.parquet.run") == stream(tmp_path / "a.jsonl.run")


NS = 1_700_000_000_123_456_789
TIMES = [
    (pa.array([NS // 1000], pa.timestamp("us")), "2023-11-14 22:13:20.123456"),
    (pa.array([NS], pa.timestamp("ns")), "2023-11-14 22:13:20.123456789"),
    (pa.array([NS // 1000 * 1000], pa.timestamp("ns")), "2023-11-14 22:13:20.123456"),
    (pa.array([NS // 1000 * 1000], pa.timestamp("ns", "UTC")), "2023-11-14 22:13:20.123456+00:00"),
    (pa.array([10**17], pa.timestamp("ms")), str(10**17)),
    (pa.array([19_000], pa.date32()), str(datetime.date(1970, 1, 1) + datetime.timedelta(19_000))),
    (pa.array([2**31 - 1], pa.date32()), str(2**31 - 1)),
    (pa.array([90_000], pa.duration("s")), "1 day, 1:00:00"),
    (pa.array([10**18], pa.duration("s")), str(10**18)),
    (pa.array([1], pa.duration("ns")), "1"),
    (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    (pa.array([NS // 1000], pa.timestamp("us")).dictionary_encode(), "2023-11-14 22:13:20.123456"),
]


@pytest.mark.parametrize(("column", "name"), TIMES, ids=[f"{column.type} {name}" for column, name in TIMES])
def test_times_are_ids(tmp_path, column, name):
    pq.write_table(pa.table({"id": column, "text": ["one"]}), tmp_path / "a.parquet")
    pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=2)
    assert document_ids(tmp_path / "out") == [name]
    pq.write_table(pa.table({"id": column, "prompt": ["one"]}), tmp_path / "p.parquet")
    [[request]] = batches(expand([tmp_path / "p.parquet"])[0], Recipe("m"))
    assert (request.id, request.fault) == (name, None)


def test_a_time_that_is_no_text_is_a_fault(tmp_path):
    pq.write_table(pa.table({"text": pa.array([2**31 - 1, 1], pa.date32())}), tmp_path / "a.parquet")
    assert pack(tmp_path / "out", tmp_path / "a.parquet", on_error="skip").ledger["faults"] == {"not_text": 2}


# --- columns that are not there, and damage ---------------------------------


@pytest.mark.parametrize("command", ["pack", "plan"])
def test_files_without_the_column_are_one_wrong_request(tmp_path, run, command):
    for number in range(3):
        pq.write_table(pa.table({"id": ["a"] * 9, "messages": [[]] * 9}), tmp_path / f"{number}.parquet")
    extra = ["--out", tmp_path / "out", "--on-error", "skip"] if command == "pack" else []
    code, _, told = run(command, tmp_path, *extra)
    assert code == 2
    assert "0.parquet has no column 'text'; it has id, messages: did you mean --chat?" in told
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "0.parquet")
    assert "it has body: name the one to read with --text-field" in run(command, tmp_path / "0.parquet", *extra)[2]
    assert not (tmp_path / "out").exists()


def test_one_file_of_several_without_the_column_is_a_fault(tmp_path):
    pq.write_table(pa.table({"n": [1] * 9}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "b.parquet")
    report = pack(tmp_path / "out", [tmp_path / "a.parquet", tmp_path / "b.parquet"], seq_len=32, on_error="skip")
    assert report.ledger["faults"] == {"missing_field": 1}
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)


def test_rows_of_messages_hint_at_chat(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match=r"field 'text' is missing; there are messages: did you mean --chat\?"):
        pack(tmp_path / "out", corpus)


@pytest.mark.parametrize("packing", ["snappy", "gzip", "zstd", "brotli", "lz4", "none"])
def test_damaged_pages_are_corrupt_whatever_packs_them(tmp_path, packing):
    texts = [f"document {number} {number * 7919}" for number in range(3000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression=packing, use_dictionary=False)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[40:400] = b"\xff" * 360
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet.*(damaged|cannot be read as) Parquet|not valid UTF-8"):
        pack(tmp_path / "out", tmp_path / "a.parquet")
    reasons = set(pack(tmp_path / "skip", tmp_path / "a.parquet", on_error="skip").ledger["faults"])
    assert reasons <= {"corrupt", "invalid_utf8"}
    assert reasons


# --- little memory ----------------------------------------------------------


def repeated(path, rows, size, others=()):
    """A file of some KB in which one text of `size` bytes is stored once and stands in `rows` rows."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["word " * (size // 5)])
    text = (
        pa.concat_arrays([column.cast(pa.string()), pa.array(others, pa.string())])
        if others
        else column.cast(pa.large_string())
    )
    pq.write_table(pa.table({"text": text}), path, row_group_size=1 << 20)
    return path


@pytest.mark.parametrize(("block", "known"), [(1 << 16, False), (1 << 20, False), (1 << 20, True)])
def test_batches_are_small_when_decoded(tmp_path, monkeypatch, block, known):
    path = repeated(tmp_path / "a.parquet", 300, 1 << 20)
    assert os.path.getsize(path) < 100_000
    with pq.ParquetFile(path) as file:
        read = []
        iterated = pq.ParquetFile.iter_batches

        def noted(self, *args, **named):
            for batch in iterated(self, *args, **named):
                read.append(batch.nbytes)
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
        leaves = (
            leaves_by_group(InputShard(str(path), path.name, "parquet"), file.metadata, ["text"])[0] if known else ()
        )
        found = [batch.num_rows for batch in batches_of(shard_of(path), file, 0, ["text"], block, leaves)]
        assert found == [1] * 300
        assert max(read) <= 1.1 * DECODED
        assert 0.9 < decoded_sizes(shard_of(path), file.metadata, ["text"])[0] / (300 << 20) < 1.1


def test_nested_texts_that_are_stored_once_are_bounded_too(tmp_path):
    messages = [[{"role": "system", "content": "word " * 100_000}, {"role": "user", "content": "x"}]] * 400
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        sizes = [batch.nbytes for batch in batches_of(shard_of(tmp_path / "a.parquet"), file, 0, ["messages"], 1 << 20)]
    assert max(sizes) <= 2 << 20
    assert len(sizes) >= 100


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_batches_hold_every_row_in_order(tmp_path, seed, known):
    rng = np.random.default_rng(seed)
    pool = ["x" * int(size) for size in rng.integers(0, 3000, 40)]
    texts = [pool[n] if rng.random() < 0.7 else f"unique {rng.random()}" for n in rng.integers(0, 40, 2000)]
    texts[5] = None
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=int(rng.integers(1, 1500)))
    shard = shard_of(tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        leaves = leaves_by_group(
            InputShard(str(tmp_path / "a.parquet"), "a.parquet", "parquet"), file.metadata, ["text"] if known else []
        )
        found = [
            batch.column(0).to_pylist()
            for group in range(file.num_row_groups)
            for batch in batches_of(shard, file, group, ["text"], 5000, leaves[group])
        ]
    assert [text for batch in found for text in batch] == texts
    assert all(len(batch) == 1 or sum(len(text or "") for text in batch) <= 5000 for batch in found)


def test_slices_of_a_dictionary_column_are_small(tmp_path):
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 50, pa.int32()), ["a" * 200_000, "b"])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    pieces = list(
        slices([shard_of(tmp_path / "a.parquet")], Cursor(), Manner(Limits(1 << 20), ("text", "id"), 1 << 19))
    )
    assert max(piece.size for piece in pieces) < 1 << 20
    assert [piece.stop - piece.start for piece in pieces][:2] == [4, 4]


def test_a_plan_of_repeated_texts_reads_a_sample_of_them(tmp_path):
    path = repeated(tmp_path / "a.parquet", 3000, 100_000)
    plan = make_plan(path, seq_lens=[1024], strategies=["concat"], sample=1 << 20)
    assert not plan.exact
    assert plan.documents_read < 300
    assert 0.8 < plan.documents.value / 3000 < 1.2


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("packing", ["none", "snappy", "zstd"])
def test_the_sizes_of_pages_are_told_by_their_headers(tmp_path, version, packing):
    """They add up to what the footer says of the column, less the headers themselves."""
    texts = [f"{number} " * (number % 700) for number in range(3000)]
    table = pa.table({"text": texts, "n": range(3000), "lists": [[number, None] for number in range(3000)]})
    path = tmp_path / "a.parquet"
    named = {"data_page_version": version, "compression": packing, "data_page_size": 10_000, "write_batch_size": 10}
    pq.write_table(table, path, row_group_size=1500, dictionary_pagesize_limit=5000, write_page_checksum=True, **named)
    footer = pq.read_metadata(path)
    with open(path, "rb") as file:
        for leaves in leaves_by_group(InputShard(str(path), path.name, "parquet"), footer, ["text", "n", "lists"]):
            assert len(leaves) == 3
            for leaf in leaves:
                sizes = list(page_sizes(file, leaf))
                assert 0 <= leaf.unpacked - sum(sizes) < 9000 * len(sizes)
                assert len(sizes) > (20 if leaf.path == "text" else 0)
    assert unpacking_memory([shard_of(path)], ["text"], 1 << 30) == 0


def test_damaged_headers_of_pages_end_the_search(tmp_path):
    pq.write_table(pa.table({"text": TEXTS * 100}), tmp_path / "a.parquet")
    leaf = leaves_by_group(
        InputShard(str(tmp_path / "a.parquet"), "a.parquet", "parquet"),
        pq.read_metadata(tmp_path / "a.parquet"),
        ["text"],
    )[0][0]
    data = (tmp_path / "a.parquet").read_bytes()
    assert list(page_sizes(io.BytesIO(data[: leaf.data_at] + b"\x1c" * 20_000), leaf._replace(once_at=0))) == []
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(4, 80, 5):
            damaged[at] = rng.integers(256)
        assert len(list(page_sizes(io.BytesIO(bytes(damaged)), leaf))) < 1000


def test_a_page_that_is_larger_than_memory_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.corpus.parquet.DECODED", 1 << 20)
    monkeypatch.setattr("millstream.corpus.unpacking.DECODED", 1 << 20)
    texts = [f"{number} " + "x" * 190_000 for number in range(1000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    for command in (lambda: pack(tmp_path / "out", path, memory=700 << 20), lambda: make_plan(path, memory=700 << 20)):
        with pytest.raises(RequestError, match=r"a\.parquet stores 181 MiB in one page.* give memory=.*smaller pages"):
            command()
    assert not (tmp_path / "out").exists()


@runs.needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1000, 2000])
@pytest.mark.parametrize("command", ["pack", "plan"])
def test_memory_of_repeated_texts(tmp_path, command, rows):
    """The first 1,024 rows are a page of numbers, and those behind them a page of 976 MiB."""
    from test_memory import check

    path = repeated(tmp_path / "a.parquet", rows, 1 << 20)
    memory, longest = "1GiB", ("--max-document", "2MiB")  # for longer ones engines would need more
    if rows > 1024:
        out = ["--out", tmp_path / "out"] if command == "pack" else []
        done = runs.cli(command, path, "--memory", memory, *longest, *out)
        assert done.returncode == 2
        memory = re.search(r"--memory (\d+MiB)", done.stderr)[1]
    extra = ["--out", tmp_path / "out"] if command == "pack" else ["--sample", "200MiB"]
    limit = int(memory[:-3]) << (30 if "G" in memory else 20)
    check(f"{command} of {rows:,} equal texts of 1 MiB", limit, command, path, "--memory", memory, *longest, *extra)


def test_a_footer_is_read_as_arrow_reads_it(tmp_path):
    rows = [{"id": n, "text": f"t{n % 7}", "chat": [{"role": "user", "content": str(n)}]} for n in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70, use_dictionary=["text"])
    footer = pq.read_metadata(path)
    found = leaves_by_group(InputShard(str(path), path.name, "parquet"), footer, ["text", "chat"])
    assert len(found) == footer.num_row_groups == 5
    for group, leaves in enumerate(found):
        assert [leaf.path.split(".")[0] for leaf in leaves] == ["text", "chat", "chat"]
        for number, leaf in enumerate(leaves, 1):
            told = footer.row_group(group).column(number)
            assert (leaf.path, leaf.text) == (told.path_in_schema, told.physical_type == "BYTE_ARRAY")
            assert (leaf.values, leaf.unpacked, leaf.packed, leaf.data_at, leaf.once_at) == (
                *(told.num_values, told.total_uncompressed_size, told.total_compressed_size, told.data_page_offset),
                told.dictionary_page_offset or 0,
            )


def test_no_damage_to_a_footer_ends_a_plan(tmp_path):
    """Arrow ends the process where it is asked about a column whose statistics do not fit, with six of these bytes."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"t{n % 7}" for n in range(30)], "id": range(30)}), path, row_group_size=15)
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    told = row_groups(shard_of(path), ("text",))
    assert told is not None
    assert len(told) == 2
    for at in range(len(data) - 8 - footer, len(data) - 8):
        for change in (1, 0x10):
            damaged = bytearray(data)
            damaged[at] ^= change
            path.write_bytes(damaged)
            found = row_groups(shard_of(path), ("text",))
            assert found is None or all(group.size > 0 for group in found)


@pytest.mark.parametrize("seed", range(6))
def test_any_damage_is_a_fault(tmp_path, seed):
    """Names in a footer that are no UTF-8 any more, too, and nothing that would end the process."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "a.parquet"
    named = {"compression": ["snappy", "none"][seed % 2], "data_page_version": ["1.0", "2.0"][seed % 2]}
    pq.write_table(pa.table({"text": [f"t{n % 7}" for n in range(300)], "id": range(300)}), path, **named)
    data = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        unpacking_memory([shard_of(path)], ["text", "id"], 1 << 30)
        pieces = list(slices([shard_of(path)], Cursor(), Manner(Limits(1 << 20), ("text", "id"), 500)))
        assert all(piece.fault is None for piece in pieces[:-1])
        if pieces and pieces[-1].fault:
            assert pieces[-1].fault[0] in ("corrupt", "missing_field")
        else:
            assert pieces[-1].stop <= 300
