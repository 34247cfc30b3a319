"""How many attempts run at once: a fixed number, or one that learns what the server takes.

`Adaptive` puts together what others found: slow start and a remembered threshold from TCP (Jacobson 1988); a small
raise and a cut by a factor, which settles where neither alone would (AIMD: Chiu and Jain 1989); the quick return to
just below the last ceiling and the hesitation before going beyond it (CUBIC: Ha, Rhee and Xu 2008); and that a server
which queues shows its limit without saying no (Netflix's concurrency-limits, which look at the latency; here it is the
work done in a second, so that a server whose latency grows while it does more is used to the full).

It bounds attempts in flight, not attempts per minute: a quota per minute is for `rates`.
"""

from collections.abc import Callable
from math import hypot
from typing import Any, Literal, Protocol

from millstream.aio.pace import FEWEST, Pace

# The reasons are measured by the tests' model of a server: 5 to 500 places, latencies fixed, lognormal and bimodal.
_CUT = 0.8  # of what was in use: an overload of 25 % ends with one cut, and it costs little where it was a false alarm
_GENTLY = 0.05  # of the limit in a round, and at least one: so a probe beyond the ceiling costs one rejection
_BEYOND, _FURTHER = 1.1, 1.25  # a probe's goal where the server refuses; and where the pace must show the difference
_PATIENCE = 2  # rounds to stay before the first probe, twice as many after each that failed, up to
_MOST_PATIENCE = 32  # rounds: failed probes then cost below 1 % of the work, and a server that grew is used in a minute
_CLOCK = 0.25  # seconds to a round of patience at least: a refused request waits about a second, however short a round
_FEW = 4  # the least round of a limit that is refused, so that probing 1 or 2 stays below 2 % rejections
_RISE = 2.0  # climbing fourfold must double the pace at least: halfway, in logarithms, between all of it and nothing
_NEARLY = 0.7  # of the pace, measured while climbing, which is half a round behind: in truth nearly all of it
_WORTH = 0.25  # of the proportional gain: a step up that brings less is not worth it, a step down that loses less is
_SURE = 2.0  # standard errors
_IN_A_ROW = 3  # refusals without an end between them: so it is where all places are taken, and hardly ever by chance
_ROUND, _FEWER = 0.15, 2.0  # climbing stops at such a share of refusals in a round; and so many more where it is short
_QUIET, _USUAL = 0.01, 1 / 300  # a share below which nothing is refused by chance; and the weight of one event in it
_BREAK = 8  # a part of a round for which a refusal delays climbing
_HISTORY = 200  # entries


class Limit(Protocol):
    """How many attempts may run at once. Times are seconds of any clock that does not go back."""

    @property
    def now(self) -> int:
        """The limit at this moment, at least 1."""

    @property
    def cut(self) -> bool:
        """The server refused lately, and it has not yet recovered: not the time for hedging."""

    def started(self, time: float) -> int:
        """An attempt begins; gives the ticket that it ends with."""

    def ended(self, ticket: int, time: float, value: Any, error: BaseException | None) -> None:
        """It ended with a value, or with an error; cancelled counts as an error too."""


class Fixed:
    """Always the same number.

    >>> Fixed(64).now
    64
    """

    def __init__(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"at least 1 may be in flight, not {number}")
        self.now, self.cut = number, False

    def started(self, time: float) -> int:
        return 0

    def ended(self, ticket: int, time: float, value: Any, error: BaseException | None) -> None:
        pass


