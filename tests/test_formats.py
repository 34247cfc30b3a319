"""Exports: the bytes that the formats ask for, every id in them once, whole folders or none."""

import itertools
import json
import os
import pickle
import signal
import struct
import tracemalloc
from pathlib import Path

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import LedgerError, RequestError, RunError
from millstream.exports import FORMATS, check_formats, npy
from millstream.exports.format import Format
from millstream.exports.tasks import Exporting, do
from millstream.folder import samples
from millstream.folder.entries import RemainderEntry, SubsetEntry
from millstream.folder.samples import Samples
from millstream.runs.pack import convert
from millstream.runs.pack.convert import convert_to
from millstream.store import at

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
quick = pytest.fixture(autouse=True, scope="module")(helpers.without_fsync)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 400 ids, for ids of 16 bits."""
    return str(runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def packed(folder, documents, seq_len, **options):
    """A run of documents that are lists of ids."""
    source = helpers.write_jsonl(folder / "corpus.jsonl", [{"id": f"d{n}", "ids": d} for n, d in enumerate(documents)])
    helpers.pack(folder / "run", source, ids_field="ids", seq_len=seq_len, **options)
    return folder / "run"


def converted(folder, run, *formats):
    convert_to(folder / "out", run, formats or list(FORMATS))
    return folder / "out"


# --- golden bytes ----------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory, tokenizer):
    """The documents [1, 2, 3] and [4, 5] in samples of 3: one sample, and [4, 5] as the remainder."""
    folder = tmp_path_factory.mktemp("golden")
    return converted(folder, packed(folder, [[1, 2, 3], [4, 5]], 3, tokenizer=tokenizer))


GOLDEN = {
    "megatron/train.bin": "01000200030004000500",
    "megatron/train.idx": "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000"
    "000000000600000000000000000000000000000001000000000000000200000000000000",
    "nanogpt/train.bin": "01000200030004000500",
    "llm.c/train_000000.bin": "88d834010100000005000000" + 253 * "00000000" + "01000200030004000500",
    "datatrove/train/00000.ds": "01000200030004000500",
    "datatrove/train/00000.ds.index": "03000000000000000500000000000000",
    "litdata/train/chunk-0-0.bin": "01000000" + "0c000000" + "12000000" + "010002000300",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(golden, name):
    assert (golden / name).read_bytes().hex() == GOLDEN[name]


def test_golden_mds(golden):
    config = (
        b'{"column_encodings": ["ndarray:int32", "ndarray:int32"], "column_names": ["seq_lengths", "tokens"], '
        b'"column_sizes": [null, null], "compression": null, "format": "mds", "hashes": [], "size_limit": null, '
        b'"version": 2}'
    )
    sample = bytes.fromhex("06000000 0e000000 0401 03000000 0403 01000000 02000000 03000000")
    begin = 12 + len(config)
    expected = struct.pack("<III", 1, begin, begin + len(sample)) + config + sample
    assert (golden / "mds/train/shard.00000.mds").read_bytes() == expected
    index = json.loads((golden / "mds/train/index.json").read_bytes())
    assert index["version"] == 2
    assert index["shards"][0]["raw_data"] == {"basename": "shard.00000.mds", "bytes": len(expected), "hashes": {}}


def test_golden_index_of_litdata(golden):
    assert json.loads((golden / "litdata/train/index.json").read_bytes()) == {
        "chunks": [{"chunk_bytes": 18, "chunk_size": 1, "dim": 3, "filename": "chunk-0-0.bin"}],
        "config": {
            "chunk_bytes": None,
            "chunk_size": 1,
            "compression": None,
            "data_format": ["no_header_numpy:5"],
            "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
            "encryption": None,
            "item_loader": "TokensLoader",
        },
    }


def test_wide_ids(tmp_path):
    run = packed(tmp_path, [[1, 2, 70_000], [4]], 3)
    out = converted(tmp_path, run, "megatron", "datatrove", "llm.c", "litdata", "npy")
    flat = "01000000 02000000 70110100 04000000"
    assert (out / "megatron/train.bin").read_bytes() == bytes.fromhex(flat)
    assert (out / "megatron/train.idx").read_bytes()[17] == 4
    assert (out / "datatrove/train/00000.ds").read_bytes() == bytes.fromhex(flat)
    header = struct.pack("<3i", 20240801, 7, 4).ljust(1024, b"\0")
    assert (out / "llm.c/train_000000.bin").read_bytes() == header + bytes.fromhex(flat)
    assert json.loads((out / "litdata/train/index.json").read_bytes())["config"]["data_format"] == ["no_header_numpy:2"]
    assert np.load(out / "npy/train/samples-00000.npy").dtype == np.uint32


# --- small parsers of our own, one a format --------------------------------


def parse_npy(folder, subset, seq_len):
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{subset}/samples-*.npy"))]).tolist()


def parse_parquet(folder, subset, seq_len):
    files = sorted(folder.glob(f"{subset}/*.parquet"))
    return [row for file in files for row in pq.read_table(file)["input_ids"].to_pylist()]


def parse_megatron(folder, subset, seq_len):
    data, ids = (folder / f"{subset}.idx").read_bytes(), (folder / f"{subset}.bin").read_bytes()
    magic, version, code, count, documents = struct.unpack_from("<9sQBQQ", data)
    assert (magic, version, documents) == (b"MMIDIDX\0\0", 1, count + 1)
    letter, width = {4: ("i", 4), 8: ("H", 2)}[code]
    lengths = struct.unpack_from(f"<{count}i", data, 34)
    offsets = struct.unpack_from(f"<{count}q", data, 34 + 4 * count)
    assert struct.unpack_from(f"<{documents}q", data, 34 + 12 * count) == tuple(range(count + 1))
    assert len(data) == 34 + 20 * count + 8
    assert len(ids) == width * sum(lengths)
    return [list(struct.unpack_from(f"<{n}{letter}", ids, at)) for n, at in zip(lengths, offsets, strict=True)]


def parse_mds(folder, subset, seq_len):
    rows = []
    for shard in json.loads((folder / subset / "index.json").read_bytes())["shards"]:
        data = (folder / subset / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        (count,) = struct.unpack_from("<I", data)
        assert count == shard["samples"]
        offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
        for low, high in itertools.pairwise(offsets):
            spans, tokens = struct.unpack_from("<II", data, low)
            lengths, ids = _ndarray(data[low + 8 : low + 8 + spans]), _ndarray(data[low + 8 + spans : high])
            assert (len(ids), sum(lengths), low + 8 + spans + tokens) == (seq_len, seq_len, high)
            rows.append(ids)
    return rows


def _ndarray(data):
    assert data[0] >> 2 == 1
    form = "<" + "BHIQ"[data[0] & 3]
    (count,) = struct.unpack_from(form, data, 1)
    return list(struct.unpack(f"<{count}i", data[1 + struct.calcsize(form) :]))


def parse_datatrove(folder, subset, seq_len):
    flat = []
    for file in sorted(folder.glob(f"{subset}/*.ds")):
        ends = struct.iter_unpack("<Q", file.with_name(file.name + ".index").read_bytes())
        data = file.read_bytes()
        last = [end for (end,) in ends][-1]
        flat += struct.unpack(f"<{last}{'H' if len(data) == 2 * last else 'I'}", data)
    return flat


def parse_litdata(folder, subset, seq_len):
    rows = []
    index = json.loads((folder / subset / "index.json").read_bytes())
    letter = {"no_header_numpy:5": "H", "no_header_numpy:2": "i"}[index["config"]["data_format"][0]]
    for chunk in index["chunks"]:
        data = (folder / subset / chunk["filename"]).read_bytes()
        (count,) = struct.unpack_from("<I", data)
        offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
        assert (count, count * seq_len, len(data)) == (chunk["chunk_size"], chunk["dim"], chunk["chunk_bytes"])
        assert offsets[0] == 4 * (count + 2)
        assert offsets[-1] == len(data)
        rows += [list(struct.unpack_from(f"<{seq_len}{letter}", data, at)) for at in offsets[:-1]]
    return rows


def parse_nanogpt(folder, subset, seq_len):
    return np.memmap(folder / {"train": "train.bin", "validation": "val.bin"}[subset], np.uint16, "r").tolist()


def parse_llmc(folder, subset, seq_len):
    flat = []
    for file in sorted(folder.glob({"train": "train_*", "validation": "val_*"}[subset])):
        header = np.fromfile(file, "<i4", 256)
        dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}[tuple(header[:2].tolist())]
        ids = np.memmap(file, dtype, "r", 1024)
        assert len(ids) == header[2]
        assert not header[3:].any()
        flat += ids.tolist()
    return flat


PARSERS = {
    "npy": parse_npy,
    "parquet": parse_parquet,
    "megatron": parse_megatron,
    "mds": parse_mds,
    "datatrove": parse_datatrove,
    "litdata": parse_litdata,
    "nanogpt": parse_nanogpt,
    "llm.c": parse_llmc,
}


def check_format(out, run, name, subset):
    """The export holds the run's samples in order, and the remainder if it is flat; whether there were any."""
    dataset = millstream.open(run, subset)
    rows = [sample.token_ids.tolist() for sample in dataset]
    rest = dataset.remainder.token_ids.tolist() if dataset.remainder and len(dataset.remainder) else []
    kept = rest if FORMATS[name].flat else []
    if not rows and not kept:
        assert not [path for path in out.rglob(f"{name}/*") if path.is_file() and subset[:3] in path.name]
        return False
    found = PARSERS[name](out / name, subset, dataset.seq_len)
    if found and isinstance(found[0], list):
        assert found == rows + [kept] * bool(kept)
    else:
        assert found == [number for row in rows for number in row] + kept
    return True


