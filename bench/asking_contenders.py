"""Who is measured at asking: millstream, the openai package, bare aiohttp; each as one function that runs it once."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import measure
from bench.contenders import HERE, alternate
from bench.measure import Failed

ROWS = ("speed-64", "speed-512", "million", "crowd", "hedge", "auto", "resume", "resume-batch")
MODEL = "simulated"
SAMPLE_EVERY = 0.005
PATIENCE = 30.0
"""Seconds within which a server answers, or ends."""
WITH_FAULTS = 3
"""The exit code of a run in which requests failed."""


@dataclass(frozen=True)
class AskPlan:
    """What is measured with what: the wanted rows, how many prompts, and the rivals' interpreter.

    `prompts` are those of the long rows, `share` is what the others make of their full number of requests.
    """

    wanted: tuple[str, ...]
    folder: Path
    prompts: int
    share: float
    repeats: int
    rivals: str
    judge: bool = True

    @property
    def out(self) -> Path:
        return self.folder / "answers.jsonl"

    @property
    def journal(self) -> Path:
        return self.folder / "answers.jsonl.run"

    @property
    def long_repeats(self) -> int:
        """Fewer rounds for what takes long."""
        return min(self.repeats, 3)

    def requests(self, full: int) -> int:
        return max(200, round(self.share * full))

    def judged(self, met: bool) -> bool | None:
        return met if self.judge else None


@dataclass(frozen=True)
class Asked:
    """One run of one contender: what so many requests cost."""

    cpu: float
    wall: float
    requests: int
    told: dict[str, Any]

    @property
    def rate(self) -> float:
        return self.requests / self.wall

    @property
    def each(self) -> float:
        """CPU seconds of a request, the start of the process included."""
        return self.cpu / self.requests


@dataclass(frozen=True)
class Pair:
    """The same with n requests and with 2n, so that what the start costs can be told from the rest."""

    less: Asked
    more: Asked

    @property
    def further(self) -> float:
        """CPU seconds of a request beyond the first n."""
        return (self.more.cpu - self.less.cpu) / (self.more.requests - self.less.requests)


Contender = Callable[[str, int, int], Asked]
"""(URL, requests, in flight) -> what it cost"""


# --- servers


def client_core() -> int | None:
    """Clients are bound to one core and servers to another, where there are two."""
    cores = measure.usable_cores()
    return cores[0] if len(cores) > 1 else None


@contextmanager
def started(command: list[str]) -> Iterator[str]:
    """A server that prints its URL; yields it, and ends the server after the block."""
    cores = measure.usable_cores()
    bind = partial(os.sched_setaffinity, 0, {cores[-1]}) if len(cores) > 1 else None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=measure.environment(), preexec_fn=bind)
    try:
        assert process.stdout
        words = process.stdout.readline().decode().split()
        urls = [word for word in words if word.startswith("http://")]
        if not urls:
            raise Failed("its server did not start")
        yield urls[0]
    finally:
        process.terminate()
        process.wait(PATIENCE)


def fast_server(latency: float) -> Any:
    return started([sys.executable, str(HERE / "server.py"), str(latency)])


def simulator(*options: str) -> Any:
    return started([sys.executable, "-u", "-m", "millstream", "simulate", "--port", "0", *options])


def seen_by(url: str, path: str = "/stats") -> dict[str, Any]:
    """What the server has seen."""
    with urllib.request.urlopen(url.removesuffix("/v1") + path, timeout=PATIENCE) as response:
        seen: dict[str, Any] = json.load(response)
        return seen


# --- contenders


def ask_command(plan: AskPlan, prompts: Path, url: str, in_flight: int | str, *options: str) -> list[str]:
    """The command line a user would type, with this interpreter's millstream."""
    command = [sys.executable, "-m", "millstream", "ask", str(prompts), "--out", str(plan.out), "--model", MODEL]
    return [*command, "--base-url", url, "--in-flight", str(in_flight), "--json", *options]


def written(plan: AskPlan, count: int) -> Path:
    """A file with so many prompts, a JSON row each."""
    path = plan.folder / f"prompts-{count}.jsonl"
    if not path.exists():
        with open(path, "w") as file:
            file.writelines(f'{{"prompt": "What is the capital of country number {n}?"}}\n' for n in range(count))
    return path


def written_batch(plan: AskPlan, count: int) -> Path:
    """The same prompts as rows of OpenAI's Batch format."""
    path = plan.folder / f"batch-{count}.jsonl"
    if not path.exists():
        with open(path, "w") as file:
            for n in range(count):
                message = {"role": "user", "content": f"What is the capital of country number {n}?"}
                row = {"custom_id": f"request-{n}", "method": "POST", "url": "/v1/chat/completions"}
                body = {"model": MODEL, "messages": [message], "max_tokens": 64}
                file.write(json.dumps({**row, "body": body}) + "\n")
    return path


