"""What the tests of flows share: servers with a script, sources of every kind, and a loop that takes no complaint."""

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import virtual

from millstream.aio import Fault, Outcome
from millstream.aio.flow import Flow

T = TypeVar("T")
FOREVER = 1e9  # seconds


def run(main: Coroutine[Any, Any, T]) -> T:
    """In virtual time; fails if a task is left over, or if an exception got lost in a callback or a task."""
    lost: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        return await main

    result = virtual.run(watched())
    assert not lost, lost
    return result


def clock() -> float:
    return asyncio.get_running_loop().time()


async def read(flow: Flow[Any, T], pause: float = 0.0) -> list[Outcome[T]]:
    """All outcomes of a flow, with a pause after each."""
    outcomes = []
    async with flow:
        async for outcome in flow:
            outcomes.append(outcome)
            if pause:
                await asyncio.sleep(pause)
    return outcomes


def kinds(outcomes: list[Outcome[Any]]) -> list[str]:
    """`reply`, or the kind of the fault, in source order."""
    ranked = sorted(outcomes, key=lambda outcome: outcome.index)
    return [outcome.kind if isinstance(outcome, Fault) else "reply" for outcome in ranked]


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


class Mute(Exception):
    def __str__(self) -> str:
        raise AttributeError("no words")


class Own(Exception):
    kind = "own"


class Numbered(Exception):
    kind = 7


ERRORS: dict[str, BaseException] = {
    "fail": ConnectionError("refused"),
    "cancel": asyncio.CancelledError(),
    "falsy": Falsy("no"),
    "mute": Mute(),
    "own": Own("mine"),
    "numbered": Numbered("seven"),
    "end": StopAsyncIteration("over"),
    "many": ExceptionGroup("two", [ValueError("a"), KeyError("b")]),
}


class Server:
    """An async function with a script: item i's attempt number k takes `seconds` and ends as `scripts[i][k]` says.

    The ends are `ok`, `hang`, `stubborn` (hangs, and takes 0.3 s to be cancelled), `deaf` (answers when it is
    cancelled) and those of ERRORS; after the last of the script everything is ok at once.
    """

    def __init__(self, scripts: Sequence[Sequence[tuple[str, float]]] = ()) -> None:
        self.scripts = scripts
        self.began: list[tuple[int, float]] = []  # (item, when)
        self.calls: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()
        self.running = self.most = self.cancelled = 0

    async def __call__(self, item: int) -> int:
        script = self.scripts[item] if item < len(self.scripts) else ()
        end, seconds = script[self.calls[item]] if self.calls[item] < len(script) else ("ok", 0.0)
        self.calls[item] += 1
        self.began.append((item, clock()))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(FOREVER if end in ("hang", "stubborn", "deaf") else seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            if end == "stubborn":
                await asyncio.sleep(0.3)
            if end != "deaf":
                raise
        finally:
            self.running -= 1
        if end in ERRORS:
            raise ERRORS[end]
        self.answered[item] += 1
        return item * 10


def patient(attempts: int, wait: float = 0.25):
    return lambda error, job: wait * job.attempts if job.attempts < attempts else None


def hopeful(attempts: int):
    """Held after so many, until another succeeds."""
    return lambda error, job: 0.25 if job.attempts % (attempts + 1) else math.inf


class Source:
    """`number` items as a source of one of the kinds, which may fail at its end."""

    KINDS = ("list", "iterator", "generator", "async", "async slow", "batched")

    def __init__(self, kind: str, number: int, failing: bool = False) -> None:
        self.kind, self.number, self.failing = kind, number, failing
        self.given = 0
        if kind in ("list", "iterator") and not failing:
            self.items: Any = list(range(number)) if kind == "list" else iter(range(number))
        elif kind in ("list", "iterator", "generator"):
            self.items = self._generator()
        else:
            self.items = self._batches() if kind == "batched" else self._async()

    @property
    def closed(self) -> bool:
        """A generator has no frame any more, once it is closed."""
        return getattr(self.items, "gi_frame", None) is None and getattr(self.items, "ag_frame", None) is None

    def _generator(self) -> Iterator[int]:
        while self.given < self.number:
            self.given += 1
            yield self.given - 1
        self._end()

    async def _async(self) -> AsyncIterator[int]:
        while self.given < self.number:
            await asyncio.sleep(0.2 if self.kind == "async slow" else 0)
            self.given += 1
            yield self.given - 1
        self._end()

    async def _batches(self) -> AsyncIterator[list[int]]:
        size = 0
        while self.given < self.number:
            await asyncio.sleep(0.05)
            batch = list(range(self.given, min(self.given + size, self.number)))
            self.given += len(batch)
            size = (size + 1) % 4
            yield batch
        self._end()

    def _end(self) -> None:
        if self.failing:
            raise OSError("no more disk")


def held(flow: Flow[Any, Any]) -> dict[str, int]:
    """How much a flow still holds, by the name of what holds it."""
    parts = (flow, flow._source, flow._turns, flow._outbox, flow._retries)
    held = [(name, value) for part in parts for name, value in vars(part).items() if name != "_items"]  # the caller's
    sizes = {name: len(value) for name, value in held if isinstance(value, dict | list | deque)}
    sizes |= {"places": len(flow._places._waiting), "taken": flow._places.taken, "bytes": flow._outbox.bytes}
    return {name: size for name, size in sizes.items() if size}
