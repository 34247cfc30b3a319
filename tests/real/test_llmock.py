"""llmock breaks as providers do, watches each attempt, and judges the client: it must find nothing against us.

Its waits are real, so each test makes many requests wait together.
"""

import asyncio
import json
import subprocess
import sys

import pytest

from millstream import Client, Fault

RETRYABLE = (408, 409, 429, 500, 502, 503, 504, 529)
FINAL = {400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 422: "bad_request"}
PROMPTS = [f"question {number}" for number in range(20)]


def asked(main, **options):
    """`main(client)` with a client of the server that the fixture `llmock` runs; it sets OPENAI_BASE_URL."""

    async def inside():
        async with Client(model="mock", seed=0, **options) as client:
            return await main(client)

    return asyncio.run(inside())


def ask(prompt, **options):
    async def main(client):
        return await client.ask(prompt)

    return asked(main, **options)


def gather(prompts, **options):
    async def main(client):
        return await client.gather(prompts)

    return asked(main, **options)


def texts(outcomes):
    assert not [outcome for outcome in outcomes if isinstance(outcome, Fault)]
    return [outcome.text for outcome in outcomes]


def test_rate_limits_are_waited_out(llmock):
    llmock.rate_limit(times=5, retry_after=2)
    replies = gather(PROMPTS)
    assert len(texts(replies)) == 20
    assert sorted(reply.attempts for reply in replies) == [1] * 15 + [2] * 5
    llmock.assert_resilient(strict=True)


def test_what_may_pass_is_tried_again(llmock):
    for status in RETRYABLE:
        llmock.fail(status)
    replies = gather(PROMPTS)
    assert len(texts(replies)) == 20
    assert sum(reply.attempts for reply in replies) == len(llmock.requests) == 20 + len(RETRYABLE)
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("status", FINAL)
def test_what_will_not_pass_is_not(llmock, status):
    llmock.fail(status)
    fault = ask("hello")
    assert (fault.kind, fault.attempts) == (FINAL[status], 1)
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)


def test_a_prompt_too_long_is_not_tried_again(llmock):
    llmock.context_overflow()
    assert "maximum context length" in ask("hello").message
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)


def test_an_outage_is_given_up_on(llmock):
    llmock.outage()
    fault = ask("hello", attempts=3)
    assert (fault.kind, fault.attempts) == ("server_error", 3)
    assert len(llmock.requests) == 3
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("quota", [{"rpm": 100}, {"tpm": 12_000}], ids=["rpm", "tpm"])
def test_quotas_are_kept_to(llmock, quota):
    llmock.limits(**quota)  # what a minute brings may come at once
    replies = gather([f"question {number}" for number in range(104)], params={"max_tokens": 100}, attempts=10)
    assert len(texts(replies)) == 104
    assert any(record.status == 429 for record in llmock.requests)
    llmock.assert_resilient(strict=True)


def test_an_answer_too_slow_is_asked_for_again(llmock):
    llmock.delay(5)
    reply = ask("hello", timeout=2)
    assert reply.attempts == 2
    llmock.assert_resilient(strict=True)


def streamed(**options):
    """What was said piece by piece, and the outcome."""

    async def main(client):
        async with client.stream("How is flour made?", **options) as pieces:
            return "".join([piece async for piece in pieces]), pieces.outcome

    return asked(main)


STREAM_FAULTS = {"disconnect": "cut", "truncate": "cut", "corrupt": "unusable"}


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_a_stream_that_breaks_before_its_first_piece_is_begun_again(llmock, fault):
    llmock.pace(20)  # so that it can see us leave
    getattr(llmock, fault)(after_chunks=1)  # the first chunk says the role alone
    said, reply = streamed()
    assert (reply.text, reply.attempts) == (said, 2)
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_a_stream_that_breaks_in_the_middle_is_no_reply(llmock, fault):
    llmock.pace(20)
    getattr(llmock, fault)(after_chunks=4)
    said, broken = streamed()
    assert said
    assert (broken.kind, broken.attempts) == (STREAM_FAULTS[fault], 1)
    assert len(llmock.requests) == 1  # it waits until the server has seen that we left
    whole, reply = streamed()  # only the caller knows whether to ask again: pieces can't be taken back
    assert whole.startswith(said)
    assert reply.text == whole != said
    llmock.assert_resilient(strict=True)


def test_a_stream_that_stalls_is_left(llmock):
    llmock.stall(after_chunks=4, seconds=30)
    said, fault = streamed(timeout=3)
    assert said
    assert (fault.kind, fault.attempts) == ("timeout", 1)
    llmock.assert_resilient(strict=True)


def test_the_command_on_a_file(llmock, tmp_path):
    llmock.limits(rpm=100).rate_limit().fail(400)
    prompts = [f"question {number}" for number in range(104)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    command = [sys.executable, "-m", "millstream", "ask", "prompts.txt", "--out", "out.jsonl", "--model", "mock"]

    first = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 3, first.stderr  # there was a fault
    report = json.loads(first.stdout)
    assert (report["replies"], report["faults"]) == (103, {"bad_request": 1})
    asked_for = len(llmock.requests)
    assert report["spent"]["attempts"] == asked_for > 104

    second = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 3, second.stderr
    assert json.loads(second.stdout)["again"] == 104
    assert len(llmock.requests) == asked_for
    llmock.assert_resilient(strict=True)
