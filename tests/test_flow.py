"""A flow with all of its options at once, left in every way, over calls that do whatever calls can do."""

import asyncio
import contextlib
import itertools
from collections import Counter

import pytest
from flows import FOREVER, Server, Source, clock, held, hopeful, kinds, patient, read, run
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.aio import Flow, Returned
from millstream.aio.hedging import Hedge
from millstream.aio.places import Places
from millstream.aio.rates import All, Bucket, Rate, RetryBudget, per_minute

ENDS = ["ok"] * 4 + ["fail", "hang", "stubborn", "deaf", "cancel", "falsy", "mute", "own", "numbered", "end", "many"]
TIMES = [0.0, 0.1, 0.5, 0.7, 1.0, 30.0]
SCRIPTS = st.lists(
    st.lists(st.tuples(st.sampled_from(ENDS), st.sampled_from(TIMES)), max_size=4), max_size=14
)  # of each item, of each attempt
SOURCES = st.builds(lambda kind, failing: (kind, failing), st.sampled_from(Source.KINDS), st.booleans())
PLAIN = {
    "in_order": st.booleans(),
    "timeout": st.sampled_from([0.7, 5.0]),
    "deadline": st.sampled_from([None, 0.3, 2.5, 20.0]),
    "window": st.sampled_from([None, 1, 3, 8]),
    "window_bytes": st.sampled_from([None, 1, 2]),
    "canaries": st.integers(0, 3),
    "head_start": st.sampled_from([0.0, 0.6, 5.0]),
    "delay": st.one_of(
        st.builds(patient, st.integers(1, 4), st.sampled_from([0.0, 0.25])), st.builds(hopeful, st.integers(0, 3))
    ),
    "longest_wait": st.sampled_from([0.1, 0.6, float("inf")]),
    "gate": st.one_of(
        st.none(),
        st.builds(Rate, st.builds(per_minute, st.sampled_from([10, 600, 10_000]))),
        st.builds(
            lambda rate: All(
                [Rate(per_minute(600)), Rate(Bucket(rate, 2.0), lambda item: 1 + item % 4, lambda v: v % 3)]
            ),
            st.sampled_from([0.5, 5.0]),
        ),
    ),
    "budget": st.one_of(st.none(), st.builds(RetryBudget, st.just(0.1), st.just(0.5), st.just(1.0))),
}
OPTIONS = st.fixed_dictionaries({"in_flight": st.integers(1, 5), **PLAIN})


def eager_hedge(server: Server) -> Hedge:
    """One that has learned that calls take 0.1 s, and may double them all."""
    hedge = Hedge(server, share=1.0)
    for _ in range(20):
        hedge.learn(0.1)
    return hedge


def flow_of(server, source, hedged, **options):
    more = {"hedge": eager_hedge(server) if hedged else None, "batched": source.kind == "batched", "weigh": lambda _: 1}
    return Flow(server, source.items, **more, **options)


def check(flow, server, outcomes, hedged):
    """What holds for the outcomes of a flow that was read to its end, stopped or not."""
    indices = [outcome.index for outcome in outcomes]
    assert sorted(indices) == list(range(len(indices)))
    assert indices == sorted(indices) or not flow._outbox._in_order
    for outcome in outcomes:
        answered, calls = server.answered[outcome.index], server.calls[outcome.index]
        assert isinstance(outcome, Returned) == bool(answered)
        assert hedged or outcome.attempts == calls
        if isinstance(outcome, Returned):
            assert outcome.value == outcome.index * 10
        else:
            assert outcome.kind in {"timeout", "cancelled", "error", "own", "stopped"}
        if flow._turns._bounds.deadline is not None:  # or what a stubborn one took to be cancelled
            assert outcome.seconds <= flow._turns._bounds.deadline + (0.3 * calls) + 1e-9
    spent = flow.spent
    assert spent.attempts == sum(outcome.attempts for outcome in outcomes)
    assert spent.wasted == spent.attempts - sum(isinstance(outcome, Returned) for outcome in outcomes)
    assert min(spent.queue, spent.backoff, spent.budget, spent.slot, spent.server, spent.stall) >= 0.0
    if not hedged:
        assert spent.retries == sum(max(outcome.attempts - 1, 0) for outcome in outcomes)
        until_done = spent.queue + spent.backoff + spent.budget + spent.slot + spent.server
        assert until_done == pytest.approx(sum(outcome.seconds for outcome in outcomes), abs=1e-6)


