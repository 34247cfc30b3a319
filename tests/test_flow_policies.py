"""What a flow does beside many calls: rates, a retry budget, hedges, canaries, shared places; in virtual time."""

import asyncio
import math
import random
from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import run

from millstream.aio import Fault, Flow, Returned, as_completed
from millstream.aio.hedging import Hedge
from millstream.aio.places import Places
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
        name = "the gate"

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
    assert [type(outcome) for outcome in outcomes[:3]] == [Returned] * 3
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
        options = {"delay": lambda error, job: 0.0, "budget": RetryBudget(0.0, 0.01, 1.0)}

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
        if now() < 20.0:
            raise ConnectionError
        return item

    budget = RetryBudget(share=0.2, per_second=10.0, saved=5.0)
    flow = Flow(call, range(300), in_flight=50, window=300, delay=lambda error, job: 0.0, budget=budget)
    outcomes = run(all_of(flow))
    assert sorted(outcome.value for outcome in outcomes) == list(range(300))
    # 5 saved, 10 a second, and a fifth of the 300, of which no more than 5 may be saved
    in_vain = sum(start < 20.0 for start in starts) - 300
    assert 190 <= in_vain <= 5 + 60 + 200
    assert flow.spent.budget == pytest.approx(sum(outcome.seconds for outcome in outcomes), rel=0.01)


def flaky(bad, away=(0.0, 0.0)):
    """A server that takes 0.1 s, fails the first attempt at each of `bad`, and everything while it is away."""

    async def call(item):
        began = now()
        calls.append(began)
        await asyncio.sleep(0.1)
        if away[0] <= began < away[1]:
            raise ConnectionError
        if item in bad:
            bad.remove(item)
            raise ConnectionError
        return item

    calls = []
    return call, calls


def jittered(most):
    draw = random.Random(0)
    return lambda error, job: draw.uniform(0.0, 0.5 * 2.0**job.attempts) if job.attempts < most else None


def test_retries_that_succeed_give_back_what_they_took():
    """Of 3,000 requests, 14 % fail once: without it, what is over the 100 saved waits for 10 a second."""
    draw = random.Random(1)
    call, _ = flaky({item for item in range(3000) if draw.random() < 0.14})

    async def main():
        flow = Flow(call, range(3000), in_flight=256, deadline=9.0, delay=jittered(5), budget=RetryBudget())
        return await all_of(flow), flow.spent, now()

    outcomes, spent, seconds = run(main())
    assert [type(outcome) for outcome in outcomes] == [Returned] * 3000
    assert 380 <= spent.retries <= 460
    assert seconds < 4.0


@pytest.mark.parametrize("in_flight", [64, 256])
def test_retries_in_vain_give_nothing_back(in_flight):
    """In an outage there are as few re-asks as if nothing ever came back."""

    class Strict(RetryBudget):
        def give_back(self, tokens, now):
            pass

    def in_outage(budget):
        call, calls = flaky(set(), away=(0.0, 3.0))
        outcomes = run(all_of(Flow(call, range(3000), in_flight=in_flight, delay=jittered(9), budget=budget)))
        assert [type(outcome) for outcome in outcomes] == [Returned] * 3000
        return sum(began < 3.0 for began in calls)

    assert in_outage(RetryBudget()) == in_outage(Strict())


def test_a_retry_that_was_held_back_until_its_deadline_says_so():
    class Refused(Exception):
        brief = "HTTP 429"

    async def call(item):
        raise Refused

    budget = RetryBudget(0.0, 1e-9, 1.0)
    outcomes = run(all_of(Flow(call, range(2), deadline=9.0, delay=lambda error, job: 1.0, budget=budget)))
    assert {(outcome.kind, outcome.message) for outcome in outcomes} == {
        ("timeout", "no answer within 9 s in 2 attempts; last: HTTP 429; held back 7.0 s by the retry budget"),
        ("timeout", "no answer within 9 s in 1 attempt; last: HTTP 429; held back 8.0 s by the retry budget"),
    }


def until_success(error, job):
    return 0.1 if job.attempts < 3 else math.inf


