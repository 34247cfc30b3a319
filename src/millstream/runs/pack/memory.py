"""How much memory a run takes at most, and how many workers fit into it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from millstream.corpus.sources import InputShard, rough_total
from millstream.corpus.unpacking import unpacking_memory
from millstream.errors import RequestError, setting, sized
from millstream.runs.pack.encode import CHECK_SIZE
from millstream.runs.pack.machine import cores, memory
from millstream.runs.pack.settings import (
    DEFAULT_MAX_DOCUMENT,
    DEFAULT_MEMORY,
    MIB,
    Settings,
    columns_of,
    paces,
    windows,
)
from millstream.stream.pack import LEAST
from millstream.stream.tokenizers import Tokenizer

# Peak resident memory, measured: the parent with Arrow; what GPT-2's engine and its word cache grow to on words that
# never repeat, in the parent or in a worker of its own; what a larger vocabulary adds an id (o200k: 90 MiB); and
# copies of a document that is decoded, tokenized and packed.
PARENT_MEMORY = 160 * MIB
ENGINE_MEMORY = 180 * MIB
WORKER_MEMORY = 270 * MIB
ID_MEMORY = 640
GPT2_IDS = 50_257
LARGE_PIECE_MEMORY = 100 * MIB  # that one of a cluster's size takes beyond a usual one, until it is put
FAR_MEMORY = 32 * MIB  # of what is read from far away: two ranges, and the client
DOCUMENT_COPIES = 10
HELD_DOCUMENT = 320  # what is kept of each document in a window besides its ids, until the window is handed out
HELD_SAMPLE = 32  # bytes, of each in a window of best-fit: their order
WORTH_A_WORKER = 24 * MIB
"""Bytes of input below which starting another process takes longer than it saves."""

# Bytes for each byte of text while it becomes ids, measured with the text that is worst for an engine: one word for
# those that merge its bytes (57; prose takes 10); for `tokenizers`, which makes objects, blanks that are words of their
# own (324; prose 110 to 205), and where each id's letters are asked for too (483).
ENGINE_COPIES = {"fastokens": 64, "tiktoken": 64, "tokenizers": 340}
LETTERS_COPIES = 500


@dataclass(frozen=True)
class Need:
    """What a run holds at most: `copies` of the `longest` document, in bytes, and of the text that a worker has at
    once; of what the reference checks, `checked` copies. Who packs holds `held` bytes in windows, who reads `unpacked`
    bytes in what is unpacked."""

    longest: int
    copies: int = DOCUMENT_COPIES
    checked: int = 0
    held: int = 0
    unpacked: int = 0
    vocab_size: int = 0

    @property
    def documents(self) -> int:
        return max(self.copies * self.longest, self.checked * min(self.longest, CHECK_SIZE))

    @property
    def engine(self) -> int:
        """What this tokenizer takes beyond GPT-2's, in each process."""
        more = max(0, self.copies - ENGINE_COPIES["fastokens"], self.checked - ENGINE_COPIES["fastokens"])
        return ID_MEMORY * max(0, self.vocab_size - GPT2_IDS) + more * MIB

    @property
    def alone(self) -> int:
        """With one process, besides documents."""
        return PARENT_MEMORY + ENGINE_MEMORY + self.engine + self.held + self.unpacked

    def workers(self, count: int, writers: int = 1) -> int:
        """With `count` workers, of which so many write output shards at once. Long documents take turns
        (`engines.turns`), so that they count once."""
        each = WORKER_MEMORY + self.engine + self.unpacked
        return PARENT_MEMORY + self.documents + writers * self.held + count * each


class Crew(NamedTuple):
    """How many processes a run has, why, and how many of them write output shards at once."""

    workers: int
    why: str
    writers: int = 1


def workers_of(settings: Settings, tokenizer: Tokenizer | None, shards: Sequence[InputShard]) -> Crew:
    """The processes for a run. Raises RequestError if `memory` is less than it was measured to need; where it is not
    given, the `workers` asked for have what they need, if this machine has it."""
    total = rough_total(shards)
    need = need_of(settings, tokenizer, shards, total)
    limit = limit_of(settings, need)
    fetched = FAR_MEMORY if any(shard.far for shard in shards) else 0
    need = replace(need, unpacked=unpacking_memory(shards, columns_of(settings), limit) + fetched)
    wanted = _whole(need.workers(settings.workers)) if settings.workers and settings.memory is None else 0
    here = memory()
    if wanted > limit and (here is None or wanted <= here):
        crew = choose_workers(settings, need, wanted, total)
        return crew._replace(why=f"{crew.why}, with up to {wanted // MIB:,} MiB")
    return choose_workers(settings, need, limit, total)


def share_of(
    settings: Settings, tokenizer: Tokenizer | None, shards: Sequence[InputShard]
) -> Callable[[int, int], int]:
    """How many workers a machine has for a run, which has so many cores and bytes of memory; `memory` is what a run may
    take on each. Any of them may write output shards."""
    need = need_of(settings, tokenizer, shards, rough_total(shards))

    def share(cores: int, there: int) -> int:
        limit = there if settings.memory is None else min(settings.memory, there)
        own = replace(need, unpacked=unpacking_memory(shards, columns_of(settings), limit) + LARGE_PIECE_MEMORY)
        return max((count for count in range(1, cores + 1) if own.workers(count, count) <= limit), default=0)

    return share


