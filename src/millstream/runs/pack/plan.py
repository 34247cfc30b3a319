"""What packing a corpus would give, before it is done: from the lengths of its documents, or of some of them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from millstream.errors import DataError, RequestError
from millstream.formats.documents import Fields
from millstream.formats.slices import Limits
from millstream.formats.sources import InputShard, expand
from millstream.records import SEGMENT, Ids
from millstream.runs.pack.blocks import ENOUGH, BlockReader, Part, rough_size
from millstream.runs.pack.encode import Encode, engine_of
from millstream.runs.pack.settings import (
    DEFAULT_MAX_DOCUMENT,
    MIB,
    Settings,
    check_settings,
    choose_workers,
    identity,
    window_memory,
)
from millstream.stream.bestfit import WINDOW, assign
from millstream.stream.line import STRATEGIES
from millstream.stream.pack import weight
from millstream.stream.tokenizers import Tokenizer, load_tokenizer

SEQ_LENS = (1024, 2048, 4096, 8192)
RESAMPLES = 1000
FEW = 100
"""Documents below which an estimate is called rough."""


class Estimate(NamedTuple):
    """A number, and between which two it lies with 95 % confidence; all three are equal if it was counted."""

    value: int
    low: int
    high: int

    @property
    def exact(self) -> bool:
        return self.low == self.high


@dataclass(frozen=True)
class Choice:
    """What one strategy would give with samples of `seq_len` ids.

    Of the documents that have ids, `truncation` is the share that is cut, `needless` the share that is cut though it
    fits into a sample, `concatenation` the share that is in a sample with another one. `padding` is a share of the ids
    in samples, `remainder` the ids that fill no sample (None: not counted). `bytes` on disk are samples, remainder and
    segments; `seconds` are for reading and tokenizing with `workers` processes.
    """

    seq_len: int
    strategy: str
    samples: Estimate
    padding_ids: int
    remainder: int | None
    split: int
    padding: float
    truncation: float
    needless: float
    concatenation: float
    documents_per_sample: float
    bytes: int
    seconds: float
    workers: int


@dataclass(frozen=True)
class Bin:
    """Documents with more than half of `longest` ids, up to `longest`: how many, and their ids."""

    longest: int
    documents: int
    ids: int


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. `exact`: the whole corpus was read, so everything but the seconds was counted.

    `documents` are all of them, with the `empty` and the `faulty`; `faults` counts those met, by reason, and `examples`
    has one of each. `bytes_total` is None where it cannot be told; `quantiles` of the documents' lengths in ids, by
    percent. `ids_per_second` is the speed of one worker.
    """

    exact: bool
    tokenizer: str | None
    bytes_read: int
    bytes_total: int | None
    documents_read: int
    documents: Estimate
    empty: int
    faulty: int
    ids: Estimate
    lengths: list[Bin]
    quantiles: dict[int, int]
    choices: list[Choice]
    ids_per_second: float
    faults: dict[str, int]
    examples: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        plan = asdict(self)
        for where in (plan, *plan["choices"]):
            where.update({name: value._asdict() for name, value in where.items() if isinstance(value, Estimate)})
        return plan


