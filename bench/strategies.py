"""The rows about best-fit, shuffling, exports and conversations; as in `bench.rows`, no number is known before."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from bench import corpus, measure
from bench.contenders import (
    HERE,
    SEQ_LEN,
    Contender,
    Cost,
    Plan,
    alternate,
    ids_on_disk,
    pack_command,
    packed,
    say,
)
from bench.conversations import chat_row
from bench.measure import Failed
from bench.rows import PER_SECOND, Row, could_not, millions, peak, spread

ROWS = ("plan", "assign", "padding", "strategies", "shards", "windows", "convert", "chat")

TARGET_PLAN = 0.1
TARGET_ASSIGN = 5e6
TARGET_PADDING = 0.0005
PAPER_EXTRA = 0.000024
"""Samples more than concat in "Fewer Truncations Improve Language Modeling", ICML 2024."""
TARGET_EXTRA = 2 * PAPER_EXTRA
TARGET_STRATEGY = 1.3
MEMORY = {"1GiB": 1 << 30, "2GiB": 2 << 30}
"""The first is the default."""

LENGTHS = (2048, 8192, 2000)
"""Sample lengths; a target is for the first where it does not say that it is for all."""
FIRST = LENGTHS[0]
LESS_PADDING = f"less than {100 * TARGET_PADDING:.2f} %"
STRATEGIES = {
    "--strategy best-fit": ("--strategy", "best-fit"),
    "--shuffle 0": ("--shuffle", "0"),
    "--strategy best-fit --shuffle 0": ("--strategy", "best-fit", "--shuffle", "0"),
}
SHARDS = ("--shard-size", "16MiB")
FORMATS = ("mds", "megatron", "parquet", "litdata")

Told = dict[str, Any]


def many(plan: Plan, count: int) -> int:
    """So many, or a tenth of them where nothing is judged."""
    return count if plan.judge else count // 10


def by_length(plan: Plan, what: str, count: int) -> dict[int, list[Told]]:
    """What `lengths.py` tells at each of `LENGTHS`, with another seed in every round."""
    program = [sys.executable, str(HERE / "lengths.py"), what, str(count)]
    told: dict[int, list[Told]] = {n: [] for n in LENGTHS}
    for seed in range(plan.repeats):
        for n, some in told.items():
            say(f"round {seed + 1} of {plan.repeats}: {what}, N = {n}")
            some.append(json.loads(measure.run([*program, str(n), str(seed)]).output))
    return told


def at_each(told: dict[int, list[Told]], words: Callable[[int, list[Told]], str]) -> str:
    """What there is to say about each sample length.

    >>> at_each({2048: [{"steps": 3}], 500: [{"steps": 1}]}, lambda n, told: str(told[0]["steps"]))
    '3 at N = 2,048; 1 at N = 500'
    """
    return "; ".join(f"{words(n, some)} at N = {n:,}" for n, some in told.items())


# --- lengths alone


def plan_row(plan: Plan) -> Row:
    count = 1_000_000_000
    what = f"The best-fit plan alone: {count:,} documents, as a histogram of lengths"
    target = f"less than {TARGET_PLAN} s at N = {FIRST:,}"
    try:
        told = by_length(plan, "plan", count)
    except Failed as failure:
        return Row(what, target, could_not(failure), plan.judged(False))

    def words(n: int, some: list[Told]) -> str:
        steps = median(one["steps"] for one in some)
        return f"{spread([one['seconds'] for one in some], 3, ' s')}, {steps:,.0f} steps,"

    met = median(one["seconds"] for one in told[FIRST]) < TARGET_PLAN
    return Row(what, target, at_each(told, words), plan.judged(met))


def assign_row(plan: Plan) -> Row:
    count = many(plan, 10_000_000)
    what = f"Best-fit, plan and assignment: {count:,} documents' lengths to the samples they are put into"
    target = f"at least {TARGET_ASSIGN / 1e6:.0f} M documents per CPU second at N = {FIRST:,}"
    try:
        told = by_length(plan, "assign", count)
    except Failed as failure:
        return Row(what, target, could_not(failure), plan.judged(False))

    def rates(n: int) -> list[float]:
        return [one["documents"] / one["seconds"] for one in told[n]]

    measured = at_each(told, lambda n, _: f"{millions(rates(n))} M documents per CPU second")
    return Row(what, target, measured, plan.judged(median(rates(FIRST)) >= TARGET_ASSIGN))


# --- what is padded


def padding_share(told: Told, n: int) -> float:
    """
    >>> padding_share({"padding": 512, "samples": 10}, 512)
    0.1
    """
    share: float = told["padding"] / (told["samples"] * n)
    return share


def concat_samples(told: Told, n: int) -> int:
    """The samples that concat makes, with one for the remainder.

    >>> concat_samples({"ids": 4097}, 2048)
    3
    """
    return -(-int(told["ids"]) // n)


def extra_samples(told: Told, n: int) -> int:
    return int(told["samples"]) - concat_samples(told, n)


def extra_share(told: Told, n: int) -> float:
    return extra_samples(told, n) / concat_samples(told, n)


def percent(shares: list[float]) -> str:
    return spread([100 * share for share in shares], 4, " %")


def padding_rows(plan: Plan) -> list[Row]:
    """Padding and extra samples at the default window: on a synthetic corpus, and on the standard library's source."""
    count = many(plan, 1_000_000_000)
    try:
        told = by_length(plan, "line", count)
    except Failed as failure:
        return [Row("Best-fit on a synthetic corpus", "–", could_not(failure), plan.judged(False)), stdlib_row(plan)]
    text = f"long-tailed synthetic documents, {count:,} ids"
    return [synthetic_row(plan, told, text), stdlib_row(plan), extra_row(plan, told, text), line_row(told, text)]


