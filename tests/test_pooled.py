"""Several workers write what one does: any corpus, in parts and pieces of any size, whoever is killed and goes on."""

import contextlib
import os
import platform
import random
import shutil
from typing import ClassVar

import fuzz
import pytest
import runs
from helpers import bad_sector, faults, pack, read_little, run_bytes, without_fsync
from here import Here, pooled
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import write_kind

from millstream.corpus.sources import InputShard
from millstream.errors import DataError, RequestError, RunError
from millstream.folder.records import read_shards, sealed_shards
from millstream.folder.shards import ShardWriter
from millstream.runs.pack import driver, run, subset
from millstream.runs.pack.site import site_of
from millstream.runs.pack.spill import most_of
from millstream.runs.pack.traffic import Traffic
from millstream.runs.pack.writing import WriteShards
from millstream.store import at
from millstream.store.local import LocalStore

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)


def bytes_or_error(folder, sources, **wanted):
    """What a run leaves in its folder, or the words of its error."""
    try:
        pack(folder, sources, memory=8 << 30, **wanted)
    except (DataError, RequestError) as error:
        return str(error).replace(str(folder), "")
    assert not [name for name in os.listdir(folder) if name in ("run.json", "records", "pieces")]
    return run_bytes(folder)


@pytest.mark.parametrize("seed", range(20))
def test_any_corpus_by_several_is_that_of_one(tmp_path, seed):
    chance, case = random.Random(seed), fuzz.case_of(seed)
    (tmp_path / "corpus").mkdir()
    fuzz.write(case, tmp_path / "corpus", chance)
    wanted = {"on_error": "skip", **case.settings, "validation": chance.choice([0.0, 0.0, 0.3])}
    wanted["limit"] = chance.choice([None, None, 1, 17])
    wanted["block"] = chance.choice([1, 300, 1 << 20])
    wanted["format"] = chance.choice(["npy", "parquet", "npy,megatron", "parquet,npy,mds"])
    whole = bytes_or_error(tmp_path / "one", [tmp_path / "corpus"], **wanted, workers=1)
    sizes = {"part": chance.choice([60, 500, 1 << 20]), "piece": chance.choice([1, 500, 1 << 20])}
    sizes["large"] = chance.choice([0, 64 << 20])
    with pooled(seed, **sizes, bound=chance.choice([0, 5000, 1 << 30])):
        found = bytes_or_error(tmp_path / "several", [tmp_path / "corpus"], **wanted, workers=chance.choice([2, 5]))
    assert found == whole