@settings(max_examples=250, deadline=None)
@given(SCRIPTS, OPTIONS, SOURCES, st.booleans(), st.sampled_from([0.0, 0.4]))
def test_exactly_one_outcome_each_whatever_calls_do_and_with_all_options_at_once(scripts, options, kind, hedged, pause):
    server, source = Server(scripts), Source(kind[0], len(scripts), failing=kind[1])
    outcomes = []

    async def main():
        flow = flow_of(server, source, hedged, **options)
        async with asyncio.timeout(10_000):
            with pytest.raises(OSError, match="no more disk") if source.failing else contextlib.nullcontext():
                async with flow:
                    async for outcome in flow:
                        outcomes.append(outcome)
                        await asyncio.sleep(pause)
        return flow

    flow = run(main())
    assert len(outcomes) == len(scripts)
    check(flow, server, outcomes, hedged)
    assert server.most <= options["in_flight"]
    assert server.running == 0
    assert source.closed
    assert held(flow) == {}


@settings(max_examples=250, deadline=None)
@given(
    SCRIPTS,
    st.lists(
        st.tuples(
            st.fixed_dictionaries(PLAIN),
            SOURCES,
            st.booleans(),
            st.sampled_from(["read", "break", "raise", "cancel", "stop"]),
            st.sampled_from([0.0, 0.05, 0.7, 3.0]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 5),
)
def test_flows_that_share_places_are_left_in_any_way_at_any_time_and_nothing_of_them_stays(scripts, readers, number):
    places, everybody = Places(number), Server()

    async def reader(options, kind, hedged, how, after):
        """`after` seconds are when to leave it; all of these servers count as one."""
        server, source = Server(scripts), Source(kind[0], len(scripts), failing=kind[1])
        outcomes = []

        async def call(item):
            everybody.running += 1
            everybody.most = max(everybody.most, everybody.running)
            try:
                return await server(item)
            finally:
                everybody.running -= 1

        flow = flow_of(server, source, False, **options, in_flight=places)
        flow._function, flow._hedge = call, eager_hedge(call) if hedged else None
        leaving = {"cancel": asyncio.current_task().cancel, "stop": flow.stop}.get(how, lambda: None)
        timer = asyncio.get_running_loop().call_later(after, leaving)
        ended = None
        try:
            async with flow:
                async for outcome in flow:
                    outcomes.append(outcome)
                    if clock() >= after and how == "break":
                        break
                    if clock() >= after and how == "raise":
                        raise KeyError
        except (OSError, KeyError, asyncio.CancelledError) as error:
            ended = error
        timer.cancel()
        if ended is not None:
            allowed = {"raise": KeyError, "cancel": asyncio.CancelledError}.get(how, ())
            assert isinstance(ended, allowed) or (isinstance(ended, OSError) and source.failing)
        assert server.running == 0
        assert source.closed
        assert flow.in_flight == 0
        if how in ("read", "stop"):
            check(flow, server, outcomes, hedged)
        return timer

    async def main():
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(100_000), asyncio.TaskGroup() as group:
            for each in readers:
                group.create_task(reader(*each))
        assert everybody.most <= number
        assert (places.taken, len(places._waiting)) == (0, 0)
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []

    run(main())


# What is nobody's fault ---------------------------------------------------------------------------------------------


class Bug(Exception):
    pass


def broken(*_):
    raise Bug


class BrokenGate(Rate):
    def __init__(self, name):
        super().__init__(Bucket(1.0, 1.0))
        setattr(self, name, broken)


@pytest.mark.parametrize(
    "options",
    [
        {"delay": broken},
        {"weigh": broken},
        {"gate": BrokenGate("wait")},
        {"gate": BrokenGate("take")},
        {"gate": BrokenGate("settle")},
        {"gate": Rate(Bucket(1.0, 1.0), cost=broken)},
    ],
    ids=["delay", "weigh", "wait", "take", "settle", "cost"],
)
def test_a_bug_in_what_a_flow_was_given_is_raised_to_the_reader_instead_of_keeping_him_waiting(options):
    server, places = Server([[("fail", 1.0)], [("ok", 1.0)], [("hang", 0.0)]]), Places(3)
    with pytest.raises(Bug):
        run(read(Flow(server, range(3), in_flight=places, **options)))
    assert (server.running, places.taken) == (0, 0)


@pytest.mark.parametrize("error", [BaseExceptionGroup("", [ValueError(), GeneratorExit()]), GeneratorExit()])
def test_what_is_no_exception_is_raised_at_once_and_ends_all(error):
    server = Server([[("hang", 0.0)]] * 10)

    async def call(item):
        if item == 3:
            await asyncio.sleep(1.0)
            raise error
        return await server(item)

    with pytest.raises(type(error)):
        run(read(Flow(call, itertools.count(), in_flight=5, hedge=eager_hedge(server))))
    assert (server.running, server.cancelled) == (0, 4)


@pytest.mark.parametrize("kind", ["generator", "async"])
@pytest.mark.parametrize("at", [0, 1])
def test_so_is_that_of_a_source_and_it_is_not_taken_for_its_end(kind, at):
    """If it came out of entering the block, nobody would end what had begun."""
    server = Server([[("hang", 0.0)]])

    def items():
        yield from range(at)
        raise GeneratorExit

    async def items_async():
        for item in range(at):
            yield item
        raise GeneratorExit

    with pytest.raises(GeneratorExit):
        run(read(Flow(server, items_async() if kind == "async" else items(), in_flight=2)))
    assert server.running == 0


def test_outcomes_are_read_inside_the_block_and_nowhere_else():
    flow = Flow(Server(), range(3))

    async def main():
        with pytest.raises(RuntimeError, match="async with"):
            await anext(flow)
        async with flow:
            await anext(flow)
        with pytest.raises(RuntimeError, match="async with"):
            await anext(flow)

    run(main())


# Leaving ------------------------------------------------------------------------------------------------------------


def test_cancelled_while_closing_it_still_waits_for_all_and_closes_the_source():
    server, source = Server([[("stubborn", 0.0)]] * 4), Source("async", 100)

    async def main():
        task = asyncio.create_task(read(Flow(server, source.items, in_flight=4)))
        await asyncio.sleep(1.0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.1)
        with pytest.raises(asyncio.CancelledError):
            await task
        return clock()

    assert run(main()) == pytest.approx(1.3)
    assert (server.running, server.cancelled, source.closed) == (0, 4, True)


@pytest.mark.parametrize("steps", range(4))
def test_cancelled_in_the_moment_in_which_all_end_it_still_waits_until_their_places_are_given_back(steps):
    """They end at 1.3 s; whoever cancels does it as many steps of the loop later."""
    places = Places(4)

    async def block():
        try:
            async with Flow(Server([[("stubborn", 0.0)]] * 4), range(4), in_flight=places):
                await asyncio.sleep(1.0)
        finally:
            found.append((clock(), places.taken))

    async def main():
        task = asyncio.create_task(block())
        await asyncio.sleep(1.3)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    found = []
    run(main())
    assert found == [(1.3, 0)]


def test_the_places_of_what_ended_just_before_closing_are_given_back_with_the_block():
    places = Places(4)

    async def main():
        async with Flow(Server([[("ok", 1.0)]] * 4), range(4), in_flight=places) as flow:
            await anext(flow)  # the others have ended in the same moment
        return places.taken, flow.in_flight

    assert run(main()) == (0, 0)


@pytest.mark.parametrize("how", ["stop", "leave"])
@pytest.mark.parametrize("end", [None, OSError("no more disk")])
def test_what_a_source_says_when_it_is_cancelled_is_not_lost_in_a_task(how, end):
    """A source that ends or fails while nobody wants to know any more; `run` fails if that is complained about."""
    cleaned = []

    async def source():
        yield 0
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            cleaned.append(True)
            if end:
                raise end from None
        yield 1

    async def main():
        async with Flow(Server(), source()) as flow:
            assert (await anext(flow)).value == 0
            await asyncio.sleep(1.0)
            if how == "stop":
                flow.stop()
                assert [outcome async for outcome in flow] == []
                await asyncio.sleep(1.0)
                assert cleaned == [True]  # already

    run(main())
    assert cleaned == [True]


def test_a_source_that_is_cancelled_inside_is_a_failing_source():
    async def source():
        yield 0
        raise asyncio.CancelledError

    outcomes = []

    async def main():
        async with Flow(Server([[("ok", 5.0)]]), source()) as flow:
            async for outcome in flow:
                outcomes.append(outcome)

    with pytest.raises(asyncio.CancelledError):
        run(main())
    assert kinds(outcomes) == ["reply"]


# Time ---------------------------------------------------------------------------------------------------------------

HANG, FAIL = [("hang", 0.0)], [("fail", 0.1)] * 100
DEADLINES = {
    "an attempt": (HANG, {}),
    "a retry": ([("fail", 0.7)] * 100, {"delay": patient(100, 0.1)}),
    "a place": (FAIL, {"in_flight": 1, "delay": lambda error, job: 0.1}),
    "the gate": (HANG, {"gate": Rate(Bucket(1 / 7, 1.0))}),
    "a gate that is shut": (HANG, {"gate": Rate(Bucket(1e-9, 1.0))}),
    "the budget": (FAIL, {"delay": lambda error, job: 0.0, "budget": RetryBudget(0.0, 1e-9, 1.0)}),
    "the budget, with a gate": (
        FAIL,
        {"delay": lambda error, job: 0.0, "budget": RetryBudget(0.0, 0.2, 1.0), "gate": Rate(Bucket(1.0, 1.0))},
    ),
    "a hedge": (HANG, {"hedge": eager_hedge(Server([HANG] * 9))}),
    "canaries": (HANG, {"canaries": 1, "head_start": 1000.0}),
}


@pytest.mark.parametrize("waits_for", DEADLINES)
def test_a_deadline_comes_exactly_then_whatever_a_request_waits_for(waits_for):
    script, options = DEADLINES[waits_for]
    server = Server([script, HANG, script, HANG, script, script, script, HANG, script])
    flow = Flow(server, range(9), **{"in_flight": 3, "deadline": 5.0, **options})
    outcomes = run(read(flow))
    late = [outcome.seconds for outcome in outcomes if outcome.kind == "timeout"]
    assert late == pytest.approx([5.0] * len(late), abs=1e-9)
    assert len(late) >= 5
    # Where no attempt fits in any more, its failure is the outcome, and it is known before.
    assert all(outcome.seconds < 5.0 for outcome in outcomes if outcome.kind == "error")
    check(flow, server, outcomes, hedged="hedge" in options)


def test_a_gate_that_is_slower_than_the_deadline_lets_through_what_it_can():
    """With one start every 4 s and 3 s of patience: one waits in vain, the next begins in time."""
    starts = []

    async def call(item):
        starts.append((item, clock()))

    outcomes = run(read(Flow(call, range(5), deadline=3.0, gate=Rate(per_minute(15)))))
    assert kinds(outcomes) == ["reply", "timeout", "reply", "timeout", "reply"]
    assert starts == [(0, 0.0), (2, 4.0), (4, 8.0)]


def test_the_time_that_a_source_takes_is_not_taken_from_its_items():
    """A source that blocks the loop for 2 s an item: each attempt begins with its item, and so does its timeout.

    Nothing else may pull the next one before it has begun, neither an attempt that ends nor the reader.
    """

    def slow():
        for item in range(5):
            waited_for.append(flow.waits_for)
            asyncio.get_running_loop().now += 2.0
            yield item

    server, waited_for = Server([[("ok", 1.9)]] * 5), []
    flow = Flow(server, slow(), timeout=2.5, deadline=3.0)
    assert kinds(run(read(flow))) == ["reply"] * 5
    assert server.began == [(0, 2.0), (1, 4.0), (2, 6.0), (3, 8.0), (4, 10.0)]
    assert flow.spent.queue == 0.0
    assert waited_for == ["nothing"] + ["the source"] * 4


def test_all_time_of_all_requests_is_accounted_for():
    """By hand, for one request in flight at a time, one start in 2 s, and a reader who takes 3 s."""
    server = Server([[("fail", 1.0), ("ok", 1.0)], [("ok", 5.0)]])
    flow = Flow(server, range(2), in_flight=1, delay=lambda error, job: 1.5, gate=Rate(per_minute(30)), in_order=True)
    run(read(flow, pause=3.0))
    # 0: 0-1 fails, due at 2.5, free at 7, done at 8, handed out at 8. 1: admitted at 1, 2-7, handed out at 11.
    spent = flow.spent
    assert (spent.server, spent.backoff, spent.slot) == (7.0, 1.5, 4.5)
    assert (spent.queue, spent.stall) == (1.0, 4.0)


# Places -------------------------------------------------------------------------------------------------------------


def test_a_small_flow_beside_an_endless_one_gets_every_other_place():
    """Of the four places that are free in each second from the next end on, at 11 s."""

    async def main():
        places, server = Places(4), Server([[("ok", 1.0)]] * 10_000)

        async def endless():
            async with Flow(server, itertools.count(), in_flight=places) as flow:
                async for _ in flow:
                    pass

        greedy = asyncio.create_task(endless())
        await asyncio.sleep(10.5)
        outcomes = await read(Flow(server, range(5000, 5010), in_flight=places))
        ended = clock()
        greedy.cancel()
        await asyncio.wait([greedy])
        assert server.most == 4
        both = Counter((when, item >= 5000) for item, when in server.began if 11.0 <= when < 16.0)
        assert both == {(float(second), small): 2 for second in range(11, 16) for small in (False, True)}
        return kinds(outcomes), ended, places.taken

    assert run(main()) == (["reply"] * 10, 16.0, 0)


@pytest.mark.parametrize(("end", "free"), [("hang", 1.0), ("deaf", 1.0), ("stubborn", 1.3)])
def test_a_flow_that_is_left_frees_its_places_for_the_others(end, free):
    """It is left at 1 s; a place is free when what holds it has ended, and not when that is told to."""

    async def main():
        places, hogs, server = Places(3), Server([[(end, 0.0)]] * 9), Server([[("ok", 1.0)]] * 3)
        async with Flow(hogs, range(9), in_flight=places):
            waiting = asyncio.create_task(read(Flow(server, range(3), in_flight=places)))
            await asyncio.sleep(1.0)
        assert (clock(), hogs.running, hogs.cancelled) == (free, 0, 3)
        outcomes = await waiting
        assert server.began == [(item, free) for item in range(3)]
        return kinds(outcomes), clock(), places.taken

    assert run(main()) == (["reply"] * 3, free + 1.0, 0)


@pytest.mark.parametrize("how", ["wait", "stop", "leave"])
@pytest.mark.parametrize("number", [0, 1, 7])
@pytest.mark.parametrize("kind", ["generator", "async", "async slow", "batched"])
def test_a_flow_without_a_place_learns_whether_there_is_anything_and_loses_nothing_of_it(kind, number, how):
    """For that it pulls one item, or one list, ahead; the only place is taken until 2 s."""
    places, source, server = Places(1), Source(kind, number), Server([[("ok", 1.0)]] * number)
    outcomes = []

    async def main():
        flow = flow_of(server, source, False, in_flight=places)

        async def reading():
            async with flow:
                async for outcome in flow:
                    outcomes.append(outcome)
            return clock()

        async with Flow(Server([HANG]), [0], in_flight=places):
            task = asyncio.create_task(reading())
            await asyncio.sleep(1.0)
            assert task.done() == (number == 0)  # nothing is left, which takes no place
            assert source.given == min(number, 1)
            if how == "stop":
                flow.stop()
            elif how == "leave":
                task.cancel()
            await asyncio.sleep(1.0)
            assert task.done() == (number == 0 or how != "wait")
        await asyncio.wait([task])
        assert held(flow) == {} or how == "leave"
        return clock()

    ended = run(main())
    assert kinds(outcomes) == ["reply"] * (number if how == "wait" else 0)
    assert len(server.began) == len(outcomes)
    assert ended >= 2.0 + len(outcomes)  # one after the other, and a slow source takes its time between
    assert source.closed


def test_thousands_of_flows_that_wait_for_one_place_are_served_in_turn():
    async def main():
        places, server = Places(1), Server([[("ok", 1.0)]] * 3000)
        order = []

        async def ask(item):
            outcomes = await read(Flow(server, [item], in_flight=places))
            order.append(outcomes[0].value // 10)

        async with asyncio.TaskGroup() as group:
            for item in range(3000):
                group.create_task(ask(item))
        return order, clock()

    assert run(main()) == (list(range(3000)), 3000.0)


# Stopping, canaries, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", Source.KINDS)
def test_a_stopped_flow_hands_out_what_runs_and_turns_away_what_waits(kind, in_order):
    """At 3 s: 0 and 2 run, 1 waits for a retry, 3 waits at the gate; 2 fails later and is not tried again.

    The gate opens every 1.09 s. The slow source gives its first item at 0.2 s, and the fourth at 2.58 s.
    """
    server, source = Server([[("ok", 5.0)], [("fail", 0.5)], [("fail", 2.0)], [("ok", 0.0)]]), Source(kind, 100)
    outcomes = []

    async def main():
        flow = flow_of(server, source, False, in_order=in_order, delay=patient(9, 9.0), gate=Rate(per_minute(55)))
        async with flow:
            asyncio.get_running_loop().call_later(3.0, flow.stop)
            async for outcome in flow:
                outcomes.append((clock(), outcome))
        return flow

    flow = run(main())
    check(flow, server, [outcome for _, outcome in outcomes], False)
    assert kinds([outcome for _, outcome in outcomes]) == ["reply", "stopped", "stopped", "stopped"]
    assert [outcome.attempts for _, outcome in sorted(outcomes, key=lambda each: each[1].index)] == [1, 1, 1, 0]
    assert [item for item, _ in server.began] == [0, 1, 2]
    assert max(time for time, _ in outcomes) == pytest.approx(server.began[0][1] + 5.0)
    assert held(flow) == {}
    assert source.closed


@pytest.mark.parametrize("kind", ["generator", "async"])
def test_a_source_may_stop_its_flow_and_what_it_gives_then_is_not_asked(kind):
    source = Source(kind, 10)
    server = Server([[("ok", 1.0)]] * 10)

    def stopping():
        for item in source.items:
            if item == 3:
                flow.stop()
            yield item

    async def stopping_async():
        async for item in source.items:
            if item == 3:
                flow.stop()
            yield item

    flow = Flow(server, stopping_async() if kind == "async" else stopping())
    assert kinds(run(read(flow))) == ["reply"] * 3
    assert [item for item, _ in server.began] == [0, 1, 2]
    assert held(flow) == {}


def test_a_flow_stopped_before_its_block_asks_nothing():
    server = Server()
    flow = Flow(server, range(10))
    flow.stop()
    assert run(read(flow)) == []
    assert server.began == []


@pytest.mark.parametrize("kind", ["list", "async", "batched"])
def test_failures_let_nobody_through_after_the_canaries(kind):
    """The first five fail, one canary after the other: only two are under way until the first reply."""
    scripts = [[("fail", 0.5)]] * 5 + [[("ok", 1.0)]] * 30
    server = Server(scripts)
    most_before = 0

    async def main():
        nonlocal most_before
        async with flow_of(server, Source(kind, 35), False, canaries=2, head_start=1.2) as flow:
            async for outcome in flow:
                if not server.answered:
                    most_before = server.most
                outcomes.append(outcome)

    outcomes = []
    run(main())
    assert kinds(outcomes) == ["error"] * 5 + ["reply"] * 30
    assert most_before == 2
    assert server.most > 2


def test_nothing_is_kept_of_twenty_thousand_requests():
    def script(item):
        return [("fail", 0.05)] * (item % 7 == 0) + [("ok", 1.0 if item % 50 == 0 else 0.05)]

    server = Server([script(item) for item in range(20_000)])
    flow = Flow(
        server,
        range(20_000),
        in_flight=64,
        in_order=True,
        timeout=5.0,
        deadline=60.0,
        delay=patient(3),
        gate=All([Rate(per_minute(200_000))]),
        budget=RetryBudget(),
        hedge=(hedge := Hedge(server, share=0.05)),
        canaries=2,
        weigh=lambda _: 1,
    )
    most = 0

    async def main():
        nonlocal most
        async with flow:
            async for outcome in flow:
                assert isinstance(outcome, Returned)
                most = max(most, sum(held(flow).values()))
            assert held(flow) == {}
            assert not [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]

    run(main())
    assert flow._outbox.handed == 20_000
    assert flow.spent.hedges > 100
    assert most <= 4 * 256  # the window, and places, and bytes
    assert (len(hedge._recent), len(hedge._sorted)) == (1000, 1000)
