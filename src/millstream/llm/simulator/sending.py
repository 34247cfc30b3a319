"""How the simulator puts a reply on the wire: at once, in pieces, slowly, or not quite."""

import asyncio
from hashlib import blake2b

from aiohttp import web

from millstream.llm.simulator.behaviour import Latency, Treatment
from millstream.llm.simulator.bodies import Asked, Content, error_body
from millstream.llm.simulator.faults import ERRORS

JSON = {"Content-Type": "application/json"}
PAGE = {"Content-Type": "text/html; charset=utf-8"}
_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_DONE = b"data: [DONE]\n\n"
_TRICKLES = 16  # pieces of a body that comes slowly
_AT_ONCE = 1 << 20  # bytes of a huge reply that are in memory


async def answered(
    request: web.Request, asked: Asked, reply: Content, treatment: Treatment, piece_latency: Latency
) -> web.StreamResponse:
    """Send a reply with status 200, as whole as the treatment leaves it."""
    kind = treatment.kind
    if kind == "html":
        return web.Response(body=page("502 Bad Gateway"), headers=PAGE)
    if kind == "garbage":
        noise = b"\xff" + b"".join(blake2b(reply.name.encode() + bytes([part])).digest() for part in range(4))
        return web.Response(body=noise, headers=JSON)
    if asked.stream and kind not in ("truncated-json", "huge"):
        return await _streamed(request, asked, reply, treatment, piece_latency)
    body = reply.whole(empty=kind == "empty-choices")
    if kind == "huge":
        return await _huge(request, body, treatment)
    if kind == "truncated-json":
        body = body[: len(body) // 2]
    if kind not in ("cut", "slow-bytes"):
        return web.Response(body=body, headers=JSON)
    response = await _begun(request, len(body))
    if kind == "cut":
        await response.write(body[: len(body) // 2])
        return closed(request, response)
    size = -(-len(body) // _TRICKLES)
    for start in range(0, len(body), size):
        await asyncio.sleep(treatment.number if start else 0)
        await response.write(body[start : start + size])
    await response.write_eof()
    return response


async def _begun(request: web.Request, length: int) -> web.StreamResponse:
    response = web.StreamResponse(headers=JSON)
    response.content_length = length
    await response.prepare(request)
    return response


async def _huge(request: web.Request, body: bytes, treatment: Treatment) -> web.StreamResponse:
    """The reply with spaces before its closing brace, which JSON allows: as long as wanted, and never in memory."""
    padding = max(0, round(treatment.number * (1 << 20)) - len(body))
    response = await _begun(request, len(body) + padding)
    await response.write(body[:-1])
    for start in range(0, padding, _AT_ONCE):
        await response.write(b" " * min(_AT_ONCE, padding - start))
    await response.write(body[-1:])
    await response.write_eof()
    return response


async def _streamed(
    request: web.Request, asked: Asked, reply: Content, treatment: Treatment, piece_latency: Latency
) -> web.StreamResponse:
    kind = treatment.kind
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    events = reply.events(include_usage, empty=kind == "empty-choices")
    if kind in ("cut", "error-event"):
        del events[len(events) // 2 :]
    if kind == "error-event":
        error = ERRORS["500"]
        events.append(b"data: %b\n\n" % error_body(error.message, error.type, error.code))
    if kind != "cut":
        events.append(_DONE)

    response = web.StreamResponse(headers=_EVENTS)
    await response.prepare(request)
    latency = Latency("fixed", (treatment.number,)) if kind == "slow-bytes" else piece_latency
    if kind == "slow-bytes" or any(latency.numbers):
        for number, event in enumerate(events):
            if number:
                await asyncio.sleep(latency.seconds(next(treatment.draws)))
            await response.write(event)
    else:
        await response.write(b"".join(events))
    if kind == "cut":
        return closed(request, response)
    await response.write_eof()
    return response


def closed(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection after what was written; what is returned is for aiohttp, the client sees none of it."""
    request.protocol.force_close()
    return response or web.Response()


def page(title: str) -> bytes:
    """What a proxy shows to people.

    >>> page("502 Bad Gateway")[:60]
    b'<!DOCTYPE html><html><head><title>502 Bad Gateway</title></h'
    """
    head = f"<head><title>{title}</title></head>"
    return f"<!DOCTYPE html><html>{head}<body><h1>{title}</h1></body></html>\n".encode()
