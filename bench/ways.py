"""The same bytes, whichever way they are made: a row for each way, in which all strategies give what one worker gives.

A manifest has the SHA-256 of every file, and nothing that depends on how the run was made: its own is compared.
A new way is a function and a line in `WAYS`.
"""

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import corpus, measure
from bench.contenders import SEQ_LEN, Plan, say
from bench.measure import Failed
from bench.rows import Row, could_not
from bench.served import OWN, make_bucket, served
from millstream.folder.manifest import MANIFEST
from millstream.store import at

ROWS = ("same",)
WINDOW = "1M"
STRATEGIES = {
    "concat": (),
    "split": ("--strategy", "split"),
    "best-fit": ("--strategy", "best-fit", "--window", WINDOW),
    "--shuffle": ("--shuffle", "0", "--shuffle-window", WINDOW),
    "best-fit --shuffle": ("--strategy", "best-fit", "--shuffle", "0", "--window", WINDOW),
}
EVERY = ("--validation", "0.1", "--eos", "--shard-size", "4MiB", "--memory", "8GiB")
JOIN = ("--join", "--lease", "2", "--workers", "1")
BUCKET, THERE = "bench", "s3://bench/packed"
PATIENCE = 120.0
ROOT = Path(__file__).parent.parent
READ = (
    "import hashlib, sys; from millstream.store import at; "
    "print(hashlib.sha256(at(sys.argv[1]).read('manifest.json')).hexdigest())"
)
"""A program that prints the SHA-256 of the manifest of a run, wherever that lies."""

Options = Sequence[str]


@dataclass(frozen=True)
class Task:
    """What is packed: a source, how, and into which folder, where nothing is yet."""

    source: Path
    options: Options
    out: Path

    def command(self, *options: str, out: str | None = None) -> list[str]:
        """The command line a user would type, with this interpreter's millstream."""
        front = [sys.executable, "-m", "millstream", "pack", str(self.source), "--out", out or str(self.out)]
        return [*front, "--tokenizer", "gpt2", "--seq-len", str(SEQ_LEN), *EVERY, *self.options, *options]


Way = Callable[[Task], str]
"""Runs a task to its end; the SHA-256 of the manifest. Raises Failed."""


def by_workers(count: int) -> Way:
    def run(task: Task) -> str:
        measure.run(task.command("--workers", str(count)))
        return manifest_of(str(task.out))

    return run


def killed(task: Task) -> str:
    """By two workers, killed with -9 as soon as there is something to go on with; and then by three."""
    sealed = partial(any_of, task.out, "records/train-*.json")
    kill_once(sealed, begun(task.command("--workers", "2")))
    measure.run(task.command("--workers", "3"))
    return manifest_of(str(task.out))


def joined(task: Task) -> str:
    """By two that join, of which one is killed with -9 as soon as anything is done."""
    one_of_two_is_killed(task.command(*JOIN), {}, partial(any_of, task.out, "records/*/*.told"))
    return manifest_of(str(task.out))


def one_of_two_is_killed(command: list[str], env: dict[str, str], done: Callable[[], bool]) -> None:
    """Begin this twice, and kill one of them once anything is done; the other one ends."""
    one, two = begun(command, env), begun(command, env)
    try:
        kill_once(done, one)
        if two.wait(PATIENCE):
            raise Failed(f"the other one ended with {two.returncode}")
    finally:
        for process in (one, two):
            if process.poll() is None:
                measure.end_session(process.pid)
                process.wait()


