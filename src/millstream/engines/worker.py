"""A worker process of the local engine: units come on standard input, results go to standard output."""

import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from millstream.engines.lean import keep_freed_memory
from millstream.engines.local import receive, send
from millstream.engines.steps import Steps
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
        self._steps = Steps()
        self._urgent: deque[tuple[Any, ...]] = deque()
        self._new: deque[tuple[Any, ...]] = deque()
        self._allowed: dict[int, int | None] = {}  # answers of generators that were begun; None: as many as they like
        self._more: dict[int, int] = {}  # that came for units that are not begun

    def take(self, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "function":
            self._steps.learn(content[0])
        elif kind == "more":
            self._let_on(content[0])
        elif kind == "give up":
            self._give_up(content[0])
        else:
            number, which, unit, urgent, allowed = content
            (self._urgent if urgent else self._new).append((number, which, unit, allowed))

    def _let_on(self, number: int) -> None:
        """A generator may give another answer."""
        if number not in self._allowed:
            self._more[number] = self._more.get(number, 0) + 1
        elif (allowed := self._allowed[number]) is not None:
            self._allowed[number] = allowed + 1

    def _give_up(self, number: int) -> None:
        fresh = next((unit for unit in self._new if unit[0] == number), None)
        if number in self._allowed:
            del self._allowed[number]
            self._steps.give_up(number)
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
        return next((number for number, allowed in self._allowed.items() if allowed != 0), None)

    def _begin(self, number: int, which: int, unit: Any, allowed: int | None) -> None:
        extra = self._more.pop(number, 0)
        kind, result = self._steps.begin(number, which, unit)
        if kind:
            self._answer((number, kind, result))
        else:
            self._allowed[number] = None if allowed is None else allowed + extra

    def _go_on(self, number: int) -> None:
        kind, result = self._steps.go_on(number)
        if kind != "part":
            del self._allowed[number]
        elif (allowed := self._allowed[number]) is not None:
            self._allowed[number] = allowed - 1
        self._answer((number, kind, result))
