"""The simulator's server: one request after the other, through its limits, its faults and its latency."""

import asyncio
import contextlib
import math
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from yarl import URL

from millstream.errors import RequestError
from millstream.llm.simulator.behaviour import Behaviour, Treatment, key_of, treatment_of
from millstream.llm.simulator.bodies import (
    CREATED,
    Asked,
    ChatRequest,
    CompletionRequest,
    Content,
    EmbeddingRequest,
    altered,
    error_body,
)
from millstream.llm.simulator.faults import ERRORS
from millstream.llm.simulator.sending import JSON, PAGE, answered, closed, page
from millstream.llm.simulator.stats import Quota, Stats


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
        self.decoders: dict[type[Asked], msgspec.json.Decoder[Any]] = {
            form: msgspec.json.Decoder(form) for form in (ChatRequest, CompletionRequest, EmbeddingRequest)
        }
        self._forget()

    def _forget(self) -> None:
        self.seen: dict[bytes, int] = {}  # key of a body -> times it was admitted; about 150 bytes each
        self.quotas: dict[str, Quota] | None = None
        self.connections.clear()

    # --- what the routes call ---

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, ChatRequest)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, CompletionRequest)

    async def embedding(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, EmbeddingRequest)

    async def models(self, request: web.Request) -> web.StreamResponse:
        if not self._allowed(request):
            return self._error("401", count=False)
        models = [
            {"id": name, "object": "model", "created": CREATED, "owned_by": "millstream"}
            for name in self.behaviour.models
        ]
        return web.Response(body=msgspec.json.encode({"object": "list", "data": models}), headers=JSON)

    async def show(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode(self.stats), headers=JSON)

    async def reset(self, request: web.Request) -> web.StreamResponse:
        self.stats.reset()
        self._forget()
        return web.Response(body=b"{}", headers=JSON)

    async def unknown(self, request: web.Request) -> web.StreamResponse:
        message = f"There is no {request.method} {request.path}."
        return web.Response(status=404, body=error_body(message, "invalid_request_error", "unknown_url"), headers=JSON)

    async def close(self, app: web.Application) -> None:
        """End what is in flight: a hanging request would hold up the end of the server."""
        self.closing = True
        for task in self.tasks:
            task.cancel()

    # --- one request ---

    async def _tracked(self, request: web.Request, form: type[Asked]) -> web.StreamResponse:
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
            return await self._admitted(request, form)
        except asyncio.CancelledError:
            stats.gone += not self.closing
            raise
        except ConnectionError:
            stats.gone += not self.closing
            return closed(request)
        finally:
            stats.in_flight -= 1
            self.tasks.discard(task)

    async def _admitted(self, request: web.Request, form: type[Asked]) -> web.StreamResponse:
        behaviour, stats = self.behaviour, self.stats
        if request.task in self.doomed:
            stats.dropped += 1
            return closed(request)
        body = await request.read()
        if not self._allowed(request):
            return self._turned_away("api-key", "401")
        try:
            asked: Asked = self.decoders[form].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._turned_away("body", "400", message=str(error))
        key = key_of(behaviour.seed, body)
        reply = asked.reply(behaviour, key)

        if behaviour.quota is not None and stats.ids_in + stats.ids_out >= behaviour.quota:
            return self._turned_away("quota", "quota")
        full = behaviour.capacity is not None and stats.in_service >= behaviour.capacity
        if full and behaviour.overload == "429":
            return self._turned_away("overload", "429", None if behaviour.hide_limits else 1.0)
        if behaviour.rpm or behaviour.tpm:
            limit, wait = self._over_quota(reply.ids_in + reply.ids_out)
            if limit:
                return self._turned_away(limit, "429", None if behaviour.hide_limits else math.ceil(wait))

        attempt = self.seen.get(key, 0)
        self.seen[key] = attempt + 1
        stats.bodies += attempt == 0
        stats.asked_again += attempt == 1
        treatment = treatment_of(behaviour, key, attempt, bool(asked.stream))
        fault = treatment.fault
        if fault:
            stats.faults[fault.kind] += 1
            if fault.kind in ERRORS and not ERRORS[fault.kind].late:
                return self._error(fault.kind, fault.number)
        async with self._place():
            if treatment.kind not in ERRORS:
                cached = altered(reply, treatment.kind).cached
                stats.bill(reply.ids_in, reply.ids_out, cached, behaviour.price or (0.0, 0.0))
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
        self, request: web.Request, asked: Asked, reply: Content, treatment: Treatment
    ) -> web.StreamResponse:
        kind = treatment.kind
        if kind in ERRORS:
            return self._error(kind)
        if kind == "disconnect":
            return closed(request)
        if kind == "hang":
            await asyncio.get_running_loop().create_future()
        if kind == "between":
            self.doomed.add(request.task)
        self.stats.statuses[200] += 1
        return await answered(request, asked, altered(reply, kind), treatment, self.behaviour.piece_latency)

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
        error = ERRORS[kind]
        if count:
            self.stats.statuses[error.status] += 1
        headers = {} if seconds is None else {"Retry-After": f"{seconds:.10g}"}
        if error.page:
            return web.Response(status=error.status, body=page(error.message), headers={**PAGE, **headers})
        body = error_body(message or error.message, error.type, error.code)
        return web.Response(status=error.status, body=body, headers={**JSON, **headers})


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
    app.router.add_post("/v1/embeddings", simulator.embedding)
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