def synthetic_row(plan: Plan, told: dict[int, list[Told]], text: str) -> Row:
    shares = {n: [padding_share(one, n) for one in some] for n, some in told.items()}
    needless = sum(one["needless"] for some in told.values() for one in some)
    return Row(
        f"Padding of best-fit at the default window: {text}",
        f"{LESS_PADDING}, and no document of at most N ids cut",
        f"{at_each(told, lambda n, _: percent(shares[n]))}; {needless or 'none'} cut",
        plan.judged(max(map(median, shares.values())) < TARGET_PADDING and not needless),
    )


def stdlib_row(plan: Plan) -> Row:
    """The same bytes every time, so it is packed once; the numbers are the ledger's."""
    what = "Padding of best-fit at the default window: `millstream pack stdlib: --strategy best-fit`, from its ledger"
    say("stdlib:, best-fit")
    try:
        measure.run(pack_command(plan, "stdlib:", "--strategy", "best-fit"))
        ledger = json.loads((plan.packed / "manifest.json").read_text())["ledger"]
    except Failed as failure:
        return Row(what, LESS_PADDING, could_not(failure), plan.judged(False))
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)
    told = {"ids": ledger["ids"]["in"], "samples": ledger["samples"], "padding": ledger["ids"]["padding"]}
    share, concat = padding_share(told, SEQ_LEN), concat_samples(told, SEQ_LEN)
    measured = (
        f"{100 * share:.4f} %, {told['padding']:,} of {told['samples'] * SEQ_LEN:,} ids, at N = {SEQ_LEN:,}; "
        f"{told['samples']:,} samples, concat {concat:,} (one more would be {100 / concat:.3f} %)"
    )
    return Row(what, LESS_PADDING, measured, plan.judged(share < TARGET_PADDING))


def extra_row(plan: Plan, told: dict[int, list[Told]], text: str) -> Row:
    def words(n: int, some: list[Told]) -> str:
        count = spread([extra_samples(one, n) for one in some])
        return f"{percent([extra_share(one, n) for one in some])}, {count} of {concat_samples(some[0], n):,},"

    return Row(
        f"Samples of best-fit that concat would not need, at the default window: {text}",
        f"at most {100 * TARGET_EXTRA:.4f} % at N = {FIRST:,}, twice the paper's",
        at_each(told, words),
        plan.judged(median(extra_share(one, FIRST) for one in told[FIRST]) <= TARGET_EXTRA),
    )


def line_row(told: dict[int, list[Told]], text: str) -> Row:
    def words(n: int, some: list[Told]) -> str:
        return f"{spread([one['ids'] / one['seconds'] / 1e6 for one in some])} {PER_SECOND}"

    what = f"Best-fit packing alone: batches of ids to samples and their segments, nothing read or written; {text}"
    return Row(what, "–", at_each(told, words))


# --- the whole command


def strategy_rows(plan: Plan) -> list[Row]:
    """CPU seconds of the whole command over those of concat, on the same text in the same round."""
    runs: dict[str, Contender] = {"concat": partial(packed, plan, plan.mixed.path, "--workers", "1")}
    for name, options in STRATEGIES.items():
        runs[name] = partial(packed, plan, plan.mixed.path, "--workers", "1", *options)
    costs = alternate(runs, plan.repeats)
    concat = costs.pop("concat")
    return [strategy_row(plan, name, concat, some) for name, some in costs.items()]


