"""What the tests of `Wire`, of streams and of `SdkWire` share: requests, faults and what they end with, odd servers."""

import asyncio
import itertools
import json
import re
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from queue import Queue

import msgspec
from aiohttp import web
from runs import PATIENCE

from millstream.llm.simulator import Behaviour, parse_fault


def body(text="What is the capital of France?", **more):
    return {"model": "simulated", "messages": [{"role": "user", "content": text}], **more}


def faulty(*faults, **settings):
    return Behaviour(faults=tuple(map(parse_fault, faults)), **settings)


def told(error):
    """What a WireError is told apart by."""
    return error.kind, error.status, error.retry, error.fatal


REFUSED = {
    "429:1:3": ("rate_limited", 429, True, False),
    "500:1": ("server_error", 500, True, False),
    "503:1": ("server_error", 503, True, False),
    "529:1": ("server_error", 529, True, False),
    "408:1": ("server_timeout", 408, True, False),
    "400:1": ("bad_request", 400, False, False),
    "401:1": ("unauthorized", 401, False, True),
    "403:1": ("forbidden", 403, False, False),
    "404-model:1": ("model_not_found", 404, False, True),
    "413:1": ("too_large", 413, False, False),
    "quota:1": ("quota", 429, False, True),
    "disconnect:1": ("connection", None, True, False),
    "garbage:1": ("unusable", 200, True, False),
    "truncated-json:1": ("unusable", 200, True, False),
    "html:1": ("unusable", 200, True, False),
    "empty-choices:1": ("unusable", 200, True, False),
    "null-content:1": ("unusable", 200, True, False),
}
"""Fault -> how an attempt ends, whether it asked for a stream or not."""

SENT = {**REFUSED, "cut:1": ("connection", None, True, False)}
STREAMED = {**REFUSED, "cut:1": ("cut", 200, True, False), "error-event:1": ("server_error", 200, True, False)}

FINE = ["slow-bytes:1:0.001", "bad-schema:1", "between:1"]
"""Faults of which a single attempt sees nothing."""


def http(content, status="200 OK", **headers):
    """The bytes of an HTTP reply."""
    head = {"Content_Length": len(content), **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in head.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


@asynccontextmanager
async def answering(reply, ssl=None):
    """The address of a server that answers each connection with these bytes and closes it, and what it was sent."""
    heard = []

    async def handle(reader, writer):
        heard.append(await reader.read(1 << 16))
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=ssl)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        await server.wait_closed()


def said(text="yes", **choice):
    """The body of a reply."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]
    return {"model": "m", "choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}


def choosing(choices):
    """The body of a reply with several choices: (text, finish_reason) of each."""
    made = [
        {"index": at, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for at, (text, reason) in enumerate(choices)
    ]
    return {**said(), "choices": made}


@asynccontextmanager
async def deciding(decide):
    """The base URL of a server that answers each request with what `decide` says of its body and its number from 0:
    (status, body)."""
    count = itertools.count()

    async def handle(request):
        status, body = decide(msgspec.json.decode(await request.read()), next(count))
        return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/{rest:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@contextmanager
def deciding_elsewhere(decide):
    """As `deciding`, in another thread's loop."""
    loop, url, stop = asyncio.new_event_loop(), Queue(), asyncio.Event()

    async def main():
        async with deciding(decide) as found:
            url.put(found)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        yield url.get(timeout=PATIENCE)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@asynccontextmanager
async def serving(reply_to):
    """The address of a server that answers each request with the bytes of `reply_to(path, body)`; all that it heard."""
    heard = []

    async def handle(reader, writer):
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            size = int(re.search(r"(?i)content-length: (\d+)", head)[1])
            heard.append((head.split(" ")[1], json.loads(await reader.readexactly(size))))
            writer.write(reply_to(*heard[-1]))
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        await server.wait_closed()
