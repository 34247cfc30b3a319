"""Many calls at once: exactly one outcome each, never more in flight than allowed, nothing alive afterwards."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import run

from millstream.aio import Fault, Returned, as_completed, gather, ordered, race

TIMES = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 30.0])
CALLS = st.lists(st.tuples(TIMES, st.integers(0, 3)), max_size=40)  # (seconds, how often it fails first)


class Server:
    """An async function with a script: `calls[i]` says how long item i takes and how often it fails first."""

    def __init__(self, calls: list[tuple[float, int]]) -> None:
        self.calls = calls
        self.failed: dict[int, int] = {}
        self.running = self.most = 0
        self.cancelled = 0

    async def __call__(self, item: int) -> int:
        seconds, failures = self.calls[item]
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.failed.get(item, 0) < failures:
            self.failed[item] = self.failed.get(item, 0) + 1
            raise ConnectionError(f"item {item}")
        return item * 10


def patient(attempts: int):
    return lambda error, job: (
        0.25 * job.attempts if job.attempts < attempts and isinstance(error, ConnectionError) else None
    )


@settings(max_examples=80, deadline=None)
@given(
    CALLS, st.integers(1, 8), st.integers(1, 12), st.booleans(), st.integers(1, 4), st.sampled_from([None, 0.7, 5.0])
)
def test_exactly_one_outcome_each_and_the_right_one(calls, in_flight, window, in_order, attempts, timeout):
    server = Server(calls)
    many = ordered if in_order else as_completed

    async def main():
        options = {"in_flight": in_flight, "window": window, "timeout": timeout, "delay": patient(attempts)}
        async with many(server, range(len(calls)), **options) as outcomes:
            return [outcome async for outcome in outcomes]

    outcomes = run(main())
    assert sorted(outcome.index for outcome in outcomes) == list(range(len(calls)))
    if in_order:
        assert [outcome.index for outcome in outcomes] == list(range(len(calls)))
    assert server.most <= in_flight
    for outcome in outcomes:
        seconds, failures = calls[outcome.index]
        if timeout is not None and seconds > timeout:
            assert isinstance(outcome, Fault)
            assert (outcome.kind, outcome.attempts) == ("timeout", 1)
        elif failures < attempts:
            assert isinstance(outcome, Returned)
            assert (outcome.value, outcome.attempts) == (outcome.index * 10, failures + 1)
        else:
            assert isinstance(outcome, Fault)
            assert (outcome.kind, outcome.attempts) == ("error", attempts)
            assert f"item {outcome.index}" in outcome.message


def test_gather_runs_at_once_and_keeps_the_order():
    async def main():
        loop = asyncio.get_running_loop()
        outcomes = await gather(Server([(3.0, 0), (1.0, 0), (2.0, 0)]), range(3))
        return [reply.value for reply in outcomes], loop.time()

    assert run(main()) == ([0, 10, 20], 3.0)


def test_as_completed_hands_out_the_fastest_first():
    async def main():
        async with as_completed(Server([(3.0, 0), (1.0, 0), (2.0, 0)]), range(3)) as outcomes:
            return [reply.value async for reply in outcomes]

    assert run(main()) == [10, 20, 0]


def test_a_timeout_is_a_fault_and_the_lectures_word_is_one_line_away():
    async def main():
        outcomes = await gather(Server([(1.0, 0), (60.0, 0)]), range(2), timeout=3.0)
        return [outcome.value if isinstance(outcome, Returned) else "Timeout" for outcome in outcomes]

    assert run(main()) == [0, "Timeout"]


def test_a_deadline_bounds_all_attempts_together():
    async def main():
        outcomes = await gather(Server([(1.0, 99)]), [0], deadline=5.0, delay=lambda error, job: 1.0)
        return outcomes[0], asyncio.get_running_loop().time()

    fault, now = run(main())
    assert isinstance(fault, Fault)
    assert now <= 5.0
    assert fault.attempts == 3


def test_a_slow_head_does_not_stall_an_ordered_stream_before_the_window_is_full():
    calls = [(100.0, 0)] + [(1.0, 0)] * 50

    async def main(window):
        server = Server(calls)
        started = 0

        def source() -> Iterator[int]:
            nonlocal started
            for number in range(len(calls)):
                started += 1
                yield number

        async with ordered(server, source(), in_flight=4, window=window) as outcomes:
            await asyncio.sleep(90.0)
            before = started
            return before, [outcome.index async for outcome in outcomes]

    assert run(main(window=60)) == (51, list(range(51)))
    assert run(main(window=10)) == (10, list(range(51)))


def test_backoff_holds_no_slot():
    """One slot: while item 0 waits to be asked again, the others run."""
    server = Server([(1.0, 1), (1.0, 0), (1.0, 0)])

    async def main():
        async with as_completed(server, range(3), in_flight=1, delay=lambda error, job: 10.0) as outcomes:
            return [outcome.index async for outcome in outcomes], asyncio.get_running_loop().time()

    assert run(main()) == ([1, 2, 0], 12.0)


@pytest.mark.parametrize("how", ["break", "return", "exception", "cancel"])
@pytest.mark.parametrize("many", [as_completed, ordered])
def test_nothing_is_alive_after_the_block_however_it_is_left(how, many):
    server = Server([(float(n), 0) for n in range(1000)])
    closed = False

    def endless() -> Iterator[int]:
        nonlocal closed
        try:
            yield from range(1000)
        finally:
            closed = True

    async def block():
        async with many(server, endless(), in_flight=8) as outcomes:
            async for outcome in outcomes:
                if outcome.index == 3 and how == "break":
                    break
                if outcome.index == 3 and how == "return":
                    return
                if outcome.index == 3 and how == "exception":
                    raise KeyError

    async def main():
        task = asyncio.create_task(block())
        if how == "cancel":
            await asyncio.sleep(4.5)
            task.cancel()
        with contextlib.suppress(KeyError, asyncio.CancelledError):
            await task
        assert task.cancelled() == (how == "cancel")

    run(main())  # which fails if a task is left over
    assert server.running == 0
    assert closed
    assert 0 < server.cancelled <= 8


def test_an_endless_async_source_is_pulled_as_there_is_room():
    pulled = 0

    async def endless() -> AsyncIterator[int]:
        nonlocal pulled
        while True:
            await asyncio.sleep(0.01)
            yield pulled
            pulled += 1

    async def double(item: int) -> int:
        await asyncio.sleep(1.0)
        return 2 * item

    async def main():
        async with ordered(double, endless(), in_flight=4, window=8) as outcomes:
            async for outcome in outcomes:
                if outcome.index == 20:
                    return outcome.value

    assert run(main()) == 40
    assert pulled <= 21 + 8 + 1


def test_a_failing_source_is_raised_after_what_it_gave():
    def source() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("no more disk")

    seen = []

    async def main():
        async with ordered(Server([(1.0, 0)] * 2), source()) as outcomes:
            async for outcome in outcomes:
                seen.append(outcome.value)

    with pytest.raises(OSError, match="no more disk"):
        run(main())
    assert seen == [0, 10]


def test_race_is_won_by_the_first_success_not_by_the_first_failure():
    server = Server([(5.0, 0), (0.1, 9), (1.0, 0), (60.0, 0)])

    async def main():
        reply = await race(server, range(4))
        return reply.index, asyncio.get_running_loop().time(), len(asyncio.all_tasks())

    assert run(main()) == (2, 1.0, 1)
    assert server.cancelled == 2


def test_a_race_nobody_wins_gives_all_faults():
    async def main():
        return await race(Server([(2.0, 9), (1.0, 9)]), range(2))

    fault = run(main())
    assert fault.kind == "race"
    assert [(each.index, each.kind) for each in fault.faults] == [(1, "error"), (0, "error")]


def test_a_cancelled_race_leaves_nobody_running():
    server = Server([(60.0, 0)] * 3)

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await race(server, range(3))

    run(main())
    assert (server.running, server.cancelled) == (0, 3)


def test_losers_that_are_slow_to_end_are_waited_for():
    ended = []

    async def stubborn(item: int) -> int:
        try:
            await asyncio.sleep(item)
        except asyncio.CancelledError:
            await asyncio.sleep(10.0)
            ended.append(item)
            raise
        return item

    async def main():
        return (await race(stubborn, [1, 50, 60])).value

    assert run(main()) == 1
    assert sorted(ended) == [50, 60]


def test_the_sleep_that_is_a_bad_idea_is_not_needed():
    """Three timers of 2, 0.5 and 1 seconds end after 2, not after a guess."""

    async def timer(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return f"timer of {seconds} s"

    async def main():
        outcomes = await gather(timer, [2.0, 0.5, 1.0])
        return [reply.value for reply in outcomes], asyncio.get_running_loop().time()

    assert run(main()) == (["timer of 2.0 s", "timer of 0.5 s", "timer of 1.0 s"], 2.0)
