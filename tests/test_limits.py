"""The adaptive limit against models of a server, in virtual time: how near it comes to the best fixed setting."""

import asyncio
import functools
import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass

import pytest
import virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.aio.limits import Adaptive, Fixed


class Busy(Exception):
    """The server refuses."""


def fixed(seconds):
    return lambda rng: seconds


def lognormal(median, sigma=0.5):
    return lambda rng: median * math.exp(rng.gauss(0.0, sigma))


def bimodal(rng):
    return 1.0 if rng.random() < 0.02 else 0.05


LATENCIES = {
    "fixed 0.05": fixed(0.05),
    "fixed 1": fixed(1.0),
    "lognormal 0.05": lognormal(0.05),
    "lognormal 1": lognormal(1.0),
    "bimodal": bimodal,
}


class Server:
    """So many places, at most; who finds none is refused, after `refusing` seconds, or waits in line."""

    def __init__(self, places, latency, *, queues=False, seed=0, refusing=0.0, noise=0.0):
        self.places = places if callable(places) else lambda time: places
        self.latency, self.queues, self.refusing, self.noise = latency, queues, refusing, noise
        self.rng, self.line = random.Random(seed), deque()
        self.at_work = self.asked = self.refused = 0

    async def ask(self):
        loop = asyncio.get_running_loop()
        self.asked += 1
        full = self.at_work >= self.places(loop.time())
        if (full and not self.queues) or self.rng.random() < self.noise:
            self.refused += 1
            if self.refusing:
                await asyncio.sleep(self.refusing)
            raise Busy
        if full:
            turn = loop.create_future()
            self.line.append(turn)
            await turn
        else:
            self.at_work += 1
        try:
            await asyncio.sleep(self.latency(self.rng))
            return 1.0
        finally:
            self.at_work -= 1
            while self.line and self.at_work < self.places(loop.time()):
                turn = self.line.popleft()
                if not turn.done():
                    turn.set_result(None)
                    self.at_work += 1


@dataclass
class Run:
    seconds: float
    refused: float  # share of the attempts
    seen: list[tuple[float, int]]  # (time, limit) at each end

    def limits(self, after, before=math.inf):
        return [limit for time, limit in self.seen if after <= time < before]


def drive(limit, server, requests, *, backoff=(0.5, 1.0), window=1000, source=None, timeout=None, lost=0):
    """Answer all requests with `limit.now` attempts running; the refused come again after a random backoff.

    `source(time)` is how many the source lets run at most, `lost` n: every n-th end is not told.
    """

    async def main():
        loop, rng = asyncio.get_running_loop(), random.Random(1)
        changed, waiting, running, seen = asyncio.Event(), [], set(), []
        left, done, ends, alarm = requests, 0, 0, None

        async def attempt():
            async with asyncio.timeout(timeout):
                return await server.ask()

        def ended(ticket, task):
            nonlocal done, ends
            running.discard(task)
            ends += 1
            error = task.exception()
            if not lost or ends % lost:
                limit.ended(ticket, loop.time(), None if error else task.result(), error)
            seen.append((loop.time(), limit.now))
            done += error is None
            if error:
                heapq.heappush(waiting, loop.time() + rng.uniform(*backoff))
            changed.set()

        while done < requests:
            changed.clear()
            most = min(limit.now, source(loop.time()) if source else limit.now)
            while len(running) < min(most, limit.now):
                if waiting and waiting[0] <= loop.time():
                    heapq.heappop(waiting)
                elif left and len(waiting) < window:
                    left -= 1
                else:
                    break
                ticket, task = limit.started(loop.time()), loop.create_task(attempt())
                running.add(task)
                task.add_done_callback(functools.partial(ended, ticket))
            if waiting and len(running) < most:
                alarm = loop.call_at(waiting[0], changed.set)
            elif source and not running:
                alarm = loop.call_later(0.01, changed.set)
            await changed.wait()
            if alarm:
                alarm.cancel()
        return Run(loop.time(), server.refused / server.asked, seen)

    return virtual.run(main())


