"""What a pooled run works with: its parts in turn and its shards being sealed share it."""

from dataclasses import dataclass

from millstream.folder.journal import Journal
from millstream.runs.pack.faults import Faults
from millstream.runs.pack.known import KnownParts
from millstream.runs.pack.pieces import Pieces
from millstream.runs.pack.run import Run
from millstream.runs.pack.spill import Spill
from millstream.runs.pack.tokenizing import TokenizePart
from millstream.runs.pack.traffic import Traffic


@dataclass(frozen=True)
class Shop:
    """A `run`, whose workers get units through `traffic`, to `tokenize` parts into `pieces`, of which `spill` keeps
    account; the `parts` that are known of earlier calls, its `faults` and its `journal`."""

    run: Run
    traffic: Traffic
    tokenize: TokenizePart
    pieces: Pieces
    spill: Spill
    parts: KnownParts
    faults: Faults
    journal: Journal
