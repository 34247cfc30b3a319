"""How far a run is, told to its journal now and then, with what each of its processes takes."""

import os
import resource
import sys
import time
from collections.abc import Iterator

from millstream.folder.journal import Journal, Measured, NodeTaken, Process, Rhythm, events
from millstream.runs.progress import Progress
from millstream.store import at


class Measuring:
    """Writes `Measured` lines to the journal of the run in `folder`, in the `Rhythm` that the lines before make."""

    def __init__(self, folder: str, journal: Journal) -> None:
        self._journal = journal
        self._rhythm = Rhythm(sum(1 for _ in events(at(folder), Measured)))

    @property
    def due(self) -> bool:
        return self._rhythm.due(time.monotonic())

    def tell(self, now: Progress, queue: int, spilled: int, nodes: list[NodeTaken]) -> None:
        self._journal.write(
            Measured(
                seconds=round(now.seconds, 3),
                share=now.share,
                documents=now.documents,
                ids=now.ids - now.ids_before,
                bytes=now.bytes - now.bytes_before,
                faults=now.faults,
                stages={stage: round(seconds, 3) for stage, seconds in now.stages.items()},
                queue=queue,
                spilled=spilled,
                processes=processes(),
                nodes=nodes,
            )
        )


def processes() -> list[Process]:
    """This process and, where the system says which they are (Linux), those that it has started.

    >>> [own] = [process for process in processes() if process.pid == os.getpid()]
    >>> own.memory > 1 << 20, own.cpu > 0
    (True, True)
    """
    try:
        return [_process(pid) for pid in [os.getpid(), *_children()]]
    except (OSError, ValueError):
        used = resource.getrusage(resource.RUSAGE_SELF)
        unit = 1 if sys.platform == "darwin" else 1024
        return [Process(os.getpid(), used.ru_maxrss * unit, round(used.ru_utime + used.ru_stime, 3))]


def _process(pid: int) -> Process:
    """What Linux says of a process: proc(5), from the third field on, as the second may have blanks in it."""
    fields = at("/proc").read(f"{pid}/stat").rpartition(b")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Process(pid, int(fields[21]) * resource.getpagesize(), round(cpu, 3))


def _children() -> Iterator[int]:
    tasks = at("/proc/self/task")
    for name, _ in tasks.entries():
        yield from map(int, tasks.read(f"{name}/children").split())
