"""When to stop a run: faults that other requests would share, told from those of one request."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from millstream.aio import Fault, Returned
from millstream.client.requests import named, sentence
from millstream.client.retrying import verdict_on
from millstream.llm.verdicts import PATIENCE, Verdict

_ANY = "any server"
_SERVERS = "the servers' doing", _ANY
_FIRST = "the first"  # in place of the server: of faults that are only in doubt until something is answered


@dataclass(slots=True)
class _Row:
    """Faults in a row of one kind, at one server: how many, since when, and which outcomes are in doubt for them."""

    since: float
    count: int = 0
    doubted: set[int] = field(default_factory=set)


class Tripwire:
    """Notices when going on makes no sense, and says `stop`; then `reason` says why.

    It is told each outcome at once, in the order of completion. Its verdict says how many alike in a row end a run,
    while nothing was answered yet and later; and so many in a row that the servers are to blame for do. Until that is
    known, a fault is in doubt: a reply clears it that was asked for after the first of them. If the run stops, the ones
    in doubt have no outcome.

    `shared`: only what every other request would share counts, such as a wrong key.
    """

    def __init__(self, stop: Callable[[], None], *, shared: bool = False) -> None:
        self.reason: str | None = None
        self.answered = False  # anything: also by an earlier run
        self._stop, self._shared = stop, shared
        self._rows: dict[tuple[str, str], _Row] = {}

    def seen(self, outcome: Returned[Any] | Fault, began: float, now: float) -> None:
        """An outcome, whose last attempt was made from `began` to `now` (s)."""
        if isinstance(outcome, Returned):
            if self._rows and self.reason is None:
                self._clear(began, outcome.value.server)
            self.answered = True
        elif outcome.held and not self._shared:
            self._count(verdict_on(outcome.error), outcome, now)
            self._trip(f"{sentence(named(outcome))} Stopped: nothing else was left to ask")
        elif outcome.error is not None:
            self._count(verdict_on(outcome.error), outcome, now)

    def held(self, error: Exception, now: float) -> None:
        """A request has used up its attempts, and waits until somebody gets through."""
        kind = getattr(error, "kind", "error")
        self._count(verdict_on(error), Fault(-1, kind, str(error), 0.0, error=error), now)

    def doubts(self, fault: Fault) -> bool:
        """Whether it is not known yet whether this is the request's own."""
        return any(fault.index in row.doubted for row in self._rows.values())

    def _clear(self, began: float, server: str) -> None:
        """Somebody got through. What only the first requests are in doubt for is cleared by any reply."""
        for place, row in list(self._rows.items()):
            if place[1] == _FIRST or (place[1] in (server, _ANY) and began >= row.since):
                del self._rows[place]

    def _count(self, found: Verdict, fault: Fault, now: float) -> None:
        limit = found.later if self.answered else found.first
        if limit is None or (self._shared and (found.later is None or found.servers)):
            return
        server = getattr(fault.error, "server", "") or _ANY
        alike = self._add((found.kind, server if found.later else _FIRST), fault, now)
        if alike >= limit:
            self._trip(f"{sentence(named(fault))} Stopped: {_why(found, limit, self.answered)}")
        elif found.servers and self._add(_SERVERS, fault, now) >= PATIENCE:
            self._trip(f"{sentence(named(fault))} Stopped: {_why(found, PATIENCE, True)}")

    def _add(self, place: tuple[str, str], fault: Fault, now: float) -> int:
        row = self._rows.setdefault(place, _Row(now))
        row.count += 1
        row.doubted.add(fault.index)
        return row.count

    def _trip(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._stop()


def _why(found: Verdict, number: int, answered: bool) -> str:
    if number == 1:
        return "every other request would end the same way"
    if not answered:
        return "the first requests all ended this way"
    if found.kind == "connection":
        return f"{number} requests in a row could not be sent"
    return f"{number} requests in a row {'got no reply' if found.servers else 'ended this way'}"