def best(server, places, requests):
    """Seconds that so many in flight, always, would take: no refusals, nobody waits for a place."""
    rng, ends = random.Random(0), [0.0] * places
    for _ in range(requests):
        heapq.heapreplace(ends, ends[0] + server.latency(rng))
    return max(ends)


def adaptive(**more):
    return Adaptive(lambda error: isinstance(error, Busy), **more)


CASES = [(*case, 0) for case in itertools.product(LATENCIES, (5, 50), (False, True))]
CASES += [("lognormal 1", 200, False, 0), ("lognormal 1", 200, True, 0)]
MORE = [
    case for case in itertools.product(LATENCIES, (5, 20, 50, 200, 500), (False, True), (0, 1, 2)) if case not in CASES
]


@pytest.mark.parametrize(
    ("name", "places", "queues", "seed"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]
)
def test_near_the_best_fixed_setting(name, places, queues, seed):
    requests = max(3000, 100 * places)  # in fewer, slow start alone loses a tenth
    server = Server(places, LATENCIES[name], queues=queues, seed=seed)
    limit = adaptive()
    run = drive(limit, server, requests)
    assert best(server, places, requests) / run.seconds >= 0.9
    assert run.refused < 0.02
    if queues:
        assert (limit.reason, run.refused) == ("no faster with more", 0)
        assert 0.75 * places <= limit.now <= 5 * places  # soon; for later see below
    else:
        assert limit.reason == "cut by the server"
        assert 0.75 * places <= limit.now <= 1.1 * places + 1


def test_a_server_that_queues_is_left_with_a_short_queue():
    server, limit = Server(20, lognormal(1.0), queues=True, seed=4), adaptive()
    run = drive(limit, server, 12_000)
    assert best(server, 20, 12_000) / run.seconds >= 0.95
    late = run.limits(run.seconds / 2)
    assert 0.9 * 20 <= sum(late) / len(late) <= 1.6 * 20


