"""Planning: exact where all is read, honest intervals where not, bounded work, and nothing written.

Run as a script it counts how often intervals hold the truth: `python tests/test_plan.py 200`.
"""

import gzip
import io
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import chats
import numpy as np
import pytest
import runs
import zstandard
from helpers import cli, document_rows, jsonl, pack, read_manifest, rows, without_fsync, write, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import millstream
from millstream.cli import main
from millstream.corpus import sources, stretches
from millstream.errors import DataError, RequestError
from millstream.planview import show_plan
from millstream.records import Slice
from millstream.runs.plan import blocks
from millstream.runs.plan.estimates import DOCUMENTS, Corpus, Estimate
from millstream.runs.plan.plan import make_plan
from millstream.stream.line import STRATEGIES

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer.json of a few hundred ids."""
    return str(runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


# --- a corpus that is read whole: the numbers are those of the run ----------


def counted(folder):
    """What a plan says, counted from the files of a run folder with one output shard at most."""
    n = read_manifest(folder)["settings"]["seq_len"]
    arrays = {path.name: np.load(path) for path in Path(folder).glob("*.npy")}
    samples = len(arrays.get("samples-00000.npy", ()))
    remainder = arrays.get("remainder.npy", np.zeros(0))
    segments = arrays.get("segments-00000.npy", np.zeros(0, millstream.records.SEGMENT))
    documents = {row["ordinal"]: row["length"] for row in document_rows(folder)}
    held, cut = {}, set()
    for sample, group in itertools.groupby(segments.tolist(), lambda segment: segment[3]):
        held[sample] = {segment[0] for segment in group}
    for document in documents:
        if sum(document in others for others in held.values()) > 1:
            cut.add(document)
    assert cut == {row["ordinal"] for row in document_rows(folder) if row["split"]}
    filled = [document for document, length in documents.items() if length]
    shared = {document for others in held.values() if len(others) > 1 for document in others}
    inside = segments[segments["sample"] < samples]
    return {
        "samples": samples,
        "padding_ids": samples * n - int(inside["length"].sum()),
        "remainder": len(remainder),
        "split": len(cut),
        "padding": 1 - int(inside["length"].sum()) / max(1, samples * n) if samples else 0,
        "truncation": len(cut) / len(filled),
        "needless": sum(documents[document] <= n for document in cut) / len(filled),
        "concatenation": len(shared) / len(filled),
        "documents_per_sample": len(inside) / max(1, samples),
        "bytes": sum(array.nbytes for array in arrays.values()),
    }


def planned(choice):
    """The numbers of a choice; that none of them is an estimate is checked."""
    found = {}
    for name in counted.names:
        number = getattr(choice, name)
        if isinstance(number, Estimate):
            assert number.low == number.value == number.high
            number = number.value
        found[name] = pytest.approx(number, rel=1e-12, abs=1e-12)
    return found


counted.names = (
    *("samples", "padding_ids", "remainder", "split", "padding", "truncation", "needless", "concatenation"),
    *("documents_per_sample", "bytes"),
)


def same_as_packed(folder, corpus, n, strategy, **given_):
    plan = make_plan(corpus, seq_lens=[n], strategies=[strategy], **given_)
    pack(folder, corpus, seq_len=n, strategy=strategy, on_error="skip", overwrite=True, **given_)
    assert plan.exact
    assert counted(folder) == planned(plan.choices[0])
    return plan


@QUICK
@given(
    lengths=st.lists(st.one_of(st.integers(0, 12), st.integers(0, 90)), min_size=1, max_size=60).filter(any),
    n=st.sampled_from([1, 2, 8, 30, 64]),
    strategy=st.sampled_from(STRATEGIES),
    window=st.sampled_from([None, 1, 300, 2000]),
    most=st.sampled_from([None, 1, 3]),
)
def test_a_plan_of_all_is_what_packing_gives(tmp_path, lengths, n, strategy, window, most):
    corpus = write_jsonl(tmp_path / "ids.jsonl", [{"ids": list(range(length))} for length in lengths])
    only = {"window": window, "max_segments": most} if strategy == "best-fit" else {}
    plan = same_as_packed(tmp_path / "out", corpus, n, strategy, ids_field="ids", pad_id=0, **only)
    filled = sorted(filter(None, lengths))
    assert plan.documents.value == len(lengths)
    assert plan.empty.value == lengths.count(0)
    assert plan.ids == (sum(lengths), sum(lengths), sum(lengths))
    assert plan.longest == filled[-1]
    for percent, quantile in plan.quantiles.items():
        assert quantile.value == filled[math.ceil(len(filled) * percent / 100) - 1] == quantile.low == quantile.high
    expected = {}
    for length in filled:
        longest = next(1 << exponent for exponent in range(8) if length <= 1 << exponent)
        documents, ids = expected.get(longest, (0, 0))
        expected[longest] = documents + 1, ids + length
    assert {b.longest: (b.documents.value, b.ids.value) for b in plan.lengths if b.documents.value} == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("special", [{}, {"eos_token": "<|end|>"}, {"bos_token": "<|end|>", "eos_token": "<|end|>"}])
def test_with_text_of_every_kind_and_faults(tmp_path, small, strategy, special):
    folder, lines = tmp_path / "corpus", runs.lines(3, 40_000, faulty=0.05)
    folder.mkdir()
    runs.write_plain(folder / "a.jsonl", lines[:300])
    runs.write_gzip(folder / "b.jsonl.gz", lines[300:400])
    runs.write_zstd(folder / "c.jsonl.zst", lines[400:500])
    runs.write_parquet(folder / "d.parquet", lines[500:], group=20)
    runs.write_texts(folder / "e", lines[:200])
    # The file's sizes differ by the headers of NumPy's format alone: 128 bytes for samples, 256 for what is flat.
    plan = same_as_packed(tmp_path / "out", folder, 64, strategy, tokenizer=small, pad_id=0, **special)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.npy")}
    headers = sum(128 if name.startswith("samples") else 256 for name in sizes)
    assert plan.choices[0].bytes.value == sum(sizes.values()) - headers
    ledger = read_manifest(tmp_path / "out")["ledger"]
    assert plan.documents.value == ledger["documents"]["in"]
    assert plan.empty.value == ledger["documents"]["empty"]
    assert plan.faulty.value == ledger["documents"]["faulty"] == sum(plan.faults.values()) > 0
    assert plan.ids.value == ledger["ids"]["in"]


@pytest.mark.parametrize("loss", ["replies", "all"])
def test_conversations(tmp_path, loss):
    said = [{"role": role, "content": text} for role, text in (("user", "Whose mill?"), ("assistant", "The miller's."))]
    corpus = write_jsonl(tmp_path / "chat.jsonl", [{"messages": said * (1 + number % 4)} for number in range(40)])
    tokenizer = chats.write_tokenizer(tmp_path / "tokenizer")
    for strategy in STRATEGIES:
        same_as_packed(tmp_path / "out", corpus, 32, strategy, chat=True, loss=loss, tokenizer=str(tokenizer))


def test_settings_for_best_fit_leave_the_others_alone(tmp_path):
    corpus = write_jsonl(tmp_path / "ids.jsonl", [{"ids": [1] * length} for length in range(1, 60)])
    plan = make_plan(corpus, seq_lens=[64, 64], ids_field="ids", max_segments=1)
    concat, split, best_fit = plan.choices
    assert concat.documents_per_sample.value > best_fit.documents_per_sample.value == 1
    assert best_fit.samples == split.samples
    with pytest.raises(RequestError, match="max_segments=1 does not work: it belongs to strategy='best-fit'"):
        make_plan(corpus, strategies=["concat"], ids_field="ids", max_segments=1)


# --- a sample: the truth lies in the interval -------------------------------

SIZE, SAMPLE = 800_000, 200_000


def texts(seed):
    """Texts whose lengths have a long tail; one in fifty is empty."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(2000)]
    stock = " ".join(chance.choices(words, k=50_000))
    found, size = [], 0
    while size < SIZE:
        length = 0 if chance.random() < 0.02 else int(min(chance.lognormvariate(6.3, 1.4), 40_000))
        at = chance.randrange(len(stock) - length)
        found.append(stock[at : at + length])
        size += length + 12
    return found


