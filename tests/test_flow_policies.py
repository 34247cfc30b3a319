"""What a flow does beside many calls: rates, a retry budget, hedges, canaries, shared places; in virtual time."""

import asyncio
import math
from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import run

from millstream.aio import Fault, Flow, Reply, as_completed
from millstream.aio.flow import Places
from millstream.aio.hedging import Hedge
from millstream.aio.rates import Rate, RetryBudget, per_minute


def now():
    return asyncio.get_running_loop().time()


async def all_of(flow):
    async with flow:
        return [outcome async for outcome in flow]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 64), st.lists(st.floats(0.0, 20.0), min_size=1, max_size=120))
def test_no_minute_sees_more_than_its_share(rpm, in_flight, pauses):
    starts = []

    async def call(item):
        starts.append(now())

    async def source():
        for pause in pauses:
            await asyncio.sleep(pause * (pause > 10.0))
            yield pause

    outcomes = run(all_of(Flow(call, source(), in_flight=in_flight, gate=Rate(per_minute(rpm)))))
    assert len(outcomes) == len(pauses)
    for number, start in enumerate(starts):
        assert bisect_left(starts, start + 60.0 - 1e-6) - number <= rpm


def test_a_large_item_is_never_overtaken_and_leaves_a_debt_that_its_reply_refunds():
    order = []

    async def call(cost):
        order.append((round(now(), 3), cost))
        return cost

    gate = Rate(per_minute(600), cost=float, used=lambda used: used / 2)
    run(all_of(Flow(call, [1, 50, 1, 1], in_flight=4, gate=gate)))
    assert [cost for _, cost in order] == [1, 50, 1, 1]
    times = [time for time, _ in order]
    assert times[2] - times[1] == pytest.approx(2.5, abs=0.2)  # 50 at 10 a second, half of it refunded


def test_a_gate_that_never_opens_ends_the_flow_instead_of_hanging():
    class Gate:
        left = 3

        def wait(self, item, time):
            return 0.0 if self.left else math.inf

        def take(self, item, time):
            self.left -= 1

        def settle(self, permit, value, time):
            pass

    async def call(item):
        await asyncio.sleep(1)
        return item

    outcomes = run(all_of(Flow(call, range(100), in_flight=2, gate=Gate())))
    assert [type(outcome) for outcome in outcomes[:3]] == [Reply] * 3
    assert [outcome.kind for outcome in outcomes[3:]] == ["stopped"]


@pytest.mark.parametrize("wait", ["gate", "budget"])
def test_a_deadline_is_kept_whatever_a_request_waits_for(wait):
    ended = []

    async def call(item):
        if wait == "budget":
            raise ConnectionError

    if wait == "gate":
        options = {"gate": Rate(per_minute(6))}  # one every 10 seconds
    else:
        options = {"delay": lambda error, attempts: 0.0, "budget": RetryBudget(0.0, 0.01, 1.0)}

    async def main():
        async with Flow(call, range(4), in_flight=4, deadline=5.0, **options) as flow:
            async for outcome in flow:
                ended.append((now(), outcome))

    run(main())
    late = [(time, outcome) for time, outcome in ended if isinstance(outcome, Fault)]
    assert len(late) >= 2
    assert {outcome.kind for _, outcome in late} == {"timeout"}
    assert all(outcome.seconds <= 5.0 + 1e-6 for _, outcome in late)


def test_an_empty_retry_budget_delays_retries_and_fails_none():
    starts = []

    async def call(item):
        starts.append(now())
        if starts.count(now()) >= 0 and item not in done:
            done.add(item)
            raise ConnectionError
        return item

    done = set()
    budget = RetryBudget(share=0.2, per_second=10.0, saved=5.0)
    flow = Flow(call, range(300), in_flight=50, delay=lambda error, attempts: 0.0, budget=budget)
    outcomes = run(all_of(flow))
    assert sorted(outcome.value for outcome in outcomes) == list(range(300))
    assert flow.spent.retries == 300
    # 300 retries = 5 saved + 60 for the requests + 10 a second
    assert max(starts) >= (300 - 5 - 60) / 10.0 - 0.2


@pytest.mark.parametrize("in_flight", [8, 64])
def test_hedging_cuts_the_tail_for_few_requests_more(in_flight):
    running = most = 0

    def latency(item, hedged):
        slow = hash((item, hedged, "x" * (item % 7))) % 50 == 0 if hedged else item % 50 == 7
        return 1.0 if slow else 0.05 * (1 + (item % 10) / 100)

    async def timed(item, hedged):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(latency(item, hedged))
        finally:
            running -= 1
        return item

    def p99(hedge):
        flow = Flow(lambda item: timed(item, False), range(5000), in_flight=in_flight, hedge=hedge)
        outcomes = run(all_of(flow))
        assert sorted(outcome.value for outcome in outcomes) == list(range(5000))
        return sorted(outcome.seconds for outcome in outcomes)[4950], flow.spent.attempts

    plain, _ = p99(None)
    hedged, attempts = p99(Hedge(lambda item: timed(item, True)))
    assert plain == pytest.approx(1.0)
    assert hedged <= plain / 5
    assert attempts <= 5000 * 1.05
    assert most <= in_flight