def test_there_is_a_parser_for_every_format():
    assert PARSERS.keys() == FORMATS.keys()


@st.composite
def corpora(draw):
    """(N, documents, options of pack): short and long documents, with and without padding, 16 and 32 bits."""
    n = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(0, 3 * n), st.just(40 * n)), max_size=10))
    options = draw(
        st.sampled_from(
            [
                {},
                {"remainder": "pad", "pad_id": 7},
                {"remainder": "drop"},
                {"strategy": "split", "pad_id": 7},
                {"strategy": "split", "pad_id": 7, "pad_side": "left"},
                {"strategy": "best-fit", "pad_id": 7, "window": 60},
                {"strategy": "best-fit", "pad_id": 7, "pad_side": "left", "validation": 0.4},
                {"validation": 0.4},
                {"validation": 0.4, "strategy": "split", "pad_id": 7},
            ]
        )
    )
    options = {**options, "format": draw(st.sampled_from(["npy", "parquet"]))}
    options |= {"shard_size": draw(st.sampled_from([40, 300, 100_000]))}
    return n, [[(d + 7 * i) % 390 for i in range(size)] for d, size in enumerate(lengths)], options


@QUICK
@given(corpora(), st.booleans(), st.sampled_from([1, 30, 1 << 20]), st.sampled_from([1, 50, 1 << 28]))
def test_every_format_gives_back_every_id(tmp_path_factory, tokenizer, corpus, small, block, shard):
    n, documents, options = corpus
    folder = tmp_path_factory.mktemp("run")
    run = packed(folder, documents, n, tokenizer=tokenizer if small else None, **options)
    names = [name for name in FORMATS if small or name != "nanogpt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "BLOCK_IDS", block)
        patch.setattr(samples, "SHARD_IDS", shard)
        report = convert_to(folder / "out", run, names)
    for name in names:
        for subset in millstream.open(run).manifest.subsets:
            check_format(folder / "out", run, name, subset)
    ledger = millstream.open(run).ledger["ids"]
    for done in report.exports:
        assert (
            done.ids == done.written + done.left_out == ledger["in_samples"] + ledger["padding"] + ledger["remainder"]
        )
        assert done.padding == ledger["padding"]
        assert done.left_out == (0 if FORMATS[done.format].flat else ledger["remainder"])


@QUICK
@given(corpora())
def test_boundaries_and_padding(tmp_path_factory, tokenizer, corpus):
    n, documents, options = corpus
    folder = tmp_path_factory.mktemp("run")
    run = packed(folder, documents, n, tokenizer=tokenizer, **options)
    out = converted(folder, run, "npy", "parquet", "mds", "datatrove")
    padded = "strategy" in options or options.get("remainder") == "pad"
    for subset in millstream.open(run).manifest.subsets:
        dataset = millstream.open(run, subset)
        found = list(dataset)
        if found:
            table = [row for file in sorted(out.glob(f"parquet/{subset}/*")) for row in pq.read_table(file).to_pylist()]
            runs_of = [np.diff(sample.cu_seqlens).tolist() for sample in found]
            assert [row["seq_lengths"] for row in table] == runs_of
            for row, sample in zip(table, found, strict=True):
                assert [d for d in row["documents"] if d >= 0] == [s.document for s in sample.segments]
                if padded:
                    labels = np.where(sample.segment_ids > 0, sample.token_ids.astype(np.int64), -100)
                    assert row["labels"] == labels.tolist()
                else:
                    assert "labels" not in row
            stored = [np.load(path) for path in sorted(out.glob(f"npy/{subset}/segments-*.npy"))]
            segments = [segment for part in stored for segment in part[["document", "start", "length"]].tolist()]
            assert segments == [tuple(segment) for sample in found for segment in sample.segments]
        kept = [dataset.remainder] if dataset.remainder else []
        if found or kept:
            counted = np.concatenate([sample.segment_ids > 0 for sample in found + kept])
            losses = b"".join(path.read_bytes() for path in sorted(out.glob(f"datatrove/{subset}/*.loss")))
            assert losses == (counted.tobytes() if padded else b"")


def test_an_mds_sample_of_many_documents(tmp_path):
    run = packed(tmp_path, [[n] for n in range(700)], 600, remainder="pad", pad_id=0)
    out = converted(tmp_path, run, "mds")
    assert check_format(out, run, "mds", "train")


def test_npy_is_what_the_run_has(tmp_path, tokenizer):
    run = packed(tmp_path, [list(range(300))] * 5, 8, tokenizer=tokenizer, shard_size=640)
    out = converted(tmp_path, run, "npy")
    stored = sorted(run.glob("samples-*.npy"))
    assert len(stored) > 2
    for path in stored:
        assert (out / "npy/train" / path.name).read_bytes() == path.read_bytes()


# --- what cannot be written ------------------------------------------------


def test_ids_too_large_for_a_format(tmp_path):
    run = packed(tmp_path, [[1, (1 << 31) + 5]], 2)
    for name in ("parquet", "megatron", "mds", "litdata"):
        with pytest.raises(RequestError, match="2,147,483,653"):
            converted(tmp_path, run, name)
        assert not (tmp_path / "out" / name).exists()
    with pytest.raises(RequestError, match="nanogpt holds ids of 16 bits"):
        converted(tmp_path, run, "npy", "nanogpt")
    assert not (tmp_path / "out" / "npy").exists()
    out = converted(tmp_path, run, "npy", "datatrove", "llm.c")
    for name in ("npy", "datatrove", "llm.c"):
        assert check_format(out, run, name, "train")


def test_a_vocabulary_too_large_for_a_format():
    with pytest.raises(RequestError, match="vocabulary has 100,277"):
        check_formats(["npy", "nanogpt"], 100_277)
    check_formats([name for name in FORMATS if name != "nanogpt"], 100_277)


@pytest.fixture
def small(tmp_path, tokenizer):
    """A run with both subsets, three shards or more, and remainders."""
    documents = [[(d + i) % 300 for i in range(20 + d % 7)] for d in range(60)]
    return packed(tmp_path / "small", documents, 16, tokenizer=tokenizer, shard_size=320, validation=0.3)


def test_unfinished_and_foreign_folders_are_refused(tmp_path, small):
    for formats, message in ([[], "format wants"], [["mdx"], "format='mdx' is unknown"]):
        with pytest.raises(RequestError, match=message):
            convert_to(tmp_path / "out", small, formats)
    with pytest.raises(RequestError, match="no run folder"):
        convert_to(tmp_path / "out", tmp_path, ["npy"])
    with pytest.raises(RequestError, match="is a run folder"):
        convert_to(small, small, ["npy"], overwrite=True)
    (small / "manifest.json").rename(small / "run.json")
    with pytest.raises(RequestError, match="not finished"):
        convert_to(tmp_path / "out", small, ["npy"])
    assert not (tmp_path / "out").exists()


def test_other_files_in_out_are_left_alone(tmp_path, small):
    out = tmp_path / "out"
    (out / "mds.tmp").mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="has other files"):
        convert_to(out, small, ["npy"])
    with pytest.raises(RequestError, match="mds is not of a conversion"):
        convert_to(out, small, ["npy", "mds"], overwrite=True)
    assert sorted(os.listdir(out)) == ["mds.tmp", "mine.txt"]
    convert_to(out, small, ["npy"], overwrite=True)
    assert sorted(os.listdir(out)) == ["exports.json", "mds.tmp", "mine.txt", "npy"]
    (out / "litdata").mkdir()
    with pytest.raises(RequestError, match="litdata is not of a conversion"):
        convert_to(out, small, ["npy", "litdata"], overwrite=True)


