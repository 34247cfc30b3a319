"""A worker process of the local engine: units come on standard input, results go to standard output."""

import os
import pickle
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

from millstream.engines.lean import keep_freed_memory
from millstream.engines.local import receive, send
from millstream.errors import RunError
from millstream.store.pipe import to_nowhere


def main() -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Nobody else may write into the frames: whatever prints goes to standard error.
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    to_nowhere(0)

    def read() -> None:
        # Reading all the time keeps the parent from waiting in a write while we wait in ours.
        try:
            while True:
                inbox.put(receive(source))
        except EOFError:
            os._exit(0)  # the parent is gone, killed perhaps: nobody wants the rest
        except BaseException:  # what came cannot be made again here, and the parent waits for an answer
            traceback.print_exc()
            os._exit(1)

    def write() -> None:
        # And writing in a thread of its own lets the next unit begin while the parent is busy with others.
        try:
            while True:
                send(target, answers.get())
        except BaseException:  # the parent is gone, or a result cannot be pickled: either way this worker is done
            os._exit(1)

    keep_freed_memory()
    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=write, daemon=True).start()
    desk = Desk(answers.put)
    while True:
        desk.take(inbox.get())
        while desk.step():
            while not inbox.empty():
                desk.take(inbox.get())


@dataclass(slots=True)
class _Begun:
    """A generator that goes on while it is `allowed` another answer; None: always."""

    items: Generator[Any]
    allowed: int | None


class Desk:
    """What lies before a worker, and in which order it is done: what is urgent, what was begun, what is new.

    `answer` gets (number, "part", "done" or "error", result).

    >>> desk = Desk(print)
    >>> desk.take(("function", abs))
    >>> desk.take(("unit", 7, 0, -3, False, None))
    >>> desk.take(("unit", 8, 0, -4, True, None))
    >>> desk.step(), desk.step(), desk.step()
    (8, 'done', 4)
    (7, 'done', 3)
    (True, True, False)
    """

    def __init__(self, answer: Callable[[tuple[int, str, Any]], None]) -> None:
        self._answer = answer
        self._functions: list[Callable[[Any], Any]] = []
        self._urgent: deque[tuple[Any, ...]] = deque()
        self._new: deque[tuple[Any, ...]] = deque()
        self._begun: dict[int, _Begun] = {}
        self._more: dict[int, int] = {}  # that came for units that are not begun

    def take(self, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "function":
            self._functions.append(content[0])
        elif kind == "more":
            begun = self._begun.get(content[0])
            if begun is None:
                self._more[content[0]] = self._more.get(content[0], 0) + 1
            elif begun.allowed is not None:
                begun.allowed += 1
        elif kind == "give up":
            self._give_up(content[0])
        else:
            number, which, unit, urgent, allowed = content
            (self._urgent if urgent else self._new).append((number, which, unit, allowed))

    def _give_up(self, number: int) -> None:
        begun = self._begun.pop(number, None)
        fresh = next((unit for unit in self._new if unit[0] == number), None)
        if begun:
            begun.items.close()
        elif fresh:
            self._new.remove(fresh)
        else:
            return  # it is done
        self._more.pop(number, None)
        self._answer((number, "done", None))

    def step(self) -> bool:
        """Do the next thing, as far as to its next answer; False if there is nothing to do."""
        if self._urgent:
            self._begin(*self._urgent.popleft())
        elif (number := self._next_begun()) is not None:
            self._go_on(number)
        elif self._new:
            self._begin(*self._new.popleft())
        else:
            return False
        return True

    def _next_begun(self) -> int | None:
        return next((number for number, begun in self._begun.items() if begun.allowed != 0), None)

    def _begin(self, number: int, which: int, unit: Any, allowed: int | None) -> None:
        extra = self._more.pop(number, 0)
        try:
            result = self._functions[which](unit)
        except BaseException as error:
            self._answer((number, "error", portable(error)))
            return
        if isinstance(result, GeneratorType):
            self._begun[number] = _Begun(result, None if allowed is None else allowed + extra)
        else:
            self._answer((number, "done", result))

    def _go_on(self, number: int) -> None:
        begun = self._begun[number]
        try:
            item = next(begun.items)
        except StopIteration as end:
            del self._begun[number]
            self._answer((number, "done", end.value))
        except BaseException as error:
            del self._begun[number]
            self._answer((number, "error", portable(error)))
        else:
            if begun.allowed is not None:
                begun.allowed -= 1
            self._answer((number, "part", item))


def portable(error: BaseException) -> BaseException:
    """The error, or one with its words if it cannot be sent: the classes of some libraries cannot be imported."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except (pickle.PickleError, AttributeError, ImportError, TypeError, ValueError):
        return RunError(f"{type(error).__name__}: {error}")