def limit_of(settings: Settings, need: Need) -> int:
    """`memory`; if it is not given, 1 GiB and what this tokenizer takes beyond ten copies of a document."""
    if settings.memory is not None:
        return settings.memory
    return DEFAULT_MEMORY + max(0, need.documents - DOCUMENT_COPIES * need.longest) + 2 * need.engine


def need_of(
    settings: Settings, tokenizer: Tokenizer | None, shards: Sequence[InputShard], total_bytes: int | None
) -> Need:
    """What a run of these inputs needs, but for unpacking them; `total_bytes` of input, None if that is unknown."""
    longest = longest_document(settings, shards)
    itemsize = 4 if settings.masked or tokenizer is None else tokenizer.dtype.itemsize
    held = window_memory(settings, itemsize, total_bytes)
    if tokenizer is None or settings.ids_field:
        return Need(longest, held=held)
    letters = settings.masked and tokenizer.definition is not None
    letters = letters and (tokenizer.bytes_of is None or tokenizer.normalized is not None)
    reference = tokenizer.reference_name or tokenizer.engine_name
    engine = reference if settings.engine == "reference" else tokenizer.engine_name
    copies = LETTERS_COPIES if letters else ENGINE_COPIES[engine]
    return Need(longest, copies, ENGINE_COPIES[reference], held, vocab_size=tokenizer.vocab_size)


def longest_document(settings: Settings, shards: Sequence[InputShard]) -> int:
    """Bytes that a document can have: as many as are allowed, or as the largest input has, where that is known."""
    allowed = settings.max_document or DEFAULT_MAX_DOCUMENT
    if not all(shard.seekable and shard.kind != "parquet" for shard in shards):
        return allowed
    return min(allowed, max(map(_size, shards), default=0))


def _size(shard: InputShard) -> int:
    try:
        return shard.size()
    except OSError:
        return 0  # a fault when it is read


def window_memory(settings: Settings, itemsize: int, total_bytes: int | None) -> int:
    """Bytes that windows need at most, for ids of `itemsize` bytes; `total_bytes` of input, None if that is unknown."""
    most = math.inf if total_bytes is None else 2 * total_bytes  # roughly, and no text has more ids than bytes
    best_fit, shuffled = (window or 0 for window in windows(settings))
    ids = min(best_fit + shuffled, most)
    short = ids * HELD_DOCUMENT / LEAST
    # Full samples come of long documents, of which there are fewer; only of a few ids each do they take more.
    n = settings.seq_len
    long = min(best_fit, most) * (HELD_DOCUMENT / max(n, LEAST) + HELD_SAMPLE / n)
    return int((ids * itemsize + max(short, long)) * sum(paces(settings.validation)))


def choose_workers(settings: Settings, need: Need, limit: int, total_bytes: int | None) -> Crew:
    """The processes for a run, of which all together take at most `limit` bytes.

    Raises RequestError if that is less than they were measured to need.
    """
    count, why = _count_and_why(settings, need, limit, total_bytes)
    writers = next((some for some in range(count, 1, -1) if need.workers(count, some) <= limit), 1)
    return Crew(count, why, writers)


def _count_and_why(settings: Settings, need: Need, limit: int, total_bytes: int | None) -> tuple[int, str]:
    if limit < need.alone + need.documents:
        raise RequestError(_too_little(need, limit))
    most = cores()
    room = max(1, (limit - need.workers(0)) // (need.workers(1) - need.workers(0)))
    if settings.workers is not None:
        if settings.workers > room:
            wanted = _whole(need.workers(settings.workers))
            raise RequestError(
                f"{setting('workers', settings.workers)} needs up to {wanted // MIB} MiB, and the limit is "
                f"{_told(limit)}. Give {sized('memory', wanted)} or {setting('workers', room)}"
            )
        return settings.workers, "as asked"
    worth = most if total_bytes is None else max(1, total_bytes // WORTH_A_WORKER)
    if worth < most and worth <= room:
        return worth, "the input is small"
    if room < most:
        return room, f"as many as fit into {limit // MIB}MiB; there are {most} cores"
    return most, "one a core"


def _too_little(need: Need, limit: int) -> str:
    wanted = _whole(need.alone + need.documents)
    fits = max(0, limit - need.alone) // max(need.copies, need.checked) // MIB
    lower = f", or {sized('max_document', fits * MIB)}" if fits else ""
    held = need.held + need.unpacked
    window = f" and {held / MIB:.3g} MiB of windows" if held else ""
    longest = f"documents of up to {_whole(need.longest) // MIB} MiB{window}"
    return (
        f"{_told(limit)} is too little: {longest} need up to {wanted // MIB} MiB with this tokenizer. "
        f"Give {sized('memory', wanted)}{lower}"
    )


def _told(limit: int) -> str:
    """The limit as a setting; nobody has given the odd bytes of one that comes from the size of documents."""
    return sized("memory", limit // MIB * MIB or limit)


def _whole(size: int) -> int:
    """Up to the next MiB."""
    return -(-size // MIB) * MIB
