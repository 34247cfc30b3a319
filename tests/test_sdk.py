"""Attempts through a user's own `openai.AsyncOpenAI`, with the real package: judged as those of `Wire` are."""

import asyncio
import random
from contextlib import asynccontextmanager
from types import MappingProxyType

import msgspec
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from runs import PATIENCE
from wires import FINE, SENT, STREAMED, answering, body, faulty, http, told

from millstream.client.pieces import StreamedReply
from millstream.client.requests import Reply
from millstream.llm.sdk import SdkWire
from millstream.llm.simulator import Behaviour, parse_latency, running
from millstream.llm.wire import Wire, WireError

ASKED = body("What is the capital of France?")


@asynccontextmanager
async def wired(behaviour=None, api_key="sk-secret", **options):
    """A server, a user's client of it, and a wire through that, which leaves the client open."""
    async with running(behaviour) as server, AsyncOpenAI(base_url=server.url, api_key=api_key, **options) as client:
        async with SdkWire(client) as wire:
            yield server, client, wire
        assert not client.is_closed()


def sent(behaviour=None, asked=ASKED, **options):
    """The answer to one request and how many the server saw; or what it raised."""

    async def main():
        async with wired(behaviour, **options) as (server, _, wire):
            try:
                return await wire.send(asked), server.stats.requests
            except WireError as error:
                return error, server.stats.requests

    return asyncio.run(main())


def streamed(behaviour=None):
    async def main():
        async with wired(behaviour) as (server, _, wire):
            pieces = []
            try:
                async with wire.pieces(ASKED) as stream:
                    async for piece in stream:
                        pieces.append(piece)
            except WireError as error:
                return pieces, error
            assert server.stats.requests == 1
            return pieces, stream

    return asyncio.run(main())


def test_an_answer_is_that_of_a_wire():
    async def main():
        async with (
            wired(Behaviour(api_key="sk-secret")) as (server, _, wire),
            Wire(server.url, "sk-secret") as own,
        ):
            assert wire.base_url == own.base_url
            every = [ASKED, msgspec.json.encode(ASKED), MappingProxyType(ASKED)]
            return [await wire.send(asked) for asked in every], await own.send(ASKED), server.stats.bodies

    answers, own, bodies = asyncio.run(main())
    assert answers == [own] * 3
    assert "Paris" in own.text
    assert bodies <= 2  # the SDK may write it with other blanks


@pytest.mark.parametrize("fault", SENT)
def test_each_fault_is_told_apart_as_by_a_wire_and_asked_once(fault):
    error, requests = sent(faulty(fault))
    assert told(error) == SENT[fault]
    assert error.retry_after == (3.0 if fault.startswith("429") else None)
    assert requests == 1
    assert str(error).startswith("http://127.0.0.1")
    assert str(error).isprintable()


@pytest.mark.parametrize("latency", ["0", "0.001"])
@pytest.mark.parametrize("fault", STREAMED)
def test_each_fault_of_a_stream_is_told_apart_as_by_a_wire(fault, latency):
    pieces, error = streamed(faulty(fault, piece_latency=parse_latency(latency)))
    assert told(error) == STREAMED[fault]
    assert bool(pieces) == (fault in ("cut:1", "error-event:1"))


@pytest.mark.parametrize("fault", FINE)
def test_what_is_odd_but_whole_is_an_answer(fault):
    answer, _ = sent(faulty(fault))
    pieces, stream = streamed(faulty(fault))
    assert answer.text == stream.answer.text == "".join(pieces) != ""
    assert answer.usage == stream.usage


def test_what_was_paid_for_is_told():
    assert sent(faulty("null-content:1"))[0].usage["completion_tokens"] > 0


def test_the_clients_own_retries_and_timeouts_are_off_and_stay_its_own():
    async def main():
        settings = {"max_retries": 7, "timeout": 0.01}
        async with wired(faulty("503:1:times=1", latency=parse_latency("0.05")), **settings) as (server, client, wire):
            with pytest.raises(WireError, match="HTTP 503"):
                await wire.send(ASKED)
            assert server.stats.requests == 1
            assert "Paris" in (await wire.send(ASKED)).text  # later than the client's own timeout
            return client.max_retries, client.timeout

    assert asyncio.run(main()) == (7, 0.01)


