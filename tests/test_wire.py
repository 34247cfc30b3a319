"""One attempt over the wire: every way a server can fail is told apart, against the simulator on real sockets."""

import asyncio
import random
import re
import ssl
from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wires import FINE, SENT, answering, body, faulty, http, told

from millstream.aio import Fault, Returned, gather
from millstream.errors import RequestError
from millstream.llm.peers import Peer
from millstream.llm.replies import answer_in
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency, running
from millstream.llm.wire import Answer, Wire, WireError, wait_before_retry

CAPITALS = ["France", "Germany", "Italy"]


def ask(behaviour: Behaviour, text: str = "hello", api_key: str | None = None, **more: object):
    async def main():
        async with running(behaviour) as server, Wire(server.url, api_key) as wire:
            return await wire.send(body(text, **more))

    return asyncio.run(main())


def test_a_body_may_be_json_already_or_any_mapping():
    async def main():
        async with running(Behaviour()) as server, Wire(server.url) as wire:
            plain = body("hello")
            nested = MappingProxyType({**plain, "messages": [MappingProxyType(plain["messages"][0])]})
            answers = [await wire.send(each) for each in (plain, msgspec.json.encode(plain), nested)]
            return answers, server.stats.bodies

    answers, bodies = asyncio.run(main())
    assert bodies == 1
    assert answers[0] == answers[1] == answers[2]


def test_a_large_body_is_sent():
    text = "grain " * 400_000
    assert "reply to: grain" in ask(Behaviour(), text).text


@pytest.mark.parametrize("content", [object(), "\ud83d", {1, object()}])
def test_a_body_that_is_no_json_is_a_bad_request(content):
    with pytest.raises(WireError, match="cannot be written as JSON") as failed:
        ask(Behaviour(), content)
    assert told(failed.value) == ("bad_request", None, False, False)


def test_an_answer_keeps_the_whole_reply():
    answer = ask(Behaviour(), "hello")
    assert answer.body == msgspec.json.decode(answer.raw)
    assert answer.body["choices"][0]["message"]["content"] == answer.text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Paris"}, "Paris"),
        ({"content": ""}, ""),
        ({"content": None, "tool_calls": [{"id": "1"}]}, ""),
        ({"content": None, "refusal": "I will not."}, "I will not."),
    ],
)
def test_what_counts_as_text(message, text):
    choice = {"message": message, "finish_reason": "stop"}
    found = answer_in(Peer("http://127.0.0.1"), msgspec.json.encode({"choices": [choice], "usage": None}))
    told = {"refusal": message.get("refusal"), "tool_calls": message.get("tool_calls")}
    assert found == Answer(text, None, {}, "stop", found.raw, "http://127.0.0.1", **told)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_a_model_thought_is_kept_by_whatever_name(name):
    choice = {"message": {"content": "4", name: "2 and 2"}}
    answer = answer_in(Peer(""), msgspec.json.encode({"choices": [choice]}))
    assert (answer.text, answer.reasoning, answer.refusal, answer.tool_calls) == ("4", "2 and 2", None, None)
    odd = {"message": {"content": "4", name: {"effort": "low"}, "refusal": "", "tool_calls": []}}
    answer = answer_in(Peer(""), msgspec.json.encode({"choices": [odd]}))
    assert (answer.reasoning, answer.refusal, answer.tool_calls) == (None, None, None)


def test_all_of_several_choices_are_told():
    choices = [
        {"message": {"content": "a"}, "finish_reason": "stop"},
        {"text": "b", "finish_reason": "length"},
        {},
        {"message": {"content": None, "refusal": "no"}},
    ]
    answer = answer_in(Peer(""), msgspec.json.encode({"choices": choices}))
    assert (answer.text, answer.texts) == ("a", ("a", "b", None, "no"))
    assert answer.finish_reasons == ("stop", "length", None, None)
    one = answer_in(Peer(""), msgspec.json.encode({"choices": choices[:1]}))
    assert (one.texts, one.finish_reasons) == ((), ())


