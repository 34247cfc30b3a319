"""Where a run is worked on, and where its pieces lie: by processes of this machine, or on a Ray cluster."""

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from millstream.corpus.sources import InputShard
from millstream.engines import Engine, engine
from millstream.folder.journal import Journal, NodeChanged, NodeTaken, WorkerReplaced
from millstream.folder.manifest import PIECES
from millstream.runs.pack.machine import cores, memory
from millstream.runs.pack.memory import share_of
from millstream.runs.pack.objects import ObjectPieces
from millstream.runs.pack.pieces import Pieces
from millstream.runs.pack.planning import PART
from millstream.runs.pack.run import Run
from millstream.runs.pack.spill import pieces_of
from millstream.runs.pack.tokenizing import LARGE_PIECE, PIECE
from millstream.runs.pack.words import ADVICE, named
from millstream.store import Store, at

if TYPE_CHECKING:
    from millstream.engines.cluster import Sight

DEPTH = 2
"""Units that a worker has at once: one to do, and one to go on with."""
LARGE_PART = 4 * PART
"""Bytes of input in a part on a cluster, about, of a large corpus."""
_TOKEN = "seen-from-everywhere"


class Site(NamedTuple):
    """Who works, where pieces lie, how large a part and a piece are at most; `afar`: on machines that may not have all
    files."""

    pool: Engine
    pieces: Pieces
    part: int = PART
    piece: int = PIECE
    afar: bool = False


def site_of(run: Run, journal: Journal) -> Site:
    """Start a run's workers, or find them: `run` is told how many there are. Raises RequestError where a machine will
    not do."""
    how: dict[str, Any] = {
        "depth": DEPTH,
        "named": partial(named, shards=run.shards),
        "on_death": lambda why: journal.write(WorkerReplaced(why=why)),
        "advice": ADVICE,
    }
    if run.settings.on == "local":
        return Site(engine("local")(run.workers, **how), pieces_of(run))
    how["on_node"] = lambda why: journal.write(NodeChanged(why=why))
    address = None if run.settings.on == "ray" else run.settings.on
    files = pieces_of(run)
    share = share_of(run.settings, run.tokenizer, run.shards)
    look = _look_of(run, files.store)
    pool: Any = engine("ray")(run.settings.workers, **how, address=address, cores=cores(), check=look, share=share)
    run.workers, run.workers_why = pool.slots, pool.told
    run.nodes = lambda: [
        NodeTaken(node, len(some), sum(each.memory for each in some), round(sum(each.cpu for each in some), 3))
        for node, some in pool.taken.items()
    ]
    run.writers = 1 << 20  # as many as there are workers, who come and go: each has the memory for it
    pieces = ObjectPieces(files, pool.shelf) if run.settings.spill is None else files
    return Site(pool, pieces, LARGE_PART, LARGE_PIECE, afar=True)


def _look_of(run: Run, files: Store) -> "LookAround":
    token = secrets.token_hex(8)
    places = {at(run.out).below(PIECES).url: run.out, files.url: run.settings.spill or run.out}
    for url in places:
        at(url).make()
        at(url).put(_TOKEN, token.encode())
    named = [shard for shard in run.shards if shard.uri != "-"]
    sources = [(shard, shard.size()) for shard in {*named[:1], *named[-1:]}]
    return LookAround(os.getcwd(), places, token, sources)


@dataclass(frozen=True)
class LookAround:
    """Done on another machine, it says what is not there as it is here: folders, called as `places` has them by their
    addresses, in which the driver has left a `token`; and some sources with their sizes. Relative paths begin at
    `folder`, if that is there."""

    folder: str
    places: Mapping[str, str]
    token: str
    sources: Sequence[tuple[InputShard, int]]

    def __call__(self) -> "Sight":
        from millstream.engines.cluster import Sight

        with suppress(OSError):
            os.chdir(self.folder)
        return Sight(self._unseen() or self._other(), cores(), memory())

    def _unseen(self) -> str | None:
        for url, called in self.places.items():
            try:
                found = at(url).read(_TOKEN).decode()
            except OSError as error:
                found = str(error.strerror)
            if found != self.token:
                return f"does not see {called} as this machine does ({found}): give a folder that all nodes see"
        return None

    def _other(self) -> str | None:
        for shard, size in self.sources:
            try:
                found = shard.size()
                why = f"{found:,} bytes there, {size:,} here"
            except OSError as error:
                found, why = -1, str(error.strerror)
            if found != size:
                return f"does not see {shard.called} as this machine does ({why}): give sources that all nodes see"
        return None
