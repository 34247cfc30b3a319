"""What a kill -9 in the middle costs: the same command again, and then the documents that are there, once or twice.

No rival is asked for what it does not promise: each is run as its documentation says that a run is gone on with.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import corpus, measure
from bench.contenders import HERE, SEQ_LEN, Plan, say
from bench.measure import Command, Failed
from bench.rows import Row, could_not

ROWS = ("lost",)
FILES = 8
EOS = 50_256
SHARE = 0.4
"""Of what a whole run leaves on the disk: then it is killed."""
DESCRIBED = (
    f"Each has two workers, and ends documents with EOS. When {SHARE:.0%} of what a whole run leaves is on the disk, "
    "all of its processes are killed with -9, and the same command is started again. Documents are compared by their "
    "ids. CPU seconds are user and system time of all processes, one round; the start is that of a run of few lines."
)
PATIENCE = 600.0

Ids = np.ndarray


@dataclass(frozen=True)
class Packer:
    """Whose run is killed: the command that reads a folder and writes into another, and the ids that are there then."""

    what: str
    command: Callable[[Path, Path], Command]
    ids: Callable[[Path], list[Ids]]


@dataclass(frozen=True)
class Kept:
    """CPU seconds of a run that has nothing to do, of a whole run, of one until it was killed, and of that which went
    on; what is there then."""

    start: float
    whole: float
    before: float
    after: float
    documents: Counter[bytes]


def lost_rows(plan: Plan, loaders: str) -> list[Row]:
    """A row for millstream and for each rival."""
    source = in_files(corpus.subset(plan.mixed, plan.folder, plan.subset_mb), FILES)
    tokenizer = str(plan.tokenizer.absolute())

    def program(python: str, name: str) -> Callable[[Path, Path], Command]:
        return lambda folder, out: [python, str(HERE / "rivals" / name), str(folder), str(out), tokenizer]

    def ours(folder: Path, out: Path) -> Command:
        front = [sys.executable, "-m", "millstream", "pack", str(folder), "--out", str(out), "--tokenizer", "gpt2"]
        return [
            *front,
            "--seq-len",
            str(SEQ_LEN),
            "--eos",
            "--shard-size",
            "8MiB",
            "--workers",
            "2",
            "--memory",
            "4GiB",
        ]

    packers = [
        Packer("millstream pack --workers 2", ours, shards_of_ours),
        Packer(
            "datatrove (JsonlReader, DocumentTokenizer, a task for each file)",
            program(plan.rivals, "datatrove_shards.py"),
            shards_of_datatrove,
        ),
        Packer(
            "litdata (optimize with use_checkpoint, an input for each document)",
            program(loaders, "litdata_optimize.py"),
            chunks_of_litdata,
        ),
    ]
    expected: Counter[bytes] | None = None
    rows = []
    for packer in packers:
        say(f"killed in the middle: {packer.what}")
        try:
            whole, expected = went_well(plan, packer, source, expected)
            rows.append(row(packer.what, killed(plan, packer, source, whole), expected))
        except Failed as failure:
            rows.append(Row(packer.what, "every document once", could_not(failure), None))
    return rows


def in_files(path: Path, count: int) -> Path:
    """The lines of a file in `count` files about as large, in a folder."""
    folder = path.with_suffix(f".in-{count}")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        size, number = path.stat().st_size, 0
        with open(path, "rb") as lines:
            while number < count:
                with open(partial / f"{number:03d}.jsonl", "wb") as out:
                    for line in lines:
                        out.write(line)
                        if lines.tell() >= size * (number + 1) / count:
                            break
                number += 1
        partial.replace(folder)
    return folder


def first_lines(folder: Path) -> Path:
    """The first line of each file."""
    short = folder.with_suffix(".first")
    short.mkdir(exist_ok=True)
    for path in folder.glob("*.jsonl"):
        with open(path, "rb") as file:
            (short / path.name).write_bytes(file.readline())
    return short


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed: its CPU seconds, and of them those of its start; how many bytes it left."""

    start: float
    cpu: float
    bytes: int


