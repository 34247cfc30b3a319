"""Several that join one run write what one would, whoever is killed at whatever it does, is slow, or comes late."""

import errno
import os
import platform
import signal
from importlib.metadata import version

import pytest
import runs
from helpers import pack, run_bytes, small_disk, without_fsync
from hypothesis import given, settings
from hypothesis import strategies as st
from joined import Killed, World, several
from test_pooled import OPTIONS
from test_resume import write_kind

from millstream.corpus import lines, texts
from millstream.corpus import sources as corpus_sources
from millstream.engines.cluster import SAME
from millstream.errors import DataError, RequestError, ResumeRefused, RunError
from millstream.folder import records
from millstream.folder.manifest import is_journal
from millstream.runs.pack import settings as pack_settings
from millstream.runs.pack.joiner import LISTS
from millstream.store.lease import Leases

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)

STEPS = st.tuples(st.integers(0, 7), st.sampled_from([0, 0, 0, 0, 11, 31]))


def bytes_of(folder):
    return {name: data for name, data in run_bytes(folder).items() if not is_journal(name)}


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 30),
        "kind": st.sampled_from(["plain", "gzip", "zstd", "parquet", "texts"]),
        "options": st.sampled_from(OPTIONS),
        "part": st.sampled_from([60, 1000]),
        "piece": st.sampled_from([100, 500]),
        "bound": st.sampled_from([0, 5000, 1 << 30]),
        "large": st.sampled_from([0, 1 << 30]),
        "workers": st.sampled_from([1, 2]),
        "deaths": st.lists(st.one_of(st.none(), st.integers(1, 120)), min_size=1, max_size=4),
        "steps": st.lists(STEPS, max_size=60),
    }
)


def any_that_join_write_the_bytes_of_one(folder, case):
    seed, options = case["seed"], case["options"]
    source = write_kind(folder, case["kind"], runs.lines(seed % 4, 6_000, 0.1))
    wanted = {"seq_len": 16, "shard_size": 1024, "on_error": "skip", **options}
    pack(folder / "whole", source, **wanted, memory=8 << 30)
    world = World(folder / "out", [source], **wanted, workers=case["workers"])
    with several(seed, world, part=case["part"], piece=case["piece"], bound=case["bound"], large=case["large"]):
        for change in case["deaths"]:
            world.join(change)
        for number, seconds in case["steps"]:
            world.step(number, seconds)
        world.end()
        for member in world.members:
            assert member.report or isinstance(member.error, Killed), member.error
            assert member.lists <= 2 + (world.now - member.begun) * LISTS / 60
        world.join()  # what is left of those that were killed behind the end goes with the next one
        world.end()
        assert world.members[-1].report.already
    assert bytes_of(folder / "out") == bytes_of(folder / "whole")
    assert not {"run.json", "records", "pieces", "leases"} & set(os.listdir(folder / "out"))


@settings(deadline=None, max_examples=6)
@given(case=CASES)
def test_any_that_join_write_the_bytes_of_one(tmp_path_factory, case):
    any_that_join_write_the_bytes_of_one(tmp_path_factory.mktemp("run"), case)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(case=CASES)
def test_many_that_join_write_the_bytes_of_one(tmp_path_factory, case):
    any_that_join_write_the_bytes_of_one(tmp_path_factory.mktemp("run"), case)


@pytest.fixture
def source(tmp_path):
    return runs.write_plain(tmp_path / "a.jsonl", runs.lines(1, 8_000))


def whole_and_world(tmp_path, source, **wanted):
    """A run by itself, and the world where others join in the same one."""
    wanted = {"seq_len": 16, "shard_size": 1024, **wanted}
    pack(tmp_path / "whole", source, **{**wanted, "workers": 1}, memory=8 << 30)
    return World(tmp_path / "out", [source], **{"workers": 1, **wanted})


