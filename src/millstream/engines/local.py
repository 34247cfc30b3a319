"""The engine of this machine: worker processes, each of which is started anew if it dies.

Workers are spawned (never forked: threads that hold locks do not survive a fork) and without importing the main module,
so that a script or notebook without an ``if __name__ == "__main__"`` guard works as well.
"""

import contextlib
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from millstream.engines import Done
from millstream.engines.deaths import PATIENCE, ended_by_itself
from millstream.errors import setting
from millstream.store.pipe import widen

_SIZE = struct.Struct("<Q")


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


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _answered_here() -> Iterator[None]:
    """Ctrl-C reaches the whole group, and a scheduler's SIGTERM every process of a job: only this one answers them.

    Processes that are started within have them blocked. What comes meanwhile is answered at the end of the block, where
    all that was started is known; it may come through another thread of ours, in which nothing is blocked.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # else Python answers them, whatever happens here
    handlers = {number: handler for number in _STOPS if main and callable(handler := signal.getsignal(number))}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    for number in handlers:
        signal.signal(number, lambda each, frame: came.append(each))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in came:
            handlers[signal.Signals(each)](each, None)


class _Worker:
    """One process, and the numbers of the units that it has not answered, in the order in which it got them."""

    def __init__(self) -> None:
        self.unanswered: list[int] = []
        self.held_back: deque[int] = deque()  # until those before them are answered, one at a time
        self.answers: Counter[int] = Counter()  # of each unit, by this process
        self.functions: list[Callable[[Any], Any]] = []  # that it has been sent
        self.idle_deaths = 0  # of those before it in its place, at no unit, since one of them answered
        command = [sys.executable, "-P", "-c", "from millstream.engines.worker import main; main()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Without buffers: a frame read ahead into one would never make its pipe readable for `select`.
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        widen(self.stdout)

    @property
    def load(self) -> int:
        return len(self.unanswered) + len(self.held_back)

    def send(self, *items: Any) -> None:
        try:
            for item in items:
                send(self.stdin, item)
        except BrokenPipeError:
            pass  # it has died, which `done` will see, with what it had answered before

    def end(self) -> int:
        """Its exit code, once it is gone."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return code


@dataclass(slots=True)
class _Task:
    """A unit on its way: `allowed` answers it may give, of which `given` were handed out; `deaths` of its workers."""

    function: Callable[[Any], Any]
    unit: Any
    urgent: bool
    allowed: int | None
    given: int = 0
    deaths: int = 0


class Local:
    """An `Engine` of `workers` processes on this machine, each of which has `depth` units at once.

    A process that dies is started anew, and its units are done again, one at a time: the one that killed it three times
    is an error, which `named` names and which ends with an `advice`. `on_death` is told of each death, in words.
    """

    def __init__(
        self,
        workers: int,
        *,
        depth: int = 16,
        named: Callable[[Any], str] = repr,
        on_death: Callable[[str], None] = lambda words: None,
        advice: str = "",
    ) -> None:
        self.slots, self._depth, self._named, self._on_death = workers, depth, named, on_death
        self._advice = advice
        self._tasks: dict[int, _Task] = {}
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            with _answered_here():
                for _ in range(workers):
                    self._workers.append(self._started())
        except BaseException:  # an interrupt that has waited: nobody has got the engine, to close it
            self.close()
            raise

    def _started(self) -> _Worker:
        worker = _Worker()
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    @property
    def room(self) -> bool:
        return min(worker.load for worker in self._workers) < self._depth

    def submit(
        self,
        number: int,
        function: Callable[[Any], Any],
        unit: Any,
        needs: Iterable[str] = (),
        *,
        urgent: bool = False,
        ahead: int | None = None,
    ) -> None:
        self._tasks[number] = _Task(function, unit, urgent, ahead)
        worker = min(self._workers, key=lambda worker: worker.load)
        if worker.held_back:
            worker.held_back.append(number)
        else:
            self._send(worker, number)

    def more(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is None or task.allowed is None:
            return
        task.allowed += 1
        self._tell("more", number)

    def give_up(self, number: int) -> None:
        self._tell("give up", number)

    def _tell(self, what: str, number: int) -> None:
        """A word to the worker that has a unit; one that is held back will be done alone, and needs none."""
        for worker in self._workers:
            if number in worker.unanswered:
                worker.send((what, number))

    def done(self) -> Iterator[Done]:
        found: list[Done] = []
        while self._tasks and not found:
            for key, _ in self._selector.select():
                worker: _Worker = key.data
                try:
                    answer = receive(worker.stdout)
                except EOFError:
                    self._died(worker)
                else:
                    found += self._answered(worker, *answer)
        yield from found

    def _answered(self, worker: _Worker, number: int, kind: str, result: Any) -> Iterator[Done]:
        task = self._tasks[number]
        worker.idle_deaths = 0
        if kind == "part":
            worker.answers[number] += 1
            if worker.answers[number] > task.given:  # else a process that died has given it before
                task.given += 1
                yield Done(number, result, last=False)
            return
        worker.unanswered.remove(number)
        del worker.answers[number], self._tasks[number]
        if worker.held_back and not worker.unanswered:
            self._send(worker, worker.held_back.popleft(), alone=True)
        yield Done(number, error=result) if kind == "error" else Done(number, result)

    def _send(self, worker: _Worker, number: int, *, alone: bool = False) -> None:
        """Give a unit to a process; one that has it `alone` does it to its end, as others wait for that."""
        task = self._tasks[number]
        worker.unanswered.append(number)
        which = next((at for at, sent in enumerate(worker.functions) if sent is task.function), None)
        if which is None:
            which = len(worker.functions)
            worker.functions.append(task.function)
            worker.send(("function", task.function))
        worker.send(("unit", number, which, task.unit, task.urgent, None if alone else task.allowed))

    def _died(self, worker: _Worker) -> None:
        """Start another in its place, which gets its units one at a time, so that it shows which of them kills."""
        self._selector.unregister(worker.stdout)
        code = worker.end()
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        left = deque([*worker.unanswered, *worker.held_back])
        if self._blamed(worker, left[0] if left else None) >= PATIENCE:
            unit = self._named(self._tasks[left[0]].unit) if left else None
            fewer = f"; often the system was out of memory: fewer {setting('workers')} need less"
            hint = fewer if code in (-signal.SIGKILL, -signal.SIGABRT) else ""  # the second is how Rust says so
            raise ended_by_itself(why, unit, hint, self._advice)
        self._on_death(why)
        with _answered_here():
            fresh = self._started()
            fresh.idle_deaths = worker.idle_deaths
            self._workers[self._workers.index(worker)] = fresh
        fresh.held_back = left
        if left:
            self._send(fresh, fresh.held_back.popleft(), alone=True)

    def _blamed(self, worker: _Worker, number: int | None) -> int:
        """How often a worker has died at this unit, or at none in this place, with this time."""
        if number is None:
            worker.idle_deaths += 1
            return worker.idle_deaths
        self._tasks[number].deaths += 1
        return self._tasks[number].deaths

    def close(self) -> None:
        self._selector.close()
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()
