"""The rows of the table: each function measures a few of them and returns them; no number is known before."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from bench import corpus, measure
from bench.contenders import (
    HERE,
    MIB,
    RIVALS,
    SEQ_LEN,
    Contender,
    Cost,
    Costs,
    Plan,
    alternate,
    engine,
    pack_command,
    packed,
    rival,
    say,
)
from bench.measure import Failed

TARGET_RATE = 15e6
TARGET_SHARE = 0.68
TARGET_RATIO = 40
TARGET_PACKER = 300e6
TARGET_DEFAULT_MEMORY = 1 << 30
TARGET_ONE_WORKER_MEMORY = 400_000_000
SAME = 0.10
"""Two peaks count as the same up to this difference: what is alive when a sample is taken varies a little."""

PER_SECOND = "M ids per CPU second"


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where there is no target or it was not judged."""

    what: str
    target: str
    measured: str
    met: bool | None = None


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Median, unit, and the range in brackets where there is one.

    >>> spread([40, 60, 50], unit=" times"), spread([1.7], 2)
    ('50 times (40–60)', '1.70')
    """
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}–{high})"


def millions(rates: Sequence[float]) -> str:
    """Rates of ids a second, in millions.

    >>> millions([3e6, 1e6, 2.26e6]), millions([250_000])
    ('2.3 (1.0–3.0)', '0.25')
    """
    return spread([rate / 1e6 for rate in rates], digits=1 if median(rates) >= 1e6 else 2)


def could_not(failure: Failed) -> str:
    return f"could not run: {failure}"


# --- packing, and the bare engine


def packing_rows(plan: Plan) -> list[Row]:
    """JSONL to shards with one worker, and what share that is of the bare engine's speed."""
    contenders: dict[str, Contender] = {"millstream": partial(packed, plan, plan.mixed.path, "--workers", "1")}
    if "engine" in plan.wanted:
        contenders["batches of 1 MiB"] = partial(engine, plan, MIB)
        contenders["batches of 4 MiB"] = partial(engine, plan, 4 * MIB)
    costs = alternate(contenders, plan.repeats)
    ours = costs.pop("millstream")
    rows = [packing_row(plan, ours)] if "pack" in plan.wanted else []
    return [*rows, engine_row(plan, ours, costs)] if "engine" in plan.wanted else rows


def packing_row(plan: Plan, ours: list[Cost] | Failed) -> Row:
    what = "JSONL on disk to .npy shards, GPT-2, one worker; the whole process, start included"
    target = f"at least {TARGET_RATE / 1e6:.0f} {PER_SECOND}"
    if isinstance(ours, Failed):
        return Row(what, target, could_not(ours), plan.judged(False))
    rates = [cost.rate for cost in ours]
    measured = f"{millions(rates)} {PER_SECOND}; {ours[0].ids:,} ids"
    return Row(what, target, measured, plan.judged(median(rates) >= TARGET_RATE))


def engine_row(plan: Plan, ours: list[Cost] | Failed, engines: Costs) -> Row:
    """The faster batch size counts, and the ids in the shards must be the engine's, one by one."""
    what = "millstream's share of its bare engine's speed on the same text (only the encoding of lists timed)"
    target = f"at least {100 * TARGET_SHARE:.0f} %, and the same ids"
    able = {name: costs for name, costs in engines.items() if isinstance(costs, list)}
    failure = next((costs for costs in [ours, *engines.values()] if isinstance(costs, Failed)), None)
    if not able:
        return Row(what, target, could_not(failure or Failed("no engine")), plan.judged(False))
    batches = max(able, key=lambda name: median(cost.rate for cost in able[name]))
    bare = able[batches]
    speed = f"the engine makes {millions([cost.rate for cost in bare])} {PER_SECOND} in {batches}"
    if isinstance(ours, Failed):
        return Row(what, target, f"{speed}; millstream {could_not(ours)}", plan.judged(False))
    shares = [mine.rate / its.rate for mine, its in zip(ours, bare, strict=True)]
    same = len({(cost.ids, cost.sha256) for cost in [*ours, *bare]}) == 1
    percent = spread([100 * share for share in shares], unit=" %")
    measured = f"{percent}, {'the same ids' if same else 'the ids DIFFER'}; {speed}"
    return Row(what, target, measured, plan.judged(same and median(shares) >= TARGET_SHARE))


# --- what people use today


def rival_rows(plan: Plan) -> list[Row]:
    """CPU seconds of each rival over millstream's, on the same subset in the same round."""
    source = corpus.subset(plan.mixed, plan.folder, plan.subset_mb)
    names = [name for name in RIVALS if name in plan.wanted]
    contenders: dict[str, Contender] = {"millstream": partial(packed, plan, str(source), "--workers", "1")}
    contenders |= {name: partial(rival, plan, name, source) for name in names}
    costs = alternate(contenders, plan.rival_repeats)
    return [rival_row(plan, name, costs["millstream"], costs[name]) for name in names]


