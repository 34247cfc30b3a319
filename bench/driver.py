"""The arithmetic of a driver in its own process: counts of made-up parts come in as workers send them, tasks go out.

Run as `python bench/driver.py STRATEGY SHUFFLE PARTS SEED [DOCUMENTS FOLDER]`, SHUFFLE yes or no; prints one JSON line.
A part is about 16 MiB of text: 4 M ids in 5,000 documents, or in as many as told. `seconds`: CPU time of planning the
parts, if there is a FOLDER (where files as long as the corpus are made, with nothing in them), of unpickling the
counts, of the course, and of pickling the tasks; `memory`: the most of the process.
"""

import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import high_water
from millstream.corpus.find import find_inputs
from millstream.corpus.limits import Limits, Manner
from millstream.corpus.parts import parts as planned
from millstream.corpus.unpacked import Unpack
from millstream.records import Cursor, Part, Range, Ref
from millstream.runs.pack.counts import Counts, SubsetCounts
from millstream.runs.pack.course import Course, Start
from millstream.runs.pack.planning import Planning
from millstream.runs.pack.subset import Mark
from millstream.stream.line import Strategy

SEQ_LEN = 2048
PER_SHARD = (256 << 20) // (2 * SEQ_LEN)
DOCUMENTS = 5000
PART = 16 << 20
DIFFERENT = 16
"""Parts that are made up; then they come again."""
FILE = 1 << 40
"""Bytes of a file of a corpus that is planned, too."""


def made_up(number: int, rng: np.random.Generator, documents: int) -> Counts:
    """Log-normal lengths, of 800 ids in the mean where there are 5,000."""
    length = rng.lognormal(np.log(400 * DOCUMENTS / documents), 1.18, documents).astype(np.int64)
    part = Part(number, (Range(0, number * PART, (number + 1) * PART),))
    ids = int(length.sum())
    mark = Mark(Cursor(0, 0), ordinal=documents, line=documents, text_ids=ids, bytes=PART)
    ref = Ref(f"{number}-train", 2 * ids, number)
    subsets = {"train": SubsetCounts.of(length, np.arange(documents), ref=ref)}
    return Counts(part, 0, True, mark, subsets)


def by_planning(parts: int, folder: Path) -> Iterator[Part | None]:
    """The parts of a corpus of so many, as a driver plans them."""
    folder.mkdir(exist_ok=True)
    for number in range(0, parts * PART, FILE):
        with open(folder / f"{number // FILE:03d}.jsonl", "wb") as file:
            file.truncate(min(FILE, parts * PART - number))  # takes no place on the disk
    shards = find_inputs([str(folder)]).shards
    manner = Manner(Limits(1 << 25, None, True), ("text", "id"), 1 << 20)
    unpack = Unpack(shards, manner, lambda name, chunks: Ref(name, 0, 0))
    plan = Planning(planned(shards, Cursor(), manner, PART), shards, unpack=unpack, workers=64)
    for _ in range(parts):
        yield plan.next(lambda *_: lambda: None)


def main(strategy: str, shuffle: str, parts: int, seed: int, documents: int = DOCUMENTS, folder: str = "") -> None:
    rng = np.random.default_rng(seed)
    sent = [pickle.dumps(made_up(number, rng, documents), 5) for number in range(DIFFERENT)]
    how = Strategy(strategy, SEQ_LEN, shuffle=0 if shuffle == "yes" else None)
    course, mark, tasks = Course({"train": Start(how, PER_SHARD)}), Mark(), 0
    some: Iterator[Any] = by_planning(parts, Path(folder)) if folder else iter(range(parts))
    start = time.process_time()
    for number, part in enumerate(some):
        counts = pickle.loads(sent[number % DIFFERENT])
        assert part is not None
        counts.mark = replace(counts.mark, cursor=Cursor(0, (number + 1) * PART))
        made = course.add(counts, mark)
        mark = mark.plus(counts.mark)
        tasks += len([pickle.dumps(task, 5) for task in made])
        course.droppable()
    tasks += len([pickle.dumps(task, 5) for task in course.finish()])
    seconds = time.process_time() - start
    memory = high_water(os.getpid())  # what getrusage tells is that of whoever started this, too
    told = {"ids": mark.text_ids, "documents": mark.ordinal, "seconds": seconds, "tasks": tasks, "memory": memory}
    print(json.dumps(told))


main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), *sys.argv[6:])