def went_well(
    plan: Plan, packer: Packer, source: Path, expected: Counter[bytes] | None
) -> tuple[Whole, Counter[bytes]]:
    """Raises Failed if its documents are not those `expected`, which are those of the first one."""
    start = measure.run(packer.command(first_lines(source), emptied(plan))).cpu
    out = emptied(plan)
    done = measure.run(packer.command(source, out))
    found = documents(packer.ids(out))
    if expected is not None and found != expected:
        raise Failed(f"a whole run has other documents: {told(found, expected)}")
    return Whole(start, done.cpu, size_of(out)), found


def killed(plan: Plan, packer: Packer, source: Path, whole: Whole) -> Kept:
    out = emptied(plan)
    command = packer.command(source, out)
    measure.adopt_orphans()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=measure.environment()
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and size_of(out) < SHARE * whole.bytes and not ended(process.pid):
        time.sleep(0.01)
    measure.end_session(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    before = usage.ru_utime + usage.ru_stime + measure.orphans_cpu(process.pid)
    if process.returncode != -signal.SIGKILL:
        raise Failed("it ended before it was killed")
    after = measure.run(command)
    return Kept(whole.start, whole.cpu, before, after.cpu, documents(packer.ids(out)))


def ended(pid: int) -> bool:
    """Whether a child has ended, which is still to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def emptied(plan: Plan) -> Path:
    out = (plan.folder / "killed").absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


# --- what is there


def documents(shards: list[Ids]) -> Counter[bytes]:
    """How often each document is there, by a hash of its ids; what ends without EOS is one too."""
    found: Counter[bytes] = Counter()
    for ids in shards:
        ends = np.flatnonzero(ids == EOS) + 1
        found.update(hashlib.blake2b(one.tobytes(), digest_size=12).digest() for one in np.split(ids, ends) if len(one))
    return found


def shards_of_ours(out: Path) -> list[Ids]:
    """All ids in a row, as documents go on from one shard to the next."""
    names = [*sorted(out.glob("samples-*.npy")), *out.glob("remainder.npy")]
    return [np.concatenate([np.load(name).reshape(-1) for name in names])]


def shards_of_datatrove(out: Path) -> list[Ids]:
    return [np.fromfile(path, np.uint16) for path in sorted(out.glob("tokens/*.ds"))]


def chunks_of_litdata(out: Path) -> list[Ids]:
    """Those that the index names: a count, offsets, and the items' ids."""
    index = json.loads((out / "tokens" / "index.json").read_text())
    return [chunk_of_litdata((out / "tokens" / chunk["filename"]).read_bytes()) for chunk in index["chunks"]]


def chunk_of_litdata(data: bytes) -> Ids:
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    return np.frombuffer(data, np.int32, offset=4 * (count + 2)).astype(np.uint16)


# --- in words


def row(what: str, kept: Kept, expected: Counter[bytes]) -> Row:
    before, after, whole = (seconds - kept.start for seconds in (kept.before, kept.after, kept.whole))
    again = f"{max(0.0, before + after - whole) / before:.0%}" if before > 0 else "nothing"
    measured = (
        f"{told(kept.documents, expected)}; {kept.whole:.1f} CPU s without a kill; {kept.before:.1f} until it and "
        f"{kept.after:.1f} to go on: but for the start, of {kept.start:.1f}, {again} of what was spent before is spent "
        "again"
    )
    return Row(what, "every document once", measured, kept.documents == expected)


def told(found: Counter[bytes], expected: Counter[bytes]) -> str:
    """
    >>> told(Counter("aab"), Counter("abc")), told(Counter("ab"), Counter("ab"))
    ('1 documents twice, 1 missing', 'every document once')
    """
    if found == expected:
        return "every document once"
    twice = sum((found - expected)[name] for name in expected)
    other = sum(count for name, count in (found - expected).items() if name not in expected)
    words = [
        f"{twice:,} documents twice",
        f"{sum((expected - found).values()):,} missing",
        f"{other:,} others" if other else "",
    ]
    return ", ".join(word for word in words if word)