def test_the_users_http_client_and_headers_are_used():
    async def main():
        reply = http(
            msgspec.json.encode({"choices": [{"message": {"content": "Paris"}}]}), Content_Type="application/json"
        )
        async with answering(reply) as (address, heard), DefaultAsyncHttpxClient(headers={"X-Mine": "1"}) as mine:
            client = AsyncOpenAI(
                base_url=f"http://{address}/v1", api_key="sk-1", http_client=mine, default_headers={"X-Too": "2"}
            )
            async with SdkWire(client) as wire:
                text = (await wire.send(ASKED)).text
            return text, heard[0].lower(), mine.is_closed

    text, heard, closed = asyncio.run(main())
    assert text == "Paris"
    assert not closed
    assert heard.startswith(b"post /v1/chat/completions ")
    for line in (b"x-mine: 1", b"x-too: 2", b"authorization: bearer sk-1"):
        assert b"\r\n" + line + b"\r\n" in heard


def test_neither_key_nor_password_is_shown():
    async def main():
        words = b'{"error": {"message": "bad: sk-secret, pass@word, t0ken-of-mine"}}'
        async with answering(http(words, "401 Unauthorized", Content_Type="application/json")) as (address, _):
            url, mine = f"http://ann:pass%40word@{address}/v1", {"X-Api-Token": "t0ken-of-mine"}
            client = AsyncOpenAI(base_url=url, api_key="sk-secret", default_headers=mine)
            async with client, SdkWire(client) as wire:
                with pytest.raises(WireError) as failed:
                    await wire.send(ASKED)
                return f"{failed.value} {wire!r} {wire.base_url}"

    shown = asyncio.run(main())
    assert "bad: ***, ***, ***" in shown
    assert not any(secret in shown for secret in ("sk-secret", "pass", "t0ken"))


def failure(url):
    async def main():
        async with AsyncOpenAI(base_url=url, api_key="sk-secret") as client, SdkWire(client) as wire:
            with pytest.raises(WireError) as failed:
                await wire.send(ASKED)
            return failed.value

    return asyncio.run(main())


def test_servers_that_cannot_be_reached():
    refused, unknown = failure("http://127.0.0.1:1/v1"), failure("http://no-such-host.invalid/v1")
    assert str(refused) == "http://127.0.0.1:1/v1: connection refused; is the server running?"
    assert "the host no-such-host.invalid is unknown" in str(unknown)
    assert told(refused) == told(unknown) == ("connection", None, True, False)


def test_a_server_without_tls():
    async def main():
        async with answering(http(b"", "400 Bad Request")) as (address, _):
            return await asyncio.to_thread(failure, f"https://{address}/v1")

    error = asyncio.run(main())
    assert told(error) == ("tls", None, False, True)
    assert "does its URL start with http://?" in str(error)


async def until(happened):
    async with asyncio.timeout(PATIENCE):
        while not happened():
            await asyncio.sleep(0.001)


def test_leaving_a_stream_early_closes_its_connection():
    async def main():
        async with wired(Behaviour(piece_latency=parse_latency("0.05"))) as (server, _, wire):
            async with wire.pieces(ASKED) as stream:
                first = await anext(stream)
            await until(lambda: server.stats.gone)
            return first

    assert asyncio.run(main()) == "The "


@pytest.mark.parametrize("begin", [lambda wire: wire.send(ASKED), lambda wire: wire.pieces(ASKED).__aenter__()])
def test_a_hanging_server_is_left_when_the_request_is_cancelled(begin):
    async def main():
        async with wired(faulty("hang:1")) as (server, _, wire):
            request = asyncio.create_task(begin(wire))
            await until(lambda: server.stats.in_service)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await until(lambda: server.stats.gone)

    asyncio.run(main())


def test_pieces_go_through_it_too():
    async def main():
        async with wired(faulty("503:1:times=1")) as (_, _, wire):
            async with StreamedReply(wire, ASKED, draw=random.Random(1)) as pieces:
                text = "".join([piece async for piece in pieces])
            return text, pieces.outcome

    text, reply = asyncio.run(main())
    assert isinstance(reply, Reply)
    assert (reply.text, reply.attempts) == (text, 2)
    assert "Paris" in text