def test_an_answer_has_text_usage_and_server():
    answer = ask(Behaviour(), "What is the capital of France?")
    assert "Paris" in answer.text
    assert answer.usage["completion_tokens"] > 0
    assert answer.finish_reason == "stop"
    assert answer.server.startswith("http://127.0.0.1")


@pytest.mark.parametrize("fault", SENT)
def test_each_fault_is_told_apart(fault):
    with pytest.raises(WireError) as failed:
        ask(faulty(fault))
    error = failed.value
    assert told(error) == SENT[fault]
    assert error.retry_after == (3.0 if fault.startswith("429") else None)
    assert str(error).startswith("http://127.0.0.1")
    assert str(error).isprintable()


@pytest.mark.parametrize("fault", FINE)
def test_what_is_odd_but_whole_is_an_answer(fault):
    assert ask(faulty(fault)).text


def test_a_connection_that_the_server_dropped_is_no_answer():
    async def main():
        async with running(faulty("between:1:times=1")) as server, Wire(server.url) as wire:
            await wire.send(body("hello"))
            with pytest.raises(WireError) as failed:
                await wire.send(body("hello"))
            return told(failed.value), (await wire.send(body("hello"))).text

    error, text = asyncio.run(main())
    assert error == ("connection", None, True, False)
    assert "hello" in text


def test_what_was_paid_for_is_told_although_it_cannot_be_used():
    usage = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    for fault in ("null-content:1", "empty-choices:1"):
        with pytest.raises(WireError) as failed:
            ask(faulty(fault))
        assert failed.value.usage == usage
    with pytest.raises(WireError) as failed:
        ask(faulty("503:1"))
    assert failed.value.usage == {}


def failure(url: str, **options: object) -> WireError:
    """What a request to this base URL fails with."""

    async def main():
        async with Wire(url, **options) as wire:
            with pytest.raises(WireError) as failed:
                await wire.send(body("hello"))
            return failed.value

    return asyncio.run(main())


def failure_of(reply: bytes, scheme: str = "http", context: ssl.SSLContext | None = None, **options: object):
    """What a request fails with at a server that answers it with these bytes."""

    async def main():
        async with answering(reply, context) as (address, _), Wire(f"{scheme}://{address}/v1", **options) as wire:
            with pytest.raises(WireError) as failed:
                await wire.send(body("hello"))
            return failed.value

    return asyncio.run(main())


def test_servers_that_cannot_be_reached():
    refused = failure("http://127.0.0.1:1/v1")
    assert str(refused) == "http://127.0.0.1:1/v1: connection refused; is the server running?"
    unknown = failure("http://no-such-host.invalid/v1")
    assert "the host no-such-host.invalid is unknown" in str(unknown)
    assert told(refused) == told(unknown) == ("connection", None, True, False)


