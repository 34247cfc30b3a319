"""The rows about two workers on two cores beside one worker on one of them: rate by the clock, and CPU seconds."""

import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import corpus, measure
from bench.contenders import HERE, MIB, Cost, Plan, alternate, packed, say
from bench.files import FILES, in_files
from bench.measure import Failed
from bench.rows import Row, could_not, spread

ROWS = ("cores",)
TARGET_CPU = 1.15
"""CPU seconds of two workers over those of one, at most."""


class Text(NamedTuple):
    """What is packed, and how many times as fast two workers should be."""

    name: str
    target: float


TEXTS = {"jsonl": Text("JSONL", 1.7), "zst": Text(f"{FILES} .zst", 1.6), "parquet": Text(f"{FILES} .parquet", 1.6)}


def cores_rows(plan: Plan) -> list[Row]:
    """Two workers on all cores against one worker bound to a single core, in alternating pairs."""
    # The larger corpus: a second process has to start and to learn the corpus's words like the first.
    whole = Path(corpus.mixed(plan.folder, plan.memory_mb[1]).path)
    cores = measure.usable_cores()
    rows = []
    for kind, text in TEXTS.items():
        what = f"Two workers on two cores against one worker bound to one core, {plan.memory_mb[1]:,} MB as {text.name}"
        target = f"at least {text.target} times the rate by the clock, at most {TARGET_CPU} times the CPU seconds"
        if len(cores) < 2:
            rows.append(Row(what, target, could_not(Failed("needs two cores to bind to")), plan.judged(False)))
            continue
        source = whole if kind == "jsonl" else in_files(whole, kind)
        measured, met = measured_cores(plan, str(source), text, cores[0])
        if kind == "jsonl" and met is not None:
            measured += f"; {engine_scaling(plan, str(whole), cores)}"
        rows.append(Row(what, target, measured, plan.judged(bool(met))))
    return rows


def measured_cores(plan: Plan, source: str, text: Text, core: int) -> tuple[str, bool | None]:
    """What the row says, and whether the targets are met; None where it could not be measured."""
    busy: list[float] = []

    def run(*options: str, core: int | None = None) -> Cost:
        busy.append(measure.busy_share())
        return packed(plan, source, *options, core=core)

    contenders = {
        f"one worker on one core, {text.name}": partial(run, "--workers", "1", core=core),
        f"two workers, {text.name}": partial(run, "--workers", "2"),
    }
    single, double = alternate(contenders, plan.repeats).values()
    if isinstance(single, Failed):
        return could_not(single), None
    if isinstance(double, Failed):
        return could_not(double), None
    gains = [alone.wall / both.wall for alone, both in zip(single, double, strict=True)]
    costs = [both.cpu / alone.cpu for alone, both in zip(single, double, strict=True)]
    same = len({cost.sha256 for cost in [*single, *double]}) == 1
    told = (
        f"{spread(gains, 2, ' times')} the rate, {spread(costs, 2, ' times')} the CPU seconds, "
        f"{'the same ids' if same else 'the ids DIFFER'}; "
        f"{spread([cost.ids / cost.wall / 1e6 for cost in double], 1)} M ids per second with two; "
        f"other load before each run: {spread([100 * share for share in busy], unit=' % of the machine')}"
    )
    return told, same and median(gains) >= text.target and median(costs) <= TARGET_CPU


def engine_scaling(plan: Plan, source: str, cores: list[int]) -> str:
    """What two cores of this machine give at best: two independent engine processes against one alone."""
    command = [sys.executable, str(HERE / "engine.py"), source, str(plan.tokenizer), str(MIB)]
    gains = []
    try:
        for number in range(plan.rival_repeats):
            say(f"round {number + 1} of {plan.rival_repeats}: two independent engine processes")
            alone = measure.wall_together([command], cores)
            gains.append(2 * alone / measure.wall_together([command, command], cores))
    except Failed as failure:
        return f"two independent engine processes {could_not(failure)}"
    return f"two independent engine processes get {spread(gains, 2, ' times')} on these cores"
