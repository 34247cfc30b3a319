"""Several servers behind one client: each attempt goes to the next in turn that is not known to be away."""

import math
from typing import Any, NamedTuple

import msgspec

from millstream.client.requests import Request
from millstream.errors import RequestError, setting
from millstream.llm.wire import Answer, Wire, WireError

_AWAY = 3  # connections in a row that fail until a server is left alone
_REST = 5.0  # seconds for which it is, at first; twice as long each time, up to a minute
_LONGEST_REST = 60.0
_DOUBLINGS = 4  # that many lead beyond it; in an outage thousands fail in a row, and 2.0**1024 is an error


class Through(NamedTuple):
    """When the last attempt that was answered began, and when it ended, in seconds."""

    began: float = -math.inf
    ended: float = -math.inf


class _Named(msgspec.Struct):
    model: Any = None


_named = msgspec.json.Decoder(_Named).decode


class Servers:
    """Wires in turn. One that cannot be reached rests, as long as there is another; a retry goes elsewhere."""

    def __init__(self, wires: list[Any]) -> None:
        if not wires:
            raise RequestError(f"no server given: name it with {setting('base_url')}, or set OPENAI_BASE_URL")
        self.wires: list[Wire] = wires
        self.answered = False  # any of them, ever
        self._turn = -1
        self._failures = [0] * len(wires)  # connections in a row
        self._rests_until = [0.0] * len(wires)
        self._through = [Through()] * len(wires)
        self._models: dict[tuple[int, Any], Through] = {}  # the same, of models that a server was too busy for

    def pick(self, last: int, now: float) -> int:
        """The number of the server for an attempt whose last one went to `last` (-1: there was none)."""
        count = len(self.wires)
        if count == 1:
            return 0
        for step in range(1, count + 1):
            index = (self._turn + step) % count
            if index != last and self._rests_until[index] <= now:
                self._turn = index
                return index
        # All others rest: the one that came first is as good as any.
        return last if last >= 0 and self._rests_until[last] <= now else self._rests_until.index(min(self._rests_until))

    async def send(self, index: int, data: bytes, path: str, clock: Any) -> Answer:
        """One attempt at server number `index`; `clock` tells the time."""
        began = clock()
        try:
            answer = await self.wires[index].send(data, path)
        except WireError as error:
            error.server = self.wires[index].base_url
            if error.kind == "connection":
                self._failures[index] += 1
                if self._failures[index] >= _AWAY:
                    doublings = min(self._failures[index] - _AWAY, _DOUBLINGS)
                    rest = min(_LONGEST_REST, _REST * 2.0**doublings)
                    self._rests_until[index] = clock() + rest
            raise
        self.answered = True
        self._failures[index] = 0
        through = self._through[index] = Through(max(began, self._through[index].began), clock())
        if self._models and (place := (index, _named(data).model)) in self._models:
            self._models[place] = through
        return answer

    def last_through(self, request: Request, *, busy: bool) -> Through:
        """The last attempt that was answered where this request went: by the same server and, if `busy`, model.

        Which model a request is for is only looked up once a server was too busy for it.
        """
        if not busy:
            return self._through[request.server]
        return self._models.setdefault((request.server, _named(request.data).model), self._through[request.server])
