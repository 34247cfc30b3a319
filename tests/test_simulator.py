"""The simulated server, over real sockets: its replies, every fault as a client meets it, and what it leaves behind."""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from runs import PATIENCE

from millstream.errors import RequestError
from millstream.llm import simulator
from millstream.llm.simulator import Behaviour, FaultRate, Latency, parse_fault, parse_latency, running
from millstream.llm.simulator.behaviour import treatment_of

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "people": {"type": "integer"},
        "area": {"type": "number"},
        "capital": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "people", "area", "capital", "rivers"],
}


def chat(text="Why does the wheel turn?", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def faulty(*texts, **settings):
    return Behaviour(faults=tuple(map(parse_fault, texts)), **settings)


@asynccontextmanager
async def serving(behaviour=None):
    """A server and a session; after the block, nothing but the test itself is alive."""
    async with running(behaviour) as server:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield server, session
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert (server.stats.in_flight, server.stats.in_service, server.stats.queued) == (0, 0, 0)


def run(test, behaviour=None):
    """`await test(server, session)` with a server that runs; no test may hang."""

    async def whole():
        async with asyncio.timeout(PATIENCE), serving(behaviour) as (server, session):
            return await test(server, session)

    return asyncio.run(whole())


async def post(server, session, body, path="/chat/completions", **more):
    """Status, headers and bytes of a reply; `body` is an object or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(server.url + path, data=data, **more) as response:
        return response.status, response.headers, await response.read()


def asked(body, behaviour=None, path="/chat/completions"):
    """Status, headers and bytes of the reply to one request."""
    return run(lambda server, session: post(server, session, body, path), behaviour)


def text_of(body):
    return json.loads(body)["choices"][0]["message"]["content"]


def events_of(body):
    """What the events of a stream hold, and whether it was closed with [DONE]."""
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    done = bool(events) and events[-1] == b"[DONE]"
    return [json.loads(event) for event in events[: -1 if done else None]], done


def connect(server):
    return asyncio.open_connection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))


async def send(writer, body):
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    await writer.drain()


async def until(condition):
    """Go round the event loop until it holds; the limit of `run` ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0)


# --- replies ---


def test_a_chat_reply_has_the_shape_of_openais():
    status, headers, body = asked(chat("Why?"))
    assert (status, headers["Content-Type"]) == (200, "application/json")
    reply = json.loads(body)
    assert reply.pop("id").startswith("chatcmpl-")
    assert isinstance(reply.pop("created"), int)
    assert reply == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "reply to: Why?"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5},
    }


def test_a_completion_has_its_own_shape():
    _, _, body = asked({"model": "m", "prompt": "Why?"}, path="/completions")
    reply = json.loads(body)
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [{"index": 0, "text": "reply to: Why?", "logprobs": None, "finish_reason": "stop"}]
    _, _, body = asked({"model": "m", "prompt": [1, 2, 3]}, path="/completions")
    assert json.loads(body)["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(("country", "city"), [("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome")])
def test_it_knows_three_capitals(country, city):
    _, _, body = asked(chat(f"What is the capital of {country}?"))
    assert text_of(body) == f"The capital of {country} is {city}."


def test_the_last_user_message_counts_and_parts_are_joined():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "se"}, {"type": "text", "text": "cond"}]},
    ]
    _, _, body = asked({"model": "m", "messages": messages, "temperature": 0.5})
    assert text_of(body) == "reply to: second"
    assert json.loads(body)["usage"]["prompt_tokens"] == 5  # 9 + 5 + 6 characters


def test_the_length_of_replies_can_be_set_and_cut():
    behaviour = Behaviour(reply_ids=100)
    reply = json.loads(asked(chat(), behaviour)[2])
    assert len(reply["choices"][0]["message"]["content"]) == 400
    assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (100, "stop")
    for limit in ({"max_tokens": 7}, {"max_completion_tokens": 7}):
        reply = json.loads(asked(chat(**limit), behaviour)[2])
        assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (7, "length")
    reply = json.loads(asked(chat(max_tokens=100), behaviour)[2])
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_schema_is_kept_unless_the_fault_says_otherwise():
    body = chat("Paris", response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}})
    said = json.loads(text_of(asked(body)[2]))
    kinds = {"city": str, "people": int, "area": int, "capital": bool, "rivers": list}
    assert {name: type(value) for name, value in said.items()} == kinds
    assert isinstance(json.loads(text_of(asked(body, faulty("bad-schema:1"))[2])), list)
    said = json.loads(text_of(asked(chat(response_format={"type": "json_object"}))[2]))
    assert isinstance(said, dict)


