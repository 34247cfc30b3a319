"""Batches for a training loop, out of ours and other loaders: the same samples, shuffled, in one process."""

import json
import shutil
from functools import partial
from statistics import median

from bench import measure
from bench.contenders import HERE, SEQ_LEN, Cost, Plan, alternate, pack_command, say
from bench.measure import Failed
from bench.rows import PER_SECOND, Row, could_not, millions, spread

ROWS = ("loader",)
BATCH, EPOCHS = 64, 6
LOADERS = {
    "reuse": "PackedDataset, `reuse=True`",
    "millstream": "PackedDataset",
    "ids": "PackedDataset, `collate_ids` (ids alone, as the others)",
    "memmap": "DataLoader over memory-mapped files (ids alone)",
    "litdata": "litdata (StreamingDataLoader, ids alone)",
    "grain": "grain (MapDataset over memory-mapped files, ids alone)",
    "datasets": "datasets (Parquet in torch's format, DataLoader, ids alone)",
    "mosaic": "mosaicml-streaming (StreamingDataset over MDS, DataLoader, ids alone)",
}
ELSEWHERE = {"mosaic": ".venv-streaming"}
"""Those that want an environment of their own, beside the one of the others."""
TARGETS = {"reuse": 300e6, "millstream": 100e6}
DESCRIBED = (
    f"Samples of {SEQ_LEN:,} ids, {BATCH} in a batch, as int64 tensors; ours with labels, position_ids and cu_seqlens, "
    f"but for `collate_ids`. The first of {EPOCHS} epochs is not counted; its ids add up to the same in each."
)


def interpreter(name: str, python: str) -> str:
    """That of the loader's own environment, if it has one and it is there, else `python`."""
    own = HERE.parent / ELSEWHERE.get(name, "") / "bin" / "python"
    return str(own) if name in ELSEWHERE and own.exists() else python


def loaded(plan: Plan, python: str, name: str, sums: set[int]) -> Cost:
    """One loader's run through the epochs."""
    words = [name, str(plan.packed), str(EPOCHS), str(BATCH), str(SEQ_LEN)]
    done = measure.run([interpreter(name, python), str(HERE / "rivals" / "loaders.py"), *words])
    told = json.loads(done.output.splitlines()[-1])
    sums.add(told["sum"])
    if len(sums) > 1:
        raise Failed(f"its samples are not those of the others: {sorted(sums)}")
    return Cost(told["seconds"], done.wall, told["ids"])


def prepared(plan: Plan) -> None:
    """A run folder and its exports under `plan.packed`."""
    run, exports = plan.packed / "run", plan.packed / "exports"
    command = pack_command(plan, str(plan.mixed.path), "--remainder", "drop")
    command[command.index("--out") + 1] = str(run)
    measure.run(command)
    measure.run([*command[:3], "convert", str(run), "--format", "litdata,mds,parquet", "--out", str(exports)])


def measured_rows(plan: Plan, python: str) -> list[Row]:
    shutil.rmtree(plan.packed, ignore_errors=True)
    sums: set[int] = set()
    try:
        say("packing what is loaded")
        prepared(plan)
        costs = alternate({name: partial(loaded, plan, python, name, sums) for name in LOADERS}, plan.repeats)
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)
    return [_row(plan, name, costs) for name in LOADERS]


def _row(plan: Plan, name: str, all_costs: dict[str, list[Cost] | Failed]) -> Row:
    costs, ours, alone = (all_costs[each] for each in (name, "millstream", "ids"))
    if isinstance(costs, Failed):
        return Row(LOADERS[name], "", could_not(costs))
    rates = [cost.rate for cost in costs]
    told = f"{millions(rates)} {PER_SECOND}"
    if name in TARGETS:
        least = TARGETS[name]
        return Row(LOADERS[name], f"≥ {least / 1e6:.0f} {PER_SECOND}", told, plan.judged(median(rates) >= least))
    if name == "ids" or isinstance(ours, Failed) or isinstance(alone, Failed):
        return Row(LOADERS[name], "", told)
    ratios, same = ([mine.rate / cost.rate for mine, cost in zip(each, costs, strict=True)] for each in (ours, alone))
    least = 2 if name == "litdata" else 1
    target = f"PackedDataset is at least {'twice as quick' if least == 2 else 'as quick'}"
    told += f"; {spread(ratios, 1)} times as quick, with ids alone {spread(same, 1)} times"
    return Row(LOADERS[name], target, told, plan.judged(median(ratios) >= least))