def test_all_do_some_of_it_and_are_told_what(tmp_path, source):
    world = whole_and_world(tmp_path, source, format="npy,megatron")
    with several(1, world, part=500):
        one, two = world.join(), world.join()
        world.end()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert sorted(member.report.shared.rpartition("; ")[2] for member in (one, two)) == [
        "another one wrote the manifest",
        "this one wrote the manifest",
    ]
    ids = one.report.ledger["ids"]["in"]
    assert 0 < one.report.ids_this_time < ids
    assert one.report.ids_this_time + two.report.ids_this_time == ids
    assert runs.events(tmp_path / "out") == []  # each has a journal of its own


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 9)])
def test_shards_that_others_wrote_are_looked_at_before_the_run_ends(tmp_path, source, damage):
    world = whole_and_world(tmp_path, source)
    with several(1, world, part=200):
        one = world.join()
        while not list(tmp_path.glob("out/samples-*.npy")):
            one.step()
        damage(tmp_path / "out" / "samples-00000.npy")
        while not (one.report or one.error):
            one.step()
    assert isinstance(one.error, RunError)
    assert "samples-00000.npy is missing or damaged" in str(one.error)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_who_has_nothing_to_do_looks_less_and_less_often(tmp_path, source, monkeypatch):
    world = whole_and_world(tmp_path, source)
    monkeypatch.setattr(Leases, "take", lambda self, task: False)  # others have it all
    with several(1, world):
        member = world.join()
        waits = [member.step() for _ in range(20)]
        assert waits[:3] == [0.02, 0.04, 0.08]
        assert waits == sorted(waits)
        assert waits[-1] == 5
        monkeypatch.undo()
        world.end()


@pytest.mark.parametrize("count", [1, 4])
def test_what_it_costs_is_what_the_page_says(tmp_path, source, count):
    world = whole_and_world(tmp_path, source)
    with several(1, world, part=200):
        members = [world.join() for _ in range(count)]
        world.end()
    words = members[0].report.shared.replace(",", "").split()
    units = int(words[2]) + int(words[7])
    assert words[3] == "parts"
    assert 2 * units <= world.asked["create"] <= 2 * units + 2 + count  # and run.json, and the lease of the end
    assert world.asked["read"] <= (count + 4) * units + 12 * count


def test_a_disk_without_links_will_do(tmp_path, source, monkeypatch):
    def link(*given):
        raise OSError(errno.EPERM, "Operation not permitted")

    world = whole_and_world(tmp_path, source)
    monkeypatch.setattr(os, "link", link)
    close, left = os.close, [90]

    def close_or_be_killed(file):
        close(file)
        left[0] -= 1
        if not left[0] and world.changing:
            raise Killed

    with several(1, world, part=500):
        monkeypatch.setattr(os, "close", close_or_be_killed)
        world.join()
        world.join()
        world.end()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(("bound", "most"), [(12_000, 12_000), pytest.param(1 << 30, 40_000, marks=pytest.mark.slow)])
