"""One reply piece by piece, as it is said."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from millstream.aio import Fault
from millstream.client.purse import Guess, Purse, Running
from millstream.client.requests import Reply, Request, reply_of
from millstream.client.retrying import LONGEST_ASKED
from millstream.llm.events import ReplyPieces
from millstream.llm.usage import NOT_TOLD, paid_ids
from millstream.llm.wire import WireError, wait_before_retry


class StreamedReply(AsyncIterator[str]):
    """The pieces of one reply: ``async with client.stream("...") as pieces: async for piece in pieces: ...``.

    After the last one, `outcome` is the Reply or the Fault; a request that fails raises nothing, the pieces just end.
    It is tried again, up to `attempts` times, until the first piece was handed out, and never after. `timeout` bounds
    all of it, in seconds, from the begin of the block (None: no bound); a server that asks to be left alone for longer
    than `longest_wait` is not waited for. Leaving the block early is a fault of kind
    "cancelled"; after the block nothing of it is alive.
    """

    def __init__(
        self,
        wire: Any,
        body: Mapping[str, Any] | bytes,
        *,
        timeout: float | None = None,
        attempts: int = 5,
        longest_wait: float = LONGEST_ASKED,
        draw: random.Random | None = None,
        purse: Purse | None = None,
    ) -> None:
        self.outcome: Reply | Fault | None = None
        self._wire, self._body = wire, body
        self._timeout, self._most, self._longest_wait = timeout, attempts, longest_wait
        self._draw = draw or random.Random()
        self._attempts = 0
        self._said: list[str] = []
        self._began = 0.0
        self._until: float | None = None
        self._stream: ReplyPieces | None = None
        self._purse = purse or Purse(None, None, Guess())
        self._request = Request(0, None, b"", body if isinstance(body, bytes) else msgspec.json.encode(body))
        self._running: Running | None = None

    @property
    def text(self) -> str:
        """What was handed out."""
        return "".join(self._said)

    async def __aenter__(self) -> "StreamedReply":
        self._began = _now()
        self._until = None if self._timeout is None else self._began + self._timeout
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.outcome is None:
            self._fail("cancelled", "it was left before its end")
        await self._close()

    async def __anext__(self) -> str:
        if self.outcome is None:
            try:
                async with asyncio.timeout_at(self._until) as bound:
                    piece = await self._next()
            except WireError as error:
                self._fail(error.kind, str(error), error)
            except _TooDear:
                self._fail("stopped", f"not asked: {self._purse.name} is reached")
            except TimeoutError as error:
                if not bound.expired() and not self._is_late():
                    raise
                tried = f"{self._attempts} attempt{'' if self._attempts == 1 else 's'}"
                self._fail("timeout", f"no end within {self._timeout:.3g} s, in {tried}", error)
            else:
                if piece is not None:
                    self._said.append(piece)
                    return piece
                self._succeed()
            await self._close()
        raise StopAsyncIteration

    async def _next(self) -> str | None:
        """The next piece, None after the last. Raises WireError when there is no trying again, TimeoutError."""
        while True:
            if self._is_late():  # a bound that has passed stops nobody who need not wait
                raise TimeoutError
            try:
                if self._stream is None:
                    await self._may_begin()
                    self._attempts += 1
                    self._running = self._purse.running(self._request)
                    stream = self._wire.pieces(self._body)
                    await stream.__aenter__()
                    self._stream = stream
                return await anext(self._stream, None)
            except WireError as error:
                if self._running is not None:
                    self._running.end(paid_ids(error.usage), unpaid=error.unpaid)
                wait = None if self._said else wait_before_retry(error, self._attempts, self._most, self._draw)
                if wait is None or wait > self._longest_wait or self._is_late(wait):
                    raise
                await self._close()
                await asyncio.sleep(wait)

    def _is_late(self, wait: float = 0.0) -> bool:
        return self._until is not None and _now() + wait >= self._until

    async def _may_begin(self) -> None:
        """Wait until it cannot cost too much. Raises _TooDear if that will not be."""
        while wait := self._purse.wait(self._request, _now()):
            if wait == math.inf:
                raise _TooDear
            await asyncio.sleep(wait)

    async def _close(self) -> None:
        stream, self._stream = self._stream, None
        if self._running is not None:  # also of one that was left, or cut off: it was asked for
            answered = stream is not None and stream.answer is not None
            self._running.end(NOT_TOLD if stream is None else paid_ids(stream.usage), answered=answered)
            self._running = None
        if stream is not None:
            await stream.__aexit__()

    def _succeed(self) -> None:
        assert self._stream is not None
        answer = self._stream.answer
        assert answer is not None
        self.outcome = reply_of(answer, index=0, latency=_now() - self._began, attempts=self._attempts)

    def _fail(self, kind: str, message: str, error: Exception | None = None) -> None:
        self.outcome = Fault(0, kind, message, _now() - self._began, self._attempts, error)


class _TooDear(Exception):
    """Nothing runs that could give back some of what is committed."""


def _now() -> float:
    return asyncio.get_running_loop().time()
