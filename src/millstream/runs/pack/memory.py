"""How much memory a run takes at most, and how many workers fit into it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from millstream.errors import RequestError, setting, sized
from millstream.formats.sources import InputShard, rough_total
from millstream.formats.unpacking import unpacking_memory
from millstream.runs.pack.encode import CHECK_SIZE
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
    once; of what the reference checks, `checked` copies. `held` bytes are in windows and in what is unpacked."""

    longest: int
    copies: int = DOCUMENT_COPIES
    checked: int = 0
    held: int = 0
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
        return PARENT_MEMORY + ENGINE_MEMORY + self.engine + self.held

    def workers(self, count: int) -> int:
        """With `count` workers."""
        return PARENT_MEMORY + self.documents + self.held + count * (WORKER_MEMORY + self.engine)


def workers_of(settings: Settings, tokenizer: Tokenizer | None, shards: Sequence[InputShard]) -> tuple[int, str]:
    """(number of processes for a run, why). Raises RequestError if `memory` is less than it was measured to need."""
    total = rough_total(shards)
    need = need_of(settings, tokenizer, shards, total)
    limit = limit_of(settings, need)
    need = replace(need, held=need.held + unpacking_memory(shards, columns_of(settings), limit))
    return choose_workers(settings, need, limit, total)


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
    return Need(longest, copies, ENGINE_COPIES[reference], held, tokenizer.vocab_size)


def longest_document(settings: Settings, shards: Sequence[InputShard]) -> int:
    """Bytes that a document can have: as many as are allowed, or as the largest input has, where that is known."""
    allowed = settings.max_document or DEFAULT_MAX_DOCUMENT
    if not all(shard.seekable and shard.kind != "parquet" for shard in shards):
        return allowed
    return min(allowed, max(map(_size, shards), default=0))


def _size(shard: InputShard) -> int:
    try:
        return os.path.getsize(shard.uri)
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


def choose_workers(settings: Settings, need: Need, limit: int, total_bytes: int | None) -> tuple[int, str]:
    """(number of processes, why), of which all together take at most `limit` bytes.

    Raises RequestError if that is less than they were measured to need.
    """
    if limit < need.alone + need.documents:
        raise RequestError(_too_little(need, limit))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = max(1, (limit - need.workers(0)) // (need.workers(1) - need.workers(0)))
    if settings.workers is not None:
        if settings.workers > room:
            wanted = _whole(need.workers(settings.workers))
            raise RequestError(
                f"{setting('workers', settings.workers)} needs up to {wanted // MIB} MiB, and the limit is "
                f"{sized('memory', limit)}. Give {sized('memory', wanted)} or {setting('workers', room)}"
            )
        return settings.workers, "as asked"
    worth = cores if total_bytes is None else max(1, total_bytes // WORTH_A_WORKER)
    if worth < cores and worth <= room:
        return worth, "the input is small"
    if room < cores:
        return room, f"as many as fit into {limit // MIB}MiB; there are {cores} cores"
    return cores, "one a core"


def _too_little(need: Need, limit: int) -> str:
    wanted = _whole(need.alone + need.documents)
    fits = max(0, limit - need.alone) // max(need.copies, need.checked) // MIB
    lower = f", or {sized('max_document', fits * MIB)}" if fits else ""
    window = f" and {need.held / MIB:.3g} MiB of windows" if need.held else ""
    return (
        f"{sized('memory', limit)} is too little: documents of up to {need.longest / MIB:.3g} MiB{window} need up to "
        f"{wanted // MIB} MiB with this tokenizer. Give {sized('memory', wanted)}{lower}"
    )


def _whole(size: int) -> int:
    """Up to the next MiB."""
    return -(-size // MIB) * MIB