@pytest.fixture(params=["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def middle(tmp_path, request):
    """(A folder of three files, the name of the one in the middle, a byte in the middle of it.)"""
    folder, name = tmp_path / "corpus", request.param
    folder.mkdir()
    runs.write_plain(folder / "0.jsonl", runs.lines(1, 3_000))
    write = {"gz": runs.write_gzip, "jsonl": runs.write_plain, "parquet": runs.write_parquet}.get(name.split(".")[-1])
    if write:
        write(folder / name, runs.lines(2, 20_000))
    else:
        (folder / name).write_text("one word and another " * 1000)
    runs.write_plain(folder / "z.jsonl", runs.lines(3, 3_000))
    return folder, f"corpus/{name}", (folder / name).stat().st_size // 2


def test_a_disk_that_fails_in_the_middle_of_a_file_is_told_alike_by_one_and_by_several(tmp_path, middle, monkeypatch):
    """What could be read before is kept, if one goes on; all behind it in that file is left out, and told."""
    folder, name, at = middle
    read_little(monkeypatch, 500)
    with bad_sector(name, at):
        told = bytes_or_error(tmp_path / "stopped", [folder], seq_len=16, workers=1)
        whole = bytes_or_error(tmp_path / "one", [folder], seq_len=16, on_error="skip", workers=1)
        for large in (0, 1 << 30):
            with pooled(1, part=2000, large=large):
                several = tmp_path / f"several-{large}"
                assert bytes_or_error(several, [folder], seq_len=16, on_error="skip", workers=3) == whole
                assert bytes_or_error(tmp_path / f"stopped-{large}", [folder], seq_len=16, workers=3) == told
    assert f"{name}" in told
    assert "cannot be read: Input/output error" in told
    [fault] = faults(tmp_path / "one")
    assert (fault["reason"], fault["source"]) == ("unreadable", name)
    assert pack(tmp_path / "stopped", folder, seq_len=16, workers=1).resumed
    pack(tmp_path / "good", folder, seq_len=16)
    assert run_bytes(tmp_path / "stopped") == run_bytes(tmp_path / "good")
    assert run_bytes(tmp_path / "good") != whole


@pytest.mark.parametrize("large", [0, 1 << 30])
def test_what_another_machine_cannot_read_is_no_fault_of_the_corpus(tmp_path, middle, monkeypatch, large):
    """It may be read elsewhere, so that the run ends, whatever on_error says, and goes on."""
    folder, name, at = middle
    read_little(monkeypatch, 500)
    wanted = {"seq_len": 16, "on_error": "skip", "shard_size": 512, "memory": 8 << 30}
    with pooled(1, part=2000, large=large, afar=True):
        with bad_sector(name, at), pytest.raises(RunError) as raised:
            pack(tmp_path / "out", folder, **wanted, workers=3)
        told = f"{name} cannot be read on {platform.node()}: Input/output error; where several machines work on a run"
        assert told in str(raised.value)
        assert pack(tmp_path / "out", folder, **wanted, workers=3).resumed
    pack(tmp_path / "whole", folder, **wanted, workers=1)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


@pytest.mark.parametrize("afar", [False, True])
def test_a_file_that_ends_earlier_on_another_machine_is_told(tmp_path, middle, monkeypatch, afar):
    """Where all workers are here, it is looked at when it has been read."""
    folder, name, _ = middle
    size = InputShard.size
    monkeypatch.setattr(InputShard, "size", lambda shard: size(shard) - (shard.called == name))
    with pooled(1, part=2000, afar=afar), pytest.raises(RunError) if afar else contextlib.nullcontext() as raised:
        pack(tmp_path / "out", folder, seq_len=16, on_error="skip", workers=3, memory=8 << 30)
    real = size(InputShard(str(folder.parent / name), name, "jsonl"))
    assert not afar or f"{name} has {real - 1:,} bytes on {platform.node()} and {real:,} where" in str(raised.value)


def test_it_is_known_before_which_shards_fill(tmp_path, monkeypatch):
    """What is known to fill is hashed as it is written, and the last shard once, when it is."""
    found = []

    class Told(ShardWriter):
        def __init__(self, *given, fills):
            super().__init__(*given, fills=fills)
            self.fills = fills

        def seal(self):
            found.append((self.number, self.fills, self.samples == self.shape.per_shard))
            return super().seal()

    monkeypatch.setattr(subset, "ShardWriter", Told)
    (tmp_path / "a.jsonl").write_bytes(b"".join(runs.lines(0, 30_000)))
    with pooled(0, part=3000):
        pack(tmp_path / "out", tmp_path / "a.jsonl", seq_len=16, shard_size=4096, workers=2, memory=8 << 30)
    assert [number for number, _, _ in sorted(found)] == list(range(len(found)))
    assert [fills for _, fills, _ in sorted(found)] == [True] * (len(found) - 1) + [False]
    assert all(fills == filled for _, fills, filled in found)


def test_no_place_for_pieces_is_told_before_anything_is_done(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(runs.lines(0, 3000)))
    (tmp_path / "file").touch()
    wanted = {"seq_len": 16, "memory": 8 << 30}
    with pytest.raises(RequestError, match=r"cannot be made: Not a directory; give another folder as spill"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", **wanted, workers=2, spill=tmp_path / "file")
    # Nothing was made of it, and who needs no place is not asked for one.
    wanted["seq_len"] = 8
    pack(tmp_path / "out", tmp_path / "a.jsonl", **wanted, workers=1, spill=tmp_path / "file", on_error="skip")


def test_no_memory_is_told_in_words(tmp_path, monkeypatch):
    def batch(self, piece):
        raise MemoryError

    (tmp_path / "a.jsonl").write_bytes(b"".join(runs.lines(0, 3000)))
    monkeypatch.setattr(WriteShards, "batch", batch)
    with pooled(0), pytest.raises(RunError, match="no memory left: fewer workers need less"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", workers=2, memory=8 << 30, on_error="skip")


# --- interrupted, and gone on with by others --------------------------------


SIZES = {"part": 1000, "piece": 500}


class _Interrupted(BaseException):
    pass


@contextlib.contextmanager
def interrupted(records):
    """Within, a run ends with _Interrupted at its record number `records`."""
    record, left = run.record_shard, records

    def recorded(*given):
        nonlocal left
        record(*given)
        left -= 1
        if not left:
            raise _Interrupted

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Interrupted):
        patch.setattr(run, "record_shard", recorded)
        yield


OPTIONS = [
    {},
    {"strategy": "split", "eos": True, "validation": 0.4},
    {"strategy": "best-fit", "window": 3000, "shuffle": 2, "shuffle_window": 2000},
    {"format": "npy,megatron,litdata", "remainder": "keep"},
    {"overlong": "drop", "shuffle": 1, "shuffle_window": 1000, "limit": 60},
]


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(["plain", "gzip", "zstd", "parquet", "texts"]),
    options=st.sampled_from(OPTIONS),
    stops=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3])), min_size=1, max_size=3),
    last=st.sampled_from([1, 2]),
)
def test_whoever_goes_on_gives_the_bytes_of_one(tmp_path_factory, seed, kind, options, stops, last):
    folder = tmp_path_factory.mktemp("run")
    source = write_kind(folder, kind, runs.lines(seed % 4, 15_000, 0.1))
    wanted = {"seq_len": 16, "shard_size": 1024, "on_error": "skip", "memory": 8 << 30, **options}
    pack(folder / "whole", source, **wanted)
    with pooled(seed, part=1000, piece=500, bound=3000, large=seed % 2 << 30):
        for records, workers in stops:
            with interrupted(records):
                pack(folder / "out", source, **wanted, workers=workers, block=300)
        pack(folder / "out", source, **wanted, workers=last)
    assert run_bytes(folder / "out") == run_bytes(folder / "whole")


