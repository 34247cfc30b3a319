"""An event loop that owns time: when nobody can run, the clock jumps to the next timer instead of waiting for it."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping:
    """A selector that never waits for a timer: it moves the loop's clock there."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop, self._real = loop, selectors.DefaultSelector()

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("deadlock: nothing can run and no timer is set")
        self._loop.now += max(0.0, timeout)
        return self._real.select(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))  # type: ignore[arg-type]

    def time(self) -> float:
        return self.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time; fails if a task is left over."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def watched() -> T:
            result = await main
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"left over: {left}"
            return result

        return runner.run(watched())
