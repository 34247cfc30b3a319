"""When to stop a run: faults that other requests would share, told from those of one request."""

from dataclasses import replace
from typing import Any

from millstream.aio import Fault
from millstream.aio import Reply as Done
from millstream.llm.wire import WireError

# Kinds of faults that say something about every request, not about one, as long as nothing was answered yet.
_SHARED = {"bad_request", "not_found", "refused", "unusable", "connection", "server_error", "rate_limited"}
_GONE = 64  # connection faults in a row that end a run


class Tripwire:
    """Notices when going on makes no sense.

    At once: a fault that every other request would share, such as a wrong key. Before the first reply: two requests
    that ended alike. Later: many connections in a row that failed, as when a server has died. Until that is known,
    such faults are `suspicious`; a reply clears them if it was asked for after the first of them.
    """

    def __init__(self, gone: int = _GONE) -> None:
        self._gone = gone
        self._answered = self.suspicious = False
        self._alike = 0  # faults in a row of one kind
        self._kind: str | None = None
        self._since = 0.0

    def reason(self, outcome: Done[Any] | Fault, now: float) -> str | None:
        """Why to stop, after this outcome at `now` (s); None: go on."""
        if isinstance(outcome, Done):
            if not self._answered or now - outcome.seconds > self._since:
                self._answered, self.suspicious, self._kind = True, False, None
            return None
        fault = named(outcome)
        if isinstance(fault.error, WireError) and fault.error.fatal:
            return f"{sentence(fault)} Stopped: every other request would end the same way"
        suspicious = fault.kind == "connection" or (not self._answered and fault.kind in _SHARED)
        if fault.kind != self._kind or not self.suspicious:
            self._alike, self._kind, self._since = 0, fault.kind, now
        self._alike += 1
        self.suspicious = suspicious
        if suspicious and not self._answered and self._alike >= 2:
            return f"{sentence(fault)} Stopped: the first requests all ended this way"
        if suspicious and self._alike >= self._gone:
            return f"{sentence(fault)} Stopped: {self._alike} requests in a row could not be sent"
        return None


def named(fault: Fault) -> Fault:
    """A fault in the server's own words, without the exception's class in front."""
    if fault.faults:
        faults = tuple(map(named, fault.faults))
        return replace(fault, message=f"all {len(faults)} failed, the last with {faults[-1].message}", faults=faults)
    if not isinstance(fault.error, WireError):
        return fault
    return replace(fault, kind=fault.error.kind, message=str(fault.error))


def sentence(fault: Fault) -> str:
    return fault.message if fault.message.endswith((".", "?", "!")) else f"{fault.message}."
