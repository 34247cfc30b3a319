"""Results in the order of their units, whatever engine made them, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from millstream.engines import Done, Engine, engine

U = TypeVar("U")
R = TypeVar("R")

_PATIENCE = 0.05  # seconds that units are waited for while all have one to work on, and results may be there


def map_ordered(
    function: Callable[[U], R],
    units: Iterable[U],
    *,
    workers: int = 1,
    window_bytes: int = 64 << 20,
    size: Callable[[U], int] = lambda unit: 1,
    **options: Any,
) -> Generator[R]:
    """`function(unit)` for every unit, in order. `function` and what it returns must be picklable.

    At most `window_bytes` (by `size`) are with the workers or wait for an earlier unit; a larger unit goes alone.
    An exception in `function` is raised here, in order. Raises WorkerDied if a unit keeps killing its process.
    `options` are those of `Local`.

    >>> list(map_ordered(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    if workers <= 1:
        yield from map(function, units)
        return
    pool = engine("local")(workers, **options)
    try:
        yield from _in_order(pool, function, units, window_bytes, size)
    finally:
        pool.close()


def _in_order(
    pool: Engine, function: Callable[[U], R], units: Iterable[U], window_bytes: int, size: Callable[[U], int]
) -> Generator[R]:
    source = iter(units)
    waiting: deque[int] = deque()  # sizes of units handed out and not yet handed on, in order
    ready: dict[int, Done] = {}
    sent = given = held = 0
    pending: list[U] = []
    exhausted = False
    while True:
        until = time.monotonic() + _PATIENCE
        while not exhausted and pool.room:
            if len(waiting) - len(ready) >= pool.slots and time.monotonic() >= until:
                break
            if not pending:
                unit = next(source, pool)
                if unit is pool:
                    exhausted = True
                    break
                pending.append(unit)  # type: ignore[arg-type]
            cost = size(pending[0])
            if waiting and held + cost > window_bytes:
                break
            pool.submit(sent, function, pending.pop())
            waiting.append(cost)
            held, sent = held + cost, sent + 1
        if given in ready:
            held -= waiting.popleft()
            done = ready.pop(given)
            given += 1
            if done.error is not None:
                raise done.error
            yield done.result
        elif waiting:
            ready |= {done.number: done for done in pool.done()}
        elif exhausted:
            return