def tls(folder):
    """A server's side of TLS, with a certificate that nobody has signed, for tests alone."""
    (folder / "key.pem").write_text(KEY)
    (folder / "certificate.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def test_tls_that_does_not_fit(tmp_path):
    untrusted = failure_of(b"", "https", tls(tmp_path))
    assert "its certificate is not trusted" in str(untrusted)
    plain = failure_of(http(b"", "400 Bad Request"), "https")
    assert "does its URL start with http://?" in str(plain)
    page = b"<html><title>The plain HTTP request was sent to HTTPS port</title></html>"
    nginx = failure_of(http(page, "400 Bad Request"))
    alert = failure_of(b"\x15\x03\x01\x00\x02\x02\x46")
    for error in (nginx, alert):
        assert "does its URL start with https://?" in str(error)
    assert {(error.kind, error.retry, error.fatal) for error in (untrusted, plain, nginx, alert)} == {
        ("tls", False, True)
    }
    closed = failure_of(b"", context=tls(tmp_path))
    assert told(closed) == ("connection", None, True, False)
    assert "it may want https://" in str(closed)


def error_of(message, **more):
    return msgspec.json.encode({"error": {"message": message, "type": "invalid_request_error", "param": None, **more}})


ADVICE = [
    (http(b"<!DOCTYPE html><html></html>"), "unusable", "HTML instead of JSON", False),
    (http(b""), "unusable", "an empty reply", False),
    (http(b"{}"), "unusable", "no completion", False),
    (http(b"404 page not found", "404 Not Found"), "not_found", "404 page not found; check the base URL.*/v1", True),
    (http(b'{"detail": "Not Found"}', "404 Not Found"), "not_found", "Not Found; check the base URL.*/v1", True),
    (http(error_of("Unknown request URL", code="unknown_url"), "404 Not Found"), "not_found", "base URL", True),
    (http(b"", "405 Method Not Allowed"), "refused", "base URL", True),
    (http(error_of("No such file"), "404 Not Found"), "not_found", "No such file", False),
    (
        http(error_of("The model `x` does not exist.", code=404), "404 Not Found"),
        "model_not_found",
        "model's name",
        True,
    ),
    (http(error_of("x is not a valid model ID"), "400 Bad Request"), "model_not_found", "model's name", True),
    (http(error_of("too long"), "413 Too Large"), "too_large", "too long", False),
    (http(error_of("Insufficient balance"), "402 Payment Required"), "quota", "no quota left", True),
    (http(error_of("Sorry", type="insufficient_quota"), "429 Too Many"), "quota", "no quota left", True),
    (http(b"", "401 Unauthorized"), "unauthorized", "OPENAI_API_KEY", True),
    (
        http(b"", "301 Moved", Location="https://x.org/v1/chat/completions"),
        "refused",
        "https://x.org/v1; give that",
        True,
    ),
    (http(b"<title>502\nBad Gateway</title>", "502 Bad Gateway"), "server_error", "502 Bad Gateway$", False),
    (http(b'{"error": {"message": "upstream is gone", "code": 502}}'), "server_error", "upstream is gone", False),
    (http(b'{"error": "no"}', "400 Bad Request"), "bad_request", "HTTP 400: no$", False),
    (http(b"abc", Content_Length=9), "connection", "broke in the middle", False),
    (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "connection", "speaks no HTTP", False),
    (b"HTTP/1.1 200 OK\r\nContent-Le", "connection", "without an answer", False),
]


@pytest.mark.parametrize(("reply", "kind", "says", "fatal"), ADVICE)
def test_a_message_says_what_to_do(reply, kind, says, fatal):
    error = failure_of(reply)
    assert (error.kind, error.fatal) == (kind, fatal)
    assert re.search(says, str(error))
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "", "ftp://127.0.0.1/v1", "http://", "http://127.0.0.1:99999/v1", "http://[::1/v1"),
        *(
            "http://" + "x" * 64 + ".org",
            "http://a b/v1",
            "http://127.0.0.1/v1#secret",
        ),
        *("ann:secret@127.0.0.1/v1", "http://ann:se/secret@127.0.0.1/v1", "http://ann:1/secret@127.0.0.1/v1"),
        *("http://ann:1?secret@127.0.0.1/v1", "http://ann:secret@host:port/v1", "http://ann:secret@/v1"),
    ],
)
def test_what_is_no_base_url_is_refused_without_its_secrets(url):
    with pytest.raises(RequestError, match="base URL") as refused:
        Wire(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\r\nHost: x", "sk-sécret", "sk-secret\0", "\u200bsk-secret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key):
    with pytest.raises(RequestError, match="API key") as refused:
        Wire("http://127.0.0.1/v1", key)
    assert "cret" not in str(refused.value)


