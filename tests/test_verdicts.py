"""What counts as answered: one table, the page that is made of it, and what servers say that falls into its lines."""

import asyncio
import json
from pathlib import Path

import pytest
from wires import answering, body, http

from millstream.llm.said import asked_in, said_in
from millstream.llm.verdicts import (
    ANSWERED,
    BAD_ROW,
    CONNECTION,
    CUT,
    HTTP,
    LATE,
    NO_PLACE,
    NO_TEXT,
    OTHERS,
    PROXY,
    SCHEMA,
    SPEECHLESS,
    TIMEOUT,
    TLS,
    TOO_LONG,
    TWICE,
    UNKNOWN,
    UNSENT,
    UNUSABLE,
    WITHHELD,
    WireError,
    as_markdown,
)
from millstream.llm.wire import Wire

PAGE = Path(__file__).parents[1] / "docs" / "verdicts.md"


def test_the_page_has_the_table():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")] == list(as_markdown())


def wrong(status, message="no", **more):
    """An error in OpenAI's form."""
    return http(json.dumps({"error": {"message": message, "type": "invalid_request_error", **more}}).encode(), status)


def said(choices, **more):
    return http(json.dumps({"choices": choices, **more}).encode())


def message(content, **more):
    return said([{"message": {"content": content, **more}, "finish_reason": "stop"}])


GOOGLE = [
    {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota, please check your plan and billing details.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.07s"}],
        }
    }
]
"""Google's word for a limit per minute, which is gone in half a minute."""

MODERATED = {
    "code": 403,
    "message": "meta/llama requires moderation on this provider. Your input was flagged for 'violence'.",
    "metadata": {"reasons": ["violence"], "flagged_input": "..."},
}
AZURE = {
    "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
    "code": "content_filter",
    "param": "prompt",
    "innererror": {"code": "ResponsibleAIPolicyViolation"},
}
CONTEXT = "This model's maximum context length is 4096 tokens. However, your messages resulted in 5020 tokens."
CREDITS = "This request requires more credits, or fewer max_tokens. You requested up to 4096 tokens"

REFUSED = {
    ("quota", "no money left"): [
        wrong("429 Too Many", code="insufficient_quota"),
        wrong("429 Too Many", code="billing_not_active", type="billing_not_active"),
        wrong("429 Too Many", type="exceeded_current_quota_error"),
        wrong("400 Bad", code="billing_hard_limit_reached"),
        wrong("400 Bad", "Your credit balance is too low to access the API."),
        http(json.dumps({"error": {"message": "no", "code": "insufficient_quota"}}).encode()),
    ],
    ("quota", "the words ask for fewer max_tokens"): [wrong("402 Payment", CREDITS)],
    ("quota", ""): [wrong("402 Payment", "Insufficient credits")],
    ("unusable", "the model wrote JSON, or called a tool, as it should not"): [
        wrong("400 Bad", "Failed to generate JSON.", code="json_validate_failed")
    ],
    ("too_large", "the request's own size"): [
        wrong("400 Bad", CONTEXT, code="context_length_exceeded", param="messages"),
        wrong("400 Bad", CONTEXT, code=400),
        wrong("400 Bad", "Invalid 'messages[0].content': string too long.", code="string_above_max_length"),
        wrong("429 Too Many", "Request too large for gpt-4 on tokens per min (TPM): Limit 10000, Requested 12000."),
        wrong("400 Bad", "prompt is too long: 210000 tokens > 200000 maximum"),
        http(json.dumps([{"error": {"code": 400, "message": "The input token count exceeds the maximum"}}]).encode()),
    ],
    ("too_large", ""): [http(b"", "413 Too Large")],
    ("filtered", "a filter or moderation"): [
        http(json.dumps({"error": AZURE}).encode(), "400 Bad"),
        http(json.dumps({"error": MODERATED}).encode(), "403 Forbidden"),
    ],
    ("bad_request", "the words name the prompt: its messages, images or tools"): [
        wrong("400 Bad", "Invalid value for 'content': expected a string, got null.", param="messages.[0].content"),
        wrong("404 Not Found", "No endpoints found that support image input", code=404),
        http(b'{"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "field required"}]}', "422 Unfit"),
    ],
    ("tls", "the server wants TLS"): [http(b"Client sent an HTTP request to an HTTPS server.", "400 Bad")],
    ("model_not_found", "there is no such model"): [
        wrong("404 Not Found", code="model_not_found"),
        wrong("400 Bad", "x is not a valid model ID"),
    ],
    ("model_not_found", "an error about a model"): [
        wrong("404 Not Found", "The model `x` is not here"),
        http(b'{"object": "error", "message": "The model `x` is gone", "type": "NotFoundError"}', "404 Not Found"),
    ],
    ("not_found", "there is no such path"): [
        http(b"404 page not found", "404 Not Found"),
        http(b'{"detail": "Not Found"}', "404 Not Found"),
    ],
    ("not_found", "any other error"): [wrong("404 Not Found", "No such file")],
    ("refused", ""): [http(b"", "405 No"), http(b"", "409 Conflict"), http(b"", "425 Early")],
    ("unauthorized", ""): [wrong("401 No"), http(b"<html>", "401 No")],
    ("proxy", ""): [http(b"", "407 Proxy Authentication Required")],
    ("rate_limited", "a code for too many requests"): [wrong("403 Forbidden", code="rateLimitExceeded")],
    ("forbidden", "a page, as of a firewall"): [
        http(b"<html><title>Attention Required! | Cloudflare</title></html>", "403 Forbidden"),
        http(b"", "403 Forbidden"),
    ],
    ("forbidden", "any other error"): [wrong("403 Forbidden", code="unsupported_country_region_territory")],
    ("rate_limited", ""): [
        wrong("429 Too Many", "Rate limit reached", code="rate_limit_exceeded"),
        http(json.dumps(GOOGLE).encode(), "429 Too Many"),
        http(json.dumps(GOOGLE).encode()),
        http(b'{"error": {"message": "slow", "code": "429"}}'),
        http(b'{"error": {"message": "Flex tier capacity exceeded"}}', "498 Capacity"),
        http(b"<html>error code: 1015</html>", "429 Too Many"),
    ],
    ("server_error", "with Retry-After"): [http(b"", "503 Busy", Retry_After=3)],
    ("server_error", ""): [http(b"", "529 Overloaded")],
    ("server_error", "what a proxy says of the server behind it"): [
        http(b"<title>502 Bad Gateway</title>", "502 Bad Gateway"),
        http(b"", "503 Away"),
        http(b"", "504 Late"),
        http(b'{"error": {"message": "upstream is gone", "code": 502}}'),
    ],
    ("server_error", "any other error of the server"): [http(b"", "500 Oh"), http(b'{"error": {"message": "oh"}}')],
    ("server_timeout", ""): [http(b"", "408 Late")],
    ("bad_request", "any other error"): [
        wrong("400 Bad", "max_tokens is too large: 100000", param="max_tokens"),
        http(b'{"detail": [{"loc": ["body", "temperature"], "msg": "too hot"}]}', "422 Unfit"),
    ],
    ("refused", "any other error"): [http(b"", "451 No")],
    ("refused", "a redirect"): [http(b"", "301 Moved", Location="https://x.org/v1/chat/completions")],
    ("refused", "any other status"): [http(b"", "204 Nothing")],
}

