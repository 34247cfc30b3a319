"""The client against the simulator: the lecture's async half, and servers that misbehave."""

import asyncio
import itertools
import threading
from queue import Queue

import pytest
from runs import PATIENCE

from millstream.aio import Fault
from millstream.client.client import Client, ask
from millstream.client.requests import Reply
from millstream.errors import RequestError, RunError
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency, running

QUESTIONS = [f"What is the capital of {country}?" for country in ("France", "Germany", "Italy")]
CAPITALS = ["Paris", "Berlin", "Rome"]


def against(behaviour: Behaviour, main, **options):
    """`main(client, server)` in a loop of its own; fails if it leaves a task behind."""

    async def inside():
        async with running(behaviour) as server:
            before = asyncio.all_tasks()
            async with Client(server.url, model="simulated", **options) as client:
                result = await main(client, server)
            left = asyncio.all_tasks() - before
            assert not {task for task in left if "millstream/aio" in repr(task)}
            return result

    return asyncio.run(inside())


def test_gather_answers_in_order():
    async def main(client, server):
        return await client.gather(QUESTIONS)

    replies = against(Behaviour(latency=parse_latency("lognormal 0.01 1.0")), main)
    assert [capital in reply.text for capital, reply in zip(CAPITALS, replies, strict=True)] == [True] * 3
    assert all(reply.attempts == 1 and reply.usage["total_tokens"] > 0 for reply in replies)


def test_as_completed_gives_each_once_and_ordered_in_order():
    async def main(client, server):
        prompts = [f"question {number}" for number in range(100)]
        async with client.as_completed(prompts) as outcomes:
            completed = [outcome async for outcome in outcomes]
        async with client.ordered(iter(prompts)) as outcomes:
            return completed, [outcome.index async for outcome in outcomes], server.stats.most_in_flight

    completed, indices, most = against(Behaviour(latency=parse_latency("lognormal 0.005 1.0")), main, in_flight=16)
    assert sorted(outcome.index for outcome in completed) == indices == list(range(100))
    assert all(f"question {outcome.index}" in outcome.text for outcome in completed)
    assert most <= 16


def test_an_endless_stream_of_prompts_can_be_left():
    async def main(client, server):
        async with client.ordered(f"question {number}" for number in itertools.count()) as outcomes:
            async for outcome in outcomes:
                if outcome.index == 50:
                    break
        return server.stats.requests

    assert 51 <= against(Behaviour(), main, in_flight=8, window=20) <= 51 + 20


def test_race_gives_the_first_success():
    async def main(client, server):
        return await client.race(QUESTIONS), await client.race(QUESTIONS[0], models=["one", "two"])

    first, second = against(Behaviour(latency=parse_latency("lognormal 0.01 1.0")), main)
    assert any(capital in first.text for capital in CAPITALS)
    assert "Paris" in second.text
    assert second.model in ("one", "two")


def test_a_race_that_nobody_wins():
    async def main(client, server):
        return await client.race(QUESTIONS)

    fault = against(Behaviour(faults=(parse_fault("400:1"),)), main)
    assert isinstance(fault, Fault)
    assert [each.kind for each in fault.faults] == ["bad_request"] * 3


def test_a_story_too_long_is_a_timeout():
    async def main(client, server):
        outcome = await client.ask("Write a short story.", timeout=0.05)
        return [outcome.text if isinstance(outcome, Reply) else "Timeout", outcome.kind]

    assert against(Behaviour(latency=parse_latency("fixed 60")), main, attempts=1) == ["Timeout", "timeout"]


def test_a_wrong_key_stops_everything_with_one_message():
    async def main(client, server):
        with pytest.raises(RunError, match="OPENAI_API_KEY") as stopped:
            await client.gather(f"question {number}" for number in range(1000))
        return str(stopped.value), server.stats.requests

    message, requests = against(Behaviour(api_key="right"), main, api_key="sk-wrong", in_flight=4)
    assert "sk-wrong" not in message
    assert requests <= 8


def test_retries_end_well_and_a_single_ask_tells_its_fault():
    async def main(client, server):
        return await client.ask("hello"), server.stats.requests

    reply, requests = against(Behaviour(faults=(parse_fault("503:1:0:times=2"),)), main)
    assert (reply.attempts, requests) == (3, 3)
    fault, _ = against(Behaviour(faults=(parse_fault("413:1"),)), main)
    assert (fault.kind, fault.attempts) == ("too_large", 1)


def test_several_servers_share_the_load():
    async def main():
        async with running(Behaviour()) as one, running(Behaviour()) as two:
            async with Client([one.url, two.url], model="simulated") as client:
                replies = await client.gather(["hello"] * 10)
            return {reply.server for reply in replies}, one.stats.requests, two.stats.requests

    servers, one, two = asyncio.run(main())
    assert (len(servers), one, two) == (2, 5, 5)


def test_prompts_can_be_texts_messages_or_mappings():
    async def main(client, server):
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        prompts = [QUESTIONS[0], messages, {"prompt": QUESTIONS[0]}, {"messages": messages, "max_tokens": 2}]
        return await client.gather(prompts)

    replies = against(Behaviour(), main, system="Be brief.")
    assert len({reply.text for reply in replies[:3]}) == 1
    assert replies[3].finish_reason == "length"


@pytest.mark.parametrize("prompt", [None, 5, [], {}, {"prompt": 5}])
def test_what_is_no_prompt_is_said(prompt):
    async def main(client, server):
        with pytest.raises(RequestError, match="no prompt"):
            await client.ask(prompt)

    against(Behaviour(), main)


@pytest.fixture
def server_elsewhere():
    """The URL of a server in another thread's loop, as a server in another process would be."""
    loop, url, stop = asyncio.new_event_loop(), Queue(), asyncio.Event()

    async def main():
        async with running(Behaviour()) as server:
            url.put(server.url)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    yield url.get(timeout=PATIENCE)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.mark.parametrize("loop_running", [False, True], ids=["script", "notebook"])
def test_asking_from_synchronous_code(server_elsewhere, monkeypatch, loop_running):
    monkeypatch.setenv("OPENAI_BASE_URL", server_elsewhere)

    def cell():
        return [reply.text for reply in ask(QUESTIONS, model="simulated")], ask(QUESTIONS[2], model="simulated").text

    async def notebook():
        return cell()  # a plain call, while this loop is running

    texts, one = asyncio.run(notebook()) if loop_running else cell()
    assert [capital in text for capital, text in zip(CAPITALS, texts, strict=True)] == [True] * 3
    assert "Rome" in one


def test_no_server_and_no_model_are_said(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(RequestError, match="OPENAI_BASE_URL"):
        Client(model="any")
    with pytest.raises(RequestError, match="model="):
        ask("hello", "http://127.0.0.1:1/v1")