def test_no_more_pieces_lie_about_than_may_while_all_wait_for_one(tmp_path, source, monkeypatch, bound, most):
    source.write_bytes(b"".join(runs.lines(1, 30_000)))
    world, take, found = whole_and_world(tmp_path, source, workers=4), Leases.take, []
    monkeypatch.setattr(Leases, "take", lambda self, task: task != "part-0-0-200" and take(self, task))
    with several(1, world, part=200, bound=bound):
        for _ in range(2):
            world.join()
        for number in range(100):
            world.step(number)
            pieces = (world.out / "pieces").glob("*.piece")
            found.append(sum(path.stat().st_size for path in pieces))
        monkeypatch.setattr(Leases, "take", take)
        world.end()
    assert most / 3 < max(found) < most
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_pieces_lie_where_they_are_to_and_are_deleted_there(tmp_path, source):
    world = whole_and_world(tmp_path, source, spill=str(tmp_path / "spill"))
    with several(1, world, part=500):
        world.join(40)
        world.join()
        for number in range(6):
            world.step(number)
        assert list((tmp_path / "spill").rglob("*.piece"))
        assert not (tmp_path / "out" / "pieces").exists()
        world.end()
    assert os.listdir(tmp_path / "spill") == []
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_full_disk_of_temporary_files_is_told_by_its_name(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": 5}\n' * 5000)
    with small_disk(tmp_path / "disk") as (disk, enlarge):
        monkeypatch.setenv("TMPDIR", str(disk))
        join = ["pack", source, "--out", tmp_path / "out", "--join", "--on-error", "skip", "--workers", 1]
        done = runs.cli(*join)
        assert done.returncode == 1, done.stdout
        assert f"no space left on the disk of {tmp_path / 'out'} or of {disk}; free some" in done.stderr
        enlarge()
        assert runs.cli(*join).returncode == 3
    assert len((tmp_path / "out" / "faults.jsonl").read_bytes().splitlines()) == 5000


def test_who_does_not_see_the_pieces_of_others_makes_them_again_and_says_so(tmp_path, source):
    world = whole_and_world(tmp_path, source, strategy="best-fit", window=4000)
    with several(1, world, part=500):
        members = [world.join(), world.join(spill=str(tmp_path / "elsewhere"))]
        world.end()
    assert any("pieces that were not to be found here were made again" in member.report.shared for member in members)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_full_disk_ends_the_one_that_meets_it_and_the_others_go_on(tmp_path, source):
    world = whole_and_world(tmp_path, source)
    with several(1, world, part=500):
        full = world.join(60, lambda: OSError(errno.ENOSPC, "No space left on device"))
        world.join()
        world.end()
    assert full.error.errno == errno.ENOSPC
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_bad_document_is_told_by_each_and_may_be_left_out(tmp_path, source):
    with open(source, "ab") as file:
        file.write(b"bad\n")
    world = whole_and_world(tmp_path, source, on_error="skip")
    with several(1, world, part=500):
        for _ in range(2):
            stopped = world.join(on_error="stop")
            while not stopped.over:
                world.step(0)
            assert isinstance(stopped.error, DataError)
            assert f"a.jsonl, line {len(source.read_bytes().splitlines())}" in str(stopped.error)
            assert "begin anew" in str(stopped.error)
        world.join()
        world.end()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# --- who may join -----------------------------------------------------------


def begun(tmp_path, source, **wanted):
    """A run that another one has joined and has not finished."""
    world = World(tmp_path / "out", [source], seq_len=16, workers=1, **wanted)
    with several(1, world, part=500):
        member = world.join()
        for _ in range(5):
            world.step(0)
        assert not member.over


def refused(tmp_path, source, **other):
    with pytest.raises((RequestError, RunError)) as error:
        pack(tmp_path / "out", source, **{"seq_len": 16, "join": True, **other})
    return error.value


def test_another_setting_is_refused_by_name(tmp_path, source):
    begun(tmp_path, source)
    error = refused(tmp_path, source, seq_len=17)
    assert isinstance(error, ResumeRefused)
    assert "seq_len was 16, is 17" in str(error)


@pytest.mark.parametrize("other", ["millstream", "fastokens", "pyarrow"])
def test_another_version_is_refused_by_name(tmp_path, source, monkeypatch, other):
    """Of all that decides bytes, which is what a cluster's nodes are asked for, too."""
    assert other in SAME
    begun(tmp_path, source)
    for module in (records, pack_settings):
        monkeypatch.setattr(module, "version", lambda name: "99.9" if name == other else version(name))
    told = str(refused(tmp_path, source))
    assert f"{other} {'was ' * (other == 'millstream')}{version(other)}, " in told
    assert "99.9" in told
    assert "Give each the same command, versions and inputs" in told
    assert "\n" not in told


def test_what_is_known_to_decide_bytes():
    assert set(SAME) == {"millstream", "fastokens", "pyarrow"}


def test_other_inputs_are_refused_by_name(tmp_path, source):
    begun(tmp_path, source)
    (tmp_path / "b.jsonl").write_bytes(source.read_bytes())
    assert "input 1 was a.jsonl (jsonl), is b.jsonl (jsonl)" in str(refused(tmp_path, tmp_path / "b.jsonl"))
    assert "there were 1 inputs, are 2" in str(refused(tmp_path, [source, tmp_path / "b.jsonl"]))
    size = source.stat().st_size
    with open(source, "ab") as file:
        file.write(b'{"text": "more"}\n')
    told = str(refused(tmp_path, source))
    assert f"a.jsonl had {size} bytes, has {size + 17}" in told
    assert "or another out; inputs that were mended since it began need one" in told


def test_inputs_of_the_same_size_that_differ_are_found_before_a_manifest_is(tmp_path, source):
    world = whole_and_world(tmp_path, source)
    with several(1, world, part=500):
        world.join()
        for _ in range(8):
            world.step(0)
        source.write_bytes(source.read_bytes().replace(b"e", b"f"))
        other = world.join()
        while not other.over:
            world.step(1)
    assert "a.jsonl is not the same for all that join this run" in str(other.error)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_only_one_cannot_read_is_no_fault_but_its_end(tmp_path, source):
    world = whole_and_world(tmp_path, source, on_error="skip")
    with several(1, world, part=500):
        blind = world.join()
        world.step(0)
        source.rename(tmp_path / "elsewhere")
        while not blind.over:
            world.step(0)
        (tmp_path / "elsewhere").rename(source)
        world.join()
        world.now += 100
        world.end()
    assert "a.jsonl cannot be read on " in str(blind.error)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("write", "name"), [(runs.write_plain, "a.jsonl"), (runs.write_gzip, "a.jsonl.gz"), (runs.write_texts, "a")]
)
def test_what_only_one_cannot_read_to_its_end_is_no_fault_but_its_end(tmp_path, monkeypatch, write, name):
    source = write(tmp_path / name, runs.lines(1, 8_000))
    world, chunks = whole_and_world(tmp_path, source, on_error="skip"), corpus_sources.chunks
    blind = []

    def fail(*given, **named):
        for number, piece in enumerate(chunks(*given, **named)):
            if world.changing in blind and number > 2:
                raise OSError(errno.EIO, "Input/output error")
            yield piece

    for module in (lines, texts):
        monkeypatch.setattr(module, "chunks", fail)
    with several(1, world, part=10_000, large=0):
        blind.append(world.join())
        while not blind[0].over:
            world.step(0)
        world.join()
        world.now += 100
        world.end()
    assert isinstance(blind[0].error, RunError)
    assert f"cannot be read on {platform.node()}: Input/output error; where several" in str(blind[0].error)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_run_of_several_and_a_run_of_one_keep_each_other_out(tmp_path, source):
    begun(tmp_path, source)
    assert "give that too" in str(refused(tmp_path, source, join=False))
    assert "who may be at it now" in str(refused(tmp_path, source, join=False, overwrite=True))
    (tmp_path / "out").rename(tmp_path / "joined")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(source.read_bytes() + b"bad\n")
    with pytest.raises(DataError):
        pack(tmp_path / "out", bad, seq_len=16, shard_size=1024)
    assert "was begun without join=True" in str(refused(tmp_path, bad))