def begun(command: list[str], env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(command, **quiet, env=measure.environment() | (env or {}))


def any_of(out: Path, files: str) -> bool:
    return any(out.glob(files))


def kill_once(done: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Kill a run with -9 once something is done. Raises Failed if it ends before."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not done():
        time.sleep(0.005)
    measure.end_session(process.pid)
    if process.wait() != -signal.SIGKILL:
        raise Failed("it ended before it was killed")


def on_ray(task: Task) -> str:
    """By a Ray cluster of two nodes."""
    python = ROOT / ".venv-ray" / "bin" / "python"
    if not python.exists():
        raise Failed("its environment is missing: make test-ray")
    program = str(Path(__file__).with_name("ray_nodes.py"))
    measure.run([str(python), program, *task.command("--workers", "2")[3:]])
    return manifest_of(str(task.out))


@contextmanager
def bucket() -> Iterator[tuple[str, dict[str, str], str]]:
    """A bucket of moto's server, as the environment of `make test-bucket` has it: its Python, what that needs in its
    environment, and where the server is."""
    python = ROOT / ".venv-bucket" / "bin" / "python"
    if not python.exists():
        raise Failed("its environment is missing: make test-bucket")
    with tempfile.TemporaryDirectory() as folder, served(folder, python) as address:
        make_bucket(address, BUCKET)
        yield str(python), {**OWN, "AWS_ENDPOINT_URL": address}, address


def in_a_bucket(task: Task) -> str:
    """By two workers, into a bucket."""
    with bucket() as (python, env, _):
        measure.run([python, *task.command("--workers", "2", out=THERE)[1:]], env=env)
        return measure.run([python, "-c", READ, THERE], env=env).output.strip()


def joined_in_a_bucket(task: Task) -> str:
    """By two that join, which share nothing but a bucket, and of which one is killed as `joined` does it."""
    with bucket() as (python, env, address):

        def done() -> bool:
            with urllib.request.urlopen(f"{address}/{BUCKET}?list-type=2&prefix=packed/records/") as reply:
                return b".told<" in reply.read()

        one_of_two_is_killed([python, *task.command(*JOIN, out=THERE)[1:]], env, done)
        return measure.run([python, "-c", READ, THERE], env=env).output.strip()


def manifest_of(folder: str) -> str:
    try:
        return hashlib.sha256(at(folder).read(MANIFEST)).hexdigest()
    except FileNotFoundError:
        raise Failed("no manifest was written") from None


WAYS: dict[str, Way] = {
    "one worker": by_workers(1),
    "2 workers": by_workers(2),
    "8 workers": by_workers(8),
    "2 workers, killed with -9 in the middle, and gone on with by 3": killed,
    "2 that join, one of them killed with -9": joined,
    "a Ray cluster of 2 nodes, `--on`": on_ray,
    "2 workers, into a bucket": in_a_bucket,
    "2 that join in a bucket, one of them killed with -9": joined_in_a_bucket,
}


def same_rows(plan: Plan) -> list[Row]:
    """One row for each way; the first of them is what the others are compared with."""
    source = corpus.subset(plan.mixed, plan.folder, plan.subset_mb)
    found: dict[str, dict[str, str] | Failed] = {}
    for name, way in WAYS.items():
        say(f"the same bytes: {name}")
        try:
            found[name] = {strategy: digest(plan, way, source, options) for strategy, options in STRATEGIES.items()}
        except Failed as failure:
            found[name] = failure
    first = next(iter(found.values()))
    return [row(name, of, first) for name, of in found.items()]


def digest(plan: Plan, way: Way, source: Path, options: Options) -> str:
    """The SHA-256 of the manifest of a run that is made in this way."""
    shutil.rmtree(plan.packed, ignore_errors=True)
    try:
        return way(Task(source, options, plan.packed))
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)


def row(name: str, found: dict[str, str] | Failed, first: dict[str, str] | Failed) -> Row:
    target = "the SHA-256 of one worker's, for every strategy"
    if isinstance(found, Failed):
        return Row(name, target, could_not(found), False)
    told = "; ".join(f"{strategy} {sha256[:12]}" for strategy, sha256 in found.items())
    if found is first:
        return Row(name, "–", told)
    different = [strategy for strategy in found if isinstance(first, Failed) or found[strategy] != first[strategy]]
    return Row(name, target, f"others for {', '.join(different)}: {told}" if different else "the same", not different)