def test_a_login_in_the_url_is_sent_and_never_shown():
    async def main():
        reply = http(error_of("you sent YW5uOnBhc3NAd29yZA== or pass@word or pass%40word"), "400 Bad Request")
        async with answering(reply) as (address, heard):
            url = f"http://ann:pass%40word@{address}/v1"
            async with Wire(url, "sk-secret") as wire:
                with pytest.raises(WireError) as failed:
                    await wire.send(body("hello"))
            return f"{wire!r} {wire.base_url} {failed.value}", address, heard

    shown, address, heard = asyncio.run(main())
    assert b"\r\nAuthorization: Basic YW5uOnBhc3NAd29yZA==\r\n" in heard[0]
    assert b"sk-secret" not in heard[0]
    assert f"http://{address}/v1: HTTP 400: you sent *** or *** or ***" in shown
    assert "pass" not in shown


KEYS = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=8, max_size=60).filter(
    lambda key: key.strip() == key and "*" not in key
)


@given(KEYS, st.text(max_size=400), st.text(max_size=400), st.sampled_from([400, 401, 404, 429, 500]), st.booleans())
def test_no_message_holds_the_key_wherever_a_server_echoes_it(key, before, after, status, as_json):
    words = before + key + after
    content = error_of(words) if as_json else words.encode()
    message = str(Peer("http://127.0.0.1/v1", [key]).refused(status, content, {}))
    said = message.removeprefix(f"http://127.0.0.1/v1: HTTP {status}")
    assert " ".join(key.split()) not in said
    assert message.isprintable()
    assert len(message) < 500


def test_a_short_key_is_hidden_where_it_is_a_word():
    peer = Peer("http://127.0.0.1/v1", ["key"])
    assert peer.shown("the key (key) is no monkey") == "the *** (***) is no monkey"


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

    def delay(error, job):
        wait = wait_before_retry(error, job.attempts, 40, draw)
        return wait and wait / 1000

    async def main():
        async with running(behaviour) as server, Wire(server.url) as wire:
            texts = [f"question {number}" for number in range(200)]
            outcomes = await gather(lambda text: wire.send(body(text)), texts, in_flight=16, delay=delay)
            return outcomes, server.stats.most_in_flight

    outcomes, most = asyncio.run(main())
    assert all(isinstance(outcome, Returned) for outcome in outcomes)
    assert [f"question {outcome.index}" in outcome.value.text for outcome in outcomes] == [True] * 200
    assert any(outcome.attempts > 1 for outcome in outcomes)
    assert most <= 16


def test_final_errors_are_not_asked_again():
    async def main():
        async with running(Behaviour(faults=(parse_fault("400:1"),))) as server, Wire(server.url) as wire:
            draw = random.Random(0)
            outcomes = await gather(
                lambda text: wire.send(body(text)),
                CAPITALS,
                delay=lambda e, job: wait_before_retry(e, job.attempts, 5, draw),
            )
            return outcomes, server.stats.requests

    outcomes, requests = asyncio.run(main())
    assert all(isinstance(fault, Fault) and fault.kind == "bad_request" for fault in outcomes)
    assert requests == 3


KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCGCCjy3PpJMWTb0y
5PBSAWZXzIdSPJ6EyQlfDrgJ/6ShRANCAATRE7UknqJx2bZXEw7nSEfv2zoNhObX
X3WCMf+FAIzU1/MtgCfhekv5Wk7pHRfNlXfM1n0dMT/uFGQ65yMIXikW
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUSw1E6y9b1ooEcfco0iu/cMasX08wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzIzNDU1OVoYDzIxMjYxMDMw
MjM0NTU5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATRE7UknqJx2bZXEw7nSEfv2zoNhObXX3WCMf+FAIzU1/MtgCfhekv5
Wk7pHRfNlXfM1n0dMT/uFGQ65yMIXikWo28wbTAdBgNVHQ4EFgQUzq2kLrSA5Em5
PYnkcFKZYzBz09IwHwYDVR0jBBgwFoAUzq2kLrSA5Em5PYnkcFKZYzBz09IwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgcAzDy9tHCl3ZzldNwCQG8UBF2LxZf7PDwm7bdgF+1ZACIQCo
YLxRRGMfibYMFcWsqOSJjOv0EbC2zgJ4U9LSq68MiQ==
-----END CERTIFICATE-----
"""