def test_what_cannot_be_shared_is_refused(tmp_path, source):
    assert "standard input cannot be shared" in str(refused(tmp_path, "-"))
    assert "would delete what the others do" in str(refused(tmp_path, source, overwrite=True))


def test_a_finished_run_is_told_to_who_comes_late_and_another_one_is_refused(tmp_path, source):
    pack(tmp_path / "out", source, seq_len=16)
    assert pack(tmp_path / "out", source, seq_len=16, join=True).already
    assert "is finished, with other settings" in str(refused(tmp_path, source, seq_len=8))


# --- real processes ---------------------------------------------------------


def told(out):
    return list(out.glob("records/*/*.told"))


def flags(wanted):
    return [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]


SMALL = {"seq_len": 128, "shard_size": 100_000}
WINDOW = 100_000


@runs.needs_proc
@pytest.mark.parametrize(
    ("wanted", "workers"),
    [
        ({}, 1),
        pytest.param({"strategy": "split"}, 2, marks=pytest.mark.slow),
        pytest.param({"strategy": "best-fit", "window": WINDOW, "validation": 0.3}, 1, marks=pytest.mark.slow),
        pytest.param({"shuffle": 3, "shuffle_window": WINDOW, "format": "npy,megatron,mds"}, 2, marks=pytest.mark.slow),
    ],
)
def test_processes_that_join_write_what_one_does_whoever_is_killed(tmp_path, wanted, workers):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(5, 1_500_000))
    join = ["pack", source, "--out", tmp_path / "out", "--join", "--lease", 1, "--workers", workers]
    join += ["--memory", "4GiB", *flags(SMALL | wanted)]
    with runs.Run(*join, held="manifest.json") as one, runs.Run(*join, held="manifest.json") as two:
        runs.wait_until(lambda: not one.goes_on() or not two.goes_on() or len(told(tmp_path / "out")) > 2)
        assert one.process.poll() is None, one.end()
        one.signal(signal.SIGKILL)  # first, as else the other one may finish the run, and both end
        two.let_go()
        assert one.end()[0] == -signal.SIGKILL
        code, stderr = two.end()
        assert code == 0, stderr
    pack(tmp_path / "whole", source, **SMALL, **wanted)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert pack(tmp_path / "out", source, **SMALL, **wanted, join=True).already


