"""What the simulator can be told to do so that a job's odd ends show before it costs money, over real sockets."""

import base64
import contextlib
import json
from struct import unpack

import aiohttp
import pytest
from test_simulator import asked, chat, events_of, faulty, post, run

from millstream.llm.simulator import Behaviour


def reply_to(body, behaviour=None, path="/chat/completions"):
    return json.loads(asked(body, behaviour, path)[2])


# --- replies of every kind ---


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_different_and_all_are_billed(stream):
    async def test(server, session):
        body = chat("Why?", n=3, stream=stream, stream_options={"include_usage": True})
        _, _, content = await post(server, session, body)
        if stream:
            events, _ = events_of(content)
            texts = ["", "", ""]
            for event in events[:-1]:
                choice = event["choices"][0]
                texts[choice["index"]] += choice["delta"]["content"]
            usage = events[-1]["usage"]
        else:
            reply = json.loads(content)
            texts = [choice["message"]["content"] for choice in reply["choices"]]
            usage = reply["usage"]
        assert texts == ["reply to: Why?", "reply 2 to: Why?", "reply 3 to: Why?"]
        assert usage == {"prompt_tokens": 1, "completion_tokens": 12, "total_tokens": 13}
        assert (server.stats.ids_in, server.stats.ids_out) == (1, 12)

    run(test)


