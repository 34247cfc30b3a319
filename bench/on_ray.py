"""Two workers on Ray beside two of the local engine: CPU seconds of whole process trees, and of the driver alone.

Run as `.venv-ray/bin/python bench/on_ray.py --size 400` (MB of JSONL; `make test-ray` makes that environment), on a
machine with two cores. Each engine packs the whole corpus and a quarter of it, `--repeats` times, in turn; the
difference of the two is what three quarters of the corpus cost, without what it costs to begin. The best repeat counts.

What a process has taken is asked of Linux as the engine is closed, since Ray's own processes leave no account of those
that they have ended.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench"
sys.path.insert(0, str(ROOT))


def _stat(pid: str) -> tuple[int, float]:
    """(the parent, CPU seconds) of a process."""
    fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tree_seconds() -> float:
    """CPU seconds of this process and of all that it has started, near and far, and that are there."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found[int(pid)] = _stat(pid)
        except OSError:
            continue
    mine = {os.getpid()}
    while more := {pid for pid, (parent, _) in found.items() if parent in mine} - mine:
        mine |= more
    return sum(found[pid][1] for pid in mine)


def run_here(path: str, out: str, on: str, part: str) -> None:
    """One run in this process, with parts of so many MiB, if any are said; prints what it took."""
    import millstream
    from millstream.engines import engine
    from millstream.runs.pack import driver as pooled
    from millstream.runs.pack.turns import PartsInTurn

    made = engine("local" if on == "local" else "ray")
    parts, begun, taken, first = [], PartsInTurn._begin, [], []
    close = made.close  # type: ignore[attr-defined]

    def count(*args, **named):  # type: ignore[no-untyped-def]
        parts.append(1)
        return begun(*args, **named)

    def closed(pool):  # type: ignore[no-untyped-def]
        taken.append((tree_seconds(), time.process_time()))
        close(pool)

    if int(part):
        pooled.part_size = lambda *_: int(part) << 20
    PartsInTurn._begin = count  # type: ignore[method-assign]
    made.close = closed  # type: ignore[attr-defined]
    wanted = {"on": on, "workers": 2, "eos": True, "memory": 4 << 30}
    report = millstream.pack_to(out, path, **wanted, on_progress=lambda now: first or first.append(time.process_time()))
    assert report.workers == 2
    (cpu, driver) = taken[0]
    print(json.dumps({"cpu": cpu, "driver": driver - first[0], "parts": len(parts)}))


def run(path: Path, folder: Path, on: str, part: int) -> dict[str, float]:
    """One run in a process of its own: `cpu` seconds of all, and of the `driver` since it began to count `parts`."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, __file__, "--one", path, out, on, str(part)], stdout=subprocess.PIPE, check=True, text=True
    )
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def quarter_of(path: Path, folder: Path) -> Path:
    """The first quarter of a corpus."""
    some = folder / "quarter.jsonl"
    size = path.stat().st_size // 4
    with open(path, "rb") as whole, open(some, "wb") as file:
        for line in whole:
            file.write(line)
            if file.tell() >= size:
                break
    return some


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=400, help="MB of JSONL")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--part", type=int, default=0, help="MiB in a part, as a large corpus has (by default, what this has)"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_here(*options.one)
        return
    from bench.corpus import mixed

    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    corpus = Path(mixed(FOLDER, options.size).path)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        some = quarter_of(corpus, Path(name))
        for _ in range(options.repeats):
            for on in ("local", "ray"):
                for what, path in (("whole", corpus), ("quarter", some)):
                    found.setdefault((on, what), []).append(run(path, Path(name), on, options.part))
    best = {key: min(each["cpu"] for each in runs) for key, runs in found.items()}
    cost = {on: best[on, "whole"] - best[on, "quarter"] for on in ("local", "ray")}
    for on in ("local", "ray"):
        parts = found[on, "whole"][0]["parts"]
        driver = 1000 * min(each["driver"] for each in found[on, "whole"]) / parts
        print(f"{on}: {best[on, 'whole']:.1f} CPU s, {cost[on]:.1f} of them for the last three quarters;", end=" ")
        print(f"driver {driver:.1f} CPU ms a part ({parts} parts)")
    begun = best["local", "whole"] / best["ray", "whole"]
    print(f"efficiency {cost['local'] / cost['ray']:.2f}; with what it costs to begin {begun:.2f}")


if __name__ == "__main__":
    main()
