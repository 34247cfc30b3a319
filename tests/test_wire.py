"""One attempt over the wire: every way a server can fail is told apart, against the simulator on real sockets."""

import asyncio
import random

import pytest

from millstream.aio import Fault, Reply, gather
from millstream.errors import RequestError
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency, running
from millstream.llm.wire import Wire, WireError, wait_before_retry

CAPITALS = ["France", "Germany", "Italy"]


def body(text: str, **more: object) -> dict[str, object]:
    return {"model": "simulated", "messages": [{"role": "user", "content": text}], **more}


def ask(behaviour: Behaviour, text: str = "hello", api_key: str | None = None, **more: object):
    async def main():
        async with running(behaviour) as server, Wire(server.url, api_key) as wire:
            return await wire.send(body(text, **more))

    return asyncio.run(main())


def test_an_answer_has_text_usage_and_server():
    answer = ask(Behaviour(), "What is the capital of France?")
    assert "Paris" in answer.text
    assert answer.usage["completion_tokens"] > 0
    assert answer.finish_reason == "stop"
    assert answer.server.startswith("http://127.0.0.1")


FAULTS = {
    "429:1:3": ("rate_limited", 429, True, False),
    "500:1": ("server_error", 500, True, False),
    "503:1": ("server_error", 503, True, False),
    "529:1": ("server_error", 529, True, False),
    "408:1": ("server_timeout", 408, True, False),
    "400:1": ("bad_request", 400, False, False),
    "401:1": ("unauthorized", 401, False, True),
    "403:1": ("forbidden", 403, False, True),
    "404-model:1": ("model_not_found", 404, False, True),
    "413:1": ("too_large", 413, False, False),
    "quota:1": ("quota", 429, False, True),
    "disconnect:1": ("connection", None, True, False),
    "cut:1": ("connection", None, True, False),
    "garbage:1": ("unusable", 200, True, False),
    "truncated-json:1": ("unusable", 200, True, False),
    "html:1": ("unusable", 200, True, False),
    "empty-choices:1": ("unusable", 200, True, False),
    "null-content:1": ("unusable", 200, True, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_apart(fault):
    with pytest.raises(WireError) as failed:
        ask(Behaviour(faults=(parse_fault(fault),)))
    error = failed.value
    assert (error.kind, error.status, error.retry, error.fatal) == FAULTS[fault]
    assert error.retry_after == (3.0 if fault.startswith("429") else None)
    assert str(error).startswith("http://127.0.0.1")


def test_a_refused_connection_and_a_wrong_address():
    async def refused():
        async with Wire("http://127.0.0.1:1/v1") as wire:
            await wire.send(body("hello"))

    with pytest.raises(WireError, match="connect") as failed:
        asyncio.run(refused())
    assert (failed.value.kind, failed.value.retry) == ("connection", True)
    with pytest.raises(RequestError, match="http://"):
        Wire("localhost:8000")


def test_a_key_is_sent_and_never_shown():
    behaviour = Behaviour(api_key="sk-secret")
    assert ask(behaviour, api_key="sk-secret").text
    with pytest.raises(WireError) as failed:
        ask(behaviour, api_key="sk-other")
    assert failed.value.fatal
    assert "sk-other" not in f"{failed.value} {failed.value!r} {Wire('http://127.0.0.1', 'sk-other')!r}"


def test_a_hanging_server_is_left_when_the_call_is_cancelled():
    async def main():
        async with running(Behaviour(faults=(parse_fault("hang:1"),))) as server, Wire(server.url) as wire:
            outcomes = await gather(lambda text: wire.send(body(text)), CAPITALS, timeout=0.05)
            return outcomes, len(asyncio.all_tasks())

    outcomes, _ = asyncio.run(main())
    assert [(fault.kind, fault.attempts) for fault in outcomes] == [("timeout", 1)] * 3


def test_everything_is_answered_in_the_end_by_a_server_that_mostly_fails():
    kinds = (
        "429:0.1:0",
        "500:0.1",
        "503:0.05",
        "disconnect:0.1",
        "cut:0.05",
        "between:0.1",
        "garbage:0.05",
        "html:0.05",
    )
    behaviour = Behaviour(
        latency=parse_latency("fixed 0.001"), faults=tuple(parse_fault(kind) for kind in kinds), seed=3
    )
    draw = random.Random(0)

    def delay(error: Exception, attempts: int) -> float | None:
        wait = wait_before_retry(error, attempts, 40, draw)
        return wait and wait / 1000

    async def main():
        async with running(behaviour) as server, Wire(server.url) as wire:
            texts = [f"question {number}" for number in range(200)]
            outcomes = await gather(lambda text: wire.send(body(text)), texts, in_flight=16, delay=delay)
            return outcomes, server.stats.most_in_flight

    outcomes, most = asyncio.run(main())
    assert all(isinstance(outcome, Reply) for outcome in outcomes)
    assert [f"question {outcome.index}" in outcome.value.text for outcome in outcomes] == [True] * 200
    assert any(outcome.attempts > 1 for outcome in outcomes)
    assert most <= 16


def test_final_errors_are_not_asked_again():
    async def main():
        async with running(Behaviour(faults=(parse_fault("400:1"),))) as server, Wire(server.url) as wire:
            draw = random.Random(0)
            outcomes = await gather(
                lambda text: wire.send(body(text)), CAPITALS, delay=lambda e, n: wait_before_retry(e, n, 5, draw)
            )
            return outcomes, server.stats.requests

    outcomes, requests = asyncio.run(main())
    assert all(isinstance(fault, Fault) and fault.kind == "bad_request" for fault in outcomes)
    assert requests == 3