STEPS = {
    "piece": lambda out: any((out / "pieces").glob("*.piece")),
    "shard": lambda out: any(out.glob("samples-*.npy")),
    "record": lambda out: len(list(out.glob("records/train-*.json"))) > 1,
    "many": lambda out: len(list(out.glob("records/train-*.json"))) > 5,
}


@runs.needs_proc
@pytest.mark.parametrize(
    "step", ["record", *(pytest.param(step, marks=pytest.mark.slow) for step in ("piece", "shard", "many"))]
)
@pytest.mark.parametrize("group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_of_several_that_is_killed_is_gone_on_with_by_any_number(tmp_path, step, group):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(5, 4_000_000))
    args = ["pack", source, "--seq-len", 128, "--shard-size", "100kB", "--strategy", "split", "--memory", "4GiB"]
    out = tmp_path / "out"
    runs.kill_in_the_middle([*args, "--out", out, "--workers", 2], out, STEPS[step], group=group)
    sealed = inodes(out, read_shards(at(str(out))))
    runs.kill_in_the_middle([*args, "--out", out, "--workers", 3], out, STEPS["many"])
    assert {name: (out / name).stat().st_ino for name in sealed} == sealed
    done = runs.cli(*args, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert runs.cli(*args, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    assert runs.digests(out) == runs.digests(tmp_path / "whole")


# --- what lies between workers ----------------------------------------------


def test_pieces_lie_where_they_are_to_and_are_told_and_deleted(tmp_path):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 60_000))
    with pooled(1, part=3000, bound=8000):
        report = pack(tmp_path / "out", source, seq_len=32, shard_size=1024, workers=2, spill=str(tmp_path / "spill"))
    assert report.spilled > 0
    assert os.listdir(tmp_path / "spill") == []
    pack(tmp_path / "whole", source, seq_len=32, shard_size=1024)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


HELD = """
import os, sys, time

if "engines.worker" in str(sys.orig_argv):
    def hold(event, args):
        if event == "open" and isinstance(args[0], str) and os.path.basename(args[0]).startswith("0-0-"):
            while not os.path.exists("GO"):
                time.sleep(0.01)

    sys.addaudithook(hold)
"""


@pytest.mark.parametrize(("workers", "options"), [(2, {}), (3, {"validation": 0.3, "shard_size": 4096})])
def test_no_more_pieces_lie_about_than_may_while_all_wait_for_one(tmp_path, monkeypatch, workers, options):
    """Real workers, of which the one with the first part is held until the others have nothing left that they may do:
    no shard can be written, and no piece let go."""
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 120_000))
    spill, go, part, held, bounds = tmp_path / "spill", tmp_path / "go", 1000, [], []
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HELD.replace("GO", str(go)))
    monkeypatch.syspath_prepend(tmp_path / "site")
    wait = Traffic.wait

    def wait_or_let_go(traffic):
        busy = [worker for worker in traffic._pool._workers if worker.load]
        if len(busy) == 1 and not go.exists():
            held[:] = [path.stat().st_size for path in spill.glob("*/*.piece")]
            go.touch()
        wait(traffic)

    def noted(*given, **named):
        bounds.append(most_of(*given, **named))
        return bounds[-1]

    monkeypatch.setattr(Traffic, "wait", wait_or_let_go)
    monkeypatch.setattr(driver, "part_size", lambda *_: part)
    monkeypatch.setattr(driver, "site_of", lambda *given: site_of(*given)._replace(piece=part))
    monkeypatch.setattr(driver, "most_of", noted)
    wanted = {"seq_len": 32, "shard_size": 1024, "memory": 8 << 30, **options}
    with runs.in_time():
        report = pack(tmp_path / "out", source, **wanted, workers=workers, spill=spill)
    [bound] = bounds
    whole = pack(tmp_path / "whole", source, **wanted)
    assert 2 * whole.samples * 32 > 2 * bound  # so much would lie there without it
    assert bound / 2 < sum(held) <= bound + workers * max(held)
    assert report.spilled <= bound + workers * max(held)
    assert os.listdir(spill) == []
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


