"""One process of several is killed at a step: the bytes are those of one worker, at once or when it is gone on with."""

import signal

import pytest
import runs
from struck import struck

from millstream.folder.records import read_shards, sealed_shards
from millstream.store import at

SMALL = ("--seq-len", 128, "--shard-size", "64kB", "--memory", "4GiB")


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus of some parts, and the digests of what one worker makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    source = runs.write_plain(folder / "corpus.jsonl", runs.lines(4, 1_300_000))
    done = runs.cli("pack", source, *SMALL, "--out", folder / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    return source, runs.digests(folder / "out")


def ended(args):
    """(exit code, standard error) of a run, once all its processes are gone."""
    with runs.Run(*args) as run:
        found = run.end()
        runs.wait_until(lambda: not run.alive())
    return found


STEPS = {
    "as it begins to read a part": "open corpus.jsonl",
    "with a part tokenized": "open *.piece.*",
    "with a piece written": "rename *.piece",
    "before the answer for a part": "answer Counts",
    "as it begins a shard": "open samples-*",
    "with half of a shard's files": "rename segments-*",
    "before the answer for shards": "answer Written",
}


@runs.needs_proc
@pytest.mark.parametrize(
    ("step", "number"),
    [("with a piece written", 2), *(slowly(step, number) for step in STEPS for number in (1, 3))],
)
def test_a_worker_alone_is_killed_at_a_step(tmp_path, whole, monkeypatch, step, number):
    source, expected = whole
    done = struck(monkeypatch, tmp_path / "strike", "worker", STEPS[step], number)
    out = tmp_path / "out"
    code, stderr = ended(["pack", source, *SMALL, "--out", out, "--workers", 2])
    assert code == 0, stderr
    assert done.exists()
    assert runs.events(out).count("worker died") == 1
    assert runs.digests(out) == expected


RECORDS = {
    "before the first part's record": ("rename *.part", 1),
    "before a later part's record": ("rename *.part", 3),
    "before a shard's record": ("open train-*.json.*", 2),
    "before the manifest": ("rename manifest.json", 1),
}


@runs.needs_proc
@pytest.mark.parametrize(
    ("step", "last"),
    [("before a later part's record", 3), *(slowly(step, last) for step in RECORDS for last in (1, 3))],
)
def test_the_driver_is_killed_before_a_record(tmp_path, whole, monkeypatch, step, last):
    source, expected = whole
    out = tmp_path / "out"
    args = ["pack", source, *SMALL, "--out", out, "--workers"]
    with monkeypatch.context() as patch:
        struck(patch, tmp_path / "strike", "driver", *RECORDS[step])
        code, stderr = ended([*args, 2])
    assert code == -signal.SIGKILL, stderr
    assert not runs.is_complete(out)
    # Behind a gap, several may keep them, and one does not.
    without_gap = [record for each in sealed_shards(read_shards(at(str(out)))).values() for record in each.records]
    sealed = {file.name for record in without_gap for file in record.files}
    assert sealed or step != "before the manifest"
    before = {name: (out / name).stat().st_ino for name in sealed}
    code, stderr = ended([*args, last])
    assert code == 0, stderr
    assert runs.digests(out) == expected
    assert {name: (out / name).stat().st_ino for name in sealed} == before