ENDS = {
    UNUSABLE: [http(b"<html>"), http(b""), http(b"{}"), said([]), said([{"message": {}, "finish_reason": "abort"}])],
    SPEECHLESS: [message(None)],
    NO_TEXT: [said([{"message": {"content": None}, "finish_reason": "length"}])],
    WITHHELD: [said([{"message": {"content": None}, "finish_reason": "content_filter"}])],
    CONNECTION: [b"", b"SSH-2.0\r\n\r\n", http(b"abc", Content_Length=9)],
    TLS: [b"\x15\x03\x01\x00\x02\x02\x46"],
    TOO_LONG: [http(b" " * 5000)],
}

ANSWERS = [
    [message("Paris"), message(""), message([{"type": "text", "text": "Paris"}])],
    [message(None, tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}])],
    [message(None, refusal="I may not")],
    [said([{"message": {"content": "Par"}, "finish_reason": reason}]) for reason in ("length", "content_filter")],
]


ODD = [b"[]", b"[[]]", b"null", b"7", b"[null]", b"\0"]


def asked(reply):
    async def main():
        async with answering(reply) as (place, _), Wire(f"http://{place}/v1", most=4000) as wire:
            return await wire.send(body())

    return asyncio.run(main())


def judged(reply):
    with pytest.raises(WireError) as failed:
        asked(reply)
    return failed.value


def test_each_line_has_an_example():
    assert {(line.kind, line.when) for line in HTTP} == set(REFUSED)
    assert set(OTHERS) == set(ENDS) | {CUT, SCHEMA, PROXY, NO_PLACE, TIMEOUT, UNKNOWN, LATE, UNSENT, BAD_ROW, TWICE}
    assert len(ANSWERS) == len(ANSWERED)


@pytest.mark.parametrize(
    ("line", "reply"), [(line, reply) for line, replies in REFUSED.items() for reply in replies], ids=str
)
def test_an_error_falls_into_its_line(line, reply):
    verdict = judged(reply).verdict
    assert (verdict.kind, verdict.when) == line


@pytest.mark.parametrize(("line", "reply"), [(line, reply) for line, replies in ENDS.items() for reply in replies])
def test_what_is_no_reply_falls_into_its_line(line, reply):
    assert judged(reply).verdict is line


@pytest.mark.parametrize("reply", [reply for replies in ANSWERS for reply in replies])
def test_what_counts_as_answered_is(reply):
    assert asked(reply).text in ("Paris", "Par", "", "I may not")


@pytest.mark.parametrize(
    ("reply", "seconds"),
    [
        (http(b"", "429 No", Retry_After=7), 7.0),
        (http(b"", "429 No", Retry_After=7, retry_after_ms=6500), 6.5),
        (http(json.dumps(GOOGLE).encode(), "429 No"), 34.07),
        (http(json.dumps(GOOGLE).encode()), 34.07),
        (http(b"", "429 No"), None),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(reply, seconds):
    assert judged(reply).retry_after == seconds


def test_a_long_wait_is_told():
    assert "it asks to be left alone for 24 h" in str(judged(http(b"", "429 No", Retry_After=86_400)))


@pytest.mark.parametrize("content", [*ODD, b'"no"', b'{"error": 7}', b'{"detail": []}', b'{"error": {"code": []}}'])
def test_odd_errors_are_errors(content):
    found = said_in(content)
    assert isinstance(found.message, str)
    assert asked_in({}, found) is None
    assert judged(http(content, "400 Bad")).kind == "bad_request"
