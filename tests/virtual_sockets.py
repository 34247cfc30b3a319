"""Virtual time for tests with real sockets: the clock jumps only when no socket has anything to say."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from virtual import VirtualLoop, _Jumping

T = TypeVar("T")

_GRACE = 0.05  # real seconds that a busy system may need to carry bytes from one socket of this process to another
_LONG_GRACE = 10.0  # the same where there is no timer to jump to


class _Patient(_Jumping):
    def select(self, timeout: float | None) -> list[Any]:
        ready = self._real.select(0.0 if timeout == 0.0 else _LONG_GRACE if timeout is None else _GRACE)
        return ready or super().select(timeout)


class SocketLoop(VirtualLoop):
    def __init__(self) -> None:
        self.now = 0.0
        asyncio.SelectorEventLoop.__init__(self, _Patient(self))  # type: ignore[arg-type]


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time; fails if a task is left over."""
    with asyncio.Runner(loop_factory=SocketLoop) as runner:

        async def watched() -> T:
            result = await main
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result

        return runner.run(watched())