def test_what_is_held_is_tried_again_when_another_succeeds():
    """Two run out of attempts in an outage; a request that comes after it frees them."""
    starts = []

    async def call(item):
        starts.append((now(), item))
        if now() < 50.0:
            raise ConnectionError
        await asyncio.sleep(1.0)
        return item

    async def source():
        yield 0
        yield 1
        await asyncio.sleep(60.0)
        yield 2

    outcomes = run(all_of(Flow(call, source(), in_flight=4, delay=until_success)))
    assert sorted((outcome.value, outcome.attempts) for outcome in outcomes) == [(0, 4), (1, 4), (2, 1)]
    assert [start for start, _ in starts[-3:]] == [60.0, 61.0, 61.0]


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2])
def test_what_is_held_when_nothing_else_is_left_is_given_up_and_marked(in_order, window):
    async def call(item):
        if item % 3 == 0:
            raise ConnectionError("refused")
        await asyncio.sleep(1.0)
        return item

    flow = Flow(call, range(10), in_flight=2, window=window, in_order=in_order, delay=until_success)
    outcomes = sorted(run(all_of(flow)), key=lambda outcome: outcome.index)
    assert [isinstance(outcome, Fault) for outcome in outcomes] == [item % 3 == 0 for item in range(10)]
    assert all(outcome.held and outcome.message.endswith("refused") for outcome in outcomes[::3])


def test_a_wait_longer_than_the_longest_is_waited_for_only_while_there_is_something_else_to_do():
    async def call(item):
        if item == 0 and now() < 1000.0:
            raise ConnectionError
        await asyncio.sleep(item)
        return item

    def answers(last):
        flow = Flow(call, [0, 1, last], in_flight=4, delay=lambda error, job: 1000.0, longest_wait=600.0)
        return sorted(run(all_of(flow)), key=lambda outcome: outcome.index)

    given_up, *_ = answers(500.0)
    assert (given_up.held, given_up.seconds, given_up.attempts) == (True, 500.0, 1)
    waited_for, *_ = answers(1500.0)
    assert (waited_for.value, waited_for.seconds, waited_for.attempts) == (0, 1000.0, 2)


@pytest.mark.parametrize("wait", [math.inf, 700.0])
def test_a_stop_and_a_deadline_end_what_is_held(wait):
    async def call(item):
        if item:
            await asyncio.sleep(1000.0)
            return item
        raise ConnectionError

    options = {"in_flight": 2, "delay": lambda error, job: wait, "longest_wait": 600.0}
    late, *_ = run(all_of(Flow(call, [0, 1], deadline=800.0, **{**options, "delay": lambda error, job: math.inf})))
    assert (late.kind, late.seconds, late.held) == ("timeout", 800.0, False)

    async def main():
        async with Flow(call, [0, 1], **options) as flow:
            asyncio.get_running_loop().call_later(10.0, flow.stop)
            return [outcome async for outcome in flow]

    stopped, reply = run(main())
    assert (stopped.kind, stopped.seconds, reply.value) == ("stopped", 10.0, 1)


def test_what_is_held_at_the_head_of_a_full_window_is_given_up_although_more_was_pulled():
    async def call(item):
        if not item:
            raise ConnectionError
        return item

    async def source():
        for item in range(4):
            yield item

    options = {"in_order": True, "window_bytes": 1, "weigh": lambda value: 1, "delay": lambda error, job: math.inf}

    async def main():
        async with asyncio.timeout(1000):
            return await all_of(Flow(call, source(), in_flight=2, **options))

    outcomes = run(main())
    assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3]
    assert (outcomes[0].held, [reply.value for reply in outcomes[1:]]) == (True, [1, 2, 3])


def test_whoever_watches_is_told_at_once_whatever_the_order():
    told = []

    async def call(item):
        await asyncio.sleep(10.0 - item)
        return item

    watch = lambda outcome, began, time: told.append((outcome.index, began, time))  # noqa: E731
    run(all_of(Flow(call, range(3), in_flight=3, in_order=True, watch=watch)))
    assert told == [(2, 0.0, 8.0), (1, 0.0, 9.0), (0, 0.0, 10.0)]


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
    assert [type(outcome) for outcome in outcomes] == [Returned] * 30 + [Fault]


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
        delay = lambda error, job: 100.0  # noqa: E731
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
