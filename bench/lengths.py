"""Best-fit on lengths alone, in its own process: no text, and ids that are all 0.

Run as `python bench/lengths.py plan|assign|line COUNT SEQ_LEN SEED`; prints one JSON line. `plan` places COUNT
documents as a histogram, `assign` COUNT documents one by one, `line` lets the packer of `millstream pack` make samples
of documents with COUNT ids in all. Only the seconds spent in these count.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np

from millstream.records import Ids, TokenBatch
from millstream.stream.bins import assign, plan
from millstream.stream.line import Line, Strategy
from millstream.stream.pack import Packed

MEDIAN = 400
SIGMA = 1.3
LONGEST = 1 << 20
DRAWN = 10_000_000
BATCH = 1000
DESCRIBED = (
    f"log-normal lengths, median {MEDIAN} ids, sigma {SIGMA}; one in ten has more than 2,048 ids, "
    "and half of all ids are in those"
)


def drawn(rng: np.random.Generator, count: int) -> Ids:
    """Long-tailed lengths: half of the documents are shorter than `MEDIAN`, a tenth five times as long or longer."""
    return np.minimum(rng.lognormal(np.log(MEDIAN), SIGMA, count).astype(np.int64) + 1, LONGEST)


def ends(length: Ids, n: int) -> Ids:
    """What is left of documents behind their full samples of n ids; this is what a window's plan has to place."""
    rest = length % n
    return rest[rest > 0]


def time_plan(count: int, n: int, rng: np.random.Generator) -> dict[str, float]:
    few = np.bincount(ends(drawn(rng, DRAWN), n), minlength=n + 1)
    histogram = rng.multinomial(count, few / few.sum())
    start = time.process_time()
    steps = plan(histogram, n)
    return {"seconds": time.process_time() - start, "steps": len(steps)}


def time_assign(count: int, n: int, rng: np.random.Generator) -> dict[str, float]:
    pieces = ends(drawn(rng, count), n)
    start = time.process_time()
    assign(pieces, n)
    return {"seconds": time.process_time() - start, "documents": len(pieces)}


def batches(count: int, rng: np.random.Generator) -> Iterator[TokenBatch]:
    """Documents until they have `count` ids."""
    ids, none, names = np.zeros(BATCH * LONGEST, np.uint16), np.zeros(BATCH, np.int64), [""] * BATCH
    first = given = 0
    while given < count:
        length = drawn(rng, BATCH)
        ordinal = np.arange(first, first + BATCH, dtype=np.uint64)
        yield TokenBatch(ids[: length.sum()], length, ordinal, none, names, none, none)
        first += BATCH
        given += int(length.sum())


def time_line(count: int, n: int, rng: np.random.Generator) -> dict[str, float]:
    """`needless`: documents of at most n ids that were cut all the same."""
    line = Line(Strategy("best-fit", n), np.dtype(np.uint16))
    told = {"seconds": 0.0, "ids": 0, "samples": 0, "padding": 0, "needless": 0}

    def take(made: Iterable[Packed]) -> None:
        start = time.process_time()
        done = list(made)
        told["seconds"] += time.process_time() - start
        for packed in done:
            used = int(packed.segments["length"].sum())
            told["ids"] += used
            told["samples"] += len(packed.ids)
            told["padding"] += packed.ids.size - used
            told["needless"] += int((packed.ended.split & (packed.ended.length <= n)).sum())

    for batch in batches(count, rng):
        take(line.feed(batch))
    take(line.flush())
    return told


def main(what: str, count: int, n: int, seed: int) -> None:
    measure = {"plan": time_plan, "assign": time_assign, "line": time_line}[what]
    print(json.dumps(measure(count, n, np.random.default_rng(seed))))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
