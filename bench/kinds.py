"""The rows about one worker on what is packed, beside the same lines as JSONL, and about what it costs to start."""

from functools import partial
from pathlib import Path
from statistics import median

from bench.contenders import Contender, Cost, Plan, alternate, packed
from bench.files import FILES, KINDS, first_lines, in_files
from bench.measure import Failed
from bench.rows import PER_SECOND, Row, could_not, millions, spread

ROWS = ("kinds", "start")
TARGET = 1.05
"""Of what is no slower: the rest is noise."""
TARGET_START = 0.35
FEW = 100
"""Lines that are packed to see what a start costs."""


def kinds_rows(plan: Plan) -> list[Row]:
    """CPU seconds over those of the same lines in as many files of JSONL, in the same round."""
    contenders: dict[str, Contender] = {}
    for kind in KINDS:
        folder = in_files(Path(plan.mixed.path), kind)
        contenders[f".{kind}"] = partial(packed, plan, str(folder), "--workers", "1")
    costs = alternate(contenders, plan.repeats)
    plain = costs.pop(".jsonl")
    return [kind_row(plan, kind, some, plain) for kind, some in costs.items()]


def kind_row(plan: Plan, kind: str, ours: list[Cost] | Failed, plain: list[Cost] | Failed) -> Row:
    what = f"One worker, {FILES} {kind}: its CPU seconds over those of the same lines in {FILES} .jsonl, start included"
    judged = kind != ".parquet"
    target = f"no slower, at most {TARGET} times with what is noise" if judged else "–"
    for costs in (ours, plain):
        if isinstance(costs, Failed):
            return Row(what, target, could_not(costs), plan.judged(False) if judged else None)
    ratios = [mine.cpu / other.cpu for mine, other in zip(ours, plain, strict=True)]
    same = len({cost.sha256 for cost in [*ours, *plain]}) == 1
    rates, others = (millions([cost.rate for cost in costs]) for costs in (ours, plain))
    measured = (
        f"{spread(ratios, 2, ' times')}, {'the same ids' if same else 'the ids DIFFER'}; {rates} {PER_SECOND} against "
        f"{others}"
    )
    return Row(what, target, measured, plan.judged(same and median(ratios) <= TARGET) if judged else None)


def start_row(plan: Plan) -> Row:
    what = f"The start: all of `millstream pack` of {FEW} short lines of JSONL, one worker"
    target = f"at most {TARGET_START} CPU s"
    few = first_lines(Path(plan.mixed.path), FEW)
    [costs] = alternate({f"{FEW} lines": partial(packed, plan, str(few), "--workers", "1")}, plan.repeats).values()
    if isinstance(costs, Failed):
        return Row(what, target, could_not(costs), plan.judged(False))
    seconds = [cost.cpu for cost in costs]
    measured = f"{spread(seconds, 2, ' CPU s')}; {costs[0].ids:,} ids"
    return Row(what, target, measured, plan.judged(median(seconds) <= TARGET_START))


def measured_rows(plan: Plan) -> list[Row]:
    rows = kinds_rows(plan) if "kinds" in plan.wanted else []
    return rows + ([start_row(plan)] if "start" in plan.wanted else [])
