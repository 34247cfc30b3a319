"""Pieces outside the run folder, where `spill` says: a run has a folder of its own there, of which its journal tells,
so that they are deleted whatever a later call is given."""

import hashlib
import os

from millstream.folder.journal import Spilled, events
from millstream.folder.manifest import JOURNAL
from millstream.runs.pack.pieces import StoredPieces
from millstream.store import at, from_root


def pieces_in(spill: str, out: str) -> StoredPieces:
    """Those of the run in `out`, in a folder of its own below `spill`."""
    return StoredPieces(at(from_root(spill)).below(_name(out)))


def delete_pieces_elsewhere(out: str, here: StoredPieces | None = None) -> None:
    """Delete all pieces that earlier calls left outside the run folder, but for those that lie `here`."""
    if not at(out).exists(JOURNAL):
        return
    for folder in {event.folder for event in events(at(out), Spilled)}:
        # A copy of a run folder has the journal of the first one, whose pieces are not its own.
        if os.path.basename(folder) == _name(out) and (here is None or folder != here.store.url):
            StoredPieces(at(folder)).delete()


def _name(out: str) -> str:
    return "millstream-" + hashlib.blake2b(from_root(out).encode(), digest_size=6).hexdigest()