@runs.needs_proc
def test_who_is_told_to_stop_leaves_its_work_to_the_others_at_once(tmp_path):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(5, 1_200_000))
    patient = {"lease": 3600, "workers": 1}
    with runs.Run(
        "pack", source, "--out", tmp_path / "out", "--join", *flags(SMALL | patient), held="manifest.json"
    ) as one:
        runs.wait_until(lambda: not one.goes_on() or len(told(tmp_path / "out")) > 2)
        one.signal(signal.SIGTERM, group=False)
        code, stderr = one.end()
        assert code == 130, stderr
    assert not runs.is_complete(tmp_path / "out")
    with runs.in_time():
        assert not pack(tmp_path / "out", source, join=True, **SMALL, **patient).already


@runs.needs_proc
@pytest.mark.slow
def test_who_was_taken_for_dead_and_wakes_up_does_no_harm(tmp_path):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(5, 3_000_000))
    args = ["pack", source, "--seq-len", 128, "--shard-size", "100kB", "--format", "npy,megatron"]
    join = [*args, "--out", tmp_path / "out", "--join", "--lease", 1, "--workers", 1]
    with runs.Run(*join, held="manifest.json") as asleep, runs.Run(*join, held="manifest.json") as awake:
        runs.wait_until(lambda: not asleep.goes_on() or not awake.goes_on() or len(told(tmp_path / "out")) > 2)
        asleep.signal(signal.SIGSTOP)
        awake.let_go()
        code, stderr = awake.end()
        assert code == 0, stderr
        asleep.let_go()
        asleep.signal(signal.SIGCONT)
        code, stderr = asleep.end()
        assert code == 0, stderr
    assert runs.cli(*args, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    found = {name: digest for name, digest in runs.digests(tmp_path / "out").items() if not is_journal(name)}
    assert found == runs.digests(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_for_all_is_told_and_made_larger_and_gone_on_with(tmp_path):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(5, 1_000_000))
    with small_disk(tmp_path / "disk") as (disk, enlarge):
        join = ["pack", source, "--seq-len", 128, "--shard-size", "100kB", "--out", disk / "out", "--join"]
        join += ["--workers", 1, "--lease", 1, "--spill", tmp_path / "spill"]
        for _ in range(2):
            done = runs.cli(*join)
            assert done.returncode == 1
            assert "no space left on the disk" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        enlarge()
        done = runs.cli(*join)
        assert done.returncode == 0, done.stderr
        pack(tmp_path / "whole", source, seq_len=128, shard_size=100_000)
        assert bytes_of(disk / "out") == bytes_of(tmp_path / "whole")
    assert not list((tmp_path / "spill").rglob("*.piece"))
