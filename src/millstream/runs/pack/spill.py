"""The pieces that lie about between those who make them and those who write shards of them: how much, and how long."""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from millstream.errors import RequestError, setting
from millstream.folder.manifest import PIECES
from millstream.records import Part, Ref
from millstream.runs.pack.counts import Counts, ShardTask
from millstream.runs.pack.elsewhere import pieces_in
from millstream.runs.pack.pieces import StoredPieces
from millstream.runs.pack.run import Run
from millstream.runs.pack.settings import MIB, Settings, paces, windows
from millstream.runs.pack.tokenizing import PIECE
from millstream.store import Store, at


def most_of(settings: Settings, itemsize: int, workers: int, *, piece: int = PIECE) -> int:
    """Bytes of pieces beyond which no new part is begun: two output shards of each subset, the windows twice, and what
    workers have in hand. Ids have `itemsize` bytes, and the text in a `piece` so many."""
    shares = sum(paces(settings.validation))
    shards = 2 * settings.shard_size * shares
    held = 2 * itemsize * sum(window or 0 for window in windows(settings)) * shares
    return int(shards + held) + 4 * workers * piece


def pieces_of(run: Run) -> StoredPieces:
    """Where workers leave pieces for one another: in the run folder, or in a folder of this run in `spill`."""
    spill = run.spill
    return StoredPieces(at(run.out).below(PIECES)) if spill is None else pieces_in(spill, run.out)


def shared_pieces(run: Run, token: str) -> StoredPieces:
    """The same for those that join one run, whose `token` says which it is, whatever each calls its folder: where all
    of them see them."""
    if run.settings.spill is None:
        return StoredPieces(at(run.out).below(PIECES))
    return StoredPieces(at(run.settings.spill).below(f"millstream-{token}"))


def make_room(store: Store, most: int, *, needed: bool = False) -> None:
    """Make the store of pieces. Raises RequestError, with what to do, if it cannot be made, or if its disk has less
    than `most` bytes left. Pieces are `needed` where even one worker leaves some."""
    none = "" if needed else f", or {setting('workers', 1)}, which needs none"
    try:
        store.make()
    except OSError as error:
        raise RequestError(
            f"{store.url} cannot be made: {error.strerror}; give another folder as {setting('spill')}{none}"
        ) from error
    free = store.free()
    if free is not None and free < most:
        raise RequestError(
            f"workers leave up to {-(-most // MIB):,} MiB in {store.url}, and its disk has {free // MIB:,} MiB "
            f"left: give a folder on another one as {setting('spill')}{none}"
        )


def refs_of(counts: Counts) -> list[Ref]:
    """The pieces that a worker has put for these counts, one for each subset that has documents."""
    return [rows.ref for rows in counts.subsets.values() if rows.ref]


class Dropping(Protocol):
    """Where pieces lie, or whoever knows which of them to delete there."""

    def has(self, ref: Ref) -> bool: ...

    def drop(self, ref: Ref) -> None: ...


class Spill:
    """Keeps account of `pieces`; `most`: bytes of them at once so far.

    A piece is deleted once the course has let go of it and no task has it.
    """

    def __init__(self, pieces: Dropping, bound: int) -> None:
        self._pieces, self.bound = pieces, bound
        self._live: dict[str, Ref] = {}
        self._parts: dict[str, Part] = {}  # that they are of, and those that an earlier call used up
        self._lent: Counter[str] = Counter()
        self._let_go: set[str] = set()
        self.bytes = self.most = self._largest = 0

    def full(self, coming: int = 0) -> bool:
        """Whether there are more bytes than the bound, once so many pieces more have come."""
        return self.bytes + coming * self._largest > self.bound

    def add(self, counts: Counts) -> None:
        """A worker has put the pieces of these."""
        for ref in refs_of(counts):
            self._add(ref, counts.part)

    def recall(self, counts: Counts) -> None:
        """An earlier call has put them, and perhaps used them up."""
        for ref in refs_of(counts):
            if self._pieces.has(ref):
                self._add(ref, counts.part)
            else:
                self._parts[ref.name] = counts.part

    def _add(self, ref: Ref, part: Part) -> None:
        if ref.name not in self._live:
            self._live[ref.name], self._parts[ref.name] = ref, part
            self.bytes += ref.size
            self._largest = max(self._largest, ref.size)
        self.most = max(self.most, self.bytes)

    def has(self, counts: Counts) -> bool:
        """Whether the pieces of these lie there."""
        return all(ref.name in self._live for ref in refs_of(counts))

    def put_again(self, counts: Counts) -> None:
        """The same, where some were let go before."""
        for ref in refs_of(counts):
            if ref.name in self._parts:
                self._add(ref, counts.part)
            else:
                self._pieces.drop(ref)

    def part_of(self, name: str) -> Part:
        """The part that has to be done again to have a piece again."""
        return self._parts[name]

    def lend(self, task: ShardTask) -> None:
        """A task is about to read its pieces."""
        self._lent.update(piece.ref.name for piece in task.pieces)

    def take_back(self, task: ShardTask) -> None:
        """It has read them."""
        self._lent.subtract(piece.ref.name for piece in task.pieces)
        for piece in task.pieces:
            if piece.ref.name in self._let_go:
                self._drop(piece.ref)

    def let_go(self, refs: Iterable[Ref]) -> None:
        """No task wants these that is not lent them already."""
        for ref in refs:
            self._let_go.add(ref.name)
            self._drop(ref)

    def drop_unpacked(self, ref: Ref) -> None:
        """What was unpacked has been tokenized."""
        self._pieces.drop(ref)

    def _drop(self, ref: Ref) -> None:
        if not self._lent[ref.name] and ref.name in self._parts:
            del self._parts[ref.name], self._lent[ref.name]
            self._let_go.discard(ref.name)
            if self._live.pop(ref.name, None):
                self.bytes -= ref.size
                self._pieces.drop(ref)
