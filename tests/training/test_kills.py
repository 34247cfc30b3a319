"""The examples as a reader runs them, killed at random: every loss is that of a run that never stopped, to the bit."""

import json
import os
import random
import subprocess
import sys
import zlib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import PATIENCE, kept_port, train_tokenizer, wait_until

import millstream
from millstream.torch import PackedDataset

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
BATCH, STEPS, EVERY = 8, 40, 4

_HELD = """
import os, runpy, sys
name, left = sys.argv[1], int(sys.argv[2])

def hold(event, args):
    global left
    if event == "open" and isinstance(args[0], str) and args[2] & os.O_CREAT and os.path.basename(args[0]) == name:
        left -= 1
        if not left:
            os.read(0, 1)

sys.addaudithook(hold)
sys.argv[:] = sys.argv[3:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("packed")
    rng = random.Random(1)
    lines = [json.dumps({"text": " ".join(rng.choices(dir(str), k=rng.randint(1, 40)))}) for _ in range(80)]
    (base / "corpus.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer(base / "tokenizer.json")
    millstream.pack_to(str(base / "run"), str(base / "corpus.jsonl"), seq_len=32, tokenizer=str(tokenizer))
    return base / "run"


@contextmanager
def started(example, *arguments, world=1, held=None):
    """One process a rank; all of them are dead afterwards.

    `held`: (name, n). They wait before they make a file of that name for the nth time, and do not get beyond it: who is
    to be killed on the way there has not come to its end, however quick the machine is and however late we look.
    """
    kept, port = kept_port()
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    own["OMP_NUM_THREADS"] = "1"  # sums come in another order on another number of threads
    if sys.platform == "linux":
        own["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name need not lead anywhere
    holding = ["-c", _HELD, *map(str, held)] if held else []
    command = [sys.executable, *holding, EXAMPLES / example, *map(str, arguments)]
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    running = [
        subprocess.Popen(command, env={**os.environ, **own, "RANK": str(rank)}, **given) for rank in range(world)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdin.close()
        kept.close()


def finish(example, *arguments, world=1):
    with started(example, *arguments, world=world) as running:
        assert [process.wait(PATIENCE) for process in running] == [0] * world


def kill_when(reached, held, example, *arguments, world=1):
    """Run it until then, and kill it in the middle of whatever it does, or waits before as it is `held`."""
    with started(example, *arguments, world=world, held=held) as running:

        def is_reached():
            assert [process.poll() for process in running] == [None] * world, "it ended before it could be killed"
            return reached()

        wait_until(is_reached)


def count(path):
    """How many lines it has."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_gpt_at(lines, folder, out, *arguments, world=1):
    """Kill the tiny GPT once it has written so many lines more, and before the checkpoint that comes next."""
    path = out / "rank-0.txt"
    wanted = count(path) + lines
    # What another rank has done before that checkpoint, and not yet written down, would not be done again.
    held = ("checkpoint.pt.part", lines // EVERY + 1)
    kill_when(lambda: count(path) >= wanted, held, "train_gpt.py", folder, out, *arguments, world=world)


def told(out, world=1):
    """What each step of each rank was: a step that was done again after a kill must have been the same again."""
    steps = defaultdict(set)
    for rank in range(world):
        for line in (out / f"rank-{rank}.txt").read_text().splitlines():
            step, loss, *sums = line.split()
            if len(sums) == BATCH // world:  # the last line before a kill may be half of one
                steps[int(step), rank].add((loss, *sums))
    assert all(len(found) == 1 for found in steps.values())
    return {key: found.pop() for key, found in sorted(steps.items())}


def in_order(folder, steps):
    """The checksums of each step's samples, as the dataset itself has them."""
    data = PackedDataset(folder, epochs=9)
    sums = [str(zlib.crc32(data[place].token_ids.astype("i8").tobytes())) for place in range(steps * BATCH)]
    return [sums[begin : begin + BATCH] for begin in range(0, len(sums), BATCH)]


def interleaved(found, step, world):
    ranks = [found[step, rank][1:] for rank in range(world)]
    return [one for row in zip(*ranks, strict=True) for one in row]


@pytest.fixture(scope="module")
def never_stopped(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("never")
    finish("train_gpt.py", folder, out, "--steps", STEPS, "--every", EVERY, "--epochs", 9)
    return told(out)


# Seeds of kills before the first checkpoint, in the middle of one, and behind them.
@pytest.mark.parametrize(("workers", "seed"), [(0, 6), (2, 9)])
def test_killed_at_random_every_loss_is_the_same(folder, never_stopped, tmp_path, workers, seed):
    arguments = (folder, tmp_path, "--steps", STEPS, "--every", EVERY, "--epochs", 9, "--workers", workers)
    rng = random.Random(seed)
    for _ in range(3):
        kill_gpt_at(rng.randint(1, 11), *arguments)
    finish("train_gpt.py", *arguments)
    assert told(tmp_path) == never_stopped
    assert [interleaved(never_stopped, step, 1) for step in range(STEPS)] == in_order(folder, STEPS)


def test_from_one_rank_to_two_the_samples_are_the_same_and_kills_change_no_loss(folder, never_stopped, tmp_path):
    half, outs = STEPS // 2, [tmp_path / name for name in ("whole", "killed")]
    for out in outs:
        one = (folder, out, "--steps", half, "--every", EVERY, "--epochs", 9)
        two = (folder, out, "--steps", STEPS, "--every", EVERY, "--epochs", 9)
        if out.name == "killed":
            kill_gpt_at(7, *one)
        finish("train_gpt.py", *one)
        assert told(out) == {key: found for key, found in never_stopped.items() if key[0] < half}
        os.rename(out / "rank-0.txt", out / "alone.txt")
        if out.name == "killed":
            kill_gpt_at(9, *two, world=2)
        finish("train_gpt.py", *two, world=2)
    whole, killed = (told(out, world=2) for out in outs)
    assert whole == killed
    samples = in_order(folder, STEPS)
    assert [interleaved(whole, step, 2) for step in range(half, STEPS)] == samples[half:]


def losses(out):
    return dict(map(json.loads, (out / "losses.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def never_stopped_trainer(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer")
    finish("train_trainer.py", folder, out, "--steps", 16, "--every", EVERY)
    return losses(out)


def test_trainer_goes_on_with_the_samples_that_come_next(folder, never_stopped_trainer, tmp_path):
    arguments = (folder, tmp_path, "--steps", 16, "--every", EVERY)
    path = tmp_path / "losses.jsonl"
    kill_when(lambda: count(path) >= 6, (path.name, 8), "train_trainer.py", *arguments)
    finish("train_trainer.py", *arguments)
    assert losses(tmp_path) == never_stopped_trainer
    assert len(never_stopped_trainer) == 16


def test_trainer_goes_on_from_a_whole_checkpoint(folder, never_stopped_trainer, tmp_path):
    """A kill in the middle of one leaves half of it, which is the last one there."""
    arguments = (folder, tmp_path, "--steps", 16, "--every", EVERY)
    half = tmp_path / "checkpoint-8"
    kill_when(lambda: (half / "scheduler.pt").exists(), ("trainer_state.json", 2), "train_trainer.py", *arguments)
    assert not (half / "trainer_state.json").exists()
    finish("train_trainer.py", *arguments)
    assert losses(tmp_path) == never_stopped_trainer
