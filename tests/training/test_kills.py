"""The examples as a reader runs them, killed at random: every loss is that of a run that never stopped, to the bit."""

import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import PATIENCE, kept_port, train_tokenizer

import millstream
from millstream.torch import PackedDataset

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
BATCH, STEPS = 8, 40


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
def started(example, *arguments, world=1):
    """One process a rank; all of them are dead afterwards."""
    kept, port = kept_port()
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    if sys.platform == "linux":
        own["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name need not lead anywhere
    command = [sys.executable, EXAMPLES / example, *map(str, arguments)]
    running = [
        subprocess.Popen(command, env={**os.environ, **own, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(world)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
        kept.close()


def finish(example, *arguments, world=1):
    with started(example, *arguments, world=world) as running:
        assert [process.wait(PATIENCE) for process in running] == [0] * world


def kill_at(path, lines, example, *arguments, world=1):
    """Run it until it has written so many lines more, and kill it in the middle of whatever it does then."""
    before = len(path.read_text().splitlines()) if path.exists() else 0
    with started(example, *arguments, world=world) as running:
        end = time.monotonic() + PATIENCE
        while not path.exists() or len(path.read_text().splitlines()) < before + lines:
            assert running[0].poll() is None, "it ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.001)


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
    finish("train_gpt.py", folder, out, "--steps", STEPS, "--every", 4, "--epochs", 9)
    return told(out)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_every_loss_is_the_same(folder, never_stopped, tmp_path, workers):
    arguments = (folder, tmp_path, "--steps", STEPS, "--every", 4, "--epochs", 9, "--workers", workers)
    rng = random.Random(workers)
    for _ in range(3):
        kill_at(tmp_path / "rank-0.txt", rng.randint(1, 11), "train_gpt.py", *arguments)
    finish("train_gpt.py", *arguments)
    assert told(tmp_path) == never_stopped
    assert [interleaved(never_stopped, step, 1) for step in range(STEPS)] == in_order(folder, STEPS)


def test_from_one_rank_to_two_the_samples_are_the_same_and_kills_change_no_loss(folder, never_stopped, tmp_path):
    half, outs = STEPS // 2, [tmp_path / name for name in ("whole", "killed")]
    for out in outs:
        one = (folder, out, "--steps", half, "--every", 4, "--epochs", 9)
        two = (folder, out, "--steps", STEPS, "--every", 4, "--epochs", 9)
        if out.name == "killed":
            kill_at(out / "rank-0.txt", 7, "train_gpt.py", *one)
        finish("train_gpt.py", *one)
        assert told(out) == {key: found for key, found in never_stopped.items() if key[0] < half}
        os.rename(out / "rank-0.txt", out / "alone.txt")
        if out.name == "killed":
            kill_at(out / "rank-0.txt", 9, "train_gpt.py", *two, world=2)
        finish("train_gpt.py", *two, world=2)
    whole, killed = (told(out, world=2) for out in outs)
    assert whole == killed
    samples = in_order(folder, STEPS)
    assert [interleaved(whole, step, 2) for step in range(half, STEPS)] == samples[half:]


def test_trainer_goes_on_with_the_samples_that_come_next(folder, tmp_path):
    def losses(out):
        return dict(map(json.loads, (out / "losses.jsonl").read_text().splitlines()))

    finish("train_trainer.py", folder, tmp_path / "whole", "--steps", 16, "--every", 4)
    stopped = tmp_path / "stopped"
    kill_at(stopped / "losses.jsonl", 6, "train_trainer.py", folder, stopped, "--steps", 16, "--every", 4)
    finish("train_trainer.py", folder, stopped, "--steps", 16, "--every", 4)
    assert losses(stopped) == losses(tmp_path / "whole")
    assert len(losses(stopped)) == 16
