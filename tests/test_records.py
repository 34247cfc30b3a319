"""What an unfinished run keeps of itself: run.json and its records, and what is made of them when it goes on."""

import shutil

import msgspec
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream.corpus import sources
from millstream.errors import DataError, RequestError, ResumeRefused, RunError
from millstream.folder import records
from millstream.folder.entries import InputEntry
from millstream.folder.journal import FileState
from millstream.folder.manifest import sealed
from millstream.records import Cursor, Range
from millstream.runs.pack import settings as run_settings
from millstream.runs.pack.inputs import known_inputs
from millstream.store import at

WANTED = {"seq_len": 16, "shard_size": 4096, "workers": 1, "block": 1000, "validation": 0.3, "format": "npy,parquet"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setattr(sources, "READ", 1000)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """(a corpus with a bad line near its end, the same with that line mended)."""
    folder = tmp_path_factory.mktemp("corpora")
    rows = runs.lines(7, 150_000)
    place = 3 * len(rows) // 4
    bad = runs.write_plain(folder / "bad.jsonl", [*rows[:place], b'{"text": broken\n', *rows[place:]])
    return bad, runs.write_plain(folder / "good.jsonl", [*rows[:place], b'{"text": "mended"}\n', *rows[place:]])


@pytest.fixture
def stopped(tmp_path, corpora):
    """A run that stopped at the bad line, which is mended now."""
    source = tmp_path / "corpus.jsonl"
    shutil.copy(corpora[0], source)
    with pytest.raises(DataError):
        millstream.pack_to(tmp_path / "out", source, **WANTED)
    shutil.copy(corpora[1], source)
    millstream.pack_to(tmp_path / "whole", source, **WANTED)
    return tmp_path / "out", source


def names(folder):
    return sorted(path.name for path in (folder / "records").iterdir())


def test_an_unfinished_run_has_a_record_for_each_shard_and_a_finished_one_none(stopped):
    out, source = stopped
    assert len(names(out)) == len(list(out.glob("*samples-*.npy"))) > 6
    assert (out / "run.json").exists()
    assert not (out / "manifest.json").exists()
    assert millstream.pack_to(out, source, **WANTED).resumed
    assert runs.digests(out) == runs.digests(out.parent / "whole")


@pytest.mark.parametrize("lost", ["train-00000.json", "train-00002.json", "validation-00001.json"])
def test_what_is_sealed_behind_a_gap_is_packed_again(stopped, lost):
    out, source = stopped
    (out / "records" / lost).unlink()
    assert millstream.pack_to(out, source, **WANTED).resumed
    assert runs.digests(out) == runs.digests(out.parent / "whole")


def test_a_shard_that_is_sealed_in_any_order_follows_once_the_gap_is_closed(stopped):
    found = list(records.read_shards(at(stopped[0])))
    train = [record for record in found if record.subset == "train"]
    gap = records.sealed_shards([train[3], train[0], train[1]])["train"]
    assert [entry.number for entry in gap.entries] == [0, 1]
    assert [record.entry.number for record in gap.later] == [3]
    assert gap.resume == train[2].begin
    both = records.sealed_shards(reversed(found))
    assert [len(both[name].later) for name in ("train", "validation")] == [0, 0]
    assert both["train"].resume == train[-1].end
    assert records.SealedShards().resume == records.Resume()


@pytest.mark.parametrize("name", ["run.json", "records/train-00001.json"])
def test_a_damaged_record_says_so(stopped, name):
    out, source = stopped
    data = (out / name).read_bytes()
    for damaged in (data[:-9], data.replace(b'"v": 1', b'"v": 2')):
        (out / name).write_bytes(damaged)
        with pytest.raises(RunError, match=rf"{name} is damaged"):
            millstream.pack_to(out, source, **WANTED)
    millstream.pack_to(out, source, **WANTED, overwrite=True)
    assert runs.digests(out) == runs.digests(out.parent / "whole")


def test_a_file_of_a_record_that_is_missing_is_an_error(stopped):
    out, source = stopped
    (out / "segments-00001.npy").unlink()
    with pytest.raises(RunError, match=r"segments-00001\.npy is missing .*overwrite"):
        millstream.pack_to(out, source, **WANTED)


def test_a_run_of_another_form_is_refused_by_the_version_that_began_it(stopped):
    out, source = stopped
    run = msgspec.to_builtins(records.read_run(at(out)))
    (out / "run.json").write_bytes(sealed({**run, "v": 99, "millstream": "9.9"}))
    with pytest.raises(RequestError, match=r"begun by millstream 9\.9.*finish it with that one, or .*overwrite"):
        millstream.pack_to(out, source, **WANTED)


def test_another_pyarrow_goes_on_with_no_run_but_says_of_a_finished_one_that_it_is(stopped, monkeypatch):
    out, source = stopped
    version = run_settings.version
    before = runs.digests(out)
    with monkeypatch.context() as patch:
        patch.setattr(run_settings, "version", lambda name: "99.1" if name == "pyarrow" else version(name))
        with pytest.raises(ResumeRefused, match=r"of pyarrow \d.*, and this is pyarrow 99\.1: install that to go on"):
            millstream.pack_to(out, source, **WANTED)
        assert runs.digests(out) == before
        whole = out.parent / "whole"
        assert millstream.pack_to(whole, source, **WANTED).already
        millstream.pack_to(out.parent / "other", source, **WANTED)
        assert millstream.open(out.parent / "other").settings["writer"] == "pyarrow 99.1"
        assert runs.digests(out.parent / "other").items() - runs.digests(whole).items() == {
            ("manifest.json", runs.sha256(out.parent / "other" / "manifest.json"))
        }
    assert millstream.pack_to(out.parent / "other", source, **WANTED).already
    assert millstream.pack_to(out, source, **WANTED).resumed


def test_inputs_that_were_read_are_compared_even_if_more_came_later(tmp_path):
    """run.json has the inputs that the first call was given; records those that later ones have read."""
    folder = runs.write_texts(tmp_path / "corpus", runs.lines(2, 150_000))
    files = sorted(folder.iterdir())
    last = files[-1]
    good = last.read_bytes()
    last.write_bytes(b"not \xff UTF-8")
    with pytest.raises(DataError):
        millstream.pack_to(tmp_path / "out", folder, **WANTED)
    last.write_bytes(good)
    more = [folder / f"z{number:02}.txt" for number in range(30)]
    for number, path in enumerate(more):
        path.write_text(f"one more, number {number}. " * 400)
    more[-1].write_bytes(b"not \xff UTF-8")
    with pytest.raises(DataError):
        millstream.pack_to(tmp_path / "out", folder, **WANTED)
    more[-1].write_text("it is")
    before = more[3].read_text()
    more[3].write_text(before.replace("more", "less"))
    with pytest.raises(ResumeRefused, match=more[3].name):
        millstream.pack_to(tmp_path / "out", folder, **WANTED)
    more[3].write_text(before)
    assert millstream.pack_to(tmp_path / "out", folder, **WANTED).resumed
    millstream.pack_to(tmp_path / "whole", folder, **WANTED)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


def test_the_last_record_of_an_input_counts():
    a, b, c, d = (InputEntry(name, "text") for name in "abcd")
    read = msgspec.structs.replace(b, bytes=3, ends_sha256="x")
    told = [records.InputsRecord(first=0, inputs=[a, b]), records.InputsRecord(first=1, inputs=[read, d])]
    assert known_inputs([a, b, c], []) == [a, b, c]
    assert known_inputs([a, c], told) == [a, read, d]


marks = st.builds(
    records.Mark,
    st.builds(Cursor, st.integers(0, 9), st.integers(0, 1 << 60), st.none() | st.text(max_size=3)),
    *[st.integers(0, 1 << 60)] * 5,
    st.dictionaries(st.text(max_size=5), st.integers(0, 99), max_size=3),
)


@given(mark=marks, numbers=st.lists(st.integers(0, 1 << 40), min_size=5, max_size=5))
def test_states_come_back_as_they_were(mark, numbers):
    state = records.Resume(mark, *numbers)
    assert msgspec.json.decode(msgspec.json.encode(state), type=records.Resume) == state
    assert records.Resume.of(state.state) == state


spans = st.builds(Range, st.integers(0, 99), st.integers(0, 1 << 60), st.none() | st.integers(1, 1 << 60))


@settings(deadline=None, max_examples=30)
@given(
    ranges=st.lists(spans, min_size=1, max_size=5),
    cut=st.integers(0, 10_000),
    counts=st.lists(st.binary(max_size=40), max_size=3),
)
def test_a_part_is_known_by_its_ranges_and_not_at_all_if_it_is_damaged(tmp_path_factory, ranges, cut, counts):
    folder = tmp_path_factory.mktemp("part")
    inputs = [records.PartInput(ranges[0].source, "a", "jsonl", FileState(1, 2, 3, 4, 5))]
    made = [msgspec.Raw(msgspec.msgpack.encode(each)) for each in counts]
    record = records.PartRecord(made_by=("1", 2, 3), ranges=tuple(ranges), inputs=inputs, counts=made)
    records.record_part(at(folder), record)
    [(name, found)] = records.read_parts(at(folder))
    assert name == records.part_name(ranges) != records.part_name([*ranges, Range(100)])
    assert (found.made_by, found.ranges, found.inputs) == (record.made_by, record.ranges, inputs)
    assert [msgspec.msgpack.decode(each) for each in found.counts] == counts
    [path] = (folder / "records").iterdir()
    data = bytearray(path.read_bytes())
    data[cut % len(data)] ^= 1
    path.write_bytes(data)
    assert list(records.read_parts(at(folder))) == [(name, None)]