def test_another_run_needs_overwrite(tmp_path, small, tokenizer):
    out = tmp_path / "out"
    convert_to(out, small, ["npy", "mds"])
    before = tree(out)
    other = packed(tmp_path / "other", [[1, 2, 3]], 2, tokenizer=tokenizer)
    with pytest.raises(RequestError, match="another run's exports"):
        convert_to(out, other, ["npy"])
    assert tree(out) == before
    convert_to(out, other, ["npy"], overwrite=True)
    assert sorted(os.listdir(out)) == ["exports.json", "npy"]
    assert check_format(out, other, "npy", "train")


def test_two_at_once_are_refused(tmp_path, small):
    with (
        convert._claimed(at(tmp_path / "out"), ["npy"], "run", False),
        pytest.raises(RequestError, match="another millstream"),
    ):
        convert_to(tmp_path / "out", small, ["npy"])


def test_a_ledger_that_does_not_balance(tmp_path, small, monkeypatch):
    def loses_one(given, out):
        return npy.shard(given, out) - 1

    monkeypatch.setitem(FORMATS, "mds", Format(31, loses_one))
    with pytest.raises(LedgerError, match=r"mds: .* ids came in") as raised:
        convert_to(tmp_path / "out", small, ["mds"])
    assert raised.value.exit_code == 1
    assert not (tmp_path / "out" / "mds").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_run_is_no_source(tmp_path, small, name):
    path = small / "samples-00001.npy"
    stored = np.load(path)
    np.save(path, stored[:-1])
    with pytest.raises(RunError, match="samples-00001"):
        convert_to(tmp_path / "out", small, [name])
    path.write_bytes(b"")
    with pytest.raises(RunError, match="samples-00001"):
        convert_to(tmp_path / "out", small, [name])
    assert not (tmp_path / "out" / name).exists()


