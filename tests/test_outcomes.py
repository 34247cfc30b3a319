"""Replies that were paid for are never thrown away: bad prompts among good ones, and what ends a run early."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
from runs import PATIENCE
from wires import deciding, deciding_elsewhere, said

from millstream.aio import Fault
from millstream.client.client import Client, ask
from millstream.client.requests import Reply
from millstream.errors import AskStopped, RequestError

BAD = [
    {"nope": 1},
    "half \ud83d",
    5,
    None,
    [],
    [5],
    [{"content": "no role"}],
    b"bytes",
    {"prompt": "a", "stream": True},
]
NOT_JSON = [{"prompt": "a", "temperature": float("nan")}, {"prompt": "a", "stop": {1, object()}}]


def echo(body, number):
    return 200, said(body["messages"][-1]["content"])


def against(decide, main, **options):
    async def inside():
        async with deciding(decide) as url, Client(url, **{"model": "m", **options}) as client:
            return await main(client)

    return asyncio.run(inside())


def mixed():
    """Good prompts with a bad one behind each."""
    bad = BAD + NOT_JSON
    return [prompt for at, each in enumerate(bad) for prompt in (f"question {at}", each)]


def shown(outcomes):
    return [each.text if isinstance(each, Reply) else each.kind for each in outcomes]


WANTED = [word for at in range(len(BAD + NOT_JSON)) for word in (f"question {at}", "bad_row")]


async def agen(items):
    for item in items:
        yield item


@pytest.mark.parametrize("kind", ["gather", "gather async", "ordered", "as_completed"])
def test_a_bad_prompt_is_a_fault_in_its_place(kind):
    async def main(client):
        if kind == "gather":
            return await client.gather(mixed())
        if kind == "gather async":
            return await client.gather(agen(mixed()))
        async with getattr(client, kind)(mixed()) as outcomes:
            return sorted([outcome async for outcome in outcomes], key=lambda outcome: outcome.index)

    outcomes = against(echo, main)
    assert shown(outcomes) == WANTED
    assert [outcome.index for outcome in outcomes] == list(range(len(WANTED)))
    assert [outcome.attempts for outcome in outcomes] == [1, 0] * len(BAD + NOT_JSON)
    assert "surrogate" in outcomes[3].message
    assert outcomes[3].message.isprintable()


def test_a_race_goes_on_without_the_bad_and_one_prompt_alone_is_refused_at_once():
    async def main(client):
        won = await client.race([*BAD, "hello"])
        lost = await client.race(BAD[:2])
        for prompt in BAD + NOT_JSON:
            with pytest.raises(RequestError, match="no prompt"):
                await client.ask(prompt)
            if prompt is not BAD[-1]:
                with pytest.raises(RequestError, match="no prompt"):
                    client.stream(prompt)
        return won, lost

    won, lost = against(echo, main)
    assert won.text == "hello"
    assert [each.kind for each in lost.faults] == ["bad_row"] * 2


@pytest.mark.parametrize("several", ["a text", b"bytes", {"prompt": "a"}, 5, None])
def test_what_is_one_prompt_or_none_is_not_taken_for_several(several):
    async def main(client):
        for call in (client.as_completed, client.ordered):
            with pytest.raises(RequestError, match="several prompts"):
                call(several)
        with pytest.raises(RequestError, match="several prompts"):
            await client.gather(several)

    against(lambda body, number: pytest.fail("it was asked"), main)


def test_models_that_prompts_bring_and_one_that_nobody_names():
    async def main(client):
        named = {"prompt": "a", "model": "own"}
        with pytest.raises(RequestError, match="model="):
            await client.gather(["a", named])
        assert (await client.race("a", models=["one"])).text == "a"
        return await client.gather([named, "b", {"prompt": "c", "model": None}, named])

    assert shown(against(echo, main, model=None)) == ["a", "bad_row", "bad_row", "a"]


@pytest.mark.parametrize(
    "params", [{"temperature": float("nan")}, {"messages": []}, {"stream": True}, {"stop": object()}]
)
def test_parameters_that_no_request_can_have_are_refused_at_once(params):
    with pytest.raises(RequestError, match="cannot be"):
        Client("http://127.0.0.1:9/v1", model="m", params=params)


def no_money(after):
    def decide(body, number):
        if number < after:
            return echo(body, number)
        return 402, {"error": {"message": "Insufficient balance", "code": "insufficient_quota"}}

    return decide


def test_what_stops_a_run_carries_what_came_until_then():
    async def main(client):
        with pytest.raises(AskStopped, match="quota") as stopped:
            await client.gather(f"question {n}" for n in range(1000))
        return stopped.value.outcomes

    outcomes = against(no_money(30), main, in_flight=4)
    replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    assert [outcome.index for outcome in outcomes] == sorted(outcome.index for outcome in outcomes)
    assert len(replies) == 30
    assert all(reply.text == f"question {reply.index}" for reply in replies)
    assert {outcome.kind for outcome in outcomes if isinstance(outcome, Fault)} == {"quota"}


@pytest.mark.parametrize("kind", ["ordered", "as_completed"])
def test_an_iteration_that_is_stopped_hands_out_the_rest_with_the_exception(kind):
    async def main(client):
        seen = []

        async def reading():
            async with getattr(client, kind)(f"question {n}" for n in range(1000)) as outcomes:
                async for outcome in outcomes:
                    seen.append(outcome)

        with pytest.raises(AskStopped) as stopped:
            await reading()
        return [*seen, *stopped.value.outcomes]

    found = against(no_money(30), main, in_flight=8)
    assert sum(isinstance(outcome, Reply) for outcome in found) == 30
    assert len({outcome.index for outcome in found}) == len(found)


def failing(count):
    yield from (f"question {n}" for n in range(count))
    raise ValueError("the file of prompts ended in the middle")


def test_prompts_that_fail_on_the_way_lose_nothing():
    async def main(client):
        with pytest.raises(ValueError, match="in the middle") as failed:
            await client.gather(failing(20))
        return failed.value.outcomes

    assert shown(against(echo, main)) == [f"question {n}" for n in range(20)]


def test_a_timeout_of_ones_own_loses_nothing():
    bound = None

    def decide(body, number):
        if number == 20:
            bound.reschedule(asyncio.get_running_loop().time())
        return echo(body, number)

    async def main(client):
        nonlocal bound
        with pytest.raises(TimeoutError) as late:
            async with asyncio.timeout(None) as bound:
                await client.gather(f"question {n}" for n in range(100_000))
        return late.value.__cause__.outcomes

    outcomes = against(decide, main, in_flight=4)
    assert 16 <= len(outcomes) < 1000  # all but those that were under way
    assert all(reply.text == f"question {reply.index}" for reply in outcomes)


# From synchronous code ----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere():
    """serve(decide) -> the URL of a server in another thread's loop."""
    with ExitStack() as stack:
        yield lambda decide: stack.enter_context(deciding_elsewhere(decide))


