"""The engine of this machine: worker processes, each of which is started anew if it dies.

Workers are spawned (never forked: threads that hold locks do not survive a fork) and without importing the main module,
so that a script or notebook without an ``if __name__ == "__main__"`` guard works as well.
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
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import IO, Any

from millstream.engines import Done
from millstream.errors import WorkerDied, setting

_AHEAD = 16  # units a worker has at once, so that it goes on while this process seals a shard
_PATIENCE = 3  # deaths of the worker of one unit
_NONE = -1  # the number of no unit
_SIZE = struct.Struct("<Q")


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


class _Worker:
    """One process, and the units that it has not answered, in the order in which it takes them."""

    def __init__(self) -> None:
        self.unanswered: deque[int] = deque()
        self.held_back: deque[int] = deque()  # until those before them are answered, one at a time
        self.functions: list[int] = []  # that it has been sent, by id
        command = [sys.executable, "-P", "-c", "from millstream.engines.worker import main; main()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with _inherited_as_ignored():
            # Without buffers: a frame read ahead into one would never make its pipe readable for `select`.
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        _widen(self.stdout)

    @property
    def load(self) -> int:
        return len(self.unanswered) + len(self.held_back)

    def end(self) -> int:
        """Its exit code, once it is gone."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return code


class Local:
    """An `Engine` of `workers` processes on this machine.

    A process that dies is started anew, and its units are done again, one at a time: the one that killed it three times
    is an error, which `named` names. `on_death` is told of each, in words.
    """

    def __init__(
        self,
        workers: int,
        *,
        named: Callable[[Any], str] = repr,
        on_death: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.slots, self._named, self._on_death = workers, named, on_death
        self._units: dict[int, tuple[Callable[[Any], Any], Any]] = {}
        self._deaths: Counter[int] = Counter()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._started())

    def _started(self) -> _Worker:
        worker = _Worker()
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    @property
    def room(self) -> bool:
        return min(worker.load for worker in self._workers) < _AHEAD

    def submit(self, number: int, function: Callable[[Any], Any], unit: Any) -> None:
        self._units[number] = function, unit
        worker = min(self._workers, key=lambda worker: worker.load)
        if worker.held_back:
            worker.held_back.append(number)
        else:
            self._send(worker, number)

    def done(self) -> Iterator[Done]:
        if not self._units:
            return
        for key, _ in self._selector.select():
            worker: _Worker = key.data
            try:
                number, failed, result = receive(worker.stdout)
            except EOFError:
                self._died(worker)
                continue
            worker.unanswered.remove(number)
            del self._units[number]
            if worker.held_back and not worker.unanswered:
                self._send(worker, worker.held_back.popleft())
            yield Done(number, error=result) if failed else Done(number, result)

    def _send(self, worker: _Worker, number: int) -> None:
        function, unit = self._units[number]
        worker.unanswered.append(number)
        try:
            if id(function) not in worker.functions:
                worker.functions.append(id(function))
                send(worker.stdin, (None, function))
            send(worker.stdin, (number, (worker.functions.index(id(function)), unit)))
        except BrokenPipeError:
            pass  # it has died, which `done` will see, with what it had answered before

    def _died(self, worker: _Worker) -> None:
        """Start another in its place, which gets its units one at a time, so that it shows which of them kills."""
        self._selector.unregister(worker.stdout)
        code = worker.end()
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        left = deque([*worker.unanswered, *worker.held_back])
        first = left[0] if left else _NONE
        self._deaths[first] += 1
        if self._deaths[first] >= _PATIENCE:
            where = f" at {self._named(self._units[first][1])}" if left else ""
            fewer = f"; often the system was out of memory: fewer {setting('workers')} need less"
            hint = fewer if code == -signal.SIGKILL else ""
            raise WorkerDied(
                f"a worker process ended by itself ({why}), {_PATIENCE} times{where}{hint}. "
                "Run the same command again to go on"
            )
        self._on_death(why)
        fresh = self._started()
        self._workers[self._workers.index(worker)] = fresh
        fresh.held_back = left
        if left:
            self._send(fresh, fresh.held_back.popleft())

    def close(self) -> None:
        self._selector.close()
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()