@pytest.mark.parametrize("first_fails", [False, True])
def test_a_fast_failure_does_not_settle_a_hedged_pair(first_fails):
    async def first(item):
        await asyncio.sleep(0.1 if item < 30 else 3.0)
        if item >= 30 and first_fails:
            raise ConnectionError("first")
        return "first"

    async def second(item):
        await asyncio.sleep(0.05 if not first_fails else 5.0)
        if not first_fails:
            raise ConnectionError("second")
        return "second"

    outcome = run(all_of(Flow(first, range(31), in_flight=2, hedge=Hedge(second, share=1.0))))[-1]
    assert (outcome.index, outcome.value, outcome.attempts) == (30, "second" if first_fails else "first", 2)


def test_both_of_a_hedged_pair_failing_is_one_fault():
    async def call(item):
        await asyncio.sleep(0.1 if item < 30 else 3.0)
        if item >= 30:
            raise ConnectionError

    outcomes = run(all_of(Flow(call, range(31), in_flight=2, hedge=Hedge(call, share=1.0))))
    assert [type(outcome) for outcome in outcomes] == [Reply] * 30 + [Fault]


def test_canaries_go_first():
    under_way = most_before = 0
    answered = False

    async def call(item):
        nonlocal under_way, most_before, answered
        under_way += 1
        most_before = max(most_before, under_way if not answered else 0)
        await asyncio.sleep(1.0)
        under_way -= 1
        answered = True
        return item

    outcomes = run(all_of(Flow(call, range(50), in_flight=20, canaries=2)))
    assert len(outcomes) == 50
    assert most_before == 2


def test_others_do_not_wait_for_slow_canaries():
    async def call(item):
        await asyncio.sleep(100.0)
        return now()

    outcomes = run(all_of(Flow(call, range(10), in_flight=10, canaries=2, head_start=5.0)))
    assert sorted(outcome.value for outcome in outcomes) == [100.0] * 2 + [105.0] * 8


def test_a_flow_that_is_stopped_hands_out_what_is_in_flight_and_starts_no_more():
    called = []

    async def call(item):
        called.append(item)
        await asyncio.sleep(1.0)
        if item % 2:
            raise ConnectionError
        return item

    async def main():
        outcomes = []
        delay = lambda error, attempts: 100.0  # noqa: E731
        async with Flow(call, iter(range(1000)), in_flight=6, delay=delay) as flow:
            async for outcome in flow:
                outcomes.append(outcome)
                if len(outcomes) == 3:
                    flow.stop()
        return outcomes, now()

    outcomes, ended = run(main())
    assert ended <= 3.0
    assert sorted(outcome.index for outcome in outcomes) == sorted(set(called))
    assert {outcome.kind for outcome in outcomes if isinstance(outcome, Fault)} == {"stopped"}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_flows_that_share_places_never_have_more_in_flight_and_none_starves(number, sizes):
    running = most = 0
    places = Places(number)

    async def call(item):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1.0)
        running -= 1
        return item

    async def endless():
        async with as_completed(call, iter(int, 1), in_flight=places) as flow:
            async for _ in flow:
                pass

    async def main():
        greedy = asyncio.create_task(endless())
        await asyncio.sleep(5)
        found = await asyncio.gather(*(all_of(Flow(call, range(size), in_flight=places)) for size in sizes))
        ended = now()
        greedy.cancel()
        await asyncio.gather(greedy, return_exceptions=True)
        return found, ended

    found, ended = run(main())
    assert [len(outcomes) for outcomes in found] == sizes
    assert most <= number
    assert ended <= 5 + 2 * (sum(sizes) + len(sizes) * number) + 5
    assert places.taken == 0


def test_replies_that_wait_for_their_turn_are_bounded_in_bytes():
    admitted = []

    async def call(item):
        admitted.append(item)
        await asyncio.sleep(1000.0 if item == 0 else 0.1)
        return b"x" * 100

    async def main():
        flow = Flow(
            call,
            range(10_000),
            in_flight=10,
            window=5000,
            in_order=True,
            window_bytes=5000,
            weigh=lambda value: len(value),
        )
        async with flow:
            await asyncio.sleep(500.0)
            held = len(admitted)
            rest = [outcome async for outcome in flow]
        return held, rest

    held, rest = run(main())
    assert 50 <= held <= 61
    assert [outcome.index for outcome in rest] == list(range(10_000))
