"""The rows about streams inside a training process: tokenizing ahead, and asking; no number is known before."""

import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

from bench import measure
from bench.contenders import HERE, SEQ_LEN, Cost, Plan, alternate, packed
from bench.measure import Failed
from bench.rows import PER_SECOND, Row, could_not, millions, spread

ROWS = ("ahead", "asked")
WORKERS = 2
TARGET_SHARE = 0.75
QUESTIONS, IN_FLIGHT, LATENCY = 5_000, 64, 0.05
SCRIPT = HERE / "streams.py"


def measured_rows(plan: Plan) -> list[Row]:
    rows: dict[str, Callable[[Plan], list[Row]]] = {"ahead": ahead_rows, "asked": asked_rows}
    return [row for name in ROWS if name in plan.wanted for row in rows[name](plan)]


# --- tokenizing ahead


def streamed(plan: Plan, workers: int) -> Cost:
    """All samples of a stream, taken one by one in one process."""
    done = measure.run([sys.executable, str(SCRIPT), "pack", plan.mixed.path, str(SEQ_LEN), str(workers)])
    told = json.loads(done.output)
    return Cost(done.cpu, done.wall, told["ids"], told["sha256"])


def ahead_rows(plan: Plan) -> list[Row]:
    """The same ids from the command and from streams, per CPU second of all processes."""
    command = ("--workers", str(WORKERS), "--eos")
    costs = alternate(
        {
            "command": partial(packed, plan, plan.mixed.path, *command),
            "ahead": partial(streamed, plan, WORKERS),
            "alone": partial(streamed, plan, 1),
        },
        plan.repeats,
    )
    what = "`pack(tokenize(read(...)), 2048)`, every sample taken"
    return [
        _share(
            plan, f"{what}, `workers={WORKERS}`, beside `pack --workers {WORKERS}`", costs["ahead"], costs["command"]
        ),
        _share(plan, f"{what}, `workers=1`, beside the same", costs["alone"], costs["command"], judge=False),
    ]


def _share(
    plan: Plan, what: str, ours: list[Cost] | Failed, command: list[Cost] | Failed, *, judge: bool = True
) -> Row:
    target = f"at least {100 * TARGET_SHARE:.0f} % of the ids per CPU second, and the same ids" if judge else "–"
    for costs in (ours, command):
        if isinstance(costs, Failed):
            return Row(what, target, could_not(costs), plan.judged(False) if judge else None)
    assert isinstance(ours, list)
    assert isinstance(command, list)
    shares = [mine.rate / its.rate for mine, its in zip(ours, command, strict=True)]
    same = len({(cost.ids, cost.sha256) for cost in [*ours, *command]}) == 1
    mine, its = (millions([cost.rate for cost in costs]) for costs in (ours, command))
    percent = spread([100 * share for share in shares], unit=" %")
    told = "the same ids" if same else "the ids DIFFER"
    measured = f"{percent}, {told}; {mine} {PER_SECOND}, the command {its}"
    return Row(what, target, measured, plan.judged(same and median(shares) >= TARGET_SHARE) if judge else None)


# --- asking


def asked_rows(plan: Plan) -> list[Row]:
    """What a document costs that is asked about in a stream, beside the client alone, and one that was asked before."""
    count = QUESTIONS if plan.judge else QUESTIONS // 5
    how = f"{count:,} of them, {IN_FLIGHT} in flight, {LATENCY:g} s each"
    what = f"`streams.ask`: CPU time of its process a document, {how}"
    try:
        told = []
        for _ in range(plan.repeats):
            words = [sys.executable, str(SCRIPT), "ask", str(count), str(IN_FLIGHT), str(LATENCY)]
            told.append(json.loads(measure.run(words).output))
    except Failed as failure:
        return [Row(what, "–", could_not(failure))]
    each = {name: [1e6 * one[name] / count for one in told] for name in ("client", "stream", "journal")}
    stream, client, journal = (spread(each[name], unit=" µs") for name in ("stream", "client", "journal"))
    measured = f"{stream}; `Client.ordered` alone {client}; out of the journal, in a second epoch, {journal}"
    return [Row(what, "–", measured)]