def forget(plan: AskPlan) -> None:
    plan.out.unlink(missing_ok=True)
    shutil.rmtree(plan.journal, ignore_errors=True)


def asked(plan: AskPlan, url: str, count: int, in_flight: int | str, *options: str) -> Asked:
    """`millstream ask` once, with its journal; there must be a row for each prompt. Whoever calls removes them."""
    forget(plan)
    command = ask_command(plan, written(plan, count), url, in_flight, *options)
    done = measure.run(command, core=client_core(), accept=(0, WITH_FAULTS))
    told = json.loads(done.output)
    with open(plan.out, "rb") as file:
        rows = sum(1 for _ in file)
    if not rows == told["requests"] == count:
        raise Failed(f"{rows:,} rows for {count:,} prompts")
    return Asked(done.cpu, done.wall, count, told)


def command_line(plan: AskPlan) -> Contender:
    def contender(url: str, count: int, in_flight: int) -> Asked:
        try:
            return complete(asked(plan, url, count, in_flight))
        finally:
            forget(plan)

    return contender


def program(python: str, path: Path) -> Contender:
    """A program that takes URL, COUNT and IN_FLIGHT, and prints JSON with the number of `replies`."""

    def contender(url: str, count: int, in_flight: int) -> Asked:
        command = [python, str(path), url, str(count), str(in_flight)]
        try:
            done = measure.run(command, core=client_core())
        except FileNotFoundError:
            raise Failed("its environment is missing: make bench-env") from None
        return complete(Asked(done.cpu, done.wall, count, json.loads(done.output.splitlines()[-1])))

    return contender


def complete(cost: Asked) -> Asked:
    if cost.told["replies"] != cost.requests:
        raise Failed(f"{cost.told['replies']:,} replies to {cost.requests:,} requests")
    return cost


def client_api(plan: AskPlan) -> Contender:
    return program(sys.executable, HERE / "client_api.py")


def aiohttp_orjson(plan: AskPlan) -> Contender:
    return program(plan.rivals, HERE / "rivals" / "aiohttp_orjson.py")


def openai_sdk(plan: AskPlan) -> Contender:
    return program(plan.rivals, HERE / "rivals" / "openai_sdk.py")


def paired(contender: Contender, url: str, count: int, in_flight: int) -> Pair:
    return Pair(contender(url, count, in_flight), contender(url, 2 * count, in_flight))


# --- going on with a long journal


def answered(plan: AskPlan, count: int, write: Callable[[AskPlan, int], Path]) -> Path:
    """`count` + 1 prompts, of which all but the last one stand answered in the journal, as earlier runs leave it."""
    forget(plan)
    prompts = write(plan, count + 1)
    measure.run([sys.executable, str(HERE / "answered.py"), str(prompts), str(count), MODEL, str(plan.journal)])
    return prompts


@dataclass(frozen=True)
class Resumed:
    """Seconds from the start of the command to the first new request, and the most memory it had, in bytes."""

    seconds: float
    peak: int


def resumed(plan: AskPlan, prompts: Path, count: int) -> Resumed:
    """Go on with that journal, against a server of its own; the journal is as before afterwards."""
    journal = plan.journal / "journal.jsonl"
    size = journal.stat().st_size
    try:
        with fast_server(0.0) as url:
            start = time.monotonic()
            told, peak = watched(ask_command(plan, prompts, url, 64))
            seen = seen_by(url)
        if told["again"] != count or seen["requests"] != 1:
            raise Failed(f"{told['again']:,} of {count:,} were taken from the journal, {seen['requests']:,} asked")
        return Resumed(seen["first"] - start, peak)
    finally:
        os.truncate(journal, size)
        plan.out.unlink(missing_ok=True)


def watched(command: list[str]) -> tuple[dict[str, Any], int]:
    """What a command prints, and the most memory that the kernel tells of it, in bytes."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=measure.environment(),
    )
    peak = 0
    assert process.stdout
    with measure.bounded(process):
        while process.poll() is None:
            peak = max(peak, measure.high_water(process.pid))
            time.sleep(SAMPLE_EVERY)
        output = process.stdout.read()
    if process.returncode:
        raise Failed(f"exit {process.returncode}")
    return json.loads(output), peak


def warm_up(plan: AskPlan) -> None:
    """Run everyone once on a few prompts, so that no measured run compiles modules."""
    everyone = {
        "millstream": command_line(plan),
        "Client": client_api(plan),
        "aiohttp": aiohttp_orjson(plan),
        "openai": openai_sdk(plan),
    }
    with fast_server(0.0) as url:
        alternate({f"warm-up, {name}": partial(contender, url, 200, 64) for name, contender in everyone.items()}, 1)
