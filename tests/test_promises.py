"""The promises of a pack run as properties: nothing lost, in order, the same bytes, a ledger that balances."""

import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import LedgerError
from millstream.folder.entries import Ledger
from millstream.records import TokenBatch
from millstream.runs.pack.ledger import check_ledger
from millstream.runs.pack.packing import pack_to
from millstream.stream.line import STRATEGIES, Line, Strategy

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """(N, documents): empty ones, single ids, and long ones of up to 50 N."""
    n = draw(st.integers(1, 12))
    length = st.one_of(st.just(0), st.just(1), st.integers(0, 3 * n), st.just(n), st.just(50 * n))
    lengths = draw(st.lists(length, max_size=12))
    start = draw(st.integers(0, 60_000))
    return n, [[(start + 7 * d + i) % 65_536 for i in range(size)] for d, size in enumerate(lengths)]


def write_ids(path: Path, documents: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{n}", "input_ids": ids}) + "\n" for n, ids in enumerate(documents)))
    return path


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.name != "journal.jsonl")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lecture_pack(n: int, documents: list[list[int]]) -> Iterator[list[int]]:
    buffer: list[int] = []
    for ids in documents:
        buffer.extend(ids)
        while len(buffer) >= n:
            yield buffer[:n]
            del buffer[:n]
    if buffer:
        yield buffer


@QUICK
@given(corpora(), st.sampled_from([40, 200, 100_000]), st.sampled_from([1, 64, 4096]))
def test_ids_in_are_ids_out_in_order(tmp_path_factory, corpus, shard_size, block):
    n, documents = corpus
    folder = tmp_path_factory.mktemp("run")
    source = write_ids(folder / "corpus.jsonl", documents)
    report = pack_to(
        folder / "out", source, tokenizer=None, ids_field="input_ids", seq_len=n, shard_size=shard_size, block=block
    )
    dataset = millstream.open(folder / "out")
    rest = [dataset.remainder.token_ids.tolist()] if dataset.remainder else []
    assert [sample.token_ids.tolist() for sample in dataset] + rest == list(lecture_pack(n, documents))
    assert report.ledger["documents"]["in"] == len(documents)
    assert report.ledger["documents"]["empty"] == sum(not ids for ids in documents)
    assert report.ledger["ids"]["in"] == sum(map(len, documents))
    # Every segment holds just the ids of its document that it names.
    for sample in [*dataset, *([dataset.remainder] if dataset.remainder else [])]:
        spans = [documents[s.document][s.start : s.start + s.length] for s in sample.segments]
        assert functools.reduce(operator.iadd, spans, []) == sample.token_ids.tolist()
    # A document is split exactly if its ids are in more than one sample.
    places = [dataset.find(f"d{number}") for number in range(len(documents))]
    assert sum(len({place.sample for place in found}) > 1 for found in places) == report.ledger["documents"]["split"]
    assert [sum(place.length for place in found) for found in places] == [len(ids) for ids in documents]
    assert millstream.verify(folder / "out").ok


@QUICK
@given(corpora(), st.sampled_from(["right", "left"]), st.sampled_from([40, 100_000]))
def test_split_pads_each_piece_of_each_document(tmp_path_factory, corpus, side, shard_size):
    n, documents = corpus
    folder = tmp_path_factory.mktemp("run")
    source = write_ids(folder / "corpus.jsonl", documents)
    options = {"strategy": "split", "pad_id": 70_000, "pad_side": side, "shard_size": shard_size}
    pack_to(folder / "out", source, tokenizer=None, ids_field="input_ids", seq_len=n, **options)
    pieces = [ids[i : i + n] for ids in documents for i in range(0, len(ids), n)]
    padded = [[70_000] * (n - len(p)) + p if side == "left" else p + [70_000] * (n - len(p)) for p in pieces]
    dataset = millstream.open(folder / "out")
    assert [sample.token_ids.tolist() for sample in dataset] == padded
    for sample, piece in zip(dataset, pieces, strict=True):
        assert sample.token_ids[sample.segment_ids > 0].tolist() == piece
    assert millstream.verify(folder / "out").ok


@QUICK
@given(corpora(), st.sampled_from(["drop", "pad"]))
def test_remainder_is_dropped_or_padded_and_counted(tmp_path_factory, corpus, policy):
    n, documents = corpus
    folder = tmp_path_factory.mktemp("run")
    source = write_ids(folder / "corpus.jsonl", documents)
    report = pack_to(
        folder / "out", source, tokenizer=None, ids_field="input_ids", seq_len=n, remainder=policy, pad_id=9
    )
    flat = functools.reduce(operator.iadd, documents, [])
    left = len(flat) % n
    ids = report.ledger["ids"]
    assert ids["dropped"] == (left if policy == "drop" else 0)
    assert ids["padding"] == ((n - left) % n if policy == "pad" and left else 0)
    stored = [i for sample in millstream.open(folder / "out") for i in sample.token_ids.tolist()]
    assert stored == (flat[: len(flat) - left] if policy == "drop" else flat + [9] * ids["padding"])
    assert millstream.verify(folder / "out").ok


