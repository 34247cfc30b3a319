"""What packing a corpus would give, before it is done: from the lengths of its documents, or of some of them."""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from millstream.corpus.documents import Fields
from millstream.corpus.find import FoundInputs, find_inputs, ignored_files
from millstream.corpus.limits import Limits
from millstream.corpus.parquet import check_columns
from millstream.corpus.sources import rough_total
from millstream.errors import DataError, RequestError, RunError, Unusable, Words, either, setting, sized
from millstream.records import SEGMENT, Ids
from millstream.runs.pack.encode import Encode, engine_of
from millstream.runs.pack.memory import workers_of
from millstream.runs.pack.settings import (
    MIB,
    Settings,
    chat_of,
    check_settings,
    column_flag,
    columns_of,
    identity,
    with_named,
)
from millstream.runs.plan.blocks import BlockReader
from millstream.runs.plan.estimates import DOCUMENTS, Corpus, Estimate, Sums
from millstream.stream.bestfit import WINDOW
from millstream.stream.layout import Layout, kept, layout
from millstream.stream.line import STRATEGIES
from millstream.stream.pack import weight
from millstream.stream.tokenizers import Tokenizer, load_tokenizer

SEQ_LENS = (1024, 2048, 4096, 8192)
PERCENTS = (10, 50, 90, 99)
ENDS = 10
"""Documents that must have been read beyond a quantile, so that something can be said of it."""
FEW = 100
"""Documents below which an estimate is called rough."""


@dataclass(frozen=True)
class Choice:
    """What one strategy would give with samples of `seq_len` ids.

    `split` documents are in more than one sample, `overlong` ones are truncated, left out or faults, by the setting of
    this name, and `cut_off` ids of theirs are not kept. Of the documents that have ids, `truncation` is the share that
    is split, `needless` the share that is split though it fits into a sample, `concatenation` the share that is in a
    sample with another one. `padding` is a share of the ids in samples, `remainder` the ids that fill no sample (None:
    not counted). `bytes` on disk are samples, remainder and segments; `seconds` are for reading and tokenizing with
    `workers` processes.
    """

    seq_len: int
    strategy: str
    samples: Estimate
    padding_ids: Estimate
    remainder: int | None
    split: Estimate
    overlong: Estimate
    cut_off: Estimate
    padding: Estimate
    truncation: Estimate
    needless: Estimate
    concatenation: Estimate
    documents_per_sample: Estimate
    bytes: Estimate
    seconds: Estimate
    workers: int


