"""A run whose work is done by functions that somebody else calls gives the bytes of one that does it itself."""

import os
import pickle
import platform
import random
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import fuzz
import pytest
import runs
from helpers import bad_sector, pack, run_bytes, without_fsync
from here import pooled

from millstream import distributed
from millstream.errors import DataError, RequestError, RunError
from millstream.runs.pack import driven

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_engine.py"


def sent(something):
    """As another process gets it."""
    return pickle.loads(pickle.dumps(something))


def driving(seed, stop_after=-1):
    """A `drive` that does things in an order by chance, some of them twice, and is interrupted after so many shards."""
    chance = random.Random(seed)

    def drive(job):
        tokenize, write = sent(job.tokenize_part), sent(job.write_shard)
        parts, waiting, tasks, left = job.parts(), deque(), [], [stop_after]

        def write_some(most):
            for _ in range(most if tasks else 0):
                task = tasks.pop(chance.randrange(len(tasks)))
                for _ in range(chance.choice([1, 1, 2])):
                    written = sent(write(sent(task)))
                job.wrote(task, written)
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
                if not tasks:
                    return

        over = False
        while not over or waiting:
            part = next(parts, None) if not over and len(waiting) < chance.choice([1, 3, 6]) else None
            if part is not None:
                waiting.append(sent(tokenize(sent(part))))
            elif waiting:
                tasks += job.count(waiting.popleft())
            else:
                over = True
            write_some(chance.choice([0, 0, 1, 3]))
        tasks += job.finish()
        write_some(len(tasks))

    return drive


def bytes_or_error(folder, call):
    try:
        call()
    except (DataError, RequestError) as error:
        return str(error).replace(str(folder), "")
    assert not [name for name in os.listdir(folder) if name in ("run.json", "records", "pieces")]
    return run_bytes(folder)


def test_an_output_shard_that_is_gone_when_the_run_ends(tmp_path):
    """No manifest says that it is whole."""
    runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 20_000))
    gone = tmp_path / "out" / "segments-00001.npy"

    def drive(job):
        for part in job.parts():
            tasks = job.count(job.tokenize_part(part))
            for task in [*tasks, *job.finish()]:
                job.wrote(task, job.write_shard(task))
        gone.unlink()

    with pytest.raises(RunError, match=r"segments-00001.npy is missing or damaged, so the run cannot end: delete"):
        distributed.pack_with(drive, tmp_path / "out", tmp_path / "corpus.jsonl", seq_len=16, shard_size=512)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(driven, "part_size", lambda total: 700)


@pytest.mark.parametrize("seed", range(5))
def test_any_corpus_by_functions_that_are_called_is_that_of_pack(tmp_path, seed, small_parts):
    chance, case = random.Random(seed), fuzz.case_of(seed)
    (tmp_path / "corpus").mkdir()
    fuzz.write(case, tmp_path / "corpus", chance)
    wanted = {"on_error": "skip", "memory": 8 << 30, **case.settings, "validation": chance.choice([0.0, 0.3])}
    wanted["limit"] = chance.choice([None, None, 1, 17])
    wanted["format"] = chance.choice(["npy", "parquet", "npy,megatron"])
    whole = bytes_or_error(tmp_path / "one", lambda: pack(tmp_path / "one", [tmp_path / "corpus"], **wanted))
    out = tmp_path / "other"
    assert whole == bytes_or_error(
        out, lambda: distributed.pack_with(driving(seed), out, [tmp_path / "corpus"], **wanted)
    )


@pytest.mark.parametrize("then", ["the same", "one worker", "several"])
def test_it_goes_on_and_is_gone_on_with(tmp_path, then, small_parts):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 20_000))
    wanted = {"seq_len": 32, "shard_size": 1024, "memory": 8 << 30, "validation": 0.2}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        distributed.pack_with(driving(1, stop_after=5), out, source, **wanted)
    sealed = {path.name: path.stat().st_ino for path in out.glob("*-00000.npy")}
    if then == "the same":
        report = distributed.pack_with(driving(2), out, source, **wanted)
    else:
        with pooled(1, part=1000):
            report = pack(out, source, **wanted, workers=1 if then == "one worker" else 3)
    assert report.resumed
    assert sealed
    assert {name: (out / name).stat().st_ino for name in sealed} == sealed
    pack(tmp_path / "whole", source, **wanted)
    assert run_bytes(out) == run_bytes(tmp_path / "whole")


def test_what_one_machine_cannot_read_is_no_fault_of_the_corpus(tmp_path, small_parts):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        runs.write_plain(folder / f"{number}.jsonl", runs.lines(number, 3_000))
    wanted = {"seq_len": 16, "shard_size": 512, "on_error": "skip"}
    with bad_sector("corpus/1.jsonl", 2_000), pytest.raises(RunError) as raised:
        distributed.pack_with(driving(1), tmp_path / "out", folder, **wanted)
    assert f"corpus/1.jsonl cannot be read on {platform.node()}: Input/output error; where" in str(raised.value)
    distributed.pack_with(driving(1), tmp_path / "out", folder, **wanted)
    pack(tmp_path / "whole", folder, **wanted)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def test_what_is_not_done_is_told(tmp_path, small_parts):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 5_000))
    wanted = {"seq_len": 32, "shard_size": 1024}

    def only_counts(job):
        for part in job.parts():
            job.count(job.tokenize_part(part))

    for drive in (lambda job: None, only_counts, lambda job: [only_counts(job), job.finish()]):
        with pytest.raises(RunError, match=r"all parts have to be counted, all tasks written, those of finish\(\)"):
            distributed.pack_with(drive, tmp_path / "out", source, **wanted)
    assert distributed.pack_with(driving(0), tmp_path / "out", source, **wanted).samples


def test_what_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(RequestError, match="standard input cannot be read elsewhere"):
        distributed.pack_with(driving(0), tmp_path / "out", "-", seq_len=8)
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 500))
    with pytest.raises(RequestError, match="join=True shares the work out by itself: leave it"):
        distributed.pack_with(driving(0), tmp_path / "out", source, seq_len=8, join=True)
    with pytest.raises(TypeError, match=r"pack_with\(\) has no setting 'seqlen'"):
        distributed.pack_with(driving(0), tmp_path / "out", source, seqlen=8)


def test_the_example_gives_the_bytes_of_pack(tmp_path):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 100_000))
    command = [sys.executable, EXAMPLE, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=runs.PATIENCE)
    assert done.returncode == 0, done.stderr
    pack(tmp_path / "whole", source, seq_len=1024, eos=True, shard_size=1 << 20)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


@runs.needs_proc
def test_nothing_of_the_example_is_left_when_it_is_killed(tmp_path):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 20_000_000))
    command = [sys.executable, EXAMPLE, source, tmp_path / "out"]
    with subprocess.Popen(command, start_new_session=True) as example:
        pool = runs.wait_until(lambda: len(found := runs.children(example.pid)) == 2 and found)
        example.kill()
    assert example.returncode == -signal.SIGKILL
    runs.wait_until(lambda: not any(map(runs.is_alive, pool)))


def test_the_parts_of_a_job_can_be_imported():
    for name in distributed.__all__:
        assert getattr(distributed, name).__doc__, name