# --- stopping and going on -------------------------------------------------


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Crash(BaseException):
    pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_before_any_file_operation(tmp_path, small, overwrite):
    names = ["mds", "megatron"]
    convert_to(tmp_path / "whole", small, names)
    wanted = tree(tmp_path / "whole")
    other = packed(tmp_path / "other", [[1, 2, 3]], 2)
    for number in itertools.count(1):
        out = tmp_path / f"out-{number}"
        if overwrite:
            convert_to(out, other, ["mds", "npy"])
        left = number

        def tick(*args, real, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "replace", "mkdir", "makedirs", "rmdir", "unlink"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda *args, real=real, **kwargs: tick(*args, real=real, **kwargs))
            try:
                convert_to(out, small, names, overwrite=overwrite)
                break
            except Crash:
                pass
        for name in names:  # whole, or not there
            if (out / name).exists() and not overwrite:
                assert tree(out / name) == tree(tmp_path / "whole" / name)
        convert_to(out, small, names, overwrite=overwrite)
        assert tree(out) == wanted
    assert number > 20


@runs.needs_proc
def test_killed_and_run_again(tmp_path, tokenizer):
    documents = [[(d + i) % 300 for i in range(5000)] for d in range(200)]
    run = packed(tmp_path, documents, 64, tokenizer=tokenizer, shard_size=100_000)
    names = "npy,mds,litdata,megatron"
    args = ["convert", run, "--format", names, "--out"]
    assert runs.cli(*args, tmp_path / "whole").returncode == 0
    out, hits = tmp_path / "out", 0
    whens = ("megatron.tmp/train.bin", "megatron", "mds.tmp/train/shard.00001.mds", "mds", "litdata.tmp")
    for there, workers in zip(whens, itertools.cycle([2, 1]), strict=False):
        with runs.Run(*args, out, "--workers", workers) as process:
            runs.wait_until(lambda there=there: process.process.poll() is not None or (out / there).exists())
            if process.process.poll() is None:
                process.signal(signal.SIGKILL)
            code, _ = process.end()
            hits += code == -signal.SIGKILL
    assert hits
    assert runs.cli(*args, out).returncode == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_what_is_finished_is_kept(tmp_path, small):
    out = tmp_path / "out"
    assert convert_to(out, small, ["npy"]).already == []
    kept = (out / "npy/train/samples-00000.npy").stat().st_ino
    report = convert_to(out, small, ["mds", "npy"])
    assert report.already == ["npy"]
    assert [done.format for done in report.exports] == ["mds", "npy"]
    assert (out / "npy/train/samples-00000.npy").stat().st_ino == kept
    before = tree(out)
    (out / "mds/train/shard.00000.mds").write_bytes(b"changed")
    (out / "npy/train/samples-00000.npy").unlink()
    assert convert_to(out, small, ["mds", "npy"]).already == []
    assert tree(out) == before