@pytest.mark.parametrize("then", [{"workers": 2, "spill": "b"}, {"workers": 2}, {"workers": 1}, {"overwrite": True}])
def test_pieces_of_a_killed_run_are_deleted_wherever_they_lie(tmp_path, monkeypatch, then):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 20_000))
    monkeypatch.chdir(tmp_path)
    wanted = {"seq_len": 32, "shard_size": 1024, "memory": 8 << 30}
    with pooled(1, **SIZES):
        with interrupted(3):
            pack(tmp_path / "out", source, **wanted, workers=3, spill="a")
        assert any((tmp_path / "a").glob("millstream-*/*.piece"))
        os.mkdir(tmp_path / "a" / "millstream-foreign")
        pack(tmp_path / "out", source, **wanted, **then)
    assert os.listdir(tmp_path / "a") == ["millstream-foreign"]
    pack(tmp_path / "whole", source, **wanted)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def test_a_disk_without_room_for_pieces_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 60_000))
    monkeypatch.setattr(LocalStore, "free", lambda self: 50_000)
    with pytest.raises(RequestError, match="give a folder on another one as spill, or workers=1, which needs none"):
        pack(tmp_path / "out", source, seq_len=32, workers=2)
    assert "manifest.json" not in os.listdir(tmp_path / "out")
    assert pack(tmp_path / "out", source, seq_len=32, workers=1).samples


@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_piece_is_made_again(tmp_path, monkeypatch, last):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 60_000))
    call, batch, spoiled, final = WriteShards.__call__, WriteShards.batch, [], []

    def see(self, task):
        final[:] = [task.final]
        return call(self, task)

    def spoil(self, piece):
        if len(spoiled) < 3 and piece.ref.name not in spoiled and (not last or final[0]):
            spoiled.append(piece.ref.name)
            (tmp_path / "out" / "pieces" / f"{piece.ref.name}.piece").write_bytes(b"garbage")
        return batch(self, piece)

    with pooled(1, part=3000, piece=500):
        monkeypatch.setattr(WriteShards, "__call__", see)
        monkeypatch.setattr(WriteShards, "batch", spoil)
        pack(tmp_path / "out", source, seq_len=32, shard_size=1024, workers=2)
    monkeypatch.undo()
    assert 0 < len(spoiled) <= 3
    assert last or len(spoiled) == 3
    assert runs.events(tmp_path / "out").count("piece lost") >= len(spoiled)  # two tasks may have met one of them
    pack(tmp_path / "whole", source, seq_len=32, shard_size=1024)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


# --- exports beside it -------------------------------------------------------


class Told(Here):
    """An engine that tells what it is given."""

    given: ClassVar[list] = []

    def submit(self, number, function, unit, *args, **options):
        self.given.append(type(unit).__name__)
        super().submit(number, function, unit, *args, **options)


def test_shards_are_exported_while_later_ones_are_packed(tmp_path, monkeypatch):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 60_000))
    wanted = {
        "seq_len": 32,
        "shard_size": 1024,
        "memory": 8 << 30,
        "format": "npy,megatron,mds,llm.c",
        "validation": 0.2,
    }
    report = pack(tmp_path / "whole", source, **wanted)
    monkeypatch.setattr(Told, "given", [])
    with pooled(1, part=1000, engine="test_pooled:Told"):
        with interrupted(20):
            pack(tmp_path / "out", source, **wanted, workers=3)
        names = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
        assert names == {"megatron.tmp", "mds.tmp", "llm.c.tmp", "records", "pieces"}
        assert Told.given.count("WriteShard") > 10
        assert Told.given.count("Append") > 3
        several = pack(tmp_path / "out", source, **wanted, workers=2)
    assert several.exports == report.exports
    assert several.stages["export"]
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


