"""`gather`, `as_completed`, `ordered` and `race` over any async function: what the readers of a `Flow` want."""

from collections.abc import Iterable
from typing import Any, TypeVar

from millstream.aio.flow import Flow, Function
from millstream.aio.outcomes import Fault, Outcome, Returned
from millstream.aio.supply import Items

T = TypeVar("T")
R = TypeVar("R")


def as_completed(function: Function[T, R], items: Items[T], **options: Any) -> Flow[T, R]:
    """Outcomes as they finish: ``async with as_completed(f, items) as outcomes: async for outcome in outcomes``.

    `options` are those of `Flow`.
    """
    return Flow(function, items, in_order=False, **options)


def ordered(function: Function[T, R], items: Items[T], **options: Any) -> Flow[T, R]:
    """Outcomes in source order, each as soon as its turn has come; `options` are those of `Flow`."""
    return Flow(function, items, in_order=True, **options)


async def gather(function: Function[T, R], items: Items[T], **options: Any) -> list[Outcome[R]]:
    """All outcomes in source order.

    >>> import asyncio
    >>> async def double(number):
    ...     return 2 * number
    >>> [reply.value for reply in asyncio.run(gather(double, [1, 2, 3]))]
    [2, 4, 6]
    """
    async with ordered(function, items, **options) as outcomes:
        return [outcome async for outcome in outcomes]


async def race(function: Function[T, R], items: Iterable[T], **options: Any) -> Outcome[R]:
    """The first *success* over all items at once; the losers are cancelled and awaited before it is returned.

    A fast failure does not win. If all fail: one Fault of kind ``race`` with all of theirs in `faults`.
    """
    contenders = list(items)
    if not contenders:
        raise ValueError("a race needs somebody to run it")
    faults: list[Fault] = []
    async with as_completed(function, contenders, **{"in_flight": len(contenders), **options}) as outcomes:
        async for outcome in outcomes:
            if isinstance(outcome, Returned):
                return outcome
            faults.append(outcome)
    last = faults[-1]
    message = f"all {len(faults)} failed, the last with {last.message}"
    return Fault(last.index, "race", message, last.seconds, last.attempts, error=last.error, faults=tuple(faults))
