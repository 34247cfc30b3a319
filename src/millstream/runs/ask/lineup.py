"""Rows on their way to the output: as they come, or in the order of the prompts."""

import asyncio
from collections import deque

from millstream.runs.ask.output import Output

_MOST_IN_LINE = 100_000  # rows of earlier runs that wait behind a request of this one


class Slot:
    """The place of a row; `row` is None until it is known, and empty if there is none."""

    __slots__ = ("known", "row")

    def __init__(self) -> None:
        self.row: bytes | None = None
        self.known = False


class Lineup:
    """Puts rows into `output`, and says when that is published: when it holds all that earlier runs knew.

    `in_order` keeps the order in which slots were taken. `prefix` stands for an output of which whoever reads it
    skips as much as it had before: behind a row that is left to the next run nothing may come.
    """

    def __init__(self, output: Output, *, in_order: bool, prefix: bool) -> None:
        self._output, self._in_order, self._prefix = output, in_order, prefix
        self._line: deque[Slot] = deque()
        self._shorter = asyncio.Event()
        self._known = 0  # rows of earlier runs that stand in line
        self._ended = self._published = False
        self._least = 1  # rows that are put in place of a former output

    def slot(self) -> Slot:
        """The place of the next row, behind all before it if they are in order."""
        slot = Slot()
        if self._in_order:
            self._line.append(slot)
        return slot

    def put(self, slot: Slot, row: bytes) -> None:
        """The row of this slot; empty: it has none."""
        if self._in_order:
            slot.row = row
            self._advance()
        elif row:
            self._write(row)

    def put_known(self, rows: bytes, count: int = 1) -> None:
        """The next rows, which earlier runs have made, with a line end between two; empty: none."""
        if not rows:
            return
        if not self._line:
            self._write(rows, count)
            return
        for row in rows.split(b"\n"):
            slot = self.slot()
            slot.row, slot.known = row, True
        self._known += count

    def leave(self, slot: Slot) -> None:
        """The row of this slot comes from the next run."""
        if not self._prefix:
            self.put(slot, b"")

    def _advance(self) -> None:
        """Write what nothing comes before any more."""
        line = self._line
        while line and (row := line[0].row) is not None:
            self._known -= line.popleft().known
            if row:
                self._write(row)
        self._shorter.set()

    def _write(self, rows: bytes, count: int = 1) -> None:
        self._output.write(rows + b"\n", count)
        if not self._published:
            self._publish_if_due()

    async def shorter(self) -> None:
        """Wait until the line is so short that more may stand in it."""
        while len(self._line) > _MOST_IN_LINE:
            self._shorter.clear()
            await self._shorter.wait()

    # When the output gets its name ----------------------------------------------------------------------------------

    def all_known(self, *, some_lost: bool = False) -> None:
        """No more rows of earlier runs come. Where some of them were lost, it takes as many rows as there were."""
        self._ended, self._least = True, self._output.former or 0 if some_lost else 1
        self._publish_if_due()

    def _publish_if_due(self) -> None:
        if self._known or not self._ended:
            return
        if self._output.former is None or self._output.lines >= self._least:
            self._publish()

    def end(self, *, stopped: bool) -> None:
        """The last row is written. After a stop the former output stays where it has more rows than there are now."""
        former = self._output.former if stopped else None
        if former is None or self._output.lines >= former:
            self._publish()
        self._output.flush()

    def _publish(self) -> None:
        if not self._published:
            self._output.publish()
            self._published = True
