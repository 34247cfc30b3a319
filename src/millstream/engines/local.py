"""Run a function over units on this machine: inline, or in worker processes, with the results in unit order.

Workers are started anew (never forked: threads that hold locks do not survive a fork) and without importing the main
module, so that a script or notebook without an ``if __name__ == "__main__"`` guard works as well.
"""

import contextlib
import ctypes
import fcntl
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import IO, Any, TypeVar

from millstream.errors import WorkerDied, setting

U = TypeVar("U")
R = TypeVar("R")

_AHEAD = 16  # units a worker has at once, so that it goes on while this process seals a shard
_SIZE = struct.Struct("<Q")


def map_ordered(
    function: Callable[[U], R],
    units: Iterable[U],
    *,
    workers: int = 1,
    window_bytes: int = 64 << 20,
    size: Callable[[U], int] = lambda unit: 1,
) -> Generator[R]:
    """`function(unit)` for every unit, in order. `function` and what it returns must be picklable.

    At most `window_bytes` (by `size`) are with the workers or wait for an earlier unit; a larger unit goes alone.
    An exception in `function` is raised here, in order. Raises WorkerDied if a process ends by itself.

    >>> list(map_ordered(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    if workers <= 1:
        yield from map(function, units)
        return
    pool = _Pool(function, workers)
    try:
        yield from pool.run(units, window_bytes, size)
    finally:
        pool.close()


def keep_freed_memory() -> None:
    """Have the C library keep freed blocks for the next batch: giving them back and faulting them in again costs
    a tenth of the CPU time. For processes that do nothing else; glibc only, elsewhere nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)


def send(file: IO[bytes], item: Any) -> None:
    data = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
    for part in (_SIZE.pack(len(data)), data):
        left = memoryview(part)
        while left:
            left = left[file.write(left) :]
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """The next item; raises EOFError when the other side is gone."""
    (size,) = _SIZE.unpack(_exactly(file, _SIZE.size))
    return pickle.loads(_exactly(file, size))


def _exactly(file: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        left = left[count:]
    return data


def _widen(pipe: IO[bytes]) -> None:
    """A pipe that holds a whole result: 64 KiB of it at a time would wake both sides dozens of times."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # over the user's limit: it works as it is
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


@contextlib.contextmanager
def _inherited_as_ignored() -> Iterator[None]:
    """Ctrl-C reaches the whole group, and a scheduler's SIGTERM every process of a job: only this one answers them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Pool:
    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        command = [sys.executable, "-P", "-c", "from millstream.engines.worker import main; main()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with _inherited_as_ignored():
            self.processes = [
                # Without buffers: a frame read ahead into one would never make its pipe readable for `select`.
                subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                for _ in range(workers)
            ]
        self.selector = selectors.DefaultSelector()
        self.queued = [0] * workers
        for number, process in enumerate(self.processes):
            assert process.stdout
            _widen(process.stdout)
            self.selector.register(process.stdout, selectors.EVENT_READ, number)
            self._send(number, function)

    def run(self, units: Iterable[U], window_bytes: int, size: Callable[[U], int]) -> Generator[Any]:
        source = iter(units)
        waiting: deque[int] = deque()  # sizes of units handed out and not yet handed on, in order
        done: dict[int, tuple[bool, Any]] = {}
        sent = given = held = 0
        pending: list[U] = []
        exhausted = False
        while True:
            while not exhausted and min(self.queued) < _AHEAD:
                if not pending:
                    unit = next(source, self)
                    if unit is self:
                        exhausted = True
                        break
                    pending.append(unit)  # type: ignore[arg-type]
                cost = size(pending[0])
                if waiting and held + cost > window_bytes:
                    break
                number = self.queued.index(min(self.queued))
                self._send(number, (sent, pending.pop()))
                self.queued[number] += 1
                waiting.append(cost)
                held, sent = held + cost, sent + 1
            if given in done:
                held -= waiting.popleft()
                failed, result = done.pop(given)
                given += 1
                if failed:
                    raise result
                yield result
            elif waiting:
                for key, _ in self.selector.select():
                    index, failed, result = self._receive(key.data)
                    done[index] = (failed, result)
                    self.queued[key.data] -= 1
            elif exhausted:
                return

    def _send(self, number: int, item: Any) -> None:
        stdin = self.processes[number].stdin
        assert stdin
        try:
            send(stdin, item)
        except BrokenPipeError:
            self._died(number)

    def _receive(self, number: int) -> Any:
        stdout = self.processes[number].stdout
        assert stdout
        try:
            return receive(stdout)
        except EOFError:
            self._died(number)

    def _died(self, number: int) -> None:
        code = self.processes[number].wait()
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        hint = (
            f"; often the system was out of memory: fewer {setting('workers')} need less"
            if code == -signal.SIGKILL
            else ""
        )
        raise WorkerDied(f"a worker process ended by itself ({why}){hint}. Run the same command again to go on")

    def close(self) -> None:
        self.selector.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