# --- as tasks, by several processes ------------------------------------------


def ordered_by_chance(exporting, subsets, chance):
    """Do an export's tasks as far as shards are sealed, one after another, in any order, and some of them twice."""
    sealed, open_tasks, done = dict.fromkeys(range(len(subsets)), 0), [], []
    while not exporting.done:
        for number, whole in enumerate(subsets):
            entry = whole.entry
            if (so_far := sealed[number]) <= whole.output_shards and chance.random() < 0.7:
                over = so_far == whole.output_shards
                known = SubsetEntry(entry.shards[:so_far], entry.remainder if over else RemainderEntry("keep", 0))
                exporting.add(Samples(whole.store.url, whole.subset, whole.settings, known), over=over)
                sealed[number] = so_far + 1
        open_tasks += exporting.tasks()
        chance.shuffle(open_tasks)
        if open_tasks:
            number, task = open_tasks.pop()
            wrote = [do(pickle.loads(pickle.dumps(task))) for _ in range(chance.choice([1, 1, 2]))]
            assert wrote == wrote[:1] * len(wrote)
            exporting.took(number, wrote[0])
            done.append(task)
            if chance.random() < 0.4:  # somebody who was taken for dead and is only slow
                do(chance.choice(done))


@settings(QUICK, max_examples=10)
@given(corpora(), st.sampled_from([50, 1 << 28]), st.randoms())
def test_tasks_in_any_order_give_the_same_files(tmp_path_factory, tokenizer, corpus, shard, chance):
    n, documents, options = corpus
    folder = tmp_path_factory.mktemp("run")
    run = packed(folder, documents, n, tokenizer=tokenizer, **options)
    subsets = samples.samples_of(str(run), millstream.open(run).manifest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "SHARD_IDS", shard)
        wanted = {export.format: export for export in convert_to(folder / "out", run, list(FORMATS)).exports}
        (folder / "tasks").mkdir()
        for name, format in FORMATS.items():
            exporting = Exporting(name, format, at(folder / "tasks"), [samples.subset for samples in subsets])
            ordered_by_chance(exporting, subsets, chance)
            assert exporting.export() == wanted[name]
            exporting.place.publish()
            assert tree(folder / "tasks" / name) == tree(folder / "out" / name)


