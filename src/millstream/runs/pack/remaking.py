"""Pieces that were lost on the way to who writes shards of them, and are made again."""

from collections import Counter
from collections.abc import Callable

from millstream.engines import Done
from millstream.folder.journal import Journal, PieceRemade
from millstream.runs.pack.counts import Counts
from millstream.runs.pack.pieces import PieceLost
from millstream.runs.pack.run import Run
from millstream.runs.pack.spill import Spill
from millstream.runs.pack.tokenizing import TokenizePart
from millstream.runs.pack.traffic import Traffic

_PATIENCE = 3  # times that a piece may be made again


class Remaking:
    """Has the part tokenized again that a lost piece is of, as `run` reads it, before any other unit in `traffic`;
    `spill` keeps account of what it puts, and `put` is told of it first. The journal tells of each."""

    def __init__(
        self,
        run: Run,
        tokenize: TokenizePart,
        traffic: Traffic,
        spill: Spill,
        *,
        journal: Journal,
        put: Callable[[Counts], None] = lambda counts: None,
    ) -> None:
        self._run, self._tokenize, self._traffic, self._spill = run, tokenize, traffic, spill
        self._journal, self._put = journal, put
        self._lost: Counter[str] = Counter()

    def make(self, lost: PieceLost, then: Callable[[], None]) -> None:
        """Have a piece made again, and `then` go on with it. Raises PieceLost where it is lost again and again."""
        self._lost[lost.name] += 1
        if self._lost[lost.name] > _PATIENCE:
            raise lost
        self._journal.write(PieceRemade(name=lost.name))

        def came(done: Done) -> None:
            if done.error:
                raise done.error
            if done.last:
                then()
            else:
                self._put(done.result)
                self._spill.put_again(done.result)

        task = self._run.part_task(self._spill.part_of(lost.name))
        self._traffic.submit(came, self._tokenize, task, urgent=True)