def make_plan(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    settings: Settings | None = None,
    seq_lens: Sequence[int] = SEQ_LENS,
    strategies: Sequence[str] = STRATEGIES,
    *,
    sample: int = 64 * MIB,
    seed: int = 0,
    **named: Any,
) -> Plan:
    """What packing `sources` would give for every one of `seq_lens` and `strategies`; nothing is written.

    `settings` or its fields by name are those of `pack_to`. About `sample` bytes are read, of which `seed` decides the
    places; a corpus that is no larger is read whole. Raises RequestError for wrong settings and if there is nothing to
    plan, DataError if no document can be used.

    >>> plan = make_plan("stdlib:", seq_lens=[2048], strategies=["split"], sample=1 << 20)
    >>> plan.exact, plan.ids.low < plan.ids.value < plan.ids.high
    (False, True)
    """
    settings = replace(settings or Settings(), **named)
    pairs = [(n, strategy) for n in seq_lens for strategy in strategies]
    for n, strategy in pairs:
        check_settings(replace(settings, seq_len=n, strategy=strategy))
    if sample < 1:
        raise RequestError(f"--sample {sample} does not work: give a size such as 64MiB")
    shards = expand([sources] if isinstance(sources, str | os.PathLike) else list(sources))
    name = settings.tokenizer_name
    tokenizer = load_tokenizer(name) if name else None
    workers = _workers(settings, strategies, tokenizer, shards)
    reader = _reader(settings, tokenizer, sample, seed)
    parts = reader.parts(shards)
    corpus = _Corpus(parts, seed)
    _refuse_nothing(corpus, reader)

    layouts = [layout(corpus.stand_ins, n, strategy) for n, strategy in pairs]
    documents, empty, faulty, ids, *samples = corpus.totals([corpus.shares(found.share) for found in layouts])
    exact = len(parts) == 1 and parts[0].whole and not reader.cut
    if exact:  # sums of shares are whole numbers only if no remainder is left
        samples = [Estimate(found.samples, found.samples, found.samples) for found in layouts]
    rate = reader.ids / max(reader.seconds, 1e-9)
    totals = _Totals(
        corpus.stand_ins,
        documents.value - empty.value - faulty.value,
        ids.value,
        tokenizer.dtype.itemsize if tokenizer else 4,
        rate,
    )
    few = not exact and not reader.cut and len(corpus.length) < FEW
    rough = f"only {len(corpus.length):,} documents were read: the estimate is rough, a larger --sample is better"
    return Plan(
        exact=exact,
        tokenizer=name,
        bytes_read=reader.bytes,
        bytes_total=reader.bytes if exact else _rough_total(shards),
        documents_read=len(corpus.length),
        documents=documents,
        empty=empty.value,
        faulty=faulty.value,
        ids=ids,
        lengths=corpus.bins(),
        quantiles=corpus.quantiles((10, 50, 90, 99, 100)),
        choices=[
            totals.choice(n, strategy, found, count, workers[strategy])
            for (n, strategy), found, count in zip(pairs, layouts, samples, strict=True)
        ],
        ids_per_second=rate,
        faults=dict(reader.faults),
        examples=reader.examples,
        notes=[*reader.notes, rough] if few else reader.notes,
    )


def _rough_total(shards: list[InputShard]) -> int | None:
    return None if any(shard.uri == "-" for shard in shards) else sum(map(rough_size, shards))


def _workers(
    settings: Settings, strategies: Iterable[str], tokenizer: Tokenizer | None, shards: list[InputShard]
) -> dict[str, int]:
    """How many processes a run of each strategy would take."""
    rough, found = _rough_total(shards), {}
    dtype, vocab_size = (tokenizer.dtype, tokenizer.vocab_size) if tokenizer else (np.dtype(np.uint32), 0)
    longest = settings.max_document or DEFAULT_MAX_DOCUMENT
    for strategy in strategies:
        held = window_memory(replace(settings, strategy=strategy), dtype.itemsize, rough)
        found[strategy], _ = choose_workers(settings, vocab_size, longest, rough, held)
    return found


def _reader(settings: Settings, tokenizer: Tokenizer | None, sample: int, seed: int) -> BlockReader:
    """A reader of what a pack run would read, its tokenizer loaded."""
    known = identity(replace(settings, strategy="concat", remainder="keep"), tokenizer)
    longest, text_too = known["max_document"]["bytes"], known["max_document"]["plain_text_too"]
    max_id = tokenizer.vocab_size - 1 if tokenizer else 0xFFFFFFFF
    encode = Encode(
        Fields(settings.text_field, settings.id_field, settings.ids_field, max_id),
        settings.tokenizer_name,
        tokenizer.sha256 if tokenizer else None,
        known["bos_id"],
        known["eos_id"],
        longest,
        engine=settings.engine,
    )
    if tokenizer and not settings.ids_field:
        engine_of(tokenizer.name, tokenizer.sha256, settings.engine).engine.encode(["loaded before time is taken"])
    limits = Limits(longest, longest if text_too else None, bool(tokenizer and tokenizer.safe_cuts))
    return BlockReader(encode, limits, sample, seed)


def _refuse_nothing(corpus: "_Corpus", reader: BlockReader) -> None:
    if corpus.length.any():
        return
    for reason, example in reader.examples.items():
        faulty = f"none of {reader.faults.total():,} documents can be used"
        raise DataError(f"{faulty}; the first is {reason.replace('_', ' ')}: {example}")
    raise RequestError("there is no text in the corpus: nothing to plan")


@dataclass(frozen=True)
class _Totals:
    """`length` stands for `documents` documents with `ids` ids, of `itemsize` bytes; a worker makes `rate` a second."""

    length: Ids
    documents: int
    ids: int
    itemsize: int
    rate: float

    def choice(self, n: int, strategy: str, found: "Layout", samples: Estimate, workers: int) -> Choice:
        filled = self.length > 0
        cut = float(found.cut[filled].mean())
        padding = found.padding / max(1, found.samples * n)
        segments = round(found.segments * self.ids / int(self.length.sum()))
        return Choice(
            n,
            strategy,
            samples,
            round(samples.value * n * padding),
            found.remainder if samples.exact else None,
            round(cut * self.documents),
            padding,
            cut,
            float((found.cut & (self.length <= n))[filled].mean()),
            float(found.shared[filled].mean()),
            found.inside / max(1, found.samples),
            (samples.value * n + found.remainder) * self.itemsize + segments * SEGMENT.itemsize,
            self.ids / self.rate / workers,
            workers,
        )