def test_several_processes_write_the_same(tmp_path, small):
    names = list(FORMATS)
    alone = convert_to(tmp_path / "alone", small, names, workers=1)
    several = convert_to(tmp_path / "several", small, names, workers=3)
    assert several.exports == alone.exports
    assert tree(tmp_path / "several") == tree(tmp_path / "alone")
    os.truncate(small / "samples-00001.npy", 200)
    with pytest.raises(RunError, match="samples-00001"):
        convert_to(tmp_path / "damaged", small, ["npy"], workers=2)
    assert sorted(os.listdir(tmp_path / "damaged")) == ["exports.json", "npy.tmp"]


# --- while packing ---------------------------------------------------------


@pytest.mark.parametrize("base", ["npy", "parquet"])
@pytest.mark.parametrize("options", [{}, {"strategy": "best-fit", "pad_id": 7, "remainder": "pad"}], ids=str)
def test_packed_in_several_formats(tmp_path, tokenizer, base, options):
    names = [name for name in FORMATS if name != base]
    options = {"seq_len": 16, "tokenizer": tokenizer, "shard_size": 640, "validation": 0.3, **options}
    documents = [[(d + i) % 300 for i in range(20 + d % 7)] for d in range(60)]
    run = packed(tmp_path, documents, format=",".join([base, *names]), **options)
    assert millstream.verify(run).problems == []
    out = converted(tmp_path, run, *names)
    for name in names:
        assert tree(run / name) == tree(out / name)
    alone = packed(tmp_path / "alone", documents, format=base, **options)
    for path in alone.glob("*.npy"):
        assert (run / path.name).read_bytes() == path.read_bytes()


