"""A run into a bucket beside the same run into a folder of this disk: CPU seconds of the client's processes.

Run as `.venv-bucket/bin/python bench/on_bucket.py --size 100` (MB of JSONL; `make test-bucket` makes that environment).
The server is moto's, a process of its own on this machine, whose CPU seconds are not counted. The best repeat counts.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.corpus import mixed
from bench.served import OWN, make_bucket, served

_BLOCK, _BLOCKS = 1 << 20, 256


def packed(out: str, *arguments: str) -> float:
    """CPU seconds of a run and all that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "millstream", "pack", *arguments, "--out", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cost(function: Callable[[], object]) -> float:
    """CPU seconds of this process, its threads among them."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def moved(url: str) -> tuple[float, float]:
    """MB a CPU second: written and hashed as an output shard is, and read from its beginning to its end."""
    from millstream.store import at

    store, block = at(url), os.urandom(_BLOCK)

    def write() -> None:
        with store.write("big") as file:
            for _ in range(_BLOCKS):
                file.write(block)

    def read() -> None:
        with store.open("big") as file:
            while file.read(_BLOCK):
                pass

    store.make()
    size = _BLOCK * _BLOCKS / 1e6
    rates = size / cost(write), size / cost(read)
    store.delete("big")
    return rates


def measure(text: Path, repeats: int, workers: int) -> None:
    from millstream.store import at

    found: dict[str, list[float]] = {}
    rates: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, served(folder) as address:
        os.environ.update(OWN, AWS_ENDPOINT_URL=address)
        bucket = make_bucket(address, "bench")
        for _ in range(repeats):
            for where, out in (("folder", f"{folder}/run"), ("bucket", f"{bucket}/run")):
                found.setdefault(where, []).append(packed(out, str(text), "--eos", "--workers", str(workers)))
                at(out).delete("") if where == "bucket" else shutil.rmtree(out)
                rates.setdefault(where, []).append(moved(out))
    size = text.stat().st_size / 1e6
    best = {where: min(seconds) for where, seconds in found.items()}
    for where, seconds in best.items():
        written, read = (max(rate) for rate in zip(*rates[where], strict=True))
        told = f"{where}: {seconds:.2f} CPU s for {size:,.0f} MB of text"
        print(f"{told}; MB a CPU second: {written:,.0f} out, {read:,.0f} in")
    print(f"packing into a bucket has {best['folder'] / best['bucket']:.2f} of the folder's rate, by CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=100, help="MB of JSONL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.gettempdir(), "millstream-bench")
    folder.mkdir(exist_ok=True)
    measure(Path(mixed(folder, options.size).path), options.repeats, options.workers)


if __name__ == "__main__":
    main()