@dataclass(frozen=True)
class Bin:
    """Documents with more than half of `longest` ids, up to `longest`: how many, and their ids."""

    longest: int
    documents: Estimate
    ids: Estimate


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. `exact`: the whole corpus was read, so everything but the seconds was counted.

    `documents` are all of them, with the `empty` and the `faulty`; `faults` counts those met, by reason, and `examples`
    has one of each. `bytes_total` is rough for packed text and Parquet, and None for standard input. `quantiles` of the
    lengths of documents that have ids are by percent, those of which enough was read; `longest` is the longest that was
    read. `ids_per_second` is the speed of one worker.
    """

    exact: bool
    tokenizer: str | None
    bytes_read: int
    bytes_total: int | None
    documents_read: int
    documents: Estimate
    empty: Estimate
    faulty: Estimate
    ids: Estimate
    lengths: list[Bin]
    quantiles: dict[int, Estimate]
    longest: int
    choices: list[Choice]
    ids_per_second: float
    faults: dict[str, int]
    examples: dict[str, str]
    notes: list[Words]

    def as_json(self) -> dict[str, Any]:
        """Plain data; an estimate is {"value", "low", "high"}, the last two None where nothing can be said of them."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {name: end if math.isfinite(end) else None for name, end in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


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

    `settings` or its fields by name are those of `pack_to`; those for a shuffle, subsets, a limit, the remainder and
    the output change no plan. About `sample` bytes are read, of which `seed` decides the places; a corpus that is no
    larger is read whole. Raises RequestError for wrong settings and if there is nothing to plan, DataError if no
    document can be used, RunError if reading fails.

    >>> plan = make_plan("stdlib:", seq_lens=[2048], strategies=["split"], sample=1 << 20)
    >>> plan.exact, plan.ids.low < plan.ids.value < plan.ids.high
    (False, True)
    """
    settings = with_named("make_plan", settings, named)
    if sample < 1:
        raise RequestError(f"{sized('sample', sample)} does not work: give a size such as 64MiB")
    if not seq_lens or not strategies:
        raise RequestError(f"nothing to compare: give at least one {either('seq_len', '--seq-len')} and one strategy")
    wanted = [
        _settings_of(settings, n, name, strategies)
        for n in dict.fromkeys(seq_lens)
        for name in dict.fromkeys(strategies)
    ]
    inputs = find_inputs([sources] if isinstance(sources, str | os.PathLike) else list(sources))
    shards = inputs.shards
    check_columns(shards, columns_of(settings)[:-1], column_flag(settings))
    name = settings.tokenizer_name
    tokenizer = load_tokenizer(name) if name else None
    workers = {each.strategy: workers_of(each, tokenizer, shards)[0] for each in wanted}
    try:
        reader = _reader(settings, tokenizer, sample, seed)
        parts = reader.parts(shards)
    except OSError as error:
        raise RunError(str(error)) from error
    reader.notes += _left_out(inputs)
    corpus = Corpus(parts, seed)
    exact = len(parts) == 1 and parts[0].whole and not reader.cut
    _refuse_nothing(corpus, reader, exact)
    return _plan(corpus, reader, wanted, workers, exact=exact, tokenizer=tokenizer, rough_total=rough_total(shards))


def _settings_of(settings: Settings, seq_len: int, strategy: str, strategies: Sequence[str]) -> Settings:
    """Those of one choice, checked. What belongs to best-fit is not for others beside it."""
    chosen = replace(settings, seq_len=seq_len, strategy=strategy)
    if strategy != "best-fit" and "best-fit" in strategies:
        chosen = replace(chosen, window=None, max_segments=None)
    check_settings(chosen)
    return chosen


def _reader(settings: Settings, tokenizer: Tokenizer | None, sample: int, seed: int) -> BlockReader:
    """A reader of what a pack run would read, its tokenizer loaded."""
    known = identity(replace(settings, strategy="concat", remainder="keep"), tokenizer)
    longest, text_too = known.max_document.bytes, known.max_document.plain_text_too
    max_id = tokenizer.vocab_size - 1 if tokenizer else 0xFFFFFFFF
    chat = chat_of(settings, tokenizer)
    encode = Encode(
        Fields(settings.text_field, settings.id_field, settings.ids_field, max_id, chat.render if chat else None),
        settings.tokenizer_name,
        tokenizer.sha256 if tokenizer else None,
        known.bos_id,
        known.eos_id,
        longest,
        engine=settings.engine,
        masked=settings.masked,
    )
    if tokenizer and encode.tokenizer and not settings.ids_field:
        with contextlib.suppress(Unusable):
            engine_of(encode.tokenizer, tokenizer.sha256, settings.engine).engine.encode(
                ["loaded before time is taken"]
            )
    cut = bool(tokenizer and tokenizer.safe_cuts and not (settings.ids_field or settings.chat))
    limits = Limits(longest, longest if text_too else None, cut)
    return BlockReader(encode, limits, columns_of(settings), sample, seed)


def _left_out(inputs: FoundInputs) -> list[str]:
    """Notes of what the sources hold besides what is read."""
    ignored, repeated = ignored_files(inputs.ignored_by_kind()), inputs.repeated()
    notes = [f"cannot read {folder}" for folder in inputs.unreadable]
    return [*notes, *([f"ignored {ignored}"] if ignored else []), *([repeated] if repeated else [])]


def _refuse_nothing(corpus: Corpus, reader: BlockReader, exact: bool) -> None:
    if corpus.length.any():
        return
    for reason, example in reader.examples.items():
        faulty = f"none of {reader.faults.total():,} documents can be used"
        raise DataError(f"{faulty}; the first is {reason.replace('_', ' ')}: {example}")
    if not exact:
        raise RequestError(f"there is no text in what was read; give a larger {setting('sample')}")


def _plan(
    corpus: Corpus,
    reader: BlockReader,
    wanted: list[Settings],
    workers: dict[str, int],
    *,
    exact: bool,
    tokenizer: Tokenizer | None,
    rough_total: int | None,
) -> Plan:
    length, sums = corpus.length, corpus.sums
    filled = length > 0
    exponents = np.ceil(np.log2(np.maximum(length, 1))).astype(np.int64)
    used, percents = range(0), []
    if filled.any():
        used = range(int(exponents[filled].min()), int(exponents.max()) + 1)
        percents = [each for each in PERCENTS if exact or min(each, 100 - each) * filled.sum() >= 100 * ENDS]
    quantiles = dict(zip(percents, corpus.quantiles(percents) if percents else [], strict=True))
    itemsize = (tokenizer.dtype.itemsize if tokenizer else 4) + wanted[0].masked  # a byte says what is to be learned

    totals: dict[Any, Sums] = {
        "empty": sums(~filled),
        "faulty": corpus.faulty,
        "ids": sums(length),
        "seconds": corpus.seconds,
        **{("documents", each): sums(filled & (exponents == each)) for each in used},
        **{("ids", each): sums(length * (exponents == each)) for each in used},
    }
    ratios: dict[Any, tuple[Sums, Sums]] = {
        percent: (sums(filled & (length <= quantile)), sums(filled)) for percent, quantile in quantiles.items()
    }
    counted = []
    alike: tuple[Ids, Ids] | None = None
    for number, settings in enumerate(wanted):
        if settings.strategy == "best-fit" and not exact:
            alike = alike or corpus.stand_ins(weight(length), settings.window or WINDOW)
        found = _layout(corpus, settings, alike)
        more, other = _sums(corpus, settings, found, itemsize)
        totals |= {(name, number): each for name, each in more.items()}
        ratios |= {(name, number): each for name, each in other.items()}
        counted.append((found.samples, found.remainder, found.inside) if exact else None)

    total, ratio = corpus.estimates(totals, ratios)
    choices = [
        _choice(corpus, settings, number, total, ratio, counted=counted[number], workers=workers[settings.strategy])
        for number, settings in enumerate(wanted)
    ]
    notes = list(reader.notes)
    if not exact and not reader.cut and len(length) < FEW:
        notes.append(
            f"only {len(length):,} documents were read: the estimate is rough, a larger {setting('sample')} is better"
        )
    return Plan(
        exact=exact,
        tokenizer=tokenizer.name if tokenizer else None,
        bytes_read=reader.bytes,
        bytes_total=reader.bytes if exact else rough_total,
        documents_read=len(length),
        documents=_rounded(total[DOCUMENTS]),
        empty=_rounded(total["empty"]),
        faulty=_rounded(total["faulty"]),
        ids=_rounded(total["ids"]),
        lengths=[Bin(1 << each, _rounded(total["documents", each]), _rounded(total["ids", each])) for each in used],
        quantiles={
            percent: Estimate(quantile, *_between(corpus, quantile, percent, ratio[percent]))
            for percent, quantile in quantiles.items()
        },
        longest=int(length.max(initial=0)),
        choices=choices,
        ids_per_second=reader.ids / max(reader.seconds, 1e-9),
        faults=dict(reader.faults),
        examples=reader.examples,
        notes=[Words(note) for note in notes],
    )


def _rounded(estimate: Estimate) -> Estimate:
    return Estimate(*(round(end) if math.isfinite(end) else end for end in estimate))


def _between(corpus: Corpus, quantile: int, percent: int, share: Estimate) -> tuple[float, float]:
    """Between what the quantile lies: the `share` of the documents up to it could be as much smaller or larger."""
    if share.exact or not share.told:
        return (quantile, quantile) if share.exact else (math.nan, math.nan)
    off = [100 * (end - share.value) for end in (share.low, share.high)]
    low, high = corpus.quantiles([percent + each for each in off])
    return min(low, quantile), max(high, quantile)


def _layout(corpus: Corpus, settings: Settings, alike: tuple[Ids, Ids] | None) -> Layout:
    """How the documents that were read would be packed; by best-fit, as those that are `alike` are, if they are given,
    since it depends on all others in the window."""
    asked = (settings.seq_len, settings.strategy, settings.window or WINDOW, settings.max_segments)
    found = layout(kept(corpus.length, settings.seq_len, settings.overlong), *asked)
    if settings.strategy != "best-fit" or alike is None:
        return found
    length, document = alike
    packed, copies = layout(kept(length, settings.seq_len, settings.overlong), *asked), np.bincount(document)
    padding, shared = (np.bincount(document, column) / copies for column in (packed.padding, packed.shared))
    return found._replace(padding=padding, shared=shared)


def _sums(
    corpus: Corpus, settings: Settings, found: Layout, itemsize: int
) -> tuple[dict[str, Sums], dict[str, tuple[Sums, Sums]]]:
    """(totals, ratios of two) of a choice, by their names in it."""
    read, n, sums = corpus.length, settings.seq_len, corpus.sums
    length = kept(read, n, settings.overlong)
    filled, samples = sums(read > 0), sums((length + found.padding) / n)
    padding, cut, segments = sums(found.padding), sums(found.cut), sums(found.segments)
    totals = {
        "samples": samples,
        "padding_ids": padding,
        "split": cut,
        "overlong": sums(length < read),
        "cut_off": sums(read - length),
        "bytes": samples * n * itemsize + segments * SEGMENT.itemsize,
    }
    ratios = {
        "padding": (padding, samples * n),
        "truncation": (cut, filled),
        "needless": (sums(found.cut & (length <= n)), filled),
        "concatenation": (sums(found.shared), filled),
        "documents_per_sample": (segments, samples),
    }
    return totals, ratios


def _choice(
    corpus: Corpus,
    settings: Settings,
    number: int,
    total: dict[Any, Estimate],
    ratio: dict[Any, Estimate],
    counted: tuple[int, int, int] | None,
    workers: int,
) -> Choice:
    """`counted`, if everything was read: samples, ids in the remainder, segments in samples."""
    samples, padding_ids = _rounded(total["samples", number]), _rounded(total["padding_ids", number])
    padding, each = ratio["padding", number], ratio["documents_per_sample", number]
    if counted:  # what fills no sample is in no sample
        samples = Estimate(*[counted[0]] * 3)
        each = Estimate(*[counted[2] / max(1, counted[0])] * 3)
    elif settings.strategy == "best-fit":  # how full the last sample of a window is, is chance
        windows = math.ceil(float(corpus.weight @ weight(corpus.length)) / (settings.window or WINDOW))
        samples, padding_ids = samples.give_or_take(windows), padding_ids.give_or_take(windows * settings.seq_len)
        padding = padding.give_or_take(windows / max(1, samples.value))
        # Short documents that were not read, as all of them lie in one place, could fill what is padded here.
        samples, padding_ids = samples.within(total["ids"].low // settings.seq_len, 0), padding_ids.within(0, 0)
        padding = padding.within(0, 0)
    return Choice(
        seq_len=settings.seq_len,
        strategy=settings.strategy,
        samples=samples,
        padding_ids=padding_ids,
        remainder=counted[1] if counted else None,
        split=_rounded(total["split", number]),
        overlong=_rounded(total["overlong", number]),
        cut_off=_rounded(total["cut_off", number]),
        padding=_share(padding),
        truncation=_share(ratio["truncation", number]),
        needless=_share(ratio["needless", number]),
        concatenation=_share(ratio["concatenation", number]),
        documents_per_sample=each,
        bytes=_rounded(total["bytes", number]),
        seconds=Estimate(*(end / workers for end in total["seconds"])),
        workers=workers,
    )


def _share(estimate: Estimate) -> Estimate:
    return Estimate(*(min(end, 1.0) for end in estimate))