def test_ids_that_one_of_the_formats_cannot_hold_are_faults(tmp_path):
    documents = [[1, 2], [1 << 31], [3, 4]]
    run = packed(tmp_path, documents, 2, format="npy,mds", on_error="skip")
    assert [fault["reason"] for fault in helpers.faults(run)] == ["id_range"]
    assert check_format(run, run, "mds", "train")
    with pytest.raises(RequestError, match="nanogpt holds ids of 16 bits"):
        packed(tmp_path / "narrow", documents, 2, format="npy,nanogpt")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(RequestError, match="format='mdx' does not work"):
        packed(tmp_path, [[1]], 2, format="npy,mdx")


def test_overwritten_exports_are_gone(tmp_path, tokenizer):
    for formats in ("npy,mds,litdata", "npy,mds", "npy"):
        run = packed(tmp_path, [[1, 2, 3]], 2, tokenizer=tokenizer, format=formats, overwrite=True)
        assert millstream.verify(run).problems == []
        assert sorted(path.name for path in run.iterdir() if path.is_dir()) == sorted(formats.split(",")[1:])


# --- the command line ------------------------------------------------------


def test_the_command_says_what_became_of_every_id(tmp_path, small):
    ids = millstream.open(small).ledger["ids"]
    done = runs.cli("convert", small, "--format", "mds,nanogpt", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert ids["remainder"] > 0
    assert f"{ids['in']:,} in = {ids['in_samples']:,} written + {ids['remainder']:,} left out" in done.stdout
    assert f"{ids['in']:,} in = {ids['in']:,} written + 0 left out" in done.stdout
    again = runs.cli("convert", small, "--format", "nanogpt", "--out", tmp_path / "out", "--json")
    report = json.loads(again.stdout)
    assert report["already"] == ["nanogpt"]
    assert report["exports"][0]["written"] == ids["in"]
    assert runs.cli("convert", small, "--format", "mdx", "--out", tmp_path / "out").returncode == 2
    listed = json.loads((tmp_path / "out" / "exports.json").read_bytes())["exports"]
    for export in listed.values():
        for file in export["files"]:
            path = tmp_path / "out" / file["name"]
            assert (file["bytes"], file["sha256"]) == (path.stat().st_size, runs.sha256(path))


@pytest.mark.parametrize("name", FORMATS)
def test_memory_does_not_grow_with_the_run(tmp_path, tokenizer, monkeypatch, name):
    documents = [[(d + i) % 300 for i in range(4000)] for d in range(400)]
    run = packed(tmp_path, documents, 128, tokenizer=tokenizer)
    converted(tmp_path, run, name)  # imports what it needs
    monkeypatch.setattr(samples, "BLOCK_IDS", 1 << 12)
    tracemalloc.start()
    try:
        convert_to(tmp_path / "again", run, [name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # of 3,200,000 bytes of ids
