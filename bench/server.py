"""A server that costs little, so that a client's speed can be measured on the core beside it.

Run as `python bench/server.py LATENCY`: every POST is answered with one fixed chat completion LATENCY seconds later, on
connections that stay open; GET /stats says what it saw. It prints its URL, and speaks just enough of HTTP for that.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

REPLY = json.dumps({
    "id": "chatcmpl-0123456789abcdef", "object": "chat.completion", "created": 1_700_000_000, "model": "simulated",
    "choices": [{"index": 0, "logprobs": None, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": "The capital of France is Paris. " * 4}}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 32, "total_tokens": 44},
}).encode()  # fmt: skip
LENGTH = b"content-length:"


@dataclass
class Stats:
    """`first` is when the first POST came, on the clock that `time.monotonic` reads in every process."""

    requests: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0
    first: float | None = None


class Connection(asyncio.Protocol):
    """One request after the other: pipelining is for nobody's HTTP client."""

    def __init__(self, latency: float, stats: Stats) -> None:
        self.latency, self.stats = latency, stats
        self.call_later = asyncio.get_running_loop().call_later
        self.held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.stats.connections += 1

    def data_received(self, data: bytes) -> None:
        data = self.held + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + body_length(data, end):
            self.held = data
            return
        self.held = b""
        if data.startswith(b"GET"):
            self.transport.write(response(json.dumps(asdict(self.stats)).encode()))
            return
        stats = self.stats
        if stats.first is None:
            stats.first = time.monotonic()
        stats.requests += 1
        stats.in_flight += 1
        if stats.in_flight > stats.most_in_flight:
            stats.most_in_flight = stats.in_flight
        if self.latency:
            self.call_later(self.latency, self.reply)
        else:
            self.reply()

    def reply(self) -> None:
        self.stats.in_flight -= 1
        self.transport.write(ANSWER)


def body_length(data: bytes, end: int) -> int:
    """The Content-Length of the request whose head ends at `end`."""
    head = data[:end].lower()
    at = head.find(LENGTH)
    return int(head[at + len(LENGTH) :].split(b"\r\n", 1)[0]) if at >= 0 else 0


def response(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


ANSWER = response(REPLY)


async def serve(latency: float) -> None:
    stats = Stats()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(latency, stats), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


asyncio.run(serve(float(sys.argv[1])))