@pytest.mark.parametrize("refusing", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("backoff", [(0.5, 1.0), (1.0, 1.0)], ids=["jitter", "retry-after"])
def test_refusals_may_take_time_and_name_a_time(refusing, backoff):
    server = Server(50, lognormal(0.5), refusing=refusing, seed=5)
    run = drive(adaptive(), server, 5000, backoff=backoff)
    assert best(server, 50, 5000) / run.seconds >= 0.9
    assert run.refused < 0.02


def test_slow_start_overshoots_by_a_few():
    server, limit = Server(100, lognormal(1.0), seed=6), adaptive()
    run = drive(limit, server, 2000)
    assert next(time for time, now in run.seen if now >= 80) < 10.0  # log2(80 / 4) rounds of about 1.1 s, and more
    assert server.refused < 20


def test_a_server_that_shrinks_and_grows():
    server = Server(lambda time: 50 if 60 <= time < 180 else 100, lognormal(1.0), seed=7)
    run = drive(adaptive(), server, 20_000)
    assert max(run.limits(60 + 3, 180)) <= 56  # within the time that what runs takes to end
    assert max(run.limits(180, 180 + 60)) >= 90  # again within a minute
    assert min(run.limits(180 + 60)) >= 75
    assert run.refused < 0.02


def test_a_server_that_queues_and_grows():
    server = Server(lambda time: 20 if time < 100 else 200, lognormal(1.0), queues=True, seed=7)
    run = drive(adaptive(), server, 30_000)
    early, late = run.limits(50, 100), run.limits(100 + 120)
    assert sum(early) / len(early) <= 5 * 20
    assert min(late) >= 0.75 * 200
    assert max(late) <= 5 * 200


@pytest.mark.parametrize("start", [40.0, 0.0])
def test_a_server_that_is_down(start):
    server = Server(lambda time: 0 if start <= time < start + 20 else 100, lognormal(1.0), seed=8)
    run = drive(adaptive(), server, 8000, window=200)
    assert set(run.limits(start + 10, start + 20)) == {1}
    assert max(run.limits(start + 20, start + 50)) >= 90


def test_what_is_not_used_does_not_grow():
    server = Server(200, lognormal(0.05), seed=9)
    run = drive(adaptive(), server, 20_000, source=lambda time: 10 if time < 30 else 1000)
    assert 10 <= max(run.limits(0, 30)) <= 20
    assert max(run.limits(30)) >= 190


@pytest.mark.parametrize("noise", [0.01, 0.04])
@pytest.mark.parametrize("seed", range(4))
def test_refusals_that_have_no_cause_in_the_number(noise, seed):
    """Of a few refused whatever runs, cutting saves none: it is as fast as with the best fixed number."""
    fixed = min(
        drive(Fixed(number), Server(64, lognormal(0.4), seed=seed, noise=noise), 2000, backoff=(0.0, 1.0)).seconds
        for number in (56, 64)
    )
    server, limit = Server(64, lognormal(0.4), seed=seed, noise=noise), adaptive()
    run = drive(limit, server, 2000, backoff=(0.0, 1.0))
    assert run.seconds <= 1.15 * fixed
    assert run.refused <= noise + 0.02
    late = run.limits(run.seconds / 2)
    assert sum(late) / len(late) >= 0.9 * 64


def test_one_in_ten_that_is_refused_by_chance_is_no_reason_to_end_at_a_few():
    server, limit = Server(100, lognormal(1.0), seed=10, noise=0.1), adaptive()
    run = drive(limit, server, 10_000)
    assert best(server, 100, 10_000) / run.seconds >= 0.7
    late = run.limits(run.seconds / 2)
    assert sum(late) / len(late) >= 85


def test_a_queue_so_long_that_attempts_run_out_of_time():
    """A timeout is not a refusal, but it brings no work: so the pace shows it."""
    server = Server(20, lognormal(1.0), queues=True, seed=11)
    run = drive(adaptive(), server, 4000, timeout=4.0)
    assert best(server, 20, 4000) / run.seconds >= 0.65  # places are lost to those that run out of time in them
    late = run.limits(run.seconds / 2)
    assert 0.6 * 20 <= sum(late) / len(late) <= 2 * 20


def test_ends_that_nobody_told():
    server, limit = Server(50, lognormal(0.5), seed=12), adaptive()
    run = drive(limit, server, 5000, lost=10)
    assert best(server, 50, 5000) / run.seconds >= 0.9
    assert run.refused < 0.02


def begin(limit, number, time=0.0):
    return [limit.started(time) for _ in range(number)]


def test_one_cut_for_all_that_ran_together():
    limit = adaptive(start=100)
    for ticket in begin(limit, 100):
        limit.ended(ticket, 0.01, None, Busy())
    assert limit.now == 78  # 98 were running when the third in a row was refused
    assert limit.history == [(0.0, 100), (0.01, 78)]
    for _ in range(3):
        (ticket,) = begin(limit, 1, 0.02)
        limit.ended(ticket, 0.03, None, Busy())
    assert limit.now == 1  # one was running, and it was too many


@pytest.mark.parametrize("error", [TimeoutError(), ValueError(), asyncio.CancelledError()])
def test_other_errors_say_nothing(error):
    limit = adaptive(start=10)
    for ticket in begin(limit, 10):
        limit.ended(ticket, 1.0, None, error)
    assert (limit.now, limit.cut) == (10, False)


def test_a_cut_is_forgotten_after_two_clean_rounds():
    limit = adaptive(start=12)
    tickets = begin(limit, 12)
    for ticket in tickets[:2]:
        limit.ended(ticket, 1.0, None, Busy())
        assert (limit.cut, limit.reason) == (False, "climbing")  # by chance?
    limit.ended(tickets[2], 1.0, None, Busy())
    assert (limit.now, limit.cut, limit.reason) == (8, True, "cut by the server")
    for ticket in tickets[3:]:
        limit.ended(ticket, 1.1, 1, None)  # admitted before it: they tell nothing of the new limit
    cut = []
    for time in range(30):
        (ticket,) = begin(limit, 1, time)
        limit.ended(ticket, time, 1, None)
        cut.append(limit.cut)
    assert cut == [True] * 15 + [False] * 15


def test_work_counts_and_not_the_number_of_replies():
    """Twice as many in flight, each bringing half as much: no faster."""
    limit, time = adaptive(work=float), 0.0
    while limit.reason == "climbing" and time < 1000:
        running = limit.now
        tickets = begin(limit, running, time)
        time += 1.0
        for ticket in tickets:
            limit.ended(ticket, time, 64 / max(running, 64), None)
    assert limit.reason == "no faster with more"
    assert limit.now < 512


def test_never_beyond_what_is_allowed():
    run = drive(limit := adaptive(low=8, start=8, high=30), Server(1000, lognormal(1.0), seed=13), 3000)
    assert (max(run.limits(0)), limit.reason) == (30, "the highest allowed")
    run = drive(adaptive(low=8, start=20, high=30), Server(2, lognormal(1.0), seed=13), 300)
    assert set(run.limits(10)) == {8}


def test_the_history_is_thinned():
    limit = adaptive()
    for time in range(500):
        for ticket in begin(limit, limit.now, time):
            limit.ended(ticket, time + 0.5, None if time % 10 > 6 else 1, Busy() if time % 10 > 6 else None)
    times = [time for time, _ in limit.history]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (0, 499.5)
    assert 100 <= len(limit.history) <= 200
    assert abs(limit.history[-1][1] - limit.now) <= limit.now / 10


def test_limits_make_sense():
    for wrong in ({"low": 0}, {"low": 9, "start": 8}, {"start": 9, "high": 8}):
        with pytest.raises(ValueError, match="low <= start <= high"):
            adaptive(**wrong)
    with pytest.raises(ValueError, match="at least 1"):
        Fixed(0)


def test_fixed_stays():
    limit = Fixed(3)
    limit.ended(limit.started(0.0), 1.0, None, Busy())
    assert (limit.now, limit.cut) == (3, False)


ERRORS = [None, None, None, Busy(), TimeoutError(), asyncio.CancelledError()]
STEPS = st.tuples(
    st.integers(0, 60),  # start so many
    st.integers(0, 60),  # end so many
    st.lists(st.sampled_from(ERRORS), min_size=1, max_size=6),  # in turn
    st.sampled_from([0.0, 0.0, 1e-320, 1e-9, 0.01, 1.0, 1e9]),  # seconds until then
    st.floats(0.0, 1e300),  # work of each
    st.booleans(),  # so many of the oldest are lost
)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 60), st.lists(STEPS, max_size=40))
def test_whatever_happens(low, start, high, steps):
    limit = adaptive(work=float, low=low, start=low + start, high=low + start + high)
    running, time, last = deque(), 0.0, 0
    for starts, ends, errors, seconds, work, lost in steps:
        for _ in range(starts):
            ticket = limit.started(time)
            assert ticket >= last
            last = ticket
            running.append(ticket)
        time += seconds
        for number in range(min(ends, len(running))):
            error = errors[number % len(errors)]
            limit.ended(running.popleft(), time, None if error else work, error)
            assert low <= limit.now <= low + start + high
            assert len(limit.history) <= 200
        if lost:
            running.clear()
    assert isinstance(limit.cut, bool)
    # It is not wedged: a server with room for all brings it up, after one that takes none brought it down.
    for _ in range(400):
        ticket, time = limit.started(time), time + 1.0
        limit.ended(ticket, time, None, Busy())
    assert limit.now == low
    up = []
    for _ in range(400):
        tickets = begin(limit, limit.now, time)
        time += 1.0
        for ticket in tickets:
            limit.ended(ticket, time, 1.0, None)
        up.append(limit.now)
    assert max(up) > low or start + high == 0
