"""Batches by columns: what one id after the other would give, in new memory and in memory taken again."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import millstream
from millstream.errors import RequestError
from millstream.folder.dataset import gather
from millstream.samples import Arrays, Batch, Sample, Segment, collate, columns_of

ARRAYS = ("token_ids", "segment_ids", "position_ids", "loss_mask", "labels", "cu_seqlens")


@st.composite
def batches(draw, n=None):
    """Samples of one length, each with some segments, padding on one side, and perhaps a loss mask."""
    length = n or draw(st.integers(1, 12))
    samples = []
    for number in range(draw(st.integers(1, 4))):
        cuts = sorted(draw(st.sets(st.integers(0, length), min_size=1)))
        lengths = np.diff([0, *cuts]).tolist() if draw(st.booleans()) else np.diff(cuts).tolist()
        segments = tuple(Segment(number, 0, size) for size in lengths if size)
        padding = length - sum(segment.length for segment in segments)
        loss = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
        samples.append(
            Sample(
                np.array(draw(st.lists(st.integers(0, 65535), min_size=length, max_size=length)), np.uint16),
                segments,
                pad_left=draw(st.sampled_from([0, padding])),
                loss=None if loss is None else np.array(loss),
            )
        )
    return samples


def one_by_one(samples):
    """The same, one id after the other."""
    found = {name: [] for name in ARRAYS}
    found["token_ids"] = [sample.token_ids.tolist() for sample in samples]
    bounds = [0]
    for sample in samples:
        right = len(sample) - sample.pad_left - sum(segment.length for segment in sample.segments)
        runs = [(0, sample.pad_left), *((n, one.length) for n, one in enumerate(sample.segments, 1)), (0, right)]
        bounds += [size for _, size in runs if size]
        ids = [(number, place) for number, size in runs for place in range(size)]
        asked = [number > 0 and place > 0 for number, place in ids]
        if sample.loss is not None:
            asked = [one and learned for one, learned in zip(asked, sample.loss.tolist(), strict=True)]
        found["segment_ids"].append([number for number, _ in ids])
        found["position_ids"].append([place if number else 0 for number, place in ids])
        found["loss_mask"].append(asked)
        labels = [own if one else -100 for own, one in zip(sample.token_ids.tolist(), asked, strict=True)]
        found["labels"].append(labels)
    found["cu_seqlens"] = np.cumsum(bounds).tolist()
    return found, max(bounds)


def check(batch, samples):
    expected, longest = one_by_one(samples)
    assert {name: getattr(batch, name).tolist() for name in ARRAYS} == expected
    assert (batch.max_seqlen, len(batch)) == (longest, len(samples))
    dtypes = {name: getattr(batch, name).dtype.name for name in ARRAYS}
    assert dtypes == dict(zip(ARRAYS, ("int64", "int32", "int32", "bool", "int64", "int32"), strict=True))


@given(batches())
def test_a_batch_is_what_its_samples_say(samples):
    batch = collate(samples)
    check(batch, samples)
    check(pickle.loads(pickle.dumps(batch)), samples)
    for number, sample in enumerate(samples):
        for name in ("segment_ids", "position_ids", "loss_mask", "labels"):
            assert getattr(sample, name).tolist() == getattr(batch, name)[number].tolist()


@given(st.lists(batches(6), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_memory_is_taken_again_when_nobody_looks_at_it(several, reuse, held):
    """And a batch that is held, or any view of it, stays as it is; with `reuse` until the next."""
    arrays, kept = Arrays(reuse), []
    for samples in several:
        batch = Batch(columns_of(samples, arrays), arrays)
        check(batch, samples)
        views = {name: getattr(batch, name).reshape(-1)[1:] for name in ARRAYS}
        if held and not reuse:
            kept.append((views, {name: view.copy() for name, view in views.items()}))
        del batch, views
    for views, copies in kept:
        assert all(np.array_equal(views[name], copies[name]) for name in ARRAYS)


def test_memory_is_the_same_again():
    arrays = Arrays()
    first = arrays.take("any", (2, 3), np.int64)
    second, view = arrays.take("any", (2, 3), np.int64), first[1:].reshape(-1)
    places = [array.ctypes.data for array in (first, second)]
    assert places[0] != places[1]
    del first
    third = arrays.take("any", (2, 3), np.int64)
    assert third.ctypes.data not in places
    assert view.base is not None
    del view
    assert arrays.take("any", (2, 3), np.int64).ctypes.data == places[0]
    again = Arrays(reuse=True)
    one = again.take("any", (2, 3), np.int64)
    assert again.take("any", (2, 3), np.int64) is one
    assert again.take("any", (1, 3), np.int64).shape == (1, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs that differ in how they pack and pad, of documents with ids that tell them apart."""
    base = tmp_path_factory.mktemp("runs")
    lines = [
        f'{{"text": "{" ".join(["a word", "or two"][number % 2] for _ in range(number % 7 + 1))}"}}'
        for number in range(60)
    ]
    (base / "corpus.jsonl").write_text("\n".join(lines))
    chats = [f'{{"prompt": "word", "completion": "{" or two" * (1 + number % 5)}"}}' for number in range(40)]
    (base / "chats.jsonl").write_text("\n".join(chats))
    how = {
        "plain": {},
        "left": {"strategy": "best-fit", "pad_id": 0, "pad_side": "left"},
        "right": {"strategy": "split", "pad_id": 0, "shard_size": 256},
        "parquet": {"format": "parquet"},
        "masked": {"chat": True, "eos": True},
    }
    for name, settings in how.items():
        source = "chats.jsonl" if "chat" in settings else "corpus.jsonl"
        millstream.pack_to(str(base / name), str(base / source), seq_len=16, **settings)
    return [millstream.open(str(base / name)) for name in how]


@given(st.data())
def test_a_batch_gathered_from_folders_is_the_collated_one(folders, data):
    which = data.draw(st.lists(st.integers(0, len(folders) - 1), min_size=1, max_size=9))
    numbers = [data.draw(st.integers(-len(folders[each]), len(folders[each]) - 1)) for each in which]
    samples = [folders[each][number] for each, number in zip(which, numbers, strict=True)]
    check(Batch(gather(folders, np.array(which), np.array(numbers))), samples)
    check(folders[2].batch([3, 1]), [folders[2][3], folders[2][1]])


def test_what_cannot_be_gathered_is_named(folders):
    with pytest.raises(RequestError, match="nothing to collate"):
        folders[0].batch([])
    with pytest.raises(IndexError, match="sample 10000 of"):
        folders[0].batch([10_000])
    with pytest.raises(TypeError, match="float"):
        folders[0].batch([1.5])


def test_a_fingerprint_is_of_the_samples(folders, tmp_path):
    assert len({dataset.fingerprint for dataset in folders}) == len(folders)
    source = folders[0].folder.replace("plain", "corpus.jsonl")
    millstream.pack_to(str(tmp_path / "elsewhere"), source, seq_len=16)
    assert millstream.open(str(tmp_path / "elsewhere")).fingerprint == folders[0].fingerprint
