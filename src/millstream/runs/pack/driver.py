"""The pooled loop: workers tokenize parts of the corpus and write output shards; here is only counted what they did.

Counts have their turn in the order of the corpus, whenever they come. The course makes shard tasks of them, which go
before any part, as they let pieces go.
"""

from collections.abc import Generator, Sequence

from millstream.corpus.sources import rough_total
from millstream.exports.out import Place
from millstream.exports.tasks import Export
from millstream.folder.entries import SubsetEntry
from millstream.folder.journal import Journal, Spilled
from millstream.folder.samples import Samples
from millstream.runs.pack.exporting import ExportsBeside
from millstream.runs.pack.faults import Faults
from millstream.runs.pack.folder import Found
from millstream.runs.pack.known import KnownParts
from millstream.runs.pack.planning import part_size
from millstream.runs.pack.run import Run
from millstream.runs.pack.sealing import Sealing
from millstream.runs.pack.shop import Shop
from millstream.runs.pack.site import Site, site_of
from millstream.runs.pack.spill import Spill, make_room, most_of
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.traffic import Traffic
from millstream.runs.pack.turns import PartsInTurn


class Pooled:
    """The pooled loop of a run that goes on from what was `found`; its workers end with `close`."""

    def __init__(self, run: Run, found: Found | None, *, faults: Faults, journal: Journal) -> None:
        self._run = run
        self._read = found.read if found else None
        site = site_of(run, journal)
        try:
            self._set_up(site, found, faults, journal)
        except BaseException:
            site.pool.close()
            raise

    def _set_up(self, site: Site, found: Found | None, faults: Faults, journal: Journal) -> None:
        run, pieces, self._most = self._run, site.pieces, site.part
        if run.spill:
            journal.write(Spilled(folder=pieces.store.url))
            journal.flush()
        parts = KnownParts(run, found, site.piece)
        bound = most_of(run.settings, run.dtype.itemsize, run.workers, piece=site.piece)
        self._spill = Spill(pieces, bound)
        parts.load(pieces, self._spill)
        total = rough_total(run.shards)
        room = (bound if total is None else min(total, bound)) - self._spill.bytes
        make_room(pieces.store, 0 if site.afar else room)
        self._exports = ExportsBeside(run.identity.exports or [], run.out, run.identity, run.forms)
        for name, shards in found.subsets.items() if found else ():
            self._exports.add(name, (record.entry for record in shards.all))
        self._traffic = Traffic(site.pool, run.tally)
        tokenize = run.reading.tokenize_part(pieces, self._read, site.piece, afar=site.afar, shared=site.afar)
        self._shop = Shop(
            run, self._traffic, tokenize, pieces, self._spill, parts=parts, faults=faults, journal=journal
        )
        self._sealing = Sealing(self._shop, found, self._exports.add)
        self._start = self._mark = Mark()

    @property
    def sealed(self) -> bool:
        """Whether any output shard is written."""
        return self._sealing.shards.any

    def pack(self, mark: Mark) -> Mark:
        size, self._start = part_size(rough_total(self._run.shards), self._most), mark
        turns = PartsInTurn(self._shop, self._sealing, mark, size=size, read=self._read)
        while True:
            turns.begin()
            if turns.over:
                break
            turns.let_on()
            self._begin_exports()
            if not turns.have_come:
                self._traffic.wait()
            turns.take()
            self._mark = turns.mark
            self._show()
        self._mark = turns.mark
        self._show(at_once=True)
        return self._mark

    def finish(self) -> dict[str, SubsetEntry]:
        """Have everything written that is left: what the manifest says of each subset."""
        self._sealing.finish()
        while self._sealing.left:
            self._begin_exports()
            self._traffic.wait()
        self._run.tally.spilled = self._spill.most
        return self._sealing.shards.entries()

    def export(self, subsets: Sequence[Samples]) -> Generator[tuple[Export, Place]]:
        self._exports.end(subsets)
        while True:
            self._begin_exports(2 * self._traffic.slots)  # each has one to go on with
            yield from self._exports.finished()
            if not self._exports.left:
                return
            self._traffic.wait()
            self._show()

    def close(self) -> None:
        self._traffic.close()

    def _begin_exports(self, most: int | None = None) -> None:
        """Have what is sealed exported, so many tasks at once: `most`, or by half of the workers, to leave some for the
        rest.

        Shard tasks go before them, as they let pieces go; parts do not, as an export of one file would wait for them to
        the end, and then be all that is done.
        """
        if not self._sealing.waiting:
            self._exports.begin(self._traffic, most or max(1, self._traffic.slots // 2))

    def _show(self, at_once: bool = False) -> None:
        queue, spilled = len(self._traffic) + self._sealing.waiting, self._spill.bytes
        self._run.show(self._mark, self._start, at_once, queue=queue, spilled=spilled)
