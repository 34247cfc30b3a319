"""The simulator's server: one request after the other, through its limits, its faults and its latency."""

import asyncio
import contextlib
import math
import weakref
from collections.abc import AsyncGenerator, Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from yarl import URL

from millstream.errors import RequestError
from millstream.llm.simulator.behaviour import ERRORS, WAITS_FIRST, Behaviour, Latency, Treatment, key_of, treatment_of
from millstream.llm.simulator.bodies import CREATED, Chat, Completion, Reply, error_body, reply_of
from millstream.llm.simulator.stats import Quota, Stats

_TRICKLES = 16  # pieces of a body that comes slowly
_JSON = {"Content-Type": "application/json"}
_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_DONE = b"data: [DONE]\n\n"
_HTML = (
    b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"
)


class Server(NamedTuple):
    """A server that runs: `url` is what clients call the base URL (``http://127.0.0.1:8000/v1``); `stats` is live."""

    url: str
    stats: Stats


class _Simulator:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.stats = Stats()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.closing = False
        self.places = asyncio.Semaphore(behaviour.capacity) if behaviour.capacity else None
        # A connection is known by its task: aiohttp's own object for it takes no weak references.
        self.connections: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self.doomed: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self.decoders: dict[bool, msgspec.json.Decoder[Any]] = {
            True: msgspec.json.Decoder(Chat),
            False: msgspec.json.Decoder(Completion),
        }
        self._forget()

    def _forget(self) -> None:
        self.seen: dict[bytes, int] = {}  # key of a body -> times it was admitted; about 150 bytes each
        self.quotas: dict[str, Quota] | None = None
        self.connections.clear()

    # --- what the routes call ---

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, True)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, False)

    async def models(self, request: web.Request) -> web.StreamResponse:
        if not self._allowed(request):
            return self._error("401", count=False)
        models = [
            {"id": name, "object": "model", "created": CREATED, "owned_by": "millstream"}
            for name in self.behaviour.models
        ]
        return web.Response(body=msgspec.json.encode({"object": "list", "data": models}), headers=_JSON)

    async def show(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode(self.stats), headers=_JSON)

    async def reset(self, request: web.Request) -> web.StreamResponse:
        self.stats.reset()
        self._forget()
        return web.Response(body=b"{}", headers=_JSON)

    async def unknown(self, request: web.Request) -> web.StreamResponse:
        message = f"There is no {request.method} {request.path}."
        return web.Response(status=404, body=error_body("invalid_request_error", "unknown_url", message), headers=_JSON)

    async def close(self, app: web.Application) -> None:
        """End what is in flight: a hanging request would hold up the end of the server."""
        self.closing = True
        for task in self.tasks:
            task.cancel()

    # --- one request ---

    async def _tracked(self, request: web.Request, chat: bool) -> web.StreamResponse:
        stats, task = self.stats, asyncio.current_task()
        assert task
        stats.requests += 1
        stats.in_flight += 1
        stats.most_in_flight = max(stats.most_in_flight, stats.in_flight)
        if request.task not in self.connections:
            self.connections.add(request.task)
            stats.connections += 1
        self.tasks.add(task)
        try:
            return await self._admitted(request, chat)
        except asyncio.CancelledError:
            stats.gone += not self.closing
            raise
        except ConnectionError:
            stats.gone += not self.closing
            return _closed(request)
        finally:
            stats.in_flight -= 1
            self.tasks.discard(task)

    async def _admitted(self, request: web.Request, chat: bool) -> web.StreamResponse:
        behaviour, stats = self.behaviour, self.stats
        if request.task in self.doomed:
            stats.dropped += 1
            return _closed(request)
        body = await request.read()
        if not self._allowed(request):
            return self._turned_away("api-key", "401")
        try:
            asked: Chat | Completion = self.decoders[chat].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._turned_away("body", "400", message=str(error))
        key = key_of(behaviour.seed, body)
        reply = reply_of(behaviour, asked, chat, key)

        full = behaviour.capacity is not None and stats.in_service >= behaviour.capacity
        if full and behaviour.overload == "429":
            return self._turned_away("overload", "429", 1.0)
        if behaviour.rpm or behaviour.tpm:
            limit, wait = self._over_quota(reply.ids_in + reply.ids_out)
            if limit:
                return self._turned_away(limit, "429", math.ceil(wait))

        attempt = self.seen.get(key, 0)
        self.seen[key] = attempt + 1
        stats.bodies += attempt == 0
        stats.asked_again += attempt == 1
        treatment = treatment_of(behaviour, key, attempt, bool(asked.stream))
        fault = treatment.fault
        if fault:
            stats.faults[fault.kind] += 1
            if fault.kind in ERRORS and fault.kind not in WAITS_FIRST:
                return self._error(fault.kind, fault.seconds)
        async with self._place():
            if treatment.seconds:
                await asyncio.sleep(treatment.seconds)
            return await self._answered(request, asked, reply, treatment)

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncGenerator[None]:
        """A place in service, after waiting for one where the capacity is limited."""
        stats = self.stats
        if self.places:
            if self.places.locked():
                stats.queued += 1
                stats.most_queued = max(stats.most_queued, stats.queued)
                try:
                    await self.places.acquire()
                finally:
                    stats.queued -= 1
            else:
                await self.places.acquire()
        stats.in_service += 1
        stats.most_in_service = max(stats.most_in_service, stats.in_service)
        try:
            yield
        finally:
            stats.in_service -= 1
            if self.places:
                self.places.release()

    async def _answered(
        self, request: web.Request, asked: Chat | Completion, reply: Reply, treatment: Treatment
    ) -> web.StreamResponse:
        fault = treatment.fault
        kind = fault.kind if fault else None
        if kind in ERRORS:
            return self._error(kind)
        if kind == "disconnect":
            return _closed(request)
        if kind == "hang":
            await asyncio.get_running_loop().create_future()
        if kind == "between":
            self.doomed.add(request.task)

        self.stats.statuses[200] += 1
        self.stats.ids_in += reply.ids_in
        self.stats.ids_out += reply.ids_out
        if kind == "null-content":
            reply = reply._replace(text=None)
        elif kind == "bad-schema":
            reply = reply._replace(text='["not", "what", "was", "asked"]')
        elif kind == "html":
            return web.Response(body=_HTML, headers={"Content-Type": "text/html; charset=utf-8"})
        elif kind == "garbage":
            noise = b"\xff" + b"".join(blake2b(reply.name.encode() + bytes([part])).digest() for part in range(4))
            return web.Response(body=noise, headers=_JSON)
        if asked.stream and kind != "truncated-json":
            return await self._streamed(request, asked, reply, treatment)

        body = reply.whole(empty=kind == "empty-choices")
        if kind == "truncated-json":
            body = body[: len(body) // 2]
        if kind not in ("cut", "slow-bytes"):
            return web.Response(body=body, headers=_JSON)
        response = web.StreamResponse(headers=_JSON)
        response.content_length = len(body)
        await response.prepare(request)
        if kind == "cut":
            await response.write(body[: len(body) // 2])
            return _closed(request, response)
        assert fault
        size = -(-len(body) // _TRICKLES)
        for start in range(0, len(body), size):
            await asyncio.sleep(fault.seconds or 0 if start else 0)
            await response.write(body[start : start + size])
        await response.write_eof()
        return response

    async def _streamed(
        self, request: web.Request, asked: Chat | Completion, reply: Reply, treatment: Treatment
    ) -> web.StreamResponse:
        fault = treatment.fault
        kind = fault.kind if fault else None
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = reply.events(include_usage, empty=kind == "empty-choices")
        if kind in ("cut", "error-event"):
            del events[len(events) // 2 :]
        if kind == "error-event":
            events.append(b"data: %b\n\n" % error_body(*ERRORS["500"][1:]))
        if kind != "cut":
            events.append(_DONE)

        response = web.StreamResponse(headers=_EVENTS)
        await response.prepare(request)
        latency = self.behaviour.piece_latency
        if kind == "slow-bytes":
            assert fault
            latency = Latency("fixed", (fault.seconds or 0.0,))
        if kind == "slow-bytes" or any(latency.numbers):
            for number, event in enumerate(events):
                if number:
                    await asyncio.sleep(latency.seconds(next(treatment.draws)))
                await response.write(event)
        else:
            await response.write(b"".join(events))
        if kind == "cut":
            return _closed(request, response)
        await response.write_eof()
        return response

    # --- what keeps a request out ---

    def _allowed(self, request: web.Request) -> bool:
        key = self.behaviour.api_key
        return key is None or request.headers.get("Authorization") == f"Bearer {key}"

    def _over_quota(self, ids: int) -> tuple[str | None, float]:
        """The quota that is used up, and the seconds until it is not; (None, 0.0) takes the request from both."""
        if self.quotas is None:
            limits = {"rpm": self.behaviour.rpm, "tpm": self.behaviour.tpm}
            self.quotas = {name: Quota(limit) for name, limit in limits.items() if limit}
        costs = {"rpm": 1, "tpm": ids}
        for name, quota in self.quotas.items():
            if wait := quota.wait(costs[name]):
                return name, wait
        for name, quota in self.quotas.items():
            quota.take(costs[name])
        return None, 0.0

    def _turned_away(
        self, reason: str, kind: str, seconds: float | None = None, message: str | None = None
    ) -> web.Response:
        self.stats.turned_away[reason] += 1
        return self._error(kind, seconds, message)

    def _error(
        self, kind: str, seconds: float | None = None, message: str | None = None, count: bool = True
    ) -> web.Response:
        status, error, code, default = ERRORS[kind]
        if count:
            self.stats.statuses[status] += 1
        headers = _JSON if seconds is None else {**_JSON, "Retry-After": f"{seconds:.10g}"}
        return web.Response(status=status, body=error_body(error, code, message or default), headers=headers)


def _closed(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection after what was written; what is returned is for aiohttp, the client sees none of it."""
    request.protocol.force_close()
    return response or web.Response()


_SIMULATOR = web.AppKey("simulator", _Simulator)


def application(behaviour: Behaviour) -> web.Application:
    """The server as an aiohttp application, to be made inside a running event loop.

    Its runner must be given ``handler_cancellation=True``, or the fault "hang" outlives its client.
    """
    simulator = _Simulator(behaviour)
    app = web.Application(client_max_size=0)
    app[_SIMULATOR] = simulator
    app.on_shutdown.append(simulator.close)
    app.router.add_post("/v1/chat/completions", simulator.chat)
    app.router.add_post("/v1/completions", simulator.completion)
    app.router.add_get("/v1/models", simulator.models)
    app.router.add_get("/_simulator/stats", simulator.show)
    app.router.add_post("/_simulator/reset", simulator.reset)
    app.router.add_route("*", "/{rest:.*}", simulator.unknown)
    return app


@contextlib.asynccontextmanager
async def running(
    behaviour: Behaviour | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncGenerator[Server]:
    """A server on this event loop for as long as the block lasts; port 0 takes a free one.

    Leaving the block ends every request in flight; no task and no socket of it stays.
    """
    app = application(behaviour or Behaviour())
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=4096)
        try:
            await site.start()
        except OSError as error:
            raise RequestError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
        url = URL.build(scheme="http", host=host, port=runner.addresses[0][1], path="/v1")
        yield Server(str(url), app[_SIMULATOR].stats)
    finally:
        await runner.cleanup()
        if tasks := app[_SIMULATOR].tasks:
            await asyncio.wait(tasks)
        # A closed transport tells its connection in the next round of the loop, which ends that connection's task.
        for _ in range(3):
            await asyncio.sleep(0)


async def serve(behaviour: Behaviour, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Run a server until cancelled; `ready` is called with its URL once it listens."""
    async with running(behaviour, host=host, port=port) as server:
        ready(server.url)
        await asyncio.get_running_loop().create_future()