@pytest.mark.parametrize("pieces", ["0", "0.0001"])
def test_a_stream_says_the_same_as_the_reply_at_once(pieces):
    async def test(server, session):
        whole = json.loads((await post(server, session, chat()))[2])
        options = {"stream": True, "stream_options": {"include_usage": True}}
        status, headers, body = await post(server, session, chat(**options))
        assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        (*events, usage), done = events_of(body)
        assert done
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        said = "".join(event["choices"][0]["delta"]["content"] for event in events)
        assert said == whole["choices"][0]["message"]["content"]
        assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
        assert len(events) == 2 + whole["usage"]["completion_tokens"]
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])

        _, _, body = await post(server, session, {"model": "m", "prompt": "Why?", "stream": True}, "/completions")
        events, done = events_of(body)
        assert done
        assert "".join(event["choices"][0]["text"] for event in events) == "reply to: Why?"
        assert not any("usage" in event for event in events)

    run(test, Behaviour(piece_latency=parse_latency(pieces)))


def test_models_and_unknown_addresses():
    async def test(server, session):
        async with session.get(server.url + "/models") as response:
            found = await response.json()
        assert [model["id"] for model in found["data"]] == ["one", "two"]
        async with session.get(server.url + "/chat/completions") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "unknown_url"
        assert server.stats.requests == 0

    run(test, Behaviour(models=("one", "two")))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"\xff"', {"model": "m"}, {"messages": []}, chat() | {"messages": []}, chat(max_tokens=0)],
)
def test_a_body_that_is_not_valid_is_refused_in_openais_form(body):
    async def test(server, session):
        status, _, answer = await post(server, session, body)
        assert status == 400
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"
        assert server.stats.turned_away == {"body": 1}
        assert server.stats.bodies == 0

    run(test)


def test_a_key_is_asked_for():
    async def test(server, session):
        for headers in ({}, {"Authorization": "Bearer other"}):
            status, _, answer = await post(server, session, chat(), headers=headers)
            assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
            async with session.get(server.url + "/models", headers=headers) as response:
                assert response.status == 401
        assert (await post(server, session, chat(), headers={"Authorization": "Bearer secret"}))[0] == 200
        assert server.stats.turned_away == {"api-key": 2}
        assert server.stats.statuses == {401: 2, 200: 1}

    run(test, Behaviour(api_key="secret"))