class Adaptive:
    """A limit between `low` and `high` that follows the server.

    It climbs from `start`, doubling in a round (as many ends as the limit), until the server refuses or does no more
    work for it; then it holds, and now and then tries a little more or, if nobody refuses, less. `overloaded` tells a
    refusal (like 429 or 503) from errors that say nothing about the load, such as a timeout; `work` is what a reply
    brought, in any unit. A limit that is not used, because the source is slow, stays where it is.

    A ticket is the number of cuts so far: of the attempts admitted under one limit, only the first refusal cuts. That
    needs no clock: after a cut, nothing begins before as many ended as it took away.

    >>> limit = Adaptive(overloaded=lambda error: isinstance(error, ConnectionError), start=3)
    >>> tickets = [limit.started(0.0) for _ in range(3)]
    >>> for ticket in tickets:
    ...     limit.ended(ticket, 1.0, "reply", None)
    >>> limit.now, limit.reason
    (6, 'climbing')
    >>> tickets = [limit.started(1.0) for _ in range(6)]
    >>> for ticket in tickets[3:]:  # one alone may be chance
    ...     limit.ended(ticket, 1.1, None, ConnectionError())
    >>> limit.now, limit.cut, limit.reason
    (3, True, 'cut by the server')
    >>> limit.history
    [(0.0, 3), (1.0, 4), (1.0, 5), (1.0, 6), (1.1, 3)]
    """

    reason: Literal["climbing", "cut by the server", "no faster with more", "the highest allowed"]
    """Why it is where it is."""

    def __init__(
        self,
        overloaded: Callable[[BaseException], bool],
        work: Callable[[Any], float] = lambda _: 1.0,
        *,
        low: int = 1,
        start: int = 4,
        high: int = 1024,
    ) -> None:
        if not 1 <= low <= start <= high:
            raise ValueError(f"limits are 1 <= low <= start <= high, not {low}, {start}, {high}")
        self._overloaded, self._work, self._low, self._high = overloaded, work, low, high
        self._limit, self._ceiling = float(start), high
        self._running = 0
        self._unused = 0  # ends since the limit was last in full use, counted down from a round
        self._epoch = 0
        self._clean = 0  # replies to attempts of this epoch
        self._row, self._round = 0, 0.0  # refusals without an end between them; their share in a round or so
        self._by_chance = 0.0  # share of refusals that were taken for chance, in the long run
        self._break = 0  # ends until climbing goes on
        self._refused = False  # the ceiling is where the server refuses, not where it gets no faster
        self._mode: Literal["climb", "hold", "more", "less"] = "climb"
        self._since = 0.0
        self._base, self._goal = start, start  # where a round or a trial began; where a trial leads
        self._rounds: list[tuple[int, float]] = []  # of climbing: (limit at the end, pace)
        self._patience, self._turn = _PATIENCE, False
        self._pace = self._known = Pace(start, 0.0)
        self.reason = "climbing"
        self.history: list[tuple[float, int]] = []

    @property
    def now(self) -> int:
        return int(self._limit)

    @property
    def cut(self) -> bool:
        return self._epoch > 0 and self._clean < 2 * self._limit

    def started(self, time: float) -> int:
        self._note(time)
        self._running += 1
        if self._running >= self.now:
            self._unused = self.now
        return self._epoch

    def ended(self, ticket: int, time: float, value: Any, error: BaseException | None) -> None:
        used, self._running = min(self._running, self.now), max(0, self._running - 1)
        if isinstance(error, Exception) and self._overloaded(error):
            self._reject(ticket, max(used, 1), time)
            return
        self._clean += error is None and ticket == self._epoch
        self._row = 0
        self._round -= self._round / self._limit
        self._by_chance -= _USUAL * self._by_chance
        if self._unused <= 0:
            self._measure(time)
            return
        self._unused -= 1
        batch = self._pace.add(self._work(value) if error is None else 0.0, time)
        match self._mode:
            case "climb":
                self._climb(time, error is None, batch)
            case "hold":
                self._hold(time, batch)
            case "more" if self._limit < self._goal:
                self._edge_up(time)
            case _:
                self._judge(time, batch)
        self._note(time)

    # What the server refuses ------------------------------------------------------------------------------------------

    def _reject(self, ticket: int, used: int, time: float) -> None:
        known = self._ceiling < self._high
        if ticket != self._epoch:  # admitted together with the one that cut: so the ceiling was lower still
            self._ceiling = max(self._ceiling - 1, self.now) if known else self._ceiling
            return
        quiet = self._mode == "more" and self._by_chance < _QUIET
        if self._may_be_chance() and not quiet:
            self._by_chance += _USUAL * (1 - self._by_chance)
            if self._mode == "climb" and not known:
                self._limit = min(self._limit, float(max(used, self._low)))
                self._break = used // _BREAK
            return
        if self._clean or not known:  # a server that refuses all is down: then the ceiling is where it was
            self._ceiling = max(used - 1, self._low)
        if self._mode == "more":
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        elif self._mode != "climb":
            self._patience = _PATIENCE
        self._epoch += 1
        self._clean = self._unused = 0
        self._refused, self.reason = True, "cut by the server"
        self._enter("climb", int(_CUT * used), time)
        self._note(time)

    def _may_be_chance(self) -> bool:
        """A refusal that says nothing of the number: where all places are taken, the next attempt is refused as well.

        A server that refuses 4 % by chance would else end at 7, or lose its ceiling again and again.
        """
        self._row += 1
        self._round += (1 - self._round) / self._limit
        if self._row >= _IN_A_ROW or self._round > _ROUND + _FEWER / self._limit:
            self._row, self._round, self._break = 0, 0.0, 0
            return False
        return True

    # Four modes, each with what it does at the end of an attempt ------------------------------------------------------

    def _climb(self, time: float, clean: bool, batch: bool) -> None:
        if self._break > 0:
            self._break -= 1
            return
        self._limit = min(self._limit + clean, self._ceiling)
        if self._ceiling < self._high:
            if self._limit >= self._ceiling:
                self._enter("hold", self._ceiling, time)
        elif batch and self._pace.seen >= self._base:  # a round is over
            self._rounds.append((self.now, self._pace.rate))
            if len(self._rounds) < 3 or self._pace.rate > _RISE * self._rounds[-3][1]:
                self._base, self._pace = self.now, self._pace.again(self.now)
                return
            enough = next(limit for limit, rate in self._rounds if rate >= _NEARLY * self._pace.rate)
            self._refused = False
            self.reason = "no faster with more" if enough < self._high else "the highest allowed"
            self._enter("hold", enough, time)

    def _hold(self, time: float, batch: bool) -> None:
        """Stay for some rounds; then try more, or, by turns where nobody refuses, less."""
        rounds = self._pace.seen / max(self.now, _FEW if self._refused else FEWEST)
        known = time - self._since >= _CLOCK * self._patience if self._refused else batch and self._pace.enough
        if rounds < self._patience or not known:
            return
        self._known, self._base, self._turn = self._pace, self.now, not self._turn
        if self.now < self._high and (self._refused or not self._turn or self.now == self._low):
            beyond = int((_BEYOND if self._refused else _FURTHER) * self.now)
            self._goal = min(max(beyond, self.now + 1), self._high)
            self._enter("more", self.now, time)
        else:
            self._less(time)

    def _edge_up(self, time: float) -> None:
        self._limit = min(self._limit + max(_GENTLY, 1 / self._limit), self._goal)
        if self._limit >= self._goal:
            self._measure(time)

    def _less(self, time: float) -> None:
        self._enter("less" if self.now > self._low else "hold", int(_CUT * self.now), time)
        self._goal = self.now

    def _judge(self, time: float, batch: bool) -> None:
        """Keep what was tried, go on in that direction, or go back; or wait until it is clear."""
        worth = self._is_worth() if batch or self._refused else None
        if worth is None:
            return
        if not worth:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            self._enter("hold", self._base, time)
            return
        self._patience = _PATIENCE
        if self._mode == "more":
            self._rounds = [(self._base, self._known.rate)] if self._known.enough else []
            self._base, self._ceiling, self.reason = self.now, self._high, "climbing"
            self._enter("climb", self.now, time)
        else:
            self._known = self._pace if self._pace.beats(self._known) else self._known.joined(self._pace)
            self._base, self.reason = self.now, "no faster with more"
            self._less(time)

    def _is_worth(self) -> bool | None:
        """Whether the limit that is tried is better than the one before; None: not known yet."""
        if self._refused:  # nobody refused in a round of it: climb, and see
            return True if self._pace.seen >= self.now else None
        if not self._pace.enough:
            return None
        if not self._known.rate:  # nothing gets done, as all runs out of time
            return self._pace.rate > 0 or self._mode == "less"
        ratio = self._pace.rate / self._known.rate
        least = 1 + _WORTH * (self.now / self._base - 1)
        if abs(ratio - least) > _SURE * ratio * hypot(self._pace.error, self._known.error):
            return ratio > least
        return False if self._pace.seen > 2 * self._known.seen else None

    def _enter(self, mode: Literal["climb", "hold", "more", "less"], limit: int, time: float) -> None:
        self._mode, self._since = mode, time
        self._limit = float(min(max(limit, self._low), self._high))
        self._measure(time)

    def _measure(self, time: float) -> None:
        """Anew; what was under way at another limit, a round, does not count, except while climbing."""
        self._pace = Pace(self.now, time, skip=0 if self._mode == "climb" else self.now)

    def _note(self, time: float) -> None:
        last = self.history[-1][1] if self.history else 0
        if abs(self.now - last) >= max(1, last / 10):
            self.history.append((time, self.now))
            if len(self.history) > _HISTORY:
                del self.history[1::2]