# Packing lengths without ids ----------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How documents of known lengths are packed.

    `segments` of which `inside` are in samples, the others in the remainder; for every document `share`, how many
    samples it takes up with its part of their padding, whether it is `cut`, and whether it is in a sample that is
    `shared`.
    """

    samples: int
    padding: int
    remainder: int
    segments: int
    inside: int
    share: Ids
    cut: Ids
    shared: Ids


def layout(length: Ids, n: int, strategy: str, window: int = WINDOW) -> Layout:
    """What a strategy makes of documents of `length` ids, in this order, with samples of `n` ids.

    >>> layout(np.array([3, 0, 2, 5]), 4, "concat")[:5]
    (2, 0, 2, 5, 4)
    >>> layout(np.array([3, 0, 2, 5]), 4, "split")[:5]
    (4, 6, 0, 4, 4)
    >>> layout(np.array([3, 0, 2, 5]), 4, "best-fit")[:5]
    (3, 2, 0, 4, 4)
    """
    if strategy == "concat":
        return _concat(length, n)
    if strategy == "split":
        return _split(length, n)
    return _best_fit(length, n, window)


def _concat(length: Ids, n: int) -> Layout:
    stops = np.cumsum(length)
    starts, total = stops - length, int(length.sum())
    first, last = starts // n, np.maximum(stops - 1, starts) // n
    filled = length > 0
    shared = filled & ((starts % n > 0) | ((stops % n > 0) & (stops < total)))
    touched = np.where(filled, last - first + 1, 0)
    beyond = int((filled & (last == total // n)).sum())  # each has one segment in the remainder
    segments = int(touched.sum())
    return Layout(total // n, 0, total % n, segments, segments - beyond, length / n, filled & (first != last), shared)


def _split(length: Ids, n: int) -> Layout:
    pieces = -(-length // n)
    samples = int(pieces.sum())
    padding = samples * n - int(length.sum())
    none = np.zeros(len(length), bool)
    return Layout(samples, padding, 0, samples, samples, pieces.astype(float), length > n, none)


def _best_fit(length: Ids, n: int, window: int) -> Layout:
    """As `BestFit` does it, window by window, without ids."""
    full, rest = length // n, length % n
    share, shared = full.astype(float), np.zeros(len(length), bool)
    samples = int(full.sum())
    weights = np.cumsum(weight(length))
    low = before = 0
    while low < len(length):
        high = min(int(np.searchsorted(weights, before + window)) + 1, len(length))
        pieces = low + np.flatnonzero(rest[low:high])
        bins, count = assign(rest[pieces], n)
        ids, documents = np.bincount(bins, rest[pieces], count), np.bincount(bins, minlength=count)
        share[pieces] += rest[pieces] / ids[bins]
        shared[pieces] = documents[bins] > 1
        samples += count
        low, before = high, int(weights[high - 1])
    segments = int(full.sum() + (rest > 0).sum())
    return Layout(samples, samples * n - int(length.sum()), 0, segments, segments, share, length > n, shared)


# What was read stands for the whole ---------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """Sums over a part, their variance, and for other choices of its blocks how far they are `off` with the variance
    that is estimated then."""

    total: Ids
    variance: Ids
    off: Ids
    variances: Ids


class _Corpus:
    """The documents that were read, what each of them stands for, and what follows for the whole corpus."""

    def __init__(self, parts: list[Part], seed: int) -> None:
        self._parts = parts
        self._random = np.random.default_rng([seed, 2])
        blocks = [(part.scale * block.weight, block) for part in parts for block in part.blocks]
        self.length = np.concatenate([block.length for _, block in blocks]) if blocks else np.zeros(0, np.int64)
        counts = [len(block.length) for _, block in blocks]
        self._weight = np.repeat([weight for weight, _ in blocks], counts)  # documents that each stands for
        self._block = np.repeat(np.arange(len(blocks)), counts)
        self._faulty = np.array([block.faulty for _, block in blocks], float)
        self._copies = self._stand_ins()
        self.stand_ins = np.repeat(self.length, self._copies)

    def _stand_ins(self) -> Ids:
        """How often each document comes in a small corpus that is like the whole one: best-fit fills the window of a
        large corpus better than the few documents that were read, and parts were not read with the same density."""
        if not len(self.length):
            return np.zeros(0, np.int64)
        whole = float((self._weight * weight(self.length)).sum())
        times = self._weight * max(min(1.0, WINDOW / whole), 1 / float(self._weight.min()))
        spread = np.floor(times + self._random.random(len(times)) * (times % 1 > 0))
        return np.maximum(1, spread).astype(np.int64)

    def shares(self, share: Ids) -> Ids:
        """A number for every stand-in, as its mean for every document that was read."""
        document = np.repeat(np.arange(len(self.length)), self._copies)
        return np.bincount(document, share, len(self.length)) / self._copies

    def totals(self, columns: list[Ids]) -> list[Estimate]:
        """Documents, empty ones, faulty ones, ids, and the sums of `columns`, in the whole corpus.

        The interval is a bootstrap over blocks: as many are drawn again from those that were read, and how far the
        total is off then, in standard errors, is how far it may be off now. Standard errors, because a choice without
        the few longest documents gives a wrong total and a too small error at once.
        """
        count = len(self._faulty)
        sums = [
            np.bincount(self._block, minlength=count) + self._faulty,
            np.bincount(self._block, self.length == 0, count),
            self._faulty,
            *(np.bincount(self._block, column, count) for column in (self.length, *columns)),
        ]
        table, low, found = np.stack(sums, axis=1), 0, []
        for part in self._parts:
            high = low + len(part.blocks)
            found.append(self._drawn(part, table[low:high]))
            low = high
        total, variance = sum(f.total for f in found), sum(f.variance for f in found)
        off, variances = sum(f.off for f in found), sum(f.variances for f in found)
        errors = np.divide(off, np.sqrt(variances), out=np.zeros_like(off), where=variances > 0)
        lower, upper = total - np.percentile(errors, [97.5, 2.5], axis=0) * np.sqrt(variance)
        numbers = np.rint([total, np.minimum(lower, total), np.maximum(upper, total)]).astype(np.int64)
        return [Estimate(*column) for column in np.maximum(numbers, 0).T.tolist()]

    def _drawn(self, part: Part, sums: Ids) -> "_Drawn":
        """The whole part's sums, from those of its blocks."""
        weights = np.array([block.weight for block in part.blocks])
        sizes = np.array([block.size for block in part.blocks])
        x, y = sizes * weights, sums * weights[:, None]
        total = y.sum(axis=0) * part.scale
        counted = _Drawn(total, 0 * total, np.zeros((RESAMPLES, len(total))), np.zeros((RESAMPLES, len(total))))
        if part.whole:
            return counted
        clusters = np.unique([block.cluster for block in part.blocks], return_inverse=True)[1]
        if clusters.max() + 1 >= ENOUGH:
            x, y = np.bincount(clusters, x), np.stack([np.bincount(clusters, column) for column in y.T], axis=1)
        n = len(x)
        times = np.vstack([np.ones(n), self._random.multinomial(n, np.full(n, 1 / n), RESAMPLES)])
        size = np.maximum(times @ x, 1e-9)[:, None]
        ratio = times @ y / size
        squares = times @ y**2 - 2 * ratio * (times @ (y * x[:, None])) + ratio**2 * (times @ x**2)[:, None]
        variance = np.maximum(squares, 0) * (part.total / size) ** 2 * (n / max(1, n - 1))
        unread = max(0.0, 1 - float(sizes.sum()) / part.total)
        drawn = _Drawn(total, variance[0] * unread, (ratio[1:] - ratio[0]) * part.total, variance[1:])
        if part.documents is not None:
            for mine, known in zip(drawn, (part.documents, 0, 0, 0), strict=True):
                mine[..., 0] = known
        return drawn

    def bins(self) -> list[Bin]:
        """Documents by length, in powers of two, from the shortest to the longest."""
        filled = self.length > 0
        if not filled.any():
            return []
        length, weights = self.length[filled], self._weight[filled]
        number = np.ceil(np.log2(length)).astype(np.int64)
        documents, ids = np.bincount(number, weights), np.bincount(number, weights * length)
        shortest = int(number.min())
        return [
            Bin(1 << exponent, round(documents[exponent]), round(ids[exponent]))
            for exponent in range(shortest, len(documents))
        ]

    def quantiles(self, percents: Sequence[int]) -> dict[int, int]:
        filled = np.flatnonzero(self.length)
        order = filled[np.argsort(self.length[filled], kind="stable")]
        below = np.cumsum(self._weight[order])
        at = np.searchsorted(below, below[-1] * np.array(percents) / 100 * (1 - 1e-12))
        return dict(zip(percents, self.length[order][np.minimum(at, len(order) - 1)].tolist(), strict=True))
