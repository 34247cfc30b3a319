"""What an ask run tells while it goes and when it has ended."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from millstream.aio.flow import Flow
from millstream.aio.limits import Adaptive
from millstream.client.client import Client
from millstream.runs.ask.answers import AnswerJournal
from millstream.runs.ask.endings import NOT_WHOLE, UNKNOWN
from millstream.runs.progress import IN_VAIN, AskProgress, AskReport

_PROGRESS_EVERY = 0.1  # seconds


class RowTally:
    """Counts the rows of a run: `requests`, `again` (of earlier runs), and the faults by kind."""

    def __init__(self, client: Client, on_progress: Callable[[AskProgress], None] | None) -> None:
        self._client, self._on_progress = client, on_progress
        self.total: int | None = None
        self.requests = self.again = 0
        self.left_out = 0  # replies that are not whole, and that standard output does not get
        self.tells_unknown = False  # whether rows that do not tell how they ended are of interest
        self._in_vain = 0
        self._endings: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # a message of each kind of fault
        self._started = self._told = time.perf_counter()

    def add_fault(self, row: Mapping[str, Any]) -> None:
        fault = row["fault"]
        self._faults[fault["kind"]] += 1
        self._examples.setdefault(fault["kind"], fault["message"])

    def add_in_vain(self, message: str) -> None:
        """Count a reply that was asked again and stays as it was, since no other came."""
        self._in_vain += 1
        self._examples.setdefault(IN_VAIN, message)

    def add_reply(self, ending: str) -> bool:
        """Count a reply by how it ended (see `endings`); whether it is whole, as far as one knows."""
        self._endings[ending] += 1
        return ending not in NOT_WHOLE

    def add_earlier(self, endings: Counter[str]) -> None:
        """Count replies of earlier runs by how they ended."""
        self._endings += endings
        self.requests += endings.total()
        self.again += endings.total()

    def tell(self, flow: Flow[Any, Any]) -> None:
        """How far it is, if it was not told just now."""
        if self._on_progress is None:
            return
        now = time.perf_counter()
        if now - self._told >= _PROGRESS_EVERY:
            self._told = now
            self._on_progress(
                AskProgress(
                    done=self.requests,
                    faults=self._faults.total(),
                    asked=self.requests - self.again,
                    in_flight=flow.in_flight,
                    seconds=now - self._started,
                    ids_out=self._client.used["completion_tokens"],
                    total=self.total,
                    cost=self._client.cost,
                    waits_for=flow.waits_for,
                )
            )

    def report(
        self, out: str, flow: Flow[Any, Any], *, stopped: str | None, journal: AnswerJournal | None
    ) -> AskReport:
        limit = self._client.limit
        told = (*NOT_WHOLE, UNKNOWN) if self.tells_unknown else NOT_WHOLE
        return AskReport(
            out=out,
            requests=self.requests,
            replies=self.requests - self._faults.total(),
            faults=dict(sorted(self._faults.items())),
            examples=self._examples,
            endings={ending: self._endings[ending] for ending in told if self._endings[ending]},
            left_out=self.left_out,
            in_vain=self._in_vain,
            again=self.again,
            ids_in=self._client.used["prompt_tokens"],
            ids_out=self._client.used["completion_tokens"],
            ids_wasted=self._client.wasted.total(),
            cost=self._client.cost,
            seconds=time.perf_counter() - self._started,
            spent=asdict(flow.spent),
            in_flight=limit.now,
            limits=[(round(at - limit.history[0][0], 3), now) for at, now in limit.history]
            if isinstance(limit, Adaptive)
            else [],
            stopped=stopped,
            kept=journal is not None,
            damaged=0 if journal is None else journal.damaged,
            damaged_lines=[] if journal is None else journal.damaged_lines,
        )
