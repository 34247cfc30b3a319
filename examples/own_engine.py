"""Pack with an engine of your own: here the processes of `concurrent.futures`, in place of Dask, Spark or a job queue.

    python examples/own_engine.py SOURCE... OUT

Which parts and shards there are, and what the run folder has, is the job's: an engine only calls two functions
elsewhere.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import parent_process
from threading import Thread

from millstream import distributed

AHEAD = 4
"""Parts that may be tokenized before the first of them is counted: what they leave lies on the disk."""


def end_with_the_parent() -> None:
    """Called in each process of the pool, which else stays for ever, and waits for work, when the parent is killed."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def drive(job: distributed.PackJob) -> None:
    with ProcessPoolExecutor(2, initializer=end_with_the_parent) as pool:
        writing: list[tuple[distributed.ShardTask, Future[distributed.Written]]] = []

        def write(tasks: Iterable[distributed.ShardTask]) -> None:
            writing.extend((task, pool.submit(job.write_shard, task)) for task in tasks)

        # Parts are tokenized in any order, and counted in their own.
        tokenizing: deque[Future[list[distributed.Counts]]] = deque()
        for part in job.parts():
            tokenizing.append(pool.submit(job.tokenize_part, part))
            if len(tokenizing) >= AHEAD:
                write(job.count(tokenizing.popleft().result()))
            while writing and writing[0][1].done():
                task, done = writing.pop(0)
                job.wrote(task, done.result())
        while tokenizing:
            write(job.count(tokenizing.popleft().result()))
        write(job.finish())
        for task, done in writing:
            job.wrote(task, done.result())


if __name__ == "__main__":
    *sources, out = sys.argv[1:]
    report = distributed.pack_with(drive, out, sources, seq_len=1024, eos=True, shard_size=1 << 20)
    print(f"{report.samples:,} samples in {report.shards} shards, in {out}")