def rival_row(plan: Plan, name: str, ours: list[Cost] | Failed, theirs: list[Cost] | Failed) -> Row:
    what = f"{RIVALS[name][1]}: its CPU seconds over millstream's, same {plan.subset_mb} MB"
    target = f"at least {TARGET_RATIO} times" if name == "teaching" else "–"
    if isinstance(theirs, Failed):
        return Row(what, target, could_not(theirs), verdict(plan, name, 0))
    rate = f"it makes {millions([cost.rate for cost in theirs])} {PER_SECOND}"
    if isinstance(ours, Failed):
        return Row(what, target, f"{rate}; millstream {could_not(ours)}", verdict(plan, name, 0))
    ratios = [their.cpu / mine.cpu for mine, their in zip(ours, theirs, strict=True)]
    extra = theirs[0].ids - ours[0].ids
    ids = f"{ours[0].ids:,} ids each" if not extra else f"its number of ids DIFFERS by {extra:+,}"
    ours_here = f"millstream {millions([cost.rate for cost in ours])} on the same"
    measured = f"{spread(ratios, unit=' times')}; {rate}, {ours_here}; {ids}"
    return Row(what, target, measured, verdict(plan, name, median(ratios)))


def verdict(plan: Plan, name: str, ratio: float) -> bool | None:
    """Only the teaching pipeline has a target; the others stand beside it."""
    return plan.judged(ratio >= TARGET_RATIO) if name == "teaching" else None


# --- memory


def memory_rows(plan: Plan) -> list[Row]:
    """Peak memory of all processes at two sizes of input, and over a stream whose words never repeat."""
    return [
        memory_row(plan, "default settings", TARGET_DEFAULT_MEMORY, "1 GiB"),
        memory_row(plan, "one worker", TARGET_ONE_WORKER_MEMORY, "400 MB", "--workers", "1"),
    ]


def memory_row(plan: Plan, settings: str, limit: int, named: str, *options: str) -> Row:
    what = f"Peak memory of all processes together, {settings}"
    target = f"at most {named}, the same at both sizes"
    less, more = plan.memory_mb
    try:
        small, large = (peak_of_mixed(plan, size, *options) for size in (less, more))
        words = peak_of_words(plan, less, *options)
    except Failed as failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    growth = large / small - 1
    measured = (
        f"{small / 1e6:.0f} MB for {less:,} MB of input, {large / 1e6:.0f} MB for {more:,} MB "
        f"({100 * growth:+.0f} %); {words / 1e6:.0f} MB for {less:,} MB of never-repeating words from a pipe"
    )
    return Row(what, target, measured, plan.judged(max(small, large, words) <= limit and growth <= SAME))


def peak_of_mixed(plan: Plan, megabytes: int, *options: str) -> int:
    source = corpus.mixed(plan.folder, megabytes)
    say(f"memory: {megabytes} MB {' '.join(options)}")
    return peak(plan, pack_command(plan, source.path, *options))


def peak_of_words(plan: Plan, megabytes: int, *options: str) -> int:
    say(f"memory: {megabytes} MB of never-repeating words {' '.join(options)}")
    feed = [sys.executable, str(HERE / "corpus.py"), str(megabytes * 1_000_000)]
    return peak(plan, pack_command(plan, "-", *options), feed)


def peak(plan: Plan, command: list[str], feed: list[str] | None = None) -> int:
    try:
        return measure.peak_memory(command, feed)
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)


# --- the packer alone


def packer_row(plan: Plan) -> Row:
    """The columnar packer in its own process, fed with the subset's documents, already tokenized."""
    what = "Packing alone: batches of ids to samples and their segments, nothing read or written"
    target = f"at least {TARGET_PACKER / 1e6:.0f} {PER_SECOND}"
    source = corpus.subset(plan.mixed, plan.folder, plan.subset_mb)
    command = [sys.executable, str(HERE / "packer.py"), str(source), str(plan.tokenizer), str(SEQ_LEN)]
    rates = []
    try:
        for number in range(plan.repeats):
            say(f"round {number + 1} of {plan.repeats}: packer")
            told = json.loads(measure.run(command).output)
            rates.append(told["ids"] / told["seconds"])
    except Failed as failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    rate = spread([rate / 1e6 for rate in rates])
    return Row(what, target, f"{rate} {PER_SECOND}", plan.judged(median(rates) >= TARGET_PACKER))


def measured_rows(plan: Plan) -> list[Row]:
    """All wanted rows, in the table's order."""
    wanted, rows = set(plan.wanted), list[Row]()
    if wanted & {"pack", "engine"}:
        rows += packing_rows(plan)
    if wanted & set(RIVALS):
        rows += rival_rows(plan)
    if "memory" in wanted:
        rows += memory_rows(plan)
    if "packer" in wanted:
        rows.append(packer_row(plan))
    return rows
