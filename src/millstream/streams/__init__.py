"""Streams that compose and keep their place, over any iterable: `read`, `tokenize`, `split`, `pack`, and more.

They compose by passing one to the next. Inside data moves in columns, through the same readers and packers that a pack
run uses. `chain`, `zip`, `mix` and `repeat` make one of several; `map`, `filter`, `take`, `skip`, `enumerate`, `batch`
and `shuffle` change one. As some have the names of built-in functions, import the room: ``streams.zip(...)``. `ask` is
imported on first use, as an HTTP library comes with it.
"""

from typing import TYPE_CHECKING, Any

from millstream.streams.base import State, Stream
from millstream.streams.change import Batched, batch, enumerate, filter, map, shuffle, skip, take
from millstream.streams.combine import Mix, chain, mix, repeat, zip
from millstream.streams.folder import samples
from millstream.streams.pack import pack, split
from millstream.streams.read import read
from millstream.streams.stage import stage
from millstream.streams.tokenize import tokenize

if TYPE_CHECKING:
    from millstream.streams.asking import Answered, ask

__all__ = [
    "Answered",
    "Batched",
    "Mix",
    "State",
    "Stream",
    "ask",
    "batch",
    "chain",
    "enumerate",
    "filter",
    "map",
    "mix",
    "pack",
    "read",
    "repeat",
    "samples",
    "shuffle",
    "skip",
    "split",
    "stage",
    "take",
    "tokenize",
    "zip",
]


def __getattr__(name: str) -> Any:
    if name not in ("Answered", "ask"):
        raise AttributeError(f"module 'millstream.streams' has no attribute {name!r}")
    from millstream.streams import asking

    return getattr(asking, name)
