"""The outcomes of many requests, as users read them; what was paid for is never thrown away."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from millstream.aio import Fault, Flow, Returned
from millstream.client.requests import Reply, outcome_of
from millstream.client.tripwire import Tripwire
from millstream.errors import AskStopped
from millstream.llm.wire import Answer


class Outcomes(AsyncIterator[Reply | Fault]):
    """The outcomes of a run of requests, inside ``async with``; after the block nothing of it is alive.

    Raises AskStopped, once, when it is clear that every other request would end the same way: a wrong key, no such
    model, no quota left (docs/verdicts.md says after how many). What was under way then comes to its end before, and is
    in the exception's `outcomes`.
    """

    def __init__(self, flow: Flow[Any, Answer]) -> None:
        self._flow = flow
        self._tripwire = Tripwire(flow.stop, shared=True)
        flow.watch = self._tripwire.seen
        self.rest: list[Reply | Fault] = []
        """What was not handed out when the run was stopped, in order of the requests, the fault that stopped it too."""

    async def __aenter__(self) -> "Outcomes":
        await self._flow.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._flow.__aexit__(*error)

    async def __anext__(self) -> Reply | Fault:
        outcome = await anext(self._flow)
        if self._tripwire.reason is not None:
            self._keep(outcome)
            async for each in self._flow:
                self._keep(each)
            self.rest.sort(key=_index)
            raise AskStopped(self._tripwire.reason, self.rest)
        return outcome_of(outcome)

    def _keep(self, outcome: Returned[Answer] | Fault) -> None:
        if not (isinstance(outcome, Fault) and outcome.kind == "stopped"):
            self.rest.append(outcome_of(outcome))


async def collected(outcomes: Outcomes, found: list[Reply | Fault]) -> list[Reply | Fault]:
    """All outcomes in order of the requests. Until the end they are in `found`, so that no exception loses them."""
    try:
        async with outcomes:
            async for outcome in outcomes:
                found.append(outcome)
    except BaseException as error:
        found += outcomes.rest
        found.sort(key=_index)
        leave_with(error, found)
        raise
    found.sort(key=_index)
    return found


def leave_with(error: BaseException, outcomes: list[Any]) -> None:
    """Whatever ends a run early, Ctrl-C or an exception out of the prompts too, carries what was paid for."""
    with contextlib.suppress(AttributeError, TypeError):  # of a class that takes no attributes
        error.outcomes = outcomes  # type: ignore[attr-defined]


def _index(outcome: Reply | Fault) -> int:
    return outcome.index