def strategy_row(
    plan: Plan, name: str, concat: list[Cost] | Failed, ours: list[Cost] | Failed, workers: str = "one worker"
) -> Row:
    what = f"`millstream pack {name}`: its CPU seconds over those with `--strategy concat`, {workers}, start included"
    target = f"at most {TARGET_STRATEGY} times"
    if isinstance(concat, Failed):
        return Row(what, target, could_not(concat), plan.judged(False))
    if isinstance(ours, Failed):
        return Row(what, target, could_not(ours), plan.judged(False))
    ratios = [mine.cpu / other.cpu for mine, other in zip(ours, concat, strict=True)]
    rates, others = (millions([cost.rate for cost in costs]) for costs in (ours, concat))
    measured = f"{spread(ratios, 2, ' times')}; {rates} {PER_SECOND} against {others}"
    return Row(what, target, measured, plan.judged(median(ratios) <= TARGET_STRATEGY))


def shards_rows(plan: Plan) -> list[Row]:
    """Best-fit with small output shards beside concat as it is, and with shards as small."""
    best_fit = STRATEGIES["--strategy best-fit"]
    runs = {"concat": (), "concat, small shards": SHARDS, "best-fit, small shards": (*best_fit, *SHARDS)}
    found = []
    for workers, named in {"1": "one worker", "2": "two workers"}.items():
        how = ("--workers", workers, "--memory", "4GiB")  # which has room for two beside a window
        concat, small, ours = alternate(
            {f"{name}, {named}": partial(packed, plan, plan.mixed.path, *how, *more) for name, more in runs.items()},
            plan.repeats,
        ).values()
        row = strategy_row(plan, " ".join((*best_fit, *SHARDS)), concat, ours, workers=named)
        if isinstance(small, list) and isinstance(ours, list):
            ratios = [mine.cpu / other.cpu for mine, other in zip(ours, small, strict=True)]
            beside = f"; {spread(ratios, 2, ' times')} those of concat with such shards"
            row = replace(row, measured=row.measured + beside)
        found.append(row)
    return found


def window_memory_rows(plan: Plan) -> list[Row]:
    """Peak memory while there are windows of documents to hold, with as many workers as fit."""
    return [window_memory_row(plan, memory) for memory in MEMORY]


def window_memory_row(plan: Plan, memory: str) -> Row:
    megabytes = plan.memory_mb[0]
    what = f"Peak memory of all processes together, `--memory {memory}`, {megabytes:,} MB of input"
    target = f"at most {memory}"
    source = corpus.mixed(plan.folder, megabytes).path
    peaks: dict[str, int] = {}
    try:
        for name, options in STRATEGIES.items():
            say(f"memory: {memory}, {name}")
            peaks[name] = peak(plan, pack_command(plan, source, "--memory", memory, "--max-document", "8MiB", *options))
    except Failed as failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    measured = "; ".join(f"{most / 1e6:.0f} MB with `{name}`" for name, most in peaks.items())
    return Row(what, target, measured, plan.judged(max(peaks.values()) <= MEMORY[memory]))


# --- exports


def convert_rows(plan: Plan) -> list[Row]:
    """One finished run, converted to each format by a command of its own, and to all by one."""
    folder = plan.folder / "converted"
    try:
        say("a run to convert")
        measure.run(pack_command(plan, plan.mixed.path, "--strategy", "best-fit"))
        count, _ = ids_on_disk(plan.packed)

        def converted(formats: str) -> Cost:
            command = [
                sys.executable,
                "-m",
                "millstream",
                "convert",
                str(plan.packed),
                "--out",
                str(folder),
                "--overwrite",
            ]
            try:
                done = measure.run([*command, "--format", formats, "--json"])
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return Cost(done.cpu, done.wall, count)

        names = [*FORMATS, ",".join(FORMATS)]
        costs = alternate({name: partial(converted, name) for name in names}, plan.repeats)
    except Failed as failure:
        return [Row("`millstream convert`", "–", could_not(failure))]
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)
    return [convert_row(name, some) for name, some in costs.items()]


def convert_row(formats: str, costs: list[Cost] | Failed) -> Row:
    what = f"`millstream convert --format {formats}`, start included"
    if isinstance(costs, Failed):
        return Row(what, "–", could_not(costs))
    return Row(what, "–", f"{millions([cost.rate for cost in costs])} {PER_SECOND}; {costs[0].ids:,} ids")


def measured_rows(plan: Plan) -> list[Row]:
    """All wanted rows, in the table's order."""
    rows: dict[str, Callable[[Plan], Row | list[Row]]] = {
        "plan": plan_row,
        "assign": assign_row,
        "padding": padding_rows,
        "strategies": strategy_rows,
        "shards": shards_rows,
        "windows": window_memory_rows,
        "convert": convert_rows,
        "chat": chat_row,
    }
    found = [made(plan) for name, made in rows.items() if name in plan.wanted]
    return [row for some in found for row in (some if isinstance(some, list) else [some])]