def one_jsonl(folder, some):
    return write_jsonl(folder / "one.jsonl", [{"text": text} for text in some])


def parts(some, count):
    return [some[len(some) * number // count : len(some) * (number + 1) // count] for number in range(count)]


def many_jsonl(folder, some, ending="", count=9):
    for number, part in enumerate(parts(some, count)):
        write_jsonl(folder / f"{number:02}.jsonl{ending}", [{"text": text} for text in part])
    return folder


def sorted_jsonl(folder, some):
    return one_jsonl(folder, sorted(some, key=len))


def sorted_zst(folder, some):
    return one_zst(folder, sorted(some, key=len))


def sorted_parquet(folder, some):
    """One row group."""
    lines = jsonl({"text": text} for text in sorted(some, key=len)).splitlines()
    return runs.write_parquet(folder / "one.parquet", lines, len(lines))


def many_gz(folder, some):
    return many_jsonl(folder, some, ".gz", 20)


def one_zst(folder, some):
    return many_jsonl(folder, some, ".zst", 1)


def parquet(folder, some):
    for number, part in enumerate(parts(some, 3)):
        runs.write_parquet(folder / f"{number}.parquet", jsonl({"text": text} for text in part).splitlines(), 20)
    return folder


def files(folder, some):
    for number, text in enumerate(some):
        (folder / f"{number:04}.txt").write_text(text)
    return folder


def with_truth(folder, seeds):
    """(texts, the plan of all of them) for every seed."""
    found = [texts(seed) for seed in seeds]
    return [(some, make_plan(one_jsonl(folder, some), seq_lens=[512], sample=SIZE * 4)) for some in found]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return with_truth(tmp_path_factory.mktemp("corpora"), range(4))


def hits_of(layout, draws, folder, corpora):
    """How often the intervals hold the truth, by what they are of."""
    hits = dict.fromkeys(["documents", "ids", *STRATEGIES, "truncation", "median"], 0)
    for draw in range(draws):
        some, truth = corpora[draw % len(corpora)]
        # The seed decides which files are read, so that these need not be written again.
        corpus = folder / str(draw % len(corpora) if layout is files else draw)
        if not corpus.exists():
            corpus.mkdir()
            layout(corpus, random.Random(draw).sample(some, len(some)))
        plan = make_plan(corpus, seq_lens=[512], sample=SAMPLE, seed=draw)
        assert not plan.exact
        pairs = {
            "documents": (plan.documents, truth.documents),
            "ids": (plan.ids, truth.ids),
            "median": (plan.quantiles[50], truth.quantiles[50]),
            "truncation": (plan.choices[0].truncation, truth.choices[0].truncation),
        }
        pairs |= {a.strategy: (a.samples, b.samples) for a, b in zip(plan.choices, truth.choices, strict=True)}
        for name, (found, true) in pairs.items():
            hits[name] += found.low <= true.value <= found.high
            assert found.low <= found.value <= found.high
    return hits


LAYOUTS = (one_jsonl, many_jsonl, sorted_jsonl, many_gz, one_zst, sorted_zst, parquet, sorted_parquet, files)


def rejected(hits, of):
    """Whether so few hits have a chance below 1 in 1,000 if each has one of 95 %."""
    return sum(math.comb(of, k) * 0.95**k * 0.05 ** (of - k) for k in range(hits + 1)) < 1e-3


DRAWS = dict(zip(LAYOUTS, (30, 20, 20, 20, 20, 20, 20, 20, 20), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_intervals_hold_the_truth(tmp_path, corpora, layout):
    hits = hits_of(layout, DRAWS[layout], tmp_path, corpora)
    assert not {name: count for name, count in hits.items() if rejected(count, DRAWS[layout])}


@pytest.mark.parametrize("layout", [one_zst, sorted_zst, sorted_parquet], ids=lambda layout: layout.__name__)
def test_no_interval_where_only_beginnings_are_read(tmp_path, corpora, monkeypatch, layout):
    """It would be that of the beginnings, which may be like the rest or not."""
    monkeypatch.setattr(blocks, "UNPACK", 300_000)
    monkeypatch.setattr(blocks, "LOOK", 2)
    some, truth = corpora[0]
    corpus = layout(tmp_path, some)
    plan = make_plan(corpus, seq_lens=[512], sample=100_000)
    assert any("how far off they are cannot be told" in note for note in plan.notes)
    told = [plan.ids, *(bin.documents for bin in plan.lengths), *plan.quantiles.values()]
    told += [number for choice in plan.choices for number in (choice.samples, choice.truncation, choice.bytes)]
    assert not any(number.told for number in told)
    assert plan.as_json()["ids"] == {"value": plan.ids.value, "low": None, "high": None}
    assert plan.documents.told == (layout is sorted_parquet)  # its footer has the number
    text = shown(plan)
    assert "±" not in text
    assert "nan" not in text
    if layout is one_zst:  # not sorted, so its beginning is like the rest
        assert plan.ids.value == pytest.approx(truth.ids.value, rel=0.2)


@pytest.mark.parametrize("layout", [one_zst, parquet], ids=lambda layout: layout.__name__)
def test_documents_from_anywhere_in_what_is_packed(tmp_path, corpora, layout):
    """The first half is in short documents, the second in long ones."""
    some = [text[:60] for each, _ in corpora for text in each if len(text) > 60] + corpora[0][0][:300]
    corpus = layout(tmp_path, some)
    truth = make_plan(corpus, seq_lens=[512], sample=1 << 24)
    plans = [make_plan(corpus, seq_lens=[512], sample=100_000, seed=seed) for seed in range(4)]
    assert len({plan.ids.value for plan in plans}) == 4
    for plan in plans:
        assert not plan.exact
        assert plan.documents_read < truth.documents.value / 2
        assert plan.documents.low <= truth.documents.value <= plan.documents.high
        assert plan.ids.low <= truth.ids.value <= plan.ids.high


@given(
    texts=st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
    level=st.sampled_from([1, 3, 19]),
    checksum=st.booleans(),
    told=st.booleans(),
    skipped=st.binary(max_size=20),
)
@settings(QUICK, max_examples=40)
def test_zstd_frames_tell_their_sizes(tmp_path, texts, level, checksum, told, skipped):
    packer = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=told)
    frames = [packer.compress(text * 50) for text in texts]
    skip = b"\x53\x2a\x4d\x18" + len(skipped).to_bytes(4, "little") + skipped
    data = skip.join(frames)
    size = stretches.frames_size(io.BytesIO(data), len(data))
    assert size == (sum(50 * len(text) for text in texts) if told else None)
    cut = data[: -1 - len(data) // 3]
    assert stretches.frames_size(io.BytesIO(cut), len(cut)) in (
        None,
        *(sum(50 * len(t) for t in texts[:n]) for n in range(4)),
    )


@pytest.mark.parametrize("members", [1, 3])
def test_gzip_tells_the_size_of_one_member(tmp_path, members):
    text = jsonl(rows(texts(0)[:50]))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(text) * members)
    told = stretches.told_size(sources.InputShard(str(path), path.name, "jsonl", "gzip"))
    assert told == (len(text) if members == 1 else None)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 7), st.integers(0, 9))
def test_each_slice_is_drawn_as_often_as_it_stands_for(faulty, every, seed):
    pieces = [
        Slice(0, "", "", "jsonl", n, n + 1, b"x", fault=("corrupt", "") if bad else None)
        for n, bad in enumerate(faulty)
    ]
    found = list(stretches.drawn(pieces, every, np.random.default_rng(seed)))
    assert sum(each.weight for each in found) == len(pieces)
    assert len([each for each in found if not each.piece.fault]) == -(-faulty.count(False) // every)
    assert [each.piece.start for each in found if each.piece.fault] == [n for n, bad in enumerate(faulty) if bad]


def test_a_narrower_interval_with_more(tmp_path, corpora):
    corpus = one_jsonl(tmp_path, corpora[0][0])
    errors = [make_plan(corpus, seq_lens=[512], sample=sample).documents.error for sample in (64_000, 500_000)]
    assert errors[0] > 2 * errors[1] > 0


def test_short_and_long_documents_are_drawn_alike(tmp_path):
    """A document belongs to the block it begins in: each byte as likely would draw long ones more often."""
    some = ["a b " * 4] * 900 + ["a b " * 900] * 100
    corpus = one_jsonl(tmp_path, random.Random(1).sample(some, len(some)))
    found = [make_plan(corpus, seq_lens=[512], sample=64_000, seed=seed) for seed in range(20)]
    assert np.mean([plan.documents.value for plan in found]) == pytest.approx(1000, rel=0.1)
    assert all(plan.quantiles[50].value == plan.quantiles[10].value for plan in found)


@QUICK
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    last=st.sampled_from([b"", b"no line end"]),
    size=st.integers(1, 40),
    longest=st.sampled_from([5, 100]),
)
def test_every_line_is_in_the_block_it_begins_in(tmp_path, lines, last, size, longest):
    data = b"".join(line + b"\n" for line in lines) + last
    path = tmp_path / "lines.jsonl"
    path.write_bytes(data)
    shard = sources.InputShard(str(path), path.name, "jsonl")
    stop = 0
    for low in range(0, len(data), size):
        for piece in stretches.lines_between(shard, low, low + size, longest):
            assert stop == piece.start < low + size
            assert piece.start == 0 or data[piece.start - 1 : piece.start] == b"\n"
            whole = data[piece.start : piece.stop]
            # Of a last line that is too long, enough is held to see that.
            assert piece.data == whole or (
                whole.startswith(piece.data) and len(piece.data.split(b"\n")[-1]) > longest + 1
            )
            stop = piece.stop
    assert stop == len(data)


def test_long_texts_that_are_none(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_bytes(b"\x80" * 50_000 if number % 2 else b"a b " * 12_500)
    plan = make_plan(tmp_path, seq_lens=[64], sample=64_000)
    assert set(plan.faults) == {"invalid_utf8"}
    assert plan.faulty.value == 10
    assert not plan.faulty.told
    assert plan.documents == (20, 20, 20)


@pytest.mark.parametrize("text", ["水" * 5000, "a b " * 5000, "🙂" * 5000])
@pytest.mark.parametrize("size", [4096, 4097, 4098, 4099])
def test_the_front_of_a_text_is_text(tmp_path, text, size):
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    front = stretches.text_front(sources.InputShard(str(path), path.name, "text"), size)
    assert text.startswith(front.data.decode())
    assert size - 4 <= len(front.data) == front.stop <= size


def test_few_documents_of_a_long_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text("To be, or not to be. " * (3000 + 300 * number))
    truth = make_plan(folder, seq_lens=[512], sample=1 << 24)
    plan = make_plan(folder, seq_lens=[512], sample=64_000)
    assert truth.exact
    assert not plan.exact
    assert plan.documents == (20, 20, 20)  # as many as files
    assert plan.ids.value == pytest.approx(truth.ids.value, rel=0.02)
    assert plan.bytes_read < 80_000
    assert any("read in part" in note for note in plan.notes)
    assert any("only 16 documents were read" in note for note in plan.notes)


def test_one_block_alone_says_little():
    part = blocks.Stratum(1000.0, [blocks.Block(np.array([5, 6]), 0, 0.1, 100.0)], False)
    corpus = Corpus([part], 0)
    documents = corpus.estimates({}, {})[0][DOCUMENTS]
    assert documents.value == 20
    assert documents.low == 0
    assert documents.high > 40


# --- bounded work, nothing written ------------------------------------------


class Counting(io.FileIO):
    """A file that counts what is read of all of them."""

    total = 0

    def readinto(self, buffer):
        size = super().readinto(buffer)
        Counting.total += size
        return size

    def readall(self):
        raise AssertionError("nothing may be read to the end at once")


def counting(path, buffering):
    return io.BufferedReader(Counting(path)) if buffering else Counting(path)


@pytest.mark.parametrize("name", ["big.jsonl", "big.txt", "big.jsonl.gz", "big.jsonl.zst", "big.txt.gz"])
def test_reads_about_the_sample_of_a_large_corpus(tmp_path, monkeypatch, name):
    some = [text for seed in range(12) for text in texts(seed)]
    data = jsonl({"text": text} for text in some) if "jsonl" in name else " ".join(some).encode()
    path = write(tmp_path / name, data)
    Counting.total = 0
    monkeypatch.setattr(sources.InputShard, "open", lambda shard, buffer=-1, until=None: counting(shard.uri, buffer))
    plan = make_plan(path, seq_lens=[512], sample=1 << 18)
    assert not plan.exact
    assert plan.bytes_read <= 1.3 * (1 << 18)
    assert 0 < Counting.total <= (4 << 20 if path.suffix in (".gz", ".zst") else 1.3 * (1 << 18) + (1 << 20))
    truth = make_plan(path, seq_lens=[512], sample=1 << 30)
    assert plan.ids.value == pytest.approx(truth.ids.value, rel=0.1)


def test_standard_input_is_read_as_far_as_the_sample(monkeypatch, tmp_path):
    data = jsonl(rows(["To be, or not to be. " * 20] * 20_000))
    stdin = io.BytesIO(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
    plan = make_plan("-", seq_lens=[512], sample=1 << 20)
    assert stdin.tell() < (5 << 20) < len(data)
    assert not plan.exact
    assert plan.bytes_total is None
    assert any("goes on" in note for note in plan.notes)


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(Path(folder).rglob("*"))}


@pytest.mark.parametrize("sample", ["1MiB", "64KiB"])
def test_nothing_is_written(tmp_path, sample):
    lines = runs.lines(5, 200_000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    runs.write_plain(folder / "a.jsonl", lines)
    runs.write_gzip(folder / "b.jsonl.gz", lines)
    runs.write_parquet(folder / "c.parquet", lines)
    runs.write_texts(folder / "d", lines)
    before = tree(tmp_path)
    folder.chmod(0o555)
    done = cli("plan", folder, "--sample", sample, cwd=folder, TMPDIR=str(folder))
    folder.chmod(0o755)
    assert done.returncode == 0
    assert tree(tmp_path) == before


# --- what a user sees --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.jsonl"], 2, "millstream: no such file or folder: missing.jsonl"),
        (["bad.jsonl"], 1, "millstream: none of 2 documents can be used; the first is invalid json: bad.jsonl at 0: "),
        (["bad.parquet"], 1, "millstream: none of 1 documents can be used; the first is corrupt: bad.parquet at 0: "),
        (["good.jsonl", "--seq-len", "x"], 2, "Error: Invalid value for --seq-len: 'x' is no whole number"),
        (["good.jsonl", "--seq-len", "0"], 2, "millstream: --seq-len 0 does not work: a sample needs at least one id"),
        (["good.jsonl", "--strategy", "nonsense"], 2, "millstream: --strategy nonsense does not work: give concat or"),
        (["good.jsonl", "--sample", "0"], 2, "millstream: --sample 0 does not work: give a size such as 64MiB"),
        (["good.jsonl", "--sample", "x"], 2, "Error: Invalid value for '--sample': 'x' is no size; give one such as"),
        (["good.jsonl", "--seed", "-1"], 2, "Error: Invalid value for '--seed': -1 is not in the range x>=0."),
        (["good.jsonl", "--window", "9", "--strategy", "split"], 2, "millstream: --window 9 does not work: it belongs"),
        (["good.jsonl", "--tokenizer", "./none"], 2, "millstream: "),
        ([], 2, "Error: Missing argument 'SOURCE...'."),
    ],
)
def test_bad_requests_are_one_clear_line(tmp_path, monkeypatch, capfd, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("good.jsonl"), rows(["one text"]))
    write_jsonl(Path("empty.jsonl"), [])
    write_jsonl(Path("blank.jsonl"), [b"", b"  "])
    write_jsonl(Path("bad.jsonl"), [b"{", b"[]"])
    Path("bad.parquet").write_bytes(b"no parquet")
    monkeypatch.setattr(sys, "argv", ["millstream", "plan", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert end.value.code == code
    assert out == ""
    assert err.splitlines()[-1].startswith(said)
    assert len(err.splitlines()) == 1 or err.startswith("Usage: ")


def test_a_broken_line_in_a_sample_is_named_and_counted(tmp_path):
    good = rows(["some words in a line"] * 3000)
    corpus = write_jsonl(tmp_path / "some.jsonl", [*good[:1500], b'{"text": "cut', *good[1500:]])
    plan = make_plan(corpus, sample=1 << 20)
    assert plan.exact
    assert plan.faulty.value == 1
    assert plan.faults == {"invalid_json": 1}
    assert plan.examples["invalid_json"].startswith("some.jsonl at ")
    assert "1 invalid json, such as some.jsonl at" in shown(plan)
    broken = write_jsonl(tmp_path / "many.jsonl", [*good, *[b"{"] * 3000])
    plan = make_plan(broken, sample=1 << 17)
    assert plan.faulty.low <= 3000 <= plan.faulty.high
    assert "documents in the whole corpus" in shown(plan)


def test_what_cannot_be_opened_is_a_fault_beside_the_others(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(["some words"] * 9))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip")
    for sample in (1 << 20, 100):
        plan = make_plan(tmp_path, seq_lens=[8], sample=sample)
        assert set(plan.faults) == {"corrupt", "truncated"}
        assert plan.documents.value == 11
    with pytest.raises(DataError, match="none of 2 documents"):
        make_plan([tmp_path / "b.parquet", tmp_path / "c.jsonl.gz"])


def shown(plan, width=120):
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    show_plan(plan, console)
    return console.file.getvalue()


def test_table_and_picture_have_the_numbers(tmp_path, monkeypatch):
    times = itertools.count()
    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: 2.5 * next(times)))
    corpus = write_jsonl(tmp_path / "ids.jsonl", [{"ids": [1] * length} for length in [0, 3, 20, 20, 50, 100, 1000]])
    lines = shown(make_plan(corpus, seq_lens=[64, 100], ids_field="ids")).splitlines()
    assert lines[0] == "7 documents with 1,193 ids"
    assert "all of it, so the numbers are exact" in lines[1]
    assert lines[2] == "  empty     1 document"
    cells = [line.split() for line in lines]
    assert ["32", "█" * 24, "2", "33.3%", "3.4%"] in cells
    assert ["64", "█" * 12, "1", "16.7%", "4.2%", "◂", "64:", "67%", "fit"] in cells
    assert ["128", "█" * 12, "1", "16.7%", "8.4%", "◂", "100"] in cells
    assert ["512", "0", "0.0%", "0.0%"] in cells
    # By hand: 50, 100 and 1,000 are cut by concat; best-fit puts 40 + 20 + 3 and 36 + 20 together, and 50 alone.
    assert ["64", "concat", "18", "0.00%", "50.0%", "16.7%", "100.0%", "1.28", "5.3", "kB", "2.5", "s"] in cells
    assert ["split", "22", "15.27%", "33.3%", "0.0%", "0.0%", "1", "6.2", "kB", "2.5", "s"] in cells
    assert ["best-fit", "19", "1.89%", "33.3%", "0.0%", "83.3%", "1.16", "5.4", "kB", "2.5", "s"] in cells
    assert not any("±" in line for line in lines)


def test_an_estimate_is_shown_as_one(corpora, tmp_path):
    plan = make_plan(one_jsonl(tmp_path, corpora[0][0]), seq_lens=[512], sample=SAMPLE)
    text = shown(plan)
    head = [f"{int(float(f'{number:.4g}')):,}" for number in plan.documents]
    assert f"about {head[0]} documents ({head[1]} to {head[2]}) with about" in text
    assert f"{plan.documents_read:,} documents" in text
    for choice in plan.choices:
        assert f"{choice.samples.value:,}" in text
        assert f"±{choice.samples.error:,}" in text
        assert f"±{choice.truncation.error:.1%}" in text
    for row in plan.lengths:
        assert f"{row.documents.value:,}" in text
    assert "with 95% confidence" in text


def test_json_has_all_of_it(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one text", "another text"] * 2000))
    done = cli("plan", corpus, "--json", "--seq-len", "16,32", "--seq-len", "64", "--sample", "64KiB", "--eos")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    plan = make_plan(corpus, seq_lens=[16, 32, 64], sample=1 << 16, eos=True)
    timed = {"ids_per_second", "choices"}
    assert {k: v for k, v in found.items() if k not in timed} == json.loads(
        json.dumps({k: v for k, v in plan.as_json().items() if k not in timed})
    )
    for shown_, choice in zip(found["choices"], plan.choices, strict=True):
        seconds = shown_.pop("seconds")
        assert 0 <= seconds["low"] <= seconds["value"] <= seconds["high"]
        assert shown_ == {k: v for k, v in json.loads(json.dumps(choice.__dict__)).items() if k != "seconds"} | {
            k: v._asdict() for k, v in choice.__dict__.items() if isinstance(v, Estimate) and k != "seconds"
        }
    assert [(c["seq_len"], c["strategy"]) for c in found["choices"]] == list(
        itertools.product([16, 32, 64], STRATEGIES)
    )


def test_standard_input_and_a_narrow_terminal():
    data = jsonl(rows(["one text", "another, longer text"] * 50))
    done = cli("plan", "-", "--strategy", "concat", stdin=data, COLUMNS="60")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("100 documents with ")
    assert "\x1b" not in done.stdout  # no colours where there is no terminal


def test_the_same_seed_reads_the_same(corpora, tmp_path):
    corpus = one_jsonl(tmp_path, corpora[0][0])
    found = [make_plan(corpus, sample=SAMPLE, seed=seed).as_json()["documents"] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_ctrl_c_is_one_line(tmp_path):
    pipe = tmp_path / "never"
    os.mkfifo(pipe)
    with runs.Run("plan", "-", piped=pipe) as run, open(pipe, "wb") as writer:
        writer.write(jsonl(rows(["one text"] * 30_000)))  # more than pipes hold: most of it has been read
        writer.flush()
        run.signal(signal.SIGINT, group=False)
        code, err = run.end()
    assert code == 130
    assert "Traceback" not in err


if __name__ == "__main__":  # the table in docs/plan.md, for so many draws of each
    draws = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        corpora = with_truth(Path(name), range(20))
        for layout in LAYOUTS:
            folder = Path(name, layout.__name__)
            folder.mkdir()
            hits = hits_of(layout, draws, folder, corpora)
            print(layout.__name__, *(f"{what} {100 * count / draws:.0f}" for what, count in hits.items()))