# --- faults ---


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("429", 429, "rate_limit_exceeded"),
        ("quota", 429, "insufficient_quota"),
        ("500", 500, None),
        ("503", 503, None),
        ("529", 529, None),
        ("408", 408, None),
        ("400", 400, None),
        ("401", 401, "invalid_api_key"),
        ("403", 403, "unsupported_country_region_territory"),
        ("404-model", 404, "model_not_found"),
        ("413", 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_come_in_openais_form(kind, status, code, stream):
    async def test(server, session):
        found, headers, body = await post(server, session, chat(stream=stream))
        assert found == status
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert headers.get("Retry-After") == ("1" if kind == "429" else None)
        assert server.stats.faults == {kind: 1}
        assert server.stats.statuses == {status: 1}
        assert (server.stats.ids_in, server.stats.ids_out) == (0, 0)

    run(test, faulty(f"{kind}:1"))


@pytest.mark.parametrize(("text", "header"), [("429:1:2", "2"), ("503:1:0", "0"), ("529:1:0.25:times=1", "0.25")])
def test_retry_after_can_be_set(text, header):
    assert asked(chat(), faulty(text))[1]["Retry-After"] == header


def test_the_first_requests_of_each_body_fail_and_then_it_works():
    async def test(server, session):
        for text in ("one", "two"):
            assert [(await post(server, session, chat(text)))[0] for _ in range(4)] == [503, 503, 200, 200]
        assert (server.stats.bodies, server.stats.asked_again) == (2, 2)

    run(test, faulty("503:1.0:times=2"))


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_closes_before_any_byte(stream):
    async def test(server, session):
        reader, writer = await connect(server)
        await send(writer, chat(stream=stream))
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await post(server, session, chat(stream=stream))
        assert server.stats.faults == {"disconnect": 2}
        assert server.stats.statuses == {}
        assert server.stats.gone == 0

    run(test, faulty("disconnect:1"))


def test_cut_closes_in_the_middle_of_the_body():
    async def test(server, session):
        reader, writer = await connect(server)
        await send(writer, chat())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
        assert 0 < len(body) == length // 2
        with pytest.raises(aiohttp.ClientPayloadError):
            await post(server, session, chat())

    run(test, faulty("cut:1"))


@pytest.mark.parametrize("pieces", ["0", "0.0001"])
def test_cut_closes_in_mid_stream(pieces):
    async def test(server, session):
        reader, writer = await connect(server)
        await send(writer, chat(stream=True))
        found = await reader.read()
        writer.close()
        assert found.startswith(b"HTTP/1.1 200")
        assert found.count(b"data: ") > 1
        assert b"[DONE]" not in found
        assert not found.endswith(b"0\r\n\r\n")
        with pytest.raises(aiohttp.ClientPayloadError):
            await post(server, session, chat(stream=True))

    run(test, faulty("cut:1", piece_latency=parse_latency(pieces)))


def test_between_closes_on_the_next_request_of_the_connection():
    async def test(server, session):
        reader, writer = await connect(server)
        await send(writer, chat("one"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"close" not in head.lower()
        (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
        assert text_of(await reader.readexactly(length)) == "reply to: one"
        await send(writer, chat("two"))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        writer.close()
        assert (server.stats.requests, server.stats.dropped, server.stats.bodies) == (2, 1, 1)

        await post(server, session, chat("three"))
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(server, session, chat("four"))
        assert (await post(server, session, chat("five")))[0] == 200
        assert server.stats.connections == 3
        assert server.stats.faults == {"between": 3}

    run(test, faulty("between:1"))


@pytest.mark.parametrize("stream", [False, True])
def test_hang_ends_with_the_client(stream):
    async def test(server, session):
        reader, writer = await connect(server)
        await send(writer, chat(stream=stream))
        await until(lambda: server.stats.faults)
        answer = asyncio.create_task(reader.read(1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (server.stats.in_flight, server.stats.gone) == (1, 0)
        assert not answer.done()
        writer.close()
        assert await answer == b""
        await until(lambda: server.stats.gone)
        assert server.stats.in_flight == 0
        assert server.stats.statuses == {}

    run(test, faulty("hang:1"))


def test_the_end_of_the_server_ends_what_hangs():
    async def whole():
        async with asyncio.timeout(PATIENCE):
            async with running(faulty("hang:1", capacity=1)) as server:
                pairs = [await connect(server) for _ in range(3)]
                for number, (_, writer) in enumerate(pairs):
                    await send(writer, chat(f"{number}"))
                await until(lambda: server.stats.queued == 2)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            for reader, writer in pairs:
                assert await reader.read() == b""
                writer.close()
        assert (server.stats.in_flight, server.stats.queued, server.stats.gone) == (0, 0, 0)

    asyncio.run(whole())


@pytest.mark.parametrize("stream", [False, True])
def test_slow_bytes_come_in_pieces_and_whole(stream):
    async def test(server, session):
        reader, writer = await connect(server)
        await send(writer, chat(stream=stream))
        await reader.readuntil(b"\r\n\r\n")
        end = b"0\r\n\r\n" if stream else b"}}"
        reads = [await reader.read(1 << 16)]
        while not b"".join(reads).endswith(end):
            reads.append(await reader.read(1 << 16))
        assert len(reads) > 1
        writer.close()
        _, _, body = await post(server, session, chat(stream=stream))
        assert events_of(body)[1] if stream else text_of(body)

    run(test, faulty("slow-bytes:1:0.001"))


@pytest.mark.parametrize("stream", [False, True])
def test_bodies_that_are_no_replies(stream):
    kinds = ("garbage", "html", "truncated-json")
    found = {kind: asked(chat(stream=stream), faulty(f"{kind}:1")) for kind in kinds}
    assert {status for status, _, _ in found.values()} == {200}
    with pytest.raises(UnicodeDecodeError):
        found["garbage"][2].decode()
    assert found["html"][1]["Content-Type"].startswith("text/html")
    assert found["html"][2].startswith(b"<!DOCTYPE html>")
    assert found["truncated-json"][2].startswith(b'{"id":')
    with pytest.raises(json.JSONDecodeError):
        json.loads(found["truncated-json"][2])


def test_replies_without_choices_or_text():
    assert json.loads(asked(chat(), faulty("empty-choices:1"))[2])["choices"] == []
    assert text_of(asked(chat(), faulty("null-content:1"))[2]) is None
    _, _, body = asked({"model": "m", "prompt": "Why?"}, faulty("null-content:1"), "/completions")
    assert json.loads(body)["choices"][0]["text"] is None

    events, done = events_of(asked(chat(stream=True), faulty("empty-choices:1"))[2])
    assert done
    assert all(event["choices"] == [] for event in events)
    events, done = events_of(asked(chat(stream=True), faulty("null-content:1"))[2])
    assert done
    assert all(event["choices"][0]["delta"]["content"] is None for event in events)


def test_an_error_in_mid_stream_comes_to_streams_alone():
    async def test(server, session):
        (*events, error), done = events_of((await post(server, session, chat(stream=True)))[2])
        assert done
        assert len(events) > 1
        assert error["error"]["type"] == "server_error"
        assert text_of((await post(server, session, chat()))[2])
        assert server.stats.faults == {"error-event": 1}

    run(test, faulty("error-event:1"))


def test_every_fault_is_shown_here():
    shown = "".join(Path(__file__).with_name(name).read_text() for name in ("test_simulator.py", "test_dry_runs.py"))
    assert [kind for kind in simulator.KINDS if f'"{kind}' not in shown] == []


# --- the same treatment ---

MIXED = ("429:0.1:0", "500:0.1", "null-content:0.1", "html:0.1:times=1", "truncated-json:0.1")


def treatments(order, flying, behaviour):
    """Body -> the replies to its two requests, in the order of these, at `flying` requests in flight."""

    async def test(server, session):
        found = {}
        work = iter(order)

        async def worker():
            for number in work:
                body = chat(f"question {number}")
                found[number] = [(await post(server, session, body))[::2] for _ in range(2)]

        await asyncio.gather(*(worker() for _ in range(flying)))
        return found, server.stats.faults

    return run(test, behaviour)


def test_the_same_requests_are_treated_alike_in_any_order():
    behaviour = faulty(*MIXED, seed=7, latency=Latency("lognormal", (0.0005, 1.0)))
    first, counts = treatments(range(200), 1, behaviour)
    second, again = treatments(reversed(range(200)), 32, behaviour)
    assert first == second
    assert counts == again
    assert set(counts) == {text.split(":")[0] for text in MIXED}
    assert len({status for replies in first.values() for status, _ in replies}) == 3
    other, _ = treatments(range(200), 32, faulty(*MIXED, seed=8))
    assert first != other


def test_latencies_do_not_depend_on_the_faults():
    plain = Behaviour(latency=Latency("lognormal", (1.0, 1.0)))
    extra = faulty(*MIXED, latency=plain.latency)
    keys = [number.to_bytes(16, "little") for number in range(50)]
    times = [treatment_of(plain, key, 0, False).seconds for key in keys]
    assert times == [treatment_of(extra, key, 0, False).seconds for key in keys]
    assert len(set(times)) == 50


def test_draws_have_the_shares_they_should():
    behaviour = faulty("429:0.05", "cut:0.5", latency=parse_latency("bimodal 0.05 1.0 0.02"))
    keys = [number.to_bytes(16, "little") for number in range(20_000)]
    found = [treatment_of(behaviour, key, 0, False) for key in keys]
    kinds = Counter(treatment.fault.kind if treatment.fault else None for treatment in found)
    assert kinds["429"] == pytest.approx(1_000, rel=0.15)
    assert kinds["cut"] == pytest.approx(9_500, rel=0.05)
    assert sum(treatment.seconds == 1.0 for treatment in found) == pytest.approx(400, rel=0.25)


# --- limits ---


def test_beyond_the_capacity_requests_wait():
    async def test(server, session):
        pairs = [await connect(server) for _ in range(2)]
        for _, writer in pairs:
            await send(writer, chat())
        await until(lambda: server.stats.in_service == 2)
        others = [asyncio.create_task(post(server, session, chat())) for _ in range(18)]
        await until(lambda: server.stats.queued == 18)
        for _, writer in pairs:
            writer.close()
        assert {(await other)[0] for other in others} == {200}
        stats = server.stats
        assert (stats.most_in_service, stats.most_queued, stats.most_in_flight) == (2, 18, 20)

    run(test, faulty("hang:1:times=2", capacity=2))


def test_a_client_that_goes_away_frees_its_place():
    async def test(server, session):
        _, first = await connect(server)
        await send(first, chat("one"))
        await until(lambda: server.stats.in_service)
        _, second = await connect(server)
        await send(second, chat("two"))
        await until(lambda: server.stats.queued)
        third = asyncio.create_task(post(server, session, chat("one")))
        await until(lambda: server.stats.queued == 2)
        second.close()  # while it waits
        await until(lambda: server.stats.queued == 1)
        first.close()  # while it is served
        assert (await third)[0] == 200
        assert server.stats.gone == 2

    run(test, faulty("hang:1:times=1", capacity=1))


def test_beyond_the_capacity_requests_are_turned_away():
    async def test(server, session):
        _, writer = await connect(server)
        await send(writer, chat("one"))
        await until(lambda: server.stats.in_service)
        status, headers, _ = await post(server, session, chat("two"))
        assert (status, headers["Retry-After"]) == (429, "1")
        writer.close()
        await until(lambda: server.stats.gone)
        # It was not admitted, so this is the first time it counts.
        assert server.stats.bodies == 1
        assert server.stats.turned_away == {"overload": 1}
        assert server.stats.faults == {"hang": 1}

    run(test, faulty("hang:1", capacity=1, overload="429"))


@pytest.mark.parametrize(
    ("limits", "name"), [({"rpm": 2}, "rpm"), ({"tpm": 10}, "tpm"), ({"rpm": 2, "tpm": 99}, "rpm")]
)
def test_quotas_are_answered_with_the_time_to_wait(limits, name):
    async def test(server, session):
        # Each request is 1 + 4 ids.
        found = [await post(server, session, chat("Why?")) for _ in range(3)]
        assert [status for status, _, _ in found] == [200, 200, 429]
        assert 1 <= int(found[2][1]["Retry-After"]) <= 30
        assert json.loads(found[2][2])["error"]["code"] == "rate_limit_exceeded"
        assert server.stats.turned_away == {name: 1}

    run(test, Behaviour(**limits))


def test_a_request_above_the_quota_of_ids_is_admitted_once():
    async def test(server, session):
        return [(await post(server, session, chat("Why?" * 50)))[0] for _ in range(2)]

    assert run(test, Behaviour(tpm=5)) == [200, 429]


# --- statistics, and what is left ---


def test_statistics_over_http_and_their_reset():
    async def test(server, session):
        root = server.url.removesuffix("/v1")

        async def stats():
            async with session.get(root + "/_simulator/stats") as response:
                return await response.json()

        for text in ("one", "one", "one", "two"):
            await post(server, session, chat(text))
        found = await stats()
        assert found["requests"] == 4
        assert found["statuses"] == {"503": 2, "200": 2}
        assert found["faults"] == {"503": 2}
        assert (found["bodies"], found["asked_again"], found["connections"]) == (2, 1, 1)
        assert (found["ids_in"], found["ids_out"]) == (2, 8)
        assert (found["most_in_flight"], found["in_flight"]) == (1, 0)

        async with session.post(root + "/_simulator/reset") as response:
            assert response.status == 200
        fresh = await stats()
        assert not any(fresh.values())
        # Bodies are forgotten as well, so the first request fails again.
        assert (await post(server, session, chat("one")))[0] == 503
        assert server.stats.requests == 1

    run(test, faulty("503:1:times=1"))


def test_a_burst_is_answered_and_nothing_is_left():
    behaviour = faulty(
        "disconnect:0.02", "503:0.02", "cut:0.02", latency=Latency("lognormal", (0.002, 0.5)), capacity=200
    )

    async def test(server, session):
        outcomes = Counter()
        numbers = iter(range(2_000))

        async def worker():
            for number in numbers:
                try:
                    status, _, _ = await post(server, session, chat(f"question {number}", stream=number % 10 == 0))
                except aiohttp.ClientError as error:
                    status = "cut" if isinstance(error, aiohttp.ClientPayloadError) else "disconnect"
                outcomes[status] += 1

        await asyncio.gather(*(worker() for _ in range(256)))
        stats = server.stats
        assert stats.requests == outcomes.total() == stats.bodies == 2_000
        assert outcomes == {
            200: stats.statuses[200] - stats.faults["cut"],
            503: stats.faults["503"],
            "cut": stats.faults["cut"],
            "disconnect": stats.faults["disconnect"],
        }
        assert all(stats.faults[kind] for kind in ("disconnect", "503", "cut"))
        assert stats.most_in_service <= 200
        assert stats.most_in_flight <= 256
        assert stats.gone == stats.asked_again == 0

    run(test, behaviour)


def test_it_listens_on_this_machine_alone_and_names_what_it_cannot_do():
    async def test(server, session):
        assert server.url.startswith("http://127.0.0.1:")
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(RequestError, match=f"port {port}"):
            async with running(port=port):
                pass

    run(test)


def test_serve_says_where_it_is_and_ends_when_cancelled():
    async def whole():
        ready = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(simulator.serve(Behaviour(), "127.0.0.1", 0, ready.set_result))
        url = await ready
        async with aiohttp.ClientSession() as session, session.get(url + "/models") as response:
            assert response.status == 200
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


# --- settings ---


NO_FAULTS = (
    *("", "429", "429:x", "429:0.1:x", "429:0.1:1:2", "429:1.5", "429:nan", "429:-1", "429:1:-2", "429:1:inf"),
    *("nonsense:0.1", "cut:0.1:3", "503:1:times=0", "503:1:times=x", "503:times=2:1"),
)
NO_LATENCIES = (
    *("", "fixed", "fixed x", "fixed nan", "-1", "1 2", "inf", "gamma 1 2"),
    *("lognormal 1", "lognormal 1 -1", "bimodal 1 2", "bimodal 0 1 1.5"),
)


@pytest.mark.parametrize("text", NO_FAULTS)
def test_a_fault_that_is_none_is_refused(text):
    with pytest.raises(RequestError):
        parse_fault(text)


@pytest.mark.parametrize("text", NO_LATENCIES)
def test_a_latency_that_is_none_is_refused(text):
    with pytest.raises(RequestError):
        parse_latency(text)


@pytest.mark.parametrize(
    "settings", [{"capacity": 0}, {"rpm": 0}, {"tpm": -1}, {"reply_ids": 0}, {"overload": "drop", "capacity": 1}]
)
def test_a_behaviour_that_is_none_is_refused(settings):
    with pytest.raises(RequestError):
        Behaviour(**settings)


def test_settings_are_read():
    assert parse_fault("slow-bytes:0.5") == FaultRate("slow-bytes", 0.5, 0.05)
    assert parse_fault("503:0.5:2:times=3") == FaultRate("503", 0.5, 2.0, 3)
    assert parse_latency(" bimodal  0.05 1.0 0.02 ") == Latency("bimodal", (0.05, 1.0, 0.02))
    assert str(parse_latency("bimodal 0.05 1.0 0.02")) == "bimodal 0.05 1 0.02"
