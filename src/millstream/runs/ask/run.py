"""The course of an ask run: each prompt is known already or has its turn, and each outcome goes where it belongs."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from millstream.aio import Fault, Returned
from millstream.bridge import in_thread
from millstream.client.client import Client
from millstream.client.requests import Request, named
from millstream.client.tripwire import Tripwire
from millstream.corpus.parquet import footer_of
from millstream.corpus.sources import InputShard, chunks
from millstream.errors import RunError
from millstream.llm.wire import Answer
from millstream.runs.ask.answers import AnswerJournal, is_fault
from millstream.runs.ask.earlier import Again
from millstream.runs.ask.endings import NOT_WHOLE, ending_of, endings_of
from millstream.runs.ask.lineup import Lineup, Slot
from millstream.runs.ask.output import Output
from millstream.runs.ask.rows import batch_line, row_of, row_of_none, with_input
from millstream.runs.ask.settings import AskSettings
from millstream.runs.ask.tally import RowTally
from millstream.runs.progress import AskProgress, AskReport

INTERRUPTED = "interrupted"
TOO_DEAR = "too dear"

_CANARIES = 2
_AT_ONCE = 512  # rows of earlier runs
_NOT_ASKED = {"stopped", "cancelled"}  # kinds of faults that are no outcome: the next run asks again
_COUNTED = 1 << 30  # bytes of a file whose lines are counted beforehand
_TICK = 1.0  # seconds
_encode = msgspec.json.encode


def advice(journal: AnswerJournal | None) -> str:
    """What the end of a message says about going on after a failure."""
    if journal is None:
        return ". Without --journal nothing is kept: the same command asks everything again"
    return ". What was answered is kept: the same command again goes on"


class _Asked(NamedTuple):
    """A request that was handed to the flow; `place` is that of its earlier outcome in the journal, or -1.

    `kept`: its reply is in the journal, and waits for its turn in an ordered run.
    """

    request: Request
    slot: Slot
    place: int
    kept: bool = False


class AskRun:
    """One ask run. Each request ends in `_settle`, with a row, or is left to the next run by `_leave`."""

    def __init__(
        self,
        out: str,
        prompts: InputShard,
        rows: Iterator[list[Request]],
        settings: AskSettings,
        *,
        client: Client,
        journal: AnswerJournal | None,
        again: Again | None,
        output: Output,
        on_progress: Callable[[AskProgress], None] | None,
        on_note: Callable[[str], None],
    ) -> None:
        self.on_note = on_note
        self.out, self.prompts, self.rows, self.settings = out, prompts, rows, settings
        self.client, self.journal, self.again, self.output = client, journal, again, output
        self.in_order = settings.ordered or out == "-"
        # Whether each row of an earlier run has to be looked at, or changed, before it is put out.
        self.in_parts = bool(settings.batch_format or settings.keep_input or settings.retry_finish)
        self.lineup = Lineup(output, in_order=self.in_order, prefix=out == "-" and journal is not None)
        self.tally = RowTally(client, on_progress)
        self.tally.tells_unknown = bool(settings.retry_finish)
        self.tripwire = Tripwire(lambda: self.flow.stop())
        self.told_to_wait = False
        self.stopped: str | None = None
        self.interrupts = 0
        self.listed = 0
        self.under_way: dict[int, _Asked] = {}  # by the number that the flow gives them
        self.held: list[Fault] = []  # until it is known whether they are everybody's

    async def main(self) -> AskReport | None:
        """How it ended; None if it was interrupted twice, and what ran was cancelled."""
        self.tally.total = _rows_in(self.prompts, self.settings.limit)
        if not self.journal and not self._lost_some:
            self.lineup.all_known()
        try:
            async with self.client, contextlib.AsyncExitStack() as stack:
                self.flow = self._flow()
                self._listen_to_interrupts(stack)
                self._tick()
                stack.callback(lambda: self.ticker.cancel())
                async with self.flow:
                    async for outcome in self.flow:
                        self._take(outcome)
                    self._settle_held(ended=not (self.stopped or self.tripwire.reason))
                if self.stopped or self.tripwire.reason:
                    await self._leave_the_rest()
            self.lineup.end(stopped=bool(self.stopped or self.tripwire.reason))
        except BaseException as error:
            with contextlib.suppress(RunError):  # what happened first is what is told
                self.lineup.end(stopped=True)
            if isinstance(error, asyncio.CancelledError) and self.interrupts > 1:
                return None
            raise
        if self.tripwire.reason:
            raise RunError(self.tripwire.reason + advice(self.journal))
        return self.tally.report(self.out, self.flow, stopped=self.stopped, journal=self.journal)

    def _flow(self) -> Any:
        return self.client.flow(
            self._to_ask(),
            in_order=self.in_order,
            canaries=_CANARIES,
            batched=True,
            delay=self.client.holding(self._hold, self._told_to_wait).delay,
            watch=self._seen,
        )

    def _listen_to_interrupts(self, stack: contextlib.AsyncExitStack) -> None:
        """Ctrl-C once: admit no more and let what runs end. Twice: cancel it; it is asked again by the next run.

        SIGTERM and SIGHUP count as one, unless somebody else handles them or, as nohup does, ignores them.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task

        def interrupted() -> None:
            self.interrupts += 1
            if self.interrupts > 1:
                task.cancel()
            self.stopped = INTERRUPTED
            self.flow.stop()

        nobodys = signal.SIG_DFL, signal.default_int_handler
        ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) in nobodys]
        with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not in the main thread
            for number in (signal.SIGINT, *ours):
                loop.add_signal_handler(number, interrupted)
                stack.callback(loop.remove_signal_handler, number)

    def _tick(self) -> None:
        """Tell how far it is while nothing comes back, too."""
        self.tally.tell(self.flow)
        self.ticker = asyncio.get_running_loop().call_later(_TICK, self._tick)

    # What is to be asked, and what is known already -----------------------------------------------------------------

    async def _to_ask(self) -> AsyncIterator[list[Request]]:
        """The requests that have no outcome yet, in lists; the rows of the others are written on the way."""
        # Whoever writes to our standard input may be slow, and answers must not wait for it.
        waiting = in_thread(self.rows) if self.prompts.uri == "-" else None
        while True:
            batch = await anext(waiting, None) if waiting else next(self.rows, None)
            if batch is None:
                self.lineup.all_known(some_lost=self._lost_some)
                return
            if unknown := self._unknown(batch):
                yield unknown
            else:
                await asyncio.sleep(0)  # a long stretch of known ones must not keep answers waiting
            await self.lineup.shorter()

    @property
    def _lost_some(self) -> bool:
        return self.journal is not None and self.journal.damaged > 0

    def _unknown(self, batch: list[Request]) -> list[Request]:
        """Those of a batch that are to be asked; the rows of the others take their place in the output."""
        places = self.again.find(batch) if self.again else [-1] * len(batch)
        unknown: list[Request] = []
        for is_plain, start, end in _stretches(places):
            if not (is_plain and self._put_all(batch[start:end], places[start:end])):
                pairs = zip(batch[start:end], places[start:end], strict=True)
                unknown += [request for request, place in pairs if not self._put(request, place)]
        self.tally.tell(self.flow)
        return unknown

    def _put_all(self, requests: list[Request], places: list[int]) -> bool:
        """Put out the rows of earlier replies as they are, if all of them are wanted so: at once, as that is quick."""
        if self.in_parts or not self.journal:
            return False
        rows = self.journal.rows(places, [request.id for request in requests], requests[0].index)
        if rows is None:
            return False
        endings = endings_of(rows, len(places))
        if self.out == "-" and not self.settings.all_replies and endings.keys() & NOT_WHOLE:
            return False
        self.tripwire.answered = True
        self.tally.add_earlier(endings)
        self.lineup.put_known(rows, len(places))
        return True

    def _put(self, request: Request, place: int) -> bool:
        """Put out what is known of a request; False if it is to be asked, for which it is noted."""
        if request.fault:
            row: bytes | None = self._kept(request, row_of_none(request), known=place >= 0)
        elif place < 0:
            row = None
        else:
            row, place = self._earlier_or_again(request, place)
        if row is None:
            self.under_way[self.listed] = _Asked(request, self.lineup.slot(), place)
            self.listed += 1
            return False
        self.lineup.put_known(row)
        return True

    def _earlier_or_again(self, request: Request, place: int) -> tuple[bytes | None, int]:
        """The row of an earlier run as the output wants it; none if it is to be asked (again), and the place of the row
        that stays until then: -1 for a damaged one."""
        assert self.journal
        assert self.again
        row = self.journal.row(place, request.id, request.index)
        if row is None:
            return None, -1
        self.tripwire.answered |= not is_fault(place)
        if self.again.wants(row, is_fault(place)):
            self.again.prepare(request)
            return None, place
        return self._earlier(request, row, is_fault(place)), place

    def _earlier(self, request: Request, row: bytes, fault: bool) -> bytes:
        self.tally.again += 1
        return self._counted(request, row, fault)

    async def _leave_the_rest(self) -> None:
        """After a stop: nothing more is asked, but what earlier runs know of prompts not reached is put out, too."""
        self._leave_all()
        if self.out == "-" or self.prompts.uri == "-":
            return  # nothing may come behind a row that is missing; and whoever writes to us may never end
        with contextlib.suppress(RunError) if self.tripwire.reason else contextlib.nullcontext():
            for batch in self.rows:
                self._unknown(batch)
                self._leave_all()
                await asyncio.sleep(0)
            self.lineup.all_known(some_lost=self._lost_some)

    def _leave_all(self) -> None:
        for number in list(self.under_way):
            self._leave(number)

    # Outcomes -------------------------------------------------------------------------------------------------------

    def _take(self, outcome: Returned[Answer] | Fault) -> None:
        """An outcome; faults that may turn out to be everybody's are held until that is known."""
        if isinstance(outcome, Fault) and outcome.kind in _NOT_ASKED:
            self._leave(outcome.index)
            self.stopped = self.stopped or (None if self.tripwire.reason else TOO_DEAR)
            return
        if isinstance(outcome, Fault) and self.tripwire.doubts(outcome):
            self.held.append(outcome)
        else:
            self._settle(outcome)
        if self.held and not self.tripwire.doubts(self.held[0]):
            self._settle_held()

    def _seen(self, outcome: Returned[Answer] | Fault, began: float, now: float) -> None:
        """An outcome, at once. A reply that has to wait for its turn is kept before it does: it is paid."""
        self.tripwire.seen(outcome, began, now)
        if self.in_order and self.journal is not None and isinstance(outcome, Returned):
            asked = self.under_way[outcome.index]
            self.journal.append(asked.request.key, _encode(self._row(asked.request, outcome)))
            self.under_way[outcome.index] = asked._replace(kept=True)

    def _row(self, request: Request, outcome: Returned[Answer] | Fault) -> dict[str, Any]:
        return row_of(request, outcome, whole=self.settings.batch_format or self.settings.keep_body)

    def _hold(self, error: Exception) -> None:
        self.tripwire.held(error, asyncio.get_running_loop().time())

    def _told_to_wait(self, error: Exception) -> None:
        """A server wants to be left alone for long: that is told once, and the others go on."""
        if not self.told_to_wait:
            self.told_to_wait = True
            self.on_note(f"{error}. What it says so of waits; the others are asked meanwhile")

    def _settle_held(self, ended: bool = False) -> None:
        """Of the faults that were in doubt those that are no more; all, if the run ended and nothing stopped it."""
        held, self.held = self.held, []
        for fault in held:
            if ended or not self.tripwire.doubts(fault):
                self._settle(fault)
            else:
                self.held.append(fault)

    def _settle(self, outcome: Returned[Answer] | Fault) -> None:
        asked = self.under_way.pop(outcome.index)
        if isinstance(outcome, Fault) and self._stays(asked, outcome):
            return
        self.lineup.put(asked.slot, self._kept(asked.request, self._row(asked.request, outcome), again=asked.kept))
        self.tally.tell(self.flow)

    def _stays(self, asked: _Asked, fault: Fault) -> bool:
        """Whether an earlier reply was asked again in vain: then it stays, in the journal too."""
        request, slot, place = asked.request, asked.slot, asked.place
        if not self.journal or place < 0 or is_fault(place):
            return False
        row = self.journal.row(place, request.id, request.index)
        if row is None:
            return False
        self.tally.add_in_vain(named(fault).message)
        self.lineup.put(slot, self._earlier(request, row, False))
        return True

    def _leave(self, number: int) -> None:
        """The next run asks it; until then an earlier outcome stays."""
        asked = self.under_way.pop(number)
        request, slot, place = asked.request, asked.slot, asked.place
        row = self.journal.row(place, request.id, request.index) if self.journal and place >= 0 else None
        if row is None:
            self.lineup.leave(slot)
        else:
            self.lineup.put(slot, self._earlier(request, row, is_fault(place)))

    def _kept(self, request: Request, row: dict[str, Any], *, known: bool = False, again: bool = False) -> bytes:
        """The row of an outcome as the output wants it, after the journal has it: `known` from an earlier run, or put
        there by this one, which comes to it `again`."""
        data = _encode(row)
        if self.journal is not None and not (known or again):
            self.journal.append(request.key, data)
        self.tally.again += known
        return self._counted(request, data, "fault" in row, row)

    def _counted(self, request: Request, data: bytes, fault: bool, row: dict[str, Any] | None = None) -> bytes:
        """A row as the output wants it (empty: not at all); `data` is the same in JSON."""
        self.tally.requests += 1
        if row is None and (fault or self.settings.batch_format):
            row = msgspec.json.decode(data)  # of an earlier run
        if fault:
            assert row
            self.tally.add_fault(row)
            if self.out == "-":
                return b""
        elif not self.tally.add_reply(ending_of(data)) and self.out == "-" and not self.settings.all_replies:
            self.tally.left_out += 1
            return b""
        if self.settings.batch_format:
            return batch_line(request, row or {})
        if request.row is not None:
            return with_input(data, request.row)
        return data


def _stretches(places: list[int]) -> Iterator[tuple[bool, int, int]]:
    """(whether earlier replies are at all of them, start, end) for stretches of places that are alike, not too long.

    >>> list(_stretches([4, 8, -1, 3, 6]))
    [(True, 0, 2), (False, 2, 4), (True, 4, 5)]
    """
    for first in range(0, len(places), _AT_ONCE):
        start, some = first, places[first : first + _AT_ONCE]
        if min(some) >= 0 and not any(map((1).__and__, some)):  # mostly, and this is quick
            yield True, first, first + len(some)
            continue
        for is_plain, stretch in groupby(some, lambda place: place >= 0 and not is_fault(place)):
            end = start + len(list(stretch))
            yield is_plain, start, end
            start = end


def _rows_in(prompts: InputShard, limit: int | None) -> int | None:
    """How many rows there are, where that is cheap to know: for the time that is left, and nothing else."""
    if prompts.kind == "parquet":
        found: int = footer_of(prompts).num_rows
    elif prompts.seekable and prompts.size() <= _COUNTED:
        found = sum(chunk.count(b"\n") for chunk in chunks(prompts))
    else:
        return limit
    return found if limit is None else min(found, limit)
