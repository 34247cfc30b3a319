"""What is looked at of a run in a bucket is fetched, and little more."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from helpers import cli
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import RequestError, RunError
from millstream.folder.far import BLOCK, FarRows
from millstream.folder.npy import header
from millstream.records import SEGMENT
from millstream.runs.pack.convert import convert_to
from millstream.store import at

SAMPLES = {"seq_len": 64, "eos": True, "shard_size": 1 << 15}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    lines = (json.dumps({"id": str(n), "text": f"{n} word " * (n % 90)}) for n in range(900))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"strategy": "best-fit", "shuffle": 3, "validation": 0.2},
        {"format": "parquet"},
        {"strategy": "split", "pad_side": "left"},
    ],
    ids=str,
)
def test_samples_are_those_of_a_folder(bucket, corpus, tmp_path, way):
    here, there = str(tmp_path / "run"), f"{bucket}/run"
    for out in (here, there):
        millstream.pack_to(out, corpus, **SAMPLES, **way)
    for subset in millstream.open(here).manifest.subsets:
        one, other = millstream.open(here, subset), millstream.open(there, subset)
        assert len(one) == len(other) > 10
        assert one.fingerprint == other.fingerprint
        for number in [*range(0, len(one), 7), -1]:
            assert (one[number].token_ids == other[number].token_ids).all()
            assert [*one[number].segments] == [*other[number].segments]
            assert one.documents(number) == other.documents(number)
        chosen = [5, 2, 7, len(one) - 1]
        assert (one.batch(chosen).token_ids == other.batch(chosen).token_ids).all()
        assert (one.batch(chosen).cu_seqlens == other.batch(chosen).cu_seqlens).all()
        if one.remainder:
            assert (one.remainder.token_ids == other.remainder.token_ids).all()
        assert one.locate("77") == other.locate("77")
        again = pickle.loads(pickle.dumps(other))
        assert (again[3].token_ids == one[3].token_ids).all()


def asked_of(proxy):
    """How often each file was asked for since the last time."""
    found = Counter(each.path.rpartition("/")[2] for each in proxy.asked)
    proxy.asked.clear()
    return found


def test_a_sample_is_one_request_of_each_file(bucket, tmp_path, proxy):
    """Also the first of an output shard, whose files are larger than what is fetched at once."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"ids": {[number] * 8}}}\n' for number in range(1 << 16)))
    there = f"{bucket}/run"
    millstream.pack_to(there, path, tokenizer=None, ids_field="ids", seq_len=64, shard_size=1 << 20, workers=1)
    shards = millstream.open(there).manifest.subsets["train"].shards
    assert [shard.samples for shard in shards] == [4096, 4096]
    assert min(file.bytes for shard in shards for file in (shard.files.samples, shard.files.segments)) > 2 * BLOCK
    for place in (0, 1, 100, 2048, 4000, 4095):
        dataset = millstream.open(there)
        asked_of(proxy)
        for shard in (1, 0):
            sample = dataset[4096 * shard + place]
            first = (4096 * shard + place) * 8
            assert [segment.document for segment in sample.segments] == [*range(first, first + 8)]
            assert sample.token_ids.tolist() == [number for number in range(first, first + 8) for _ in range(8)]
            assert asked_of(proxy) == {f"samples-0000{shard}.npy": 1, f"segments-0000{shard}.npy": 1}


def test_what_was_fetched_is_not_fetched_again(bucket, corpus, proxy):
    there = f"{bucket}/run"
    millstream.pack_to(there, corpus, **SAMPLES)
    dataset = millstream.open(there)
    last = len(dataset) - 1
    dataset[last]
    proxy.asked.clear()
    dataset[last]
    dataset[last - 1]
    assert proxy.asked == []
    for _ in dataset:
        pass
    size = sum(at(there).size(name) for name in at(there).list() if name.endswith(".npy"))
    assert len(proxy.asked) < 3 * len(at(there).list()) + size / BLOCK


def test_what_is_not_as_it_was_is_told(bucket, corpus):
    there = f"{bucket}/run"
    millstream.pack_to(there, corpus, **SAMPLES)
    at(there).put("samples-00000.npy", at(there).read("samples-00000.npy")[:-3000])
    at(there).delete("segments-00001.npy")
    dataset = millstream.open(there)
    with pytest.raises(RunError, match=r"samples-00000\.npy cannot be used: it is shorter than it was"):
        dataset[0]
    with pytest.raises(RunError, match=r"segments-00001\.npy cannot be read"):
        dataset[dataset.manifest.subsets["train"].shards[0].samples]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=50).map(np.cumsum),
    st.integers(1, 30_000),
    st.lists(st.integers(-1, 260), min_size=1, max_size=20),
)
def test_rows_far_away_are_searched_as_those_here(steps, times, values):
    rows = np.zeros(len(steps) * times, SEGMENT)
    rows["sample"] = np.repeat(np.array(steps, np.int64), times)
    data = header(np.dtype(SEGMENT), rows.shape, 256) + rows.tobytes()
    asked = []

    def fetch(start, stop):
        asked.append((start, stop))
        return data[start:stop]

    far = FarRows(fetch, len(data))
    assert (len(far), far.dtype) == (len(rows), rows.dtype)
    most = int(rows["sample"][-1]) if len(rows) else 0
    for value in values:
        assert far.first(value, "sample", most) == np.searchsorted(rows["sample"], value)
    assert (far[3 : 2 * BLOCK] == rows[3 : 2 * BLOCK]).all()


def test_commands_read_and_convert_it(bucket, corpus, tmp_path):
    here, there = str(tmp_path / "run"), f"{bucket}/run"
    for out in (here, there):
        millstream.pack_to(out, corpus, **SAMPLES)
    for command in (
        ["show", "RUN", "3"],
        ["find", "RUN", "77"],
        ["verify", "RUN"],
        ["verify", "RUN", "--against", corpus],
    ):
        one, other = (cli(*(run if part == "RUN" else part for part in command)) for run in (here, there))
        assert one.returncode == other.returncode == 0, other.stderr
        assert one.stdout.replace(here, "RUN") == other.stdout.replace(there, "RUN")
    formats = ["mds", "nanogpt", "datatrove"]
    convert_to(f"{tmp_path}/out", here, formats)
    at(f"{bucket}/out").put("mds/half", b"")
    with pytest.raises(RequestError, match="has other files"):
        convert_to(f"{bucket}/out", there, formats)
    at(f"{bucket}/out").delete("mds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millstream.exports.out.Place.publish", lambda place: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_to(f"{bucket}/out", there, formats)
    assert "mds" not in convert_to(f"{bucket}/out", there, formats).already
    assert convert_to(f"{bucket}/out", there, formats).already == formats
    one, other = at(f"{tmp_path}/out"), at(f"{bucket}/out")
    names = [name for name in one.list() if name != "exports.json"]
    assert [name for name in other.list() if name != "exports.json"] == names
    assert all(one.read(name) == other.read(name) for name in names)