def batches(documents: list[list[int]], cuts: list[int]) -> list[TokenBatch]:
    """The documents in batches that end wherever `cuts` says, inside documents too."""
    flat = [(d, i, value) for d, ids in enumerate(documents) for i, value in enumerate(ids)]
    empty = {d for d, ids in enumerate(documents) if not ids}
    bounds = [0, *sorted(cut % (len(flat) + 1) for cut in cuts), len(flat)]
    made, shown = [], -1
    for low, high in itertools.pairwise(bounds):
        part = flat[low:high]
        rows: list[tuple[int, int, int]] = []  # document, start, length
        for d, i, _ in part:
            while shown < d - 1 or (shown < d and d in empty):
                shown += 1
                if shown in empty:
                    rows.append((shown, 0, 0))
            if not rows or rows[-1][0] != d:
                rows.append((d, i, 0))
            rows[-1] = (d, rows[-1][1], rows[-1][2] + 1)
            shown = max(shown, d)
        if high == len(flat):
            rows += [(d, 0, 0) for d in sorted(empty) if d > shown]
            shown = len(documents)
        is_open = bool(rows) and rows[-1][1] + rows[-1][2] < len(documents[rows[-1][0]])
        ordinal, start, length = (np.array([row[k] for row in rows], np.int64) for k in range(3))
        ids = np.array([value for *_, value in part], np.uint32)
        names = [str(d) for d, *_ in rows]
        made.append(TokenBatch(ids, length, ordinal.astype(np.uint64), start, names, ordinal * 0, ordinal * 0, is_open))
    return made


@settings(QUICK, max_examples=100)
@given(
    corpora(),
    st.lists(st.integers(0, 10**6), max_size=5),
    st.sampled_from(STRATEGIES),
    st.sampled_from([None, 0, 7]),
    st.sampled_from([1, 100, 300, 1000]),
    st.sampled_from([1, 300, 1000]),
)
def test_packers_do_not_depend_on_batches_even_inside_documents(corpus, cuts, name, shuffle, window, shuffle_window):
    n, documents = corpus
    strategy = Strategy(name, n, 99, window=window, shuffle=shuffle, shuffle_window=shuffle_window)

    def run(cuts: list[int]) -> tuple[list[Any], list[Any], list[Any]]:
        line = Line(strategy, np.dtype(np.uint32))
        samples, segments, ended = [], [], []
        some = [packed for batch in batches(documents, cuts) for packed in line.feed(batch)]
        for packed in [*some, *line.flush()]:
            assert packed.first == len(samples)
            segments += [(s["document"], s["start"], s["length"], packed.first + s["sample"]) for s in packed.segments]
            samples += packed.ids.tolist()
            columns = (packed.ended.ordinal, packed.ended.length, packed.ended.last_sample, packed.ended.split)
            ended += zip(*(column.tolist() for column in columns), strict=True)
        rest = line.finish()
        return [*samples, rest.ids.tolist()], [*segments, *rest.segments.tolist()], ended

    assert run(cuts) == run([])


