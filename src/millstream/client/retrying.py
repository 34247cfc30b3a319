"""Whether a failed attempt is followed by another, and when: what a server is to blame for is no prompt's fault."""

import asyncio
import math
import random
from collections.abc import Callable

from millstream.aio.jobs import Job
from millstream.client.requests import Request
from millstream.client.servers import Servers
from millstream.llm.verdicts import TIMEOUT, UNKNOWN, Verdict, WireError
from millstream.llm.wire import LONGEST_WAIT, backoff

LONGEST_ASKED = 600.0
"""Seconds that a server may ask to be left alone for, and is, although nothing else is left to ask."""

_FIRST_CONNECTIONS = 3  # attempts at a server that has never answered: its address may be wrong
_LATELY = 120.0  # seconds: with a quota a minute, however small, somebody gets through in this time
_BUSY_WAIT = 15.0  # seconds at most, unless the server asks for more, while others get through


class Retrying:
    """The `Delay` of requests to `servers`, with `attempts` that count.

    An attempt counts for nothing while it says nothing of the request: where a server is busy, as long as others got
    through lately; where it is away (or what is behind it), unless somebody got through since the attempt before.

    With `on_held`, which is told of it, a request that the servers alone are to blame for is held when its attempts are
    used up, until another gets through; without, it fails then. `on_long` is told where a server asks to be left alone
    for more than `longest_asked` seconds.
    """

    def __init__(
        self,
        servers: Servers,
        attempts: int,
        draw: random.Random,
        *,
        on_held: Callable[[Exception], None] | None = None,
        longest_asked: float = LONGEST_ASKED,
        on_long: Callable[[Exception], None] | None = None,
    ) -> None:
        self._servers, self._attempts, self._draw, self._on_held = servers, attempts, draw, on_held
        self._longest_asked, self._on_long = longest_asked, on_long

    def delay(self, error: Exception, job: Job[Request]) -> float | None:
        """Seconds until the next attempt, infinite: held; None: none."""
        found = verdict_on(error)
        if not found.retry:
            return None
        others = self._others_get_through(found, job)
        if found.then == "again" or (found.then == "away" and (others or self._on_held is None)):
            job.counted += 1
            job.alone = 0
        elif not others:
            job.alone_since = job.alone_since if job.alone else _now()
            job.alone += 1
        most = self._attempts
        if found.kind == "connection" and not self._servers.answered:
            most = min(most, _FIRST_CONNECTIONS)
        if job.counted >= most or (job.alone and job.counted + job.alone >= most):
            if not job.alone or self._on_held is None:
                return None
            self._on_held(error)
            return math.inf
        asked = getattr(error, "retry_after", None) or 0.0
        if asked > self._longest_asked and self._on_long is not None:
            self._on_long(error)
        longest = _BUSY_WAIT if found.then == "busy" and others else LONGEST_WAIT
        return asked + backoff(job.attempts, self._draw, longest)

    def _others_get_through(self, found: Verdict, job: Job[Request]) -> bool:
        if found.then not in ("busy", "away"):
            return False
        through = self._servers.last_through(job.item, busy=found.then == "busy")
        if found.then == "busy":
            return _now() - through.ended < _LATELY
        return through.began >= (job.alone_since if job.alone else job.before) and through.ended >= job.before


def _now() -> float:
    return asyncio.get_running_loop().time()


def verdict_on(error: BaseException | None) -> Verdict:
    """What any exception of an attempt comes to."""
    if isinstance(error, WireError):
        return error.verdict
    return TIMEOUT if isinstance(error, TimeoutError) else UNKNOWN
