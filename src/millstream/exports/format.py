"""What a format is: how one output shard of it is written, or how its one file goes on, and what is said at the end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from millstream.exports.out import Out
from millstream.folder.samples import Samples, ShardSamples
from millstream.records import Ids


@dataclass(frozen=True)
class Wrote:
    """What a task wrote of a subset: `ids` in all, of so many whole samples and perhaps the remainder; `files` as the
    manifest names them. `size`: bytes that an unfinished file has now."""

    samples: int = 0
    ids: int = 0
    files: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True)
class Format:
    """A format writes either files for each shard (`shard`, which counts the ids) or one file a subset, which `file`
    names, and to which `append` gives the ids of each shard.

    `index` comes at the end and knows only what was written, in order. `bits`: how large ids may be. `flat`: they are
    back to back, so that the kept remainder has a place at the end. `masked`: it can say which ids are to be learned.
    """

    bits: int
    shard: Callable[[ShardSamples, Out], int] | None = None
    file: Callable[[Samples], str] | None = None
    append: Callable[[ShardSamples], Iterator[Ids]] | None = None
    index: Callable[[Samples, list[Wrote], Out], None] | None = None
    flat: bool = False
    masked: bool = False
