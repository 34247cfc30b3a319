"""Where documents end in a sample: the views agree with what is stored, and attention made of them leaks nothing."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
from helpers import read_manifest, without_fsync, write_manifest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import RequestError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PAD = 999
IGNORED = -100


@pytest.fixture(scope="module", autouse=True)
def quick():
    yield from without_fsync()


# --- packed corpora --------------------------------------------------------

ORDERS = [
    {"strategy": "concat", "remainder": "keep"},
    {"strategy": "concat", "remainder": "pad"},
    {"strategy": "concat", "remainder": "keep", "shuffle": 3, "shuffle_window": 300},
    {"strategy": "split"},
    {"strategy": "best-fit", "window": 200},
    {"strategy": "best-fit", "max_segments": 2, "shuffle": 5},
]


@st.composite
def corpora(draw):
    """(N, documents): empty ones, single ids, around N and several N long; no id occurs twice."""
    n = draw(st.integers(1, 12))
    size = st.one_of(st.sampled_from([0, 1, n - 1, n, n + 1]), st.integers(0, 3 * n))
    sizes = draw(st.lists(size, min_size=1, max_size=12))
    ids = itertools.count(1)
    return n, [list(itertools.islice(ids, size)) for size in sizes]


@st.composite
def packed(draw):
    """Samples of a corpus, some of them with a loss mask."""
    n, documents = draw(corpora())
    side = draw(st.sampled_from(["left", "right"]))
    samples = list(millstream.pack(documents, n, pad_id=PAD, pad_side=side, **draw(st.sampled_from(ORDERS))))
    assume(samples)
    marked = draw(st.sampled_from(["none", "all", "some"]))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    return [
        replace(sample, loss=rng.random(len(sample)) < 0.6)
        if marked == "all" or (marked == "some" and k % 2)
        else sample
        for k, sample in enumerate(samples)
    ]


def by_hand(sample):
    """(segment_ids, position_ids, bounds, loss_mask) of a sample, id by id, from its segments alone."""
    owners = [0] * sample.pad_left
    for number, segment in enumerate(sample.segments, 1):
        owners += [number] * segment.length
    owners += [0] * (len(sample) - len(owners))
    positions, bounds, mask = [], [0], []
    for at, owner in enumerate(owners):
        first = at == 0 or owners[at - 1] != owner
        positions.append(0 if first or not owner else positions[-1] + 1)
        if first and at:
            bounds.append(at)
        mask.append(not first and owner > 0 and (sample.loss is None or bool(sample.loss[at])))
    return owners, positions, [*bounds, len(owners)], mask


def check_sample(sample):
    owners, positions, bounds, mask = by_hand(sample)
    assert sample.segment_ids.tolist() == owners
    assert sample.position_ids.tolist() == positions
    assert sample.cu_seqlens.tolist() == bounds
    assert sample.loss_mask.tolist() == mask
    assert sample.labels.tolist() == [int(i) if m else IGNORED for i, m in zip(sample.token_ids, mask, strict=True)]
    kinds = [getattr(sample, name).dtype.name for name in ("segment_ids", "position_ids", "cu_seqlens", "labels")]
    assert kinds == ["int32", "int32", "int32", "int64"]
    assert (np.diff(sample.cu_seqlens) > 0).all()
    # Each view tells the lengths that are stored.
    lengths = [segment.length for segment in sample.segments]
    assert np.bincount(sample.segment_ids, minlength=1)[1:].tolist() == lengths
    runs_ = np.diff(sample.cu_seqlens).tolist()
    padding = len(sample) - sum(lengths)
    left, right = (sample.pad_left, 0) if sample.pad_left else (0, padding)
    assert runs_ == [n for n in [left, *lengths, right] if n]
    begins = np.flatnonzero((sample.position_ids == 0) & (sample.segment_ids > 0)).tolist()
    assert begins == [at for at in sample.cu_seqlens[:-1].tolist() if sample.segment_ids[at]]


@QUICK
@given(packed())
def test_the_views_of_a_sample_agree(samples):
    for sample in samples:
        check_sample(sample)


@QUICK
@given(packed())
def test_a_batch_is_its_samples(samples):
    full = [sample for sample in samples if sample.complete]
    for chosen in filter(None, (full, full[:1], full[::2], samples[-1:])):
        batch = millstream.collate(iter(chosen))
        assert len(batch) == len(chosen)
        for name in ("token_ids", "segment_ids", "position_ids", "loss_mask", "labels"):
            found = getattr(batch, name)
            assert found.tolist() == [getattr(sample, name).tolist() for sample in chosen], name
            assert found.shape == (len(chosen), len(chosen[0]))
        kinds = [batch.segment_ids.dtype, batch.position_ids.dtype, batch.cu_seqlens.dtype]
        assert kinds == [np.int32] * 3
        assert (batch.token_ids.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (np.int64, np.int64, bool)
        shifted = [sample.cu_seqlens[1:] + k * len(sample) for k, sample in enumerate(chosen)]
        assert batch.cu_seqlens.tolist() == [0, *np.concatenate(shifted).tolist()]
        assert batch.cu_seqlens[-1] == batch.token_ids.size
        assert (np.diff(batch.cu_seqlens) > 0).all()
        assert batch.max_seqlen == np.diff(batch.cu_seqlens).max()
        assert type(batch.max_seqlen) is int


def test_what_cannot_be_collated():
    samples = list(millstream.pack([[1, 2, 3, 4, 5]], 2))
    assert len(millstream.collate(samples[:2])) == 2
    assert millstream.collate(samples[2:]).cu_seqlens.tolist() == [0, 1]
    with pytest.raises(RequestError, match="at least one sample"):
        millstream.collate([])
    with pytest.raises(RequestError, match=r"number 0 has 2 ids and number 2 has 1; a kept remainder is shorter"):
        millstream.collate(samples)
    whole = [*millstream.pack([[1, 2]], 2), *millstream.pack([[1, 2, 3]], 3)]
    with pytest.raises(RequestError, match=r"number 0 has 2 ids and number 1 has 3$"):
        millstream.collate(whole)


def test_ids_of_32_bits_are_no_negative_labels():
    batch = millstream.collate(millstream.pack([[2**32 - 2, 2**32 - 1]], 2))
    assert batch.token_ids.tolist() == [[2**32 - 2, 2**32 - 1]]
    assert batch.labels.tolist() == [[IGNORED, 2**32 - 1]]


# --- attention -------------------------------------------------------------


def causal(n):
    return np.tril(np.ones((n, n), bool))


def from_segment_ids(segment_ids):
    same = segment_ids[:, None] == segment_ids[None, :]
    return same & causal(len(segment_ids))


def from_cu_seqlens(cu_seqlens):
    n = int(cu_seqlens[-1])
    mask = np.zeros((n, n), bool)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        mask[begin:end, begin:end] = causal(end - begin)
    return mask


class Attention:
    """One head over embeddings of ids and positions, all of them random."""

    def __init__(self, seed=0, ids=1000, positions=128, width=8):
        rng = np.random.default_rng(seed)
        self.by_id, self.by_position = rng.normal(size=(3, ids, width)), rng.normal(size=(3, positions, width))

    def __call__(self, ids, positions, mask):
        q, k, v = self.by_id[:, ids] + self.by_position[:, positions]
        scores = np.where(mask, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True) @ v


def leaks(attention, ids, positions, owners, mask):
    """(number of the document changed, number of the one that noticed) of all pairs of different documents."""
    before = attention(ids, positions, mask)
    found = set()
    for at in range(len(ids)):
        changed = ids.copy()
        changed[at] = 0  # no id of a corpus
        moved = np.abs(attention(changed, positions, mask) - before).max(1) > 1e-9
        assert moved[at]
        found |= {(int(owners[at]), int(owner)) for owner in set(owners[moved].tolist()) if owner != owners[at]}
    return found


@settings(QUICK, max_examples=30)
@given(packed(), st.integers(0, 9))
def test_attention_does_not_leave_a_document(samples, seed):
    attention = Attention(seed)
    for sample in samples[:6]:
        ids, positions = sample.token_ids.astype(int), sample.position_ids
        mask = from_segment_ids(sample.segment_ids)
        assert np.array_equal(mask, from_cu_seqlens(sample.cu_seqlens))
        assert not leaks(attention, ids, positions, sample.segment_ids, mask)
        found = attention(ids, positions, mask)
        for begin, end in itertools.pairwise(sample.cu_seqlens.tolist()):
            alone = attention(ids[begin:end], np.zeros(end - begin, int), causal(end - begin))
            if sample.segment_ids[begin]:
                alone = attention(ids[begin:end], np.arange(end - begin), causal(end - begin))
            assert np.allclose(found[begin:end], alone)


@settings(QUICK, max_examples=30)
@given(packed(), st.integers(0, 9))
def test_attention_over_a_batch_laid_flat_does_not_leave_a_document(samples, seed):
    chosen = [sample for sample in samples if sample.complete][:4]
    assume(chosen)
    batch = millstream.collate(chosen)
    rows = np.repeat(np.arange(len(batch)), len(chosen[0]))
    owners = rows * 100 + batch.segment_ids.reshape(-1)
    mask = from_cu_seqlens(batch.cu_seqlens)
    assert np.array_equal(mask, from_segment_ids(owners))
    assert not leaks(Attention(seed), batch.token_ids.reshape(-1), batch.position_ids.reshape(-1), owners, mask)


@settings(QUICK, max_examples=20)
@given(packed(), st.integers(0, 9))
def test_a_plain_causal_mask_leaks(samples, seed):
    """What the tests above look for can be found."""
    joined = [sample for sample in samples if len(sample.segments) > 1]
    assume(joined)
    sample = joined[0]
    ids, owners = sample.token_ids.astype(int), sample.segment_ids
    found = leaks(Attention(seed), ids, sample.position_ids, owners, causal(len(ids)))
    numbers = range(1, len(sample.segments) + 1)
    assert found >= {(first, second) for first in numbers for second in numbers if first < second}


# --- run folders -----------------------------------------------------------


def write(path, documents):
    rows = (json.dumps({"id": f"d{k}", "ids": ids}) for k, ids in enumerate(documents))
    path.write_text("".join(row + "\n" for row in rows))
    return path


def pack_ids(folder, documents, n, **options):
    source = write(folder / "corpus.jsonl", documents)
    common = {"tokenizer": None, "ids_field": "ids", "seq_len": n, "pad_id": PAD, "workers": 1}
    millstream.pack_to(folder / "out", source, **common, **options)
    return folder / "out"


@settings(QUICK, max_examples=30)
@given(corpora(), st.sampled_from(ORDERS), st.sampled_from(["left", "right"]), st.sampled_from(["npy", "parquet"]))
def test_the_views_are_those_of_the_stored_segments(tmp_path_factory, corpus, order, side, format):
    n, documents = corpus
    folder = pack_ids(
        tmp_path_factory.mktemp("run"), documents, n, pad_side=side, format=format, shard_size=64, **order
    )
    dataset = millstream.open(folder)
    stored = []
    for path in sorted(Path(folder).glob("segments-*.npy")):
        segments = np.load(path)
        numbers = np.unique(segments["sample"]).tolist()
        stored += [segments["length"][segments["sample"] == number].tolist() for number in numbers]
    rest = dataset.remainder
    samples = [*dataset, *([rest] if rest else [])]
    assert [[segment.length for segment in sample.segments] for sample in samples] == stored
    for sample in samples:
        assert sample.loss is None
        check_sample(sample)
        filled = sample.token_ids[sample.segment_ids > 0].tolist()
        assert filled == [i for s in sample.segments for i in documents[s.document][s.start : s.start + s.length]]
    if len(dataset):
        assert millstream.collate(dataset).token_ids.tolist() == [sample.token_ids.tolist() for sample in dataset]


def add_loss(folder, masked):
    """Give a run of ids a loss mask as a run of conversations has it: `masked(ids)` of every sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = read_manifest(str(folder))
    manifest["settings"]["chat"] = {"loss": "replies"}

    def entry(path):
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": runs.sha256(path)}

    for shard in manifest["subsets"]["train"]["shards"]:
        path = folder / shard["files"]["samples"]["name"]
        if path.suffix == ".npy":
            loss = folder / path.name.replace("samples", "loss")
            np.save(loss, masked(np.load(path)))
            shard["files"]["loss"] = entry(loss)
        else:
            table = pq.read_table(path)
            ids = np.array(table["input_ids"].to_pylist(), np.int32).reshape(-1, manifest["settings"]["seq_len"])
            labels = pa.array(np.where(masked(ids), ids, IGNORED).tolist(), pa.list_(pa.int32()))
            table = table.drop_columns([name for name in table.column_names if name == "labels"])
            pq.write_table(table.append_column("labels", labels), path, row_group_size=2)
            shard["files"]["samples"] |= entry(path)
    kept = manifest["subsets"]["train"]["remainder"]
    if "name" in kept:
        np.save(folder / "remainder-loss.npy", masked(np.load(folder / kept["name"])))
        kept["loss"] = entry(folder / "remainder-loss.npy")
    write_manifest(str(folder), manifest)
    return folder


