"""The row about the process that leads a real run: reading lists of files, planning, pipes, records, journal and all,
where `bench.driving` has made-up counts."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

from bench import corpus, measure
from bench.contenders import HERE, Contender, Cost, Plan, alternate, ids_on_disk, pack_command
from bench.driving import TARGET_CONCAT
from bench.files import FILES, KINDS, first_lines, in_files
from bench.kinds import FEW
from bench.measure import Failed
from bench.rows import Row, could_not, spread

ROWS = ("leading",)
WORKERS = 2


def leading_rows(plan: Plan) -> list[Row]:
    """CPU time of it for each id, but for its start, for all kinds of input."""
    # The larger corpus: of what is left when the start is taken off, there has to be enough.
    whole = Path(corpus.mixed(plan.folder, plan.memory_mb[1]).path)
    sources = {kind: whole if kind == "jsonl" else in_files(whole, kind) for kind in KINDS}
    sources["start"] = first_lines(whole, FEW)
    contenders: dict[str, Contender] = {
        f"leading, {kind}": partial(led, plan, str(source)) for kind, source in sources.items()
    }
    costs = dict(zip(sources, alternate(contenders, plan.rival_repeats).values(), strict=True))
    start = costs.pop("start")
    what = (
        f"The process that leads a real run of {WORKERS} workers, {plan.memory_mb[1]:,} MB: its own CPU time, but for "
        f"that of a run of {FEW} short lines; concat"
    )
    target = f"– (at most {TARGET_CONCAT} ns an id is for the counting in it, the next row)"
    if isinstance(start, Failed):
        return [Row(what, target, could_not(start))]
    words = "; ".join(kind_words(kind, some, start) for kind, some in costs.items())
    return [Row(what, target, f"{words}; the start {spread([cost.cpu for cost in start], 2, ' s')}")]


def kind_words(kind: str, costs: list[Cost] | Failed, start: list[Cost]) -> str:
    """
    >>> kind_words("gz", [Cost(2.5, 9.0, 1_000_100), Cost(1.5, 9.0, 1_000_100)], 2 * [Cost(0.5, 1.0, 100)])
    '32 .gz 1500.00 ns (1000.00–2000.00) an id'
    """
    name = "JSONL" if kind == "jsonl" else f"{FILES} .{kind}"
    if isinstance(costs, Failed):
        return f"{name} {could_not(costs)}"
    each = [1e9 * (one.cpu - less.cpu) / (one.ids - less.ids) for one, less in zip(costs, start, strict=True)]
    return f"{name} {spread(each, 2, ' ns')} an id"


def led(plan: Plan, source: str) -> Cost:
    """A run whose `cpu` is that of the leading process alone."""
    shutil.rmtree(plan.packed, ignore_errors=True)
    command = pack_command(plan, source, "--workers", str(WORKERS))
    try:
        done = measure.run([sys.executable, str(HERE / "leader.py"), *command[command.index("pack") :]])
        count, sha256 = ids_on_disk(plan.packed)
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)
    return Cost(json.loads(done.output.splitlines()[-1])["seconds"], done.wall, count, sha256)