@pytest.mark.parametrize(
    ("seq_len", "order"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(7, {}, marks=pytest.mark.slow),
        (128, {}),
        pytest.param(128, {"strategy": "best-fit", "window": 30_000}, marks=pytest.mark.slow),
        (64, {"strategy": "best-fit", "window": 30_000, "shuffle": 1, "shuffle_window": 5_000, "max_segments": 4}),
        pytest.param(7, {"shuffle": 2, "shuffle_window": 20_000}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_bytes_for_any_number_of_workers(tmp_path, seq_len, order):
    lines = [json.dumps({"id": n, "text": f"document {n} " * (n % 97)}) for n in range(3000)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    seen = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        options = {"seq_len": seq_len, "shard_size": 64 << 10, "eos": True, "validation": 0.1, "memory": 4 << 30}
        pack_to(out, tmp_path / "corpus.jsonl", workers=workers, block=64 << 10, **options, **order)
        seen.append(hashes(out))
    assert len(seen[0]) > 9
    assert seen[0] == seen[1] == seen[2]


def test_a_ledger_that_does_not_balance_is_an_error():
    documents = {"in": 3, "whole": 1, "split": 1, "truncated": 0, "left_out": 0, "empty": 0, "faulty": 0}
    ids = {"in": 5, "text": 5, "special": 0, "in_samples": 4, "remainder": 1, "dropped": 0, "cut_off": 0}
    with pytest.raises(LedgerError, match="3 documents came in and 2"):
        check_ledger(Ledger(documents, ids, 0, {}))
    with pytest.raises(LedgerError, match="5 ids came in and 4"):
        check_ledger(Ledger({**documents, "in": 2}, {**ids, "remainder": 0}, 0, {}))


def test_stored_shards_are_plain_npy_and_parquet(tmp_path):
    import pyarrow.parquet as pq

    source = write_ids(tmp_path / "corpus.jsonl", [[1, 2, 3], [], [4, 5, 6, 7]])
    for name in ("npy", "parquet"):
        pack_to(tmp_path / name, source, tokenizer=None, ids_field="input_ids", seq_len=2, format=name)
    samples = np.load(tmp_path / "npy/samples-00000.npy", mmap_mode="r")
    assert samples.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert samples.dtype == np.uint32
    assert np.load(tmp_path / "npy/remainder.npy").tolist() == [7]
    table = pq.read_table(tmp_path / "parquet/samples-00000.parquet")
    assert table["input_ids"].to_pylist() == [[1, 2], [3, 4], [5, 6]]
    assert table["seq_lengths"].to_pylist() == [[2], [1, 1], [2]]
    assert table["documents"].to_pylist() == [[0], [0, 2], [2]]
    views = [millstream.open(tmp_path / name) for name in ("npy", "parquet")]
    assert [s.segments for s in views[0]] == [s.segments for s in views[1]]
    assert [s.token_ids.tolist() for s in views[0]] == [s.token_ids.tolist() for s in views[1]]


def test_dataset_is_a_sequence_of_samples(tmp_path):
    source = write_ids(tmp_path / "corpus.jsonl", [[1, 2, 3], [4, 5, 6, 7]])
    pack_to(tmp_path / "out", source, tokenizer=None, ids_field="input_ids", seq_len=2)
    dataset = millstream.open(tmp_path / "out")
    assert len(dataset) == 3
    assert dataset[-1].token_ids.tolist() == [5, 6]
    assert [s.token_ids.tolist() for s in dataset[1:]] == [[3, 4], [5, 6]]
    ids = dataset[0].token_ids
    assert type(ids) is np.ndarray
    assert not ids.flags.owndata  # but a view
    assert not ids.flags.writeable  # of the file
    with pytest.raises(IndexError):
        dataset[3]
    sample = dataset[1]
    assert sample.segment_ids.tolist() == [1, 2]
    assert sample.position_ids.tolist() == [0, 0]
    assert sample.cu_seqlens.tolist() == [0, 1, 2]
    assert [(part.id, part.start, part.length) for part in dataset.documents(1)] == [("d0", 2, 1), ("d1", 0, 1)]
    assert [(place.sample, place.start, place.length) for place in dataset.find("d1")] == [
        (1, 0, 1),
        (2, 1, 2),
        (3, 3, 1),
    ]
    with pytest.raises(KeyError):
        dataset.find("nobody")


@pytest.mark.parametrize("length", [5, 500_000])
def test_a_sample_of_an_endless_source_costs_bounded_work(length):
    pulled = 0

    def endless() -> Iterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield "word " * (length // 5)

    stream = millstream.pack(millstream.tokenize(endless()), 2048)
    for _ in range(3):
        assert len(next(stream)) == 2048
    stream.close()
    assert pulled <= 8 * (3 * 2048 // (length // 5) + 1)
    assert list(stream) == []


@QUICK
@given(corpora(), st.integers(0, 40))
def test_streams_go_on_from_their_state(corpus, stop):
    n, documents = corpus
    whole = [(s.token_ids.tolist(), s.segments) for s in millstream.pack(documents, n)]
    stream = millstream.pack(documents, n)
    head = [(s.token_ids.tolist(), s.segments) for s, _ in zip(stream, range(stop), strict=False)]
    state = json.loads(json.dumps(stream.state()))
    if len(head) < stop or not head:  # zip has pulled one more, or nothing was pulled
        return
    tail = [(s.token_ids.tolist(), s.segments) for s in millstream.pack(documents, n, state=state)]
    assert whole[: len(whole) - len(tail)] + tail == whole
    assert len(whole) - len(tail) in (stop, stop + 1)


def test_read_goes_on_from_its_state(tmp_path):
    lines = [json.dumps({"id": n, "text": f"text {n}"}) if n % 7 else "" for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("plain")
    sources = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    whole = list(millstream.read(sources))
    for stop in (1, 7, 100, len(whole) - 1, len(whole)):
        stream = millstream.read(sources)
        head = [next(stream) for _ in range(stop)]
        assert head + list(millstream.read(sources, state=stream.state())) == whole


@pytest.mark.parametrize("bad", [[[1, -2]], [[2**32]], [[1.5]], ["text"], [[[1]]]])
def test_ids_that_are_none_raise(bad):
    with pytest.raises(millstream.errors.MillstreamError):
        list(millstream.pack(bad, 2))