# --- shards behind a gap ------------------------------------------------------


def inodes(out, records):
    """Of the files of shards: what tells whether one is written anew."""
    return {file.name: (out / file.name).stat().st_ino for record in records for file in record.files}


def with_a_gap(out, source, wanted, **sizes):
    """Begin a run that is interrupted with shards behind a gap: the records of its shards, by subset."""
    for seed in range(100):
        with pooled(seed, **sizes), interrupted(6):
            pack(out, source, **wanted, workers=4)
        found = sealed_shards(read_shards(at(str(out))))
        if any(each.later for each in found.values()):
            return found
        shutil.rmtree(out)
    raise AssertionError("shards come in order")


GAPS = [
    ("plain", {"format": "npy,mds"}),
    ("parquet", {"validation": 0.4, "shuffle": 3, "shuffle_window": 2000}),
]


@pytest.mark.parametrize(("kind", "options"), GAPS)
def test_shards_behind_a_gap_are_not_written_again(tmp_path, kind, options):
    source = write_kind(tmp_path, kind, runs.lines(1, 20_000))
    wanted = {"seq_len": 32, "shard_size": 1024, "memory": 8 << 30, **options}
    found = with_a_gap(tmp_path / "out", source, wanted, **SIZES)
    sealed = inodes(tmp_path / "out", [record for each in found.values() for record in each.all])
    with pooled(1, **SIZES):
        pack(tmp_path / "out", source, **wanted, workers=2)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in sealed} == sealed
    pack(tmp_path / "whole", source, **wanted)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def test_what_is_in_shards_behind_a_gap_is_not_tokenized_again(tmp_path, monkeypatch):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 20_000))
    wanted = {"seq_len": 32, "shard_size": 1024, "memory": 8 << 30}
    with_a_gap(tmp_path / "out", source, wanted, **SIZES)
    shutil.copytree(tmp_path / "out", tmp_path / "without")
    for path in (tmp_path / "without" / "records").glob("*.part"):
        path.unlink()
    parts = {}
    for name in ("out", "without"):
        monkeypatch.setattr(Told, "given", [])
        with pooled(1, **SIZES, engine="test_pooled:Told"):
            pack(tmp_path / name, source, **wanted, workers=2)
        parts[name] = Told.given.count("PartTask")
    assert parts["out"] < parts["without"]
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "without")


def test_shards_behind_a_gap_are_dropped_where_what_they_were_made_of_has_changed(tmp_path):
    rows = runs.lines(1, 20_000)
    source = runs.write_plain(tmp_path / "corpus.jsonl", rows)
    wanted = {"seq_len": 32, "shard_size": 1024, "memory": 8 << 30}
    found = with_a_gap(tmp_path / "out", source, wanted, **SIZES)["train"]
    offset, number = max(record.read.offset for record in found.records), 0
    while sum(map(len, rows[:number])) <= offset:
        number += 1
    rows[number] = b'{"text": "mended since"}\n'
    runs.write_plain(source, rows)
    with pooled(1, **SIZES):
        pack(tmp_path / "out", source, **wanted, workers=2)
    pack(tmp_path / "whole", source, **wanted)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


# --- parts that nobody wants --------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_what_goes_on_behind_a_limit_leaves_nothing(tmp_path, seed):
    (tmp_path / "a.jsonl").write_bytes(b"".join(runs.lines(0, 30_000)))
    with pooled(seed, part=1000, piece=300):
        bytes_or_error(tmp_path / "out", tmp_path / "a.jsonl", limit=2, workers=5, seq_len=8, on_error="skip")


def test_parts_that_are_given_up_keep_nobody_waiting(tmp_path):
    """Those of an input that ended early, of many pieces each, and behind it one that has to be unpacked for all."""
    lines = runs.lines(0, 20_000)
    damaged = runs.write_parquet(tmp_path / "a.parquet", lines, 20)
    data = damaged.read_bytes()
    damaged.write_bytes(data[:30] + b"\xff" * 30 + data[60:])
    sources = [damaged, runs.write_gzip(tmp_path / "b.jsonl.gz", lines)]
    wanted = {"seq_len": 8, "on_error": "skip", "block": 1}
    whole = bytes_or_error(tmp_path / "one", sources, **wanted)
    for seed in range(1):
        with pooled(seed, part=1, piece=1, large=10):
            assert bytes_or_error(tmp_path / str(seed), sources, **wanted, workers=2) == whole