def test_every_choice_has_the_limit_to_itself():
    reply = reply_to({"model": "m", "prompt": "Why not, after all?", "n": 2, "max_tokens": 2}, path="/completions")
    assert [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == [
        ("reply to", "length"),
        ("reply 2 ", "length"),
    ]
    assert reply["usage"]["completion_tokens"] == 4


def test_letters_beyond_ascii_have_an_id_a_byte():
    reply = reply_to(chat("\u6c34\u8eca" * 10, max_tokens=10))
    assert reply["usage"] == {"prompt_tokens": 60, "completion_tokens": 9, "total_tokens": 69}
    assert reply["choices"][0]["finish_reason"] == "length"
    reply = reply_to(chat("\u6c34\u8eca"), Behaviour(reply_ids=40))
    assert reply["usage"]["completion_tokens"] == 40


def test_embeddings_are_of_length_one_and_the_same_for_the_same_text():
    body = {"model": "m", "input": ["Why?", "why not, though?", "Why?"]}
    reply = reply_to(body, path="/embeddings")
    vectors = [row["embedding"] for row in reply["data"]]
    assert [row["index"] for row in reply["data"]] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    assert [sum(number * number for number in vector) for vector in vectors] == pytest.approx([1, 1, 1])
    assert reply["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    packed = reply_to({**body, "input": "Why?", "dimensions": 5, "encoding_format": "base64"}, path="/embeddings")
    numbers = unpack("<5f", base64.b64decode(packed["data"][0]["embedding"]))
    assert sum(number * number for number in numbers) == pytest.approx(1, rel=1e-6)
    assert reply_to({"model": "m", "input": [1, 2, 3]}, path="/embeddings")["usage"]["prompt_tokens"] == 3
    assert asked({"model": "m", "input": [{"no": "text"}]}, path="/embeddings")[0] == 400


# --- how replies end ---


ENDS = {  # the message's content, the finish_reason, and what else is there
    "length:1": ("reply t", "length", {}),
    "filtered:1": (None, "content_filter", {}),
    "half-filtered:1": ("reply t", "content_filter", {}),
    "refused:1": (None, "stop", {"refusal": "I cannot help with that."}),
    "all-thought:1": (None, "length", {}),
    "aborted:1": ("reply t", "abort", {}),
}


@pytest.mark.parametrize("fault", ENDS)
def test_replies_end_as_told(fault):
    content, finish, more = ENDS[fault]
    reply = reply_to(chat("Why?"), faulty(fault))
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": content, **more}
    assert reply["choices"][0]["finish_reason"] == finish
    assert reply["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("fault", ENDS)
def test_streams_end_as_told(fault):
    content, finish, more = ENDS[fault]
    events, done = events_of(asked(chat("Why?", stream=True), faulty(fault))[2])
    deltas = [event["choices"][0]["delta"] for event in events]
    assert done
    assert events[-1]["choices"][0]["finish_reason"] == finish
    assert "".join(delta["content"] or "" for delta in deltas) == (content or "")
    assert [{"refusal": delta["refusal"]} for delta in deltas if "refusal" in delta] == ([more] if more else [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(stream):
    _, _, content = asked(chat("Grind it.", stream=stream), faulty("tool-calls:1"))
    if stream:
        events, _ = events_of(content)
        [call] = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        [choice] = json.loads(content)["choices"]
        [call] = choice["message"]["tool_calls"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert call["function"]["name"] == "grind"
    assert json.loads(call["function"]["arguments"]) == {"grain": "wheat"}


# --- what they cost ---


@pytest.mark.parametrize(
    ("fault", "usage"),
    [
        ("no-usage:1", None),
        ("other-usage:1", {"input_tokens": 2, "output_tokens": 4}),
        ("hidden-thinking:1", {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 6}),
        (
            "cached:1",
            {
                "prompt_tokens": 2,
                "completion_tokens": 4,
                "total_tokens": 6,
                "prompt_tokens_details": {"cached_tokens": 1},
            },
        ),
    ],
)
def test_usage_comes_in_many_forms_and_the_bill_is_the_same(fault, usage):
    async def test(server, session):
        _, _, content = await post(server, session, chat("Why so?", max_tokens=4))
        assert json.loads(content)["usage"] == usage
        assert (server.stats.ids_in, server.stats.ids_out) == (2, 4)
        half_price = 0.5e-6 if fault == "cached:1" else 0.0
        assert server.stats.cost == pytest.approx(2 * 1e-6 + 4 * 2e-6 - half_price)

    run(test, faulty(fault, price=(1.0, 2.0, 0.5)))


@pytest.mark.parametrize("fault", ["hang:1", "disconnect:1", "garbage:1", "500:1"])
def test_work_is_billed_whether_its_reply_arrives_or_not(fault):
    async def test(server, session):
        with contextlib.suppress(TimeoutError, aiohttp.ServerDisconnectedError):
            await post(server, session, chat("Why?"), timeout=aiohttp.ClientTimeout(total=0.2))
        assert (server.stats.ids_in, server.stats.ids_out) == ((0, 0) if fault == "500:1" else (1, 4))

    run(test, faulty(fault))


def test_a_quota_ends_and_stays_at_its_end():
    async def test(server, session):
        replies = [await post(server, session, chat(f"question {number}")) for number in range(5)]
        assert [status for status, _, _ in replies] == [200, 200, 429, 429, 429]
        assert json.loads(replies[-1][2])["error"]["code"] == "insufficient_quota"
        assert server.stats.turned_away == {"quota": 3}

    run(test, Behaviour(quota=12))


def test_limits_can_be_hidden():
    async def test(server, session):
        replies = [await post(server, session, chat(f"question {number}")) for number in range(3)]
        assert [status for status, _, _ in replies] == [200, 429, 429]
        assert "Retry-After" not in replies[1][1]

    run(test, Behaviour(rpm=1, hide_limits=True))


# --- errors of one prompt, of an account, and of what stands in between ---


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("billing", 429, "billing_not_active"),
        ("hard-limit", 400, "billing_hard_limit_reached"),
        ("credits", 402, None),
        ("context-length", 400, "context_length_exceeded"),
        ("content-policy", 400, "content_filter"),
        ("too-many-ids", 429, "rate_limit_exceeded"),
        ("no-route", 404, None),
        ("json-failed", 400, "json_validate_failed"),
    ],
)
def test_errors_name_what_they_are_about(kind, status, code):
    found, headers, body = asked(chat(), faulty(f"{kind}:1"))
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert "Retry-After" not in headers


@pytest.mark.parametrize(("kind", "status"), [("403-page", 403), ("502-page", 502), ("504-page", 504)])
def test_proxies_answer_with_pages(kind, status):
    found, headers, body = asked(chat(), faulty(f"{kind}:1"))
    assert (found, headers["Content-Type"]) == (status, "text/html; charset=utf-8")
    assert body.startswith(b"<!DOCTYPE html>")


def test_a_429_without_retry_after_and_one_with_a_day():
    assert "Retry-After" not in asked(chat(), faulty("429:1:none"))[1]
    assert asked(chat(), faulty("429:1:86400"))[1]["Retry-After"] == "86400"


def test_a_huge_reply_is_as_long_as_told_and_still_json():
    _, headers, body = asked(chat("Why?"), faulty("huge:1:3"))
    assert int(headers["Content-Length"]) == len(body) == 3 << 20
    assert json.loads(body)["choices"][0]["message"]["content"] == "reply to: Why?"