@pytest.mark.parametrize("conversation", [list, tuple])
def test_a_list_of_messages_is_one_conversation(elsewhere, conversation):
    url = elsewhere(lambda body, number: (200, said(" ".join(each["content"] for each in body["messages"]))))
    messages = conversation([{"role": "system", "content": "be"}, {"role": "user", "content": "brief"}])
    assert ask(messages, url, model="m").text == "be brief"
    assert shown(ask([messages, "a"], url, model="m")) == ["be brief", "a"]
    rows = [{"role": "nurse", "prompt": "a"}, {"role": "clerk", "messages": messages}]
    assert len(ask(rows, url, model="m")) == 2


def test_bad_prompts_and_stops_lose_nothing_in_synchronous_code(elsewhere):
    assert shown(ask(mixed(), elsewhere(echo), model="m")) == WANTED
    with pytest.raises(AskStopped) as stopped:
        ask((f"question {n}" for n in range(1000)), elsewhere(no_money(30)), model="m", in_flight=4)
    assert sum(isinstance(outcome, Reply) for outcome in stopped.value.outcomes) == 30
    with pytest.raises(RequestError, match="several prompts"):
        ask(5, "http://127.0.0.1:9/v1", model="m")


INTERRUPTED = """
import asyncio, sys, threading, time
from millstream import ask

def cell():
    try:
        ask(("question %d" % n for n in range(100_000)), sys.argv[1], model="m", in_flight=4)
    except KeyboardInterrupt as stopped:
        print(len(stopped.outcomes), {type(each).__name__ for each in stopped.outcomes}, threading.active_count())

async def notebook():
    cell()

if sys.argv[2] == "notebook":
    asyncio.new_event_loop().run_until_complete(notebook())
else:
    cell()
"""


@pytest.mark.parametrize("where", ["script", "notebook"])
def test_an_interrupt_carries_what_came_and_ends_the_asking(elsewhere, where):
    answered = threading.Event()
    asked = []

    def decide(body, number):
        asked.append(number)
        if number == 50:
            answered.set()
        return echo(body, number)

    asking = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, elsewhere(decide), where], stdout=subprocess.PIPE, env=os.environ, text=True
    )
    assert answered.wait(timeout=PATIENCE)
    asking.send_signal(signal.SIGINT)
    out, _ = asking.communicate(timeout=PATIENCE)
    count, kinds, threads = out.split()
    assert len(asked) - 4 <= int(count) <= len(asked)  # but those that were under way
    assert (kinds, threads) == ("{'Reply'}", "1")
