"""Run a command and say what it cost: CPU seconds, wall-clock seconds, peak memory of all its processes."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

SAMPLE_EVERY = 0.02
LONGEST = 1800.0
"""Seconds after which a command counts as hung and is ended."""
LINUX = sys.platform == "linux"
PR_SET_CHILD_SUBREAPER = 36

Command = Sequence[str]


class Failed(Exception):
    """A command could not be run, or did not end well; the message fits into a table's cell."""


@dataclass(frozen=True)
class Run:
    """What one command cost. `cpu` is user + system of it and of every process it started."""

    cpu: float
    wall: float
    output: str


def last_words(file: IO[bytes]) -> str:
    """The last line of what a failed command wrote, without this machine's paths."""
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    return re.sub(r"(/[\w.@+-]+)+/", "", lines[-1])[:160]


def adopt_orphans() -> None:
    """Have processes whose parent is gone handed to this one, so that their CPU time can be counted too."""
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans_cpu(group: int, patience: float = 10.0) -> float:
    """CPU seconds of what a command left behind in its process group; waits until the last of it has ended."""
    seconds, deadline = 0.0, time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            pid, _, usage = os.wait4(-group, os.WNOHANG)
        except ChildProcessError:
            return seconds
        if pid:
            seconds += usage.ru_utime + usage.ru_stime
        else:
            time.sleep(0.005)
    raise Failed(f"a process it started was still running {patience:.0f} s after its end")


@contextmanager
def bounded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While waiting: end the process's whole session if it takes too long, or if we are interrupted."""
    timer = threading.Timer(LONGEST, end_session, (process.pid,))
    timer.start()
    try:
        yield
    except BaseException:
        end_session(process.pid)
        raise
    finally:
        timer.cancel()


def end_session(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Ours, without the setting under which every start would compile every module again."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(
    command: Command,
    *,
    core: int | None = None,
    env: dict[str, str] | None = None,
    accept: Sequence[int] = (0,),
) -> Run:
    """Run the command to its end, bound to one core if asked, and count the CPU of the whole process tree.

    Raises Failed if it ends with another exit code than those of `accept`.
    """
    adopt_orphans()
    pin = None if core is None else partial(os.sched_setaffinity, 0, {core})
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=pin,
            start_new_session=True,
            env=environment() | (env or {}),
        )
        with bounded(process):
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime + orphans_cpu(process.pid)
        if process.returncode not in accept:
            raise Failed(f"exit {process.returncode}: {last_words(err)}")
        out.seek(0)
        return Run(cpu, wall, out.read().decode())


def wall_together(commands: Sequence[Command], cores: Sequence[int]) -> float:
    """Wall-clock seconds until all commands, begun at once and each bound to its own core, have ended."""
    start = time.perf_counter()
    quiet = partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    processes = [
        quiet(command, preexec_fn=partial(os.sched_setaffinity, 0, {core}))
        for command, core in zip(commands, cores, strict=False)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise Failed(f"exit {max(codes)}")
    return time.perf_counter() - start


def session_memory(session: int) -> int:
    """Bytes of all processes of one session: PSS, which shares common pages out; without Linux, RSS."""
    if not LINUX:
        return tree_rss(session)
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                stat = Path(entry.path, "stat").read_text()
                if int(stat.rpartition(")")[2].split()[3]) == session:
                    total += pss(Path(entry.path, "smaps_rollup").read_text())
    return total


def pss(rollup: str) -> int:
    """Bytes of the `Pss:` line of a smaps_rollup.

    >>> pss("0-1 ---p 00000000 00:00 0 [rollup]\\nRss:  12 kB\\nPss:   5 kB\\n")
    5120
    """
    found = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def high_water(pid: int) -> int:
    """The most memory a process had so far, in bytes (Linux: VmHWM); 0 if it is gone."""
    if not LINUX:
        return tree_rss(pid)
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def tree_rss(pid: int) -> int:
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        raise Failed("needs psutil where there is no /proc") from None
    try:
        top = psutil.Process(pid)
        return sum(process.memory_info().rss for process in [top, *top.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def peak_memory(command: Command, feed: Command | None = None) -> int:
    """The most memory that all processes of the command had at once; `feed` is piped into it, not counted."""
    with tempfile.TemporaryFile() as err:
        feeder = subprocess.Popen(feed, stdout=subprocess.PIPE) if feed else None
        source = feeder.stdout if feeder else subprocess.DEVNULL
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
            env=environment(),
        )
        if feeder and feeder.stdout:
            feeder.stdout.close()
        peak = 0
        with bounded(process):
            while process.poll() is None:
                peak = max(peak, session_memory(process.pid))
                time.sleep(SAMPLE_EVERY)
        if feeder and feeder.wait():
            raise Failed("the stream of words ended early")
        if process.returncode:
            raise Failed(f"exit {process.returncode}: {last_words(err)}")
        return peak


def usable_cores() -> list[int]:
    """The cores this process may run on, where a process can be bound to one; else none."""
    return sorted(os.sched_getaffinity(0)) if LINUX else []


def busy_share(seconds: float = 0.5) -> float:
    """How much of all cores others used, over a moment in which we do nothing; 0 to 1, NaN without /proc."""
    if not LINUX:
        return float("nan")
    before = cpu_ticks()
    time.sleep(seconds)
    after = cpu_ticks()
    ticks = [late - early for early, late in zip(before, after, strict=True)]
    return 1 - (ticks[3] + ticks[4]) / max(1, sum(ticks))


def cpu_ticks() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal since boot."""
    return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
