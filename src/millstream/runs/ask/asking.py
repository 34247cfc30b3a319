"""The ask run: prompts from a file to one row each in another, resumable, with nothing asked twice."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from typing import IO, Any

import msgspec

from millstream.aio import Fault, Reply
from millstream.aio.limits import Adaptive
from millstream.aio.rates import All, Gate
from millstream.bridge import in_thread, run
from millstream.errors import RequestError, RunError
from millstream.formats.corpus import expand
from millstream.formats.sources import InputShard, chunks
from millstream.llm.wire import Answer
from millstream.runs.ask.answers import AnswerJournal, Header
from millstream.runs.ask.bodies import Recipe
from millstream.runs.ask.client import Client
from millstream.runs.ask.prompts import batches
from millstream.runs.ask.purse import Purse
from millstream.runs.ask.requests import Request
from millstream.runs.ask.rows import batch_line, row_of, row_of_none, with_input
from millstream.runs.ask.settings import AskSettings
from millstream.runs.ask.tripwire import Tripwire
from millstream.runs.progress import AskProgress, AskReport

INTERRUPTED = "interrupted"
TOO_DEAR = "too dear"

_CANARIES = 2
_MOST_IN_LINE = 100_000  # rows of earlier runs that wait behind a request of this one
_NOT_ASKED = {"stopped", "cancelled"}  # kinds of faults that are no outcome: the next run asks again
_COUNTED = 1 << 30  # bytes of a file whose lines are counted beforehand
_PROGRESS_EVERY, _TICK = 0.1, 1.0  # seconds
_encode = msgspec.json.encode


def ask_to(
    out: str,
    prompts: str,
    settings: AskSettings,
    *,
    journal: str | None = None,
    on_progress: Callable[[AskProgress], None] | None = None,
) -> AskReport:
    """Ask every prompt of `prompts` and write one JSON row each to `out` ("-": replies alone, to standard output).

    The journal (in `out`.run unless `journal` names a folder) is the truth: every outcome is in it before it is
    anywhere else, and the same call after any interruption asks only what has none. Raises RequestError for wrong
    settings, RunError when a server refuses for a reason that every request shares.
    """
    if settings.max_cost is not None and settings.price is None:
        raise RequestError("the most it may cost needs prices: give --price IN,OUT")
    shards = expand([prompts])
    if len(shards) != 1:
        raise RequestError(f"{prompts}: prompts come from one file, or '-'")
    client = Client(
        list(settings.base_urls),
        model=settings.model,
        api_key=settings.api_key,
        in_flight=settings.in_flight,
        timeout=settings.timeout,
        deadline=settings.deadline,
        attempts=settings.attempts,
        rpm=settings.rpm,
        tpm=settings.tpm,
        hedge=settings.hedge,
        schema=settings.schema,
        params=settings.params,
        max_reply=settings.max_reply,
    )
    recipe = Recipe(settings.model, settings.system, settings.template, client.params)
    folder = journal or (None if out == "-" else f"{out}.run")
    with contextlib.ExitStack() as stack:
        rows = batches(shards[0], recipe, limit=settings.limit, keep_rows=settings.keep_input)
        first = next(rows, None)  # what is wrong with the file or the settings shows before anything is written
        if first is None and settings.limit != 0:
            raise RequestError(f"{shards[0].name} is empty: there is nothing to ask")
        kept = stack.enter_context(AnswerJournal(folder)) if folder else None
        if kept is not None:
            place = None if out == "-" else os.path.relpath(os.path.realpath(out), os.path.realpath(kept.folder))
            kept.begin(Header(out=place, model=settings.model, params=dict(client.params)))
        target = sys.stdout.buffer if out == "-" else stack.enter_context(_opened(out))
        return run(_Run(out, shards[0], first, rows, settings, client, kept, target, on_progress).main())


def _rows_in(prompts: InputShard, limit: int | None) -> int | None:
    """How many rows there are, where that is cheap to know: for the time that is left, and nothing else."""
    if prompts.kind == "parquet":
        from pyarrow.parquet import read_metadata

        found: int = read_metadata(prompts.uri).num_rows
    elif prompts.seekable and os.path.getsize(prompts.uri) <= _COUNTED:
        found = sum(chunk.count(b"\n") for chunk in chunks(prompts))
    else:
        return limit
    return found if limit is None else min(found, limit)


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "wb", buffering=1 << 17)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from error


class _Run:
    """One ask run. Each request ends in `_settle`, with a row, or is left to the next run by `_leave`."""

    def __init__(
        self,
        out: str,
        prompts: InputShard,
        first: list[Request] | None,
        rows: Iterator[list[Request]],
        settings: AskSettings,
        client: Client,
        journal: AnswerJournal | None,
        target: IO[bytes],
        on_progress: Callable[[AskProgress], None] | None,
    ) -> None:
        self.out, self.prompts, self.first, self.rows = out, prompts, first, rows
        self.settings, self.client, self.journal, self.target = settings, client, journal, target
        self.on_progress = on_progress
        self.in_order = settings.ordered or out == "-"
        self.purse = Purse(settings.price or (0.0, 0.0), settings.max_cost, client)
        self.tripwire = Tripwire()
        self.tripped: str | None = None
        self.stopped: str | None = None
        self.listed = 0
        self.under_way: dict[int, tuple[Request, _Slot]] = {}  # by the number that the flow gives them
        self.held: list[Fault] = []  # until it is known whether they are everybody's
        self.line: deque[_Slot] = deque()  # of an ordered run: the rows that are not written yet
        self.shorter = asyncio.Event()  # the line is
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # a message of each kind of fault
        self.total: int | None = None
        self.started = self.told = time.perf_counter()

    async def main(self) -> AskReport:
        if self.on_progress:
            self.total = _rows_in(self.prompts, self.settings.limit)
        gates: list[Gate] = [self.client.gate] if self.client.gate else []
        gates += [self.purse] if self.purse.most is not None else []
        async with self.client, contextlib.AsyncExitStack() as stack:
            self.flow = self.client.flow(
                self._to_ask(),
                in_order=self.in_order,
                gate=All(gates) if gates else None,
                canaries=_CANARIES,
                batched=True,
            )
            self._listen_to_interrupts(stack)
            self._tick()
            stack.callback(lambda: self.ticker.cancel())
            async with self.flow:
                async for outcome in self.flow:
                    self._take(outcome)
                self._settle_held()
            self.target.flush()
        if self.tripped:
            raise RunError(f"{self.tripped}. What was answered is kept: the same command again goes on")
        return self._report()

    def _listen_to_interrupts(self, stack: contextlib.AsyncExitStack) -> None:
        """Ctrl-C once: admit no more and let what runs end. Twice: cancel it; it is asked again by the next run."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task

        def interrupted() -> None:
            if self.stopped == INTERRUPTED:
                task.cancel()
            self.stopped = INTERRUPTED
            self.flow.stop()

        with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not in the main thread
            loop.add_signal_handler(signal.SIGINT, interrupted)
            stack.callback(loop.remove_signal_handler, signal.SIGINT)

    def _tick(self) -> None:
        """Tell how far it is while nothing comes back, too."""
        self._tell()
        self.ticker = asyncio.get_running_loop().call_later(_TICK, self._tick)

    # What is to be asked, and what is known already -----------------------------------------------------------------

    async def _to_ask(self) -> AsyncIterator[list[Request]]:
        """The requests that have no outcome yet, in lists; the rows of the others are written on the way."""
        if self.first is not None:
            first, self.first = self.first, None
            yield self._unknown(first)
        # Whoever writes to our standard input may be slow, and answers must not wait for it.
        waiting = in_thread(self.rows) if self.prompts.uri == "-" else None
        while True:
            batch = await anext(waiting, None) if waiting else next(self.rows, None)
            if batch is None:
                return
            if unknown := self._unknown(batch):
                yield unknown
            else:
                await asyncio.sleep(0)  # a long stretch of known ones must not keep answers waiting
            while len(self.line) > _MOST_IN_LINE:
                self.shorter.clear()
                await self.shorter.wait()

    def _unknown(self, batch: list[Request]) -> list[Request]:
        """Those of a batch that are to be asked; the rows of the others take their place in the output."""
        places, faulty = [-1] * len(batch), [False] * len(batch)
        if self.journal is not None and len(self.journal):
            found = self.journal.find_many([request.key for request in batch])
            places, faulty = found.tolist(), self.journal.is_fault(found).tolist()
        unknown = []
        for request, place, fault in zip(batch, places, faulty, strict=True):
            known = place >= 0 and not (fault and self.settings.retry_faults and not request.fault)
            if request.fault:
                self._place(self._slot(), self._kept(request, row_of_none(request), known=known))
            elif known and (earlier := self._earlier(request, place)):
                self.counts["again"] += 1
                self._place(self._slot(), self._counted(request, earlier, fault))
            else:
                self.under_way[self.listed] = request, self._slot()
                self.listed += 1
                unknown.append(request)
        return unknown

    def _earlier(self, request: Request, place: int) -> bytes | None:
        """The row of an earlier run; None if it is damaged, and the request is asked again."""
        assert self.journal
        return self.journal.row(place, request.id, request.index)

    # Outcomes -------------------------------------------------------------------------------------------------------

    def _take(self, outcome: Reply[Answer] | Fault) -> None:
        """An outcome; faults that may turn out to be everybody's are held until that is known."""
        if isinstance(outcome, Fault) and outcome.kind in _NOT_ASKED:
            self._leave(outcome)
            self.stopped = self.stopped or (None if self.tripped else TOO_DEAR)
            return
        reason = self.tripwire.reason(outcome, time.monotonic())
        if isinstance(outcome, Reply) or not (reason or self.tripwire.suspicious):
            self._settle(outcome)
        else:
            self.held.append(outcome)
        if reason:
            self.tripped = self.tripped or reason
            self.flow.stop()
            for fault in self.held:
                self._leave(fault)
            self.held.clear()
        elif not self.tripwire.suspicious:
            self._settle_held()

    def _settle_held(self) -> None:
        for fault in self.held:
            self._settle(fault)
        self.held.clear()

    def _settle(self, outcome: Reply[Answer] | Fault) -> None:
        request, slot = self.under_way.pop(outcome.index)
        self._place(slot, self._kept(request, row_of(request, outcome, whole=self.settings.batch_format)))

    def _leave(self, outcome: Fault) -> None:
        """The next run asks it."""
        _, slot = self.under_way.pop(outcome.index)
        self._place(slot, b"")

    def _kept(self, request: Request, row: dict[str, Any], known: bool = False) -> bytes:
        """The row of an outcome as the output wants it, after the journal has it."""
        data = _encode(row)
        if self.journal is not None and not known:
            self.journal.append(request.key, data)
        self.counts["again"] += known
        return self._counted(request, data, "fault" in row, row)

    def _counted(self, request: Request, data: bytes, fault: bool, row: dict[str, Any] | None = None) -> bytes:
        """A row as the output wants it (empty: not at all); `data` is the same in JSON."""
        self.counts["requests"] += 1
        if row is None and (fault or self.settings.price or self.settings.batch_format):
            row = msgspec.json.decode(data)  # of an earlier run
            self.purse.pay_earlier(row.get("usage") or {})
        if fault:
            assert row
            self.faults[row["fault"]["kind"]] += 1
            self.examples.setdefault(row["fault"]["kind"], row["fault"]["message"])
            if self.out == "-":
                return b""
        if self.settings.batch_format:
            return batch_line(request, row or {})
        if request.row is not None:
            return with_input(data, request.row)
        return data

    # The output -----------------------------------------------------------------------------------------------------

    def _slot(self) -> "_Slot":
        """The place of the next row, behind all before it if the run is ordered."""
        slot = _Slot()
        if self.in_order:
            self.line.append(slot)
        return slot

    def _place(self, slot: "_Slot", row: bytes) -> None:
        """Put a row (empty: none) into its place, and write what nothing comes before any more."""
        if not self.in_order:
            self._write(row)
        else:
            slot.row = row
            while self.line and (ready := self.line[0].row) is not None:
                self.line.popleft()
                self._write(ready)
            self.shorter.set()
        self._tell()

    def _write(self, row: bytes) -> None:
        try:
            self.target.write(row + b"\n" if row else row)
            if self.out == "-":
                self.target.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunError(f"cannot write {self.out}: {error.strerror}. What was answered is kept") from error

    # What it tells --------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        now = time.perf_counter()
        if self.on_progress and now - self.told >= _PROGRESS_EVERY:
            self.told = now
            self.on_progress(
                AskProgress(
                    self.counts["requests"],
                    self.faults.total(),
                    self.counts["requests"] - self.counts["again"],
                    self.flow.in_flight,
                    now - self.started,
                    self.client.used["completion_tokens"],
                    self.total,
                    self.purse.cost if self.settings.price else None,
                    self.flow.waits_for,
                )
            )

    def _report(self) -> AskReport:
        limit = self.client.limit
        return AskReport(
            out=self.out,
            requests=self.counts["requests"],
            replies=self.counts["requests"] - self.faults.total(),
            faults=dict(sorted(self.faults.items())),
            examples=self.examples,
            again=self.counts["again"],
            ids_in=self.client.used["prompt_tokens"],
            ids_out=self.client.used["completion_tokens"],
            ids_wasted=self.client.wasted.total(),
            cost=self.purse.cost if self.settings.price else None,
            seconds=time.perf_counter() - self.started,
            spent=asdict(self.flow.spent),
            in_flight=limit.now,
            limits=[(round(at - limit.history[0][0], 3), now) for at, now in limit.history]
            if isinstance(limit, Adaptive)
            else [],
            stopped=self.stopped,
            damaged=self.journal.damaged if self.journal else 0,
            damaged_lines=self.journal.damaged_lines if self.journal else [],
        )


class _Slot:
    """The place of a row in an ordered output; None until it is known."""

    __slots__ = ("row",)

    def __init__(self) -> None:
        self.row: bytes | None = None