def odd(ids):
    return (ids % 2 == 1) & (ids != PAD)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(map(str, order.values())))
def test_a_dataset_has_the_loss_mask_of_its_run(tmp_path, order, format, side):
    documents = [list(range(1, 12)), [], [20], list(range(31, 90)), [100, 101, 102]]
    folder = pack_ids(tmp_path, documents, 8, pad_side=side, format=format, shard_size=100, **order)
    assert all(sample.loss is None for sample in millstream.open(folder))
    dataset = millstream.open(add_loss(folder, odd))
    rest = dataset.remainder
    samples = [*dataset, *([rest] if rest else [])]
    assert len(samples) > 8
    assert (rest is not None) == (order.get("remainder") == "keep")
    for sample in samples:
        assert sample.loss.dtype == bool
        assert sample.loss.tolist() == odd(np.asarray(sample.token_ids)).tolist()
        check_sample(sample)
    assert dataset[0].loss.flags.writeable == (format != "npy")  # a view of the file
    batch = millstream.collate(dataset)
    assert batch.loss_mask.tolist() == [sample.loss_mask.tolist() for sample in dataset]
    assert set(batch.labels[~batch.loss_mask].tolist()) == {IGNORED}


def test_padding_with_labels_is_no_loss_mask(tmp_path):
    """A Parquet run that can pad has labels too, of which only a run of conversations makes a loss mask."""
    folder = pack_ids(tmp_path, [[1, 2, 3]], 2, strategy="split", format="parquet")
    assert [sample.loss for sample in millstream.open(folder)] == [None, None]
