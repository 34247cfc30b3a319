"""The rows about a driver that sees counts alone; as in `bench.rows`, no number is known before."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench import measure
from bench.contenders import HERE, Cost, Plan, packed, say
from bench.measure import Failed
from bench.rows import PER_SECOND, SAME, Row, could_not, millions, spread

TARGET_CONCAT = 0.15
"""Nanoseconds an id."""
TARGET_WINDOWS = 200
"""Nanoseconds a document."""
STRATEGIES = {
    "concat": ("concat", "no"),
    "split": ("split", "no"),
    "best-fit": ("best-fit", "no"),
    "--shuffle 0": ("concat", "yes"),
    "both": ("best-fit", "yes"),
}
WINDOWS = ("best-fit", "--shuffle 0", "both")
PARTS = 1000
FEW, MANY = 100, 10_000
LARGE, DOCUMENTS = 1_000_000, 50
"""Parts of a corpus of 16 TB, and documents in each: as few, so that the bench is over in minutes."""
WORKERS = (8, 64, 512)
MADE_UP = "made-up counts of parts of 16 MiB, 4 M ids in 5,000 documents each"

Told = dict[str, Any]


@dataclass(frozen=True)
class Driven:
    """What `driver.py` told of every strategy, and the one-worker runs of the same rounds."""

    told: dict[str, list[Told]]
    packed: list[Cost]

    def ids(self, name: str) -> list[float]:
        """Nanoseconds an id."""
        return [1e9 * one["seconds"] / one["ids"] for one in self.told[name]]

    def documents(self, name: str) -> list[float]:
        """Nanoseconds a document."""
        return [1e9 * one["seconds"] / one["documents"] for one in self.told[name]]


def command(strategy: tuple[str, str], parts: int, seed: int = 0) -> list[str]:
    return [sys.executable, str(HERE / "driver.py"), *strategy, str(parts), str(seed)]


def driver_rows(plan: Plan) -> list[Row]:
    """The counting of a driver: its CPU time, its memory, and what follows for many workers."""
    what = f"What a driver does with {MADE_UP}"
    parts = PARTS if plan.judge else PARTS // 10
    try:
        driven = Driven({name: [] for name in STRATEGIES}, [])
        for number in range(plan.repeats):
            for name, strategy in STRATEGIES.items():
                say(f"round {number + 1} of {plan.repeats}: counting, {name}")
                driven.told[name].append(json.loads(measure.run(command(strategy, parts, number)).output))
            say(f"round {number + 1} of {plan.repeats}: one worker")
            driven.packed.append(packed(plan, plan.mixed.path, "--workers", "1"))
        return [concat_row(plan, driven), windows_row(plan, driven), memory_row(plan), bound_row(driven)]
    except Failed as failure:
        return [Row(what, f"at most {TARGET_CONCAT} ns an id", could_not(failure), plan.judged(False))]


def concat_row(plan: Plan, driven: Driven) -> Row:
    what = f"What a driver does with {MADE_UP}: unpickling, states, tasks; its CPU time, concat"
    values = driven.ids("concat")
    measured = f"{spread(values, 3, ' ns')} an id; split {spread(driven.ids('split'), 3, ' ns')}"
    return Row(what, f"at most {TARGET_CONCAT} ns an id", measured, plan.judged(median(values) <= TARGET_CONCAT))


def windows_row(plan: Plan, driven: Driven) -> Row:
    what = "The same with windows, at the default of 32 M ids"
    measured = "; ".join(f"{name} {spread(driven.documents(name), 0, ' ns')}" for name in WINDOWS) + " a document"
    met = all(median(driven.documents(name)) <= TARGET_WINDOWS for name in WINDOWS)
    return Row(what, f"at most {TARGET_WINDOWS} ns a document", measured, plan.judged(met))


def memory_row(plan: Plan) -> Row:
    few, many = (FEW, MANY) if plan.judge else (FEW // 10, MANY // 10)
    what = f"Peak memory of counting: {few:,} parts and {many:,}"
    peaks = {
        name: [measure.peak_memory(command(strategy, parts)) for parts in (few, many)]
        for name, strategy in STRATEGIES.items()
    }
    measured = "; ".join(f"{name} {low / 1e6:.0f} MB and {high / 1e6:.0f} MB" for name, (low, high) in peaks.items())
    met = all(high <= low * (1 + SAME) for low, high in peaks.values())
    return Row(what, "the same at both", measured, plan.judged(met))


def parts_rows(plan: Plan) -> list[Row]:
    """A driver of a corpus of a million parts, its planning included."""
    many = LARGE if plan.judge else LARGE // 50
    what = (
        f"A driver with {many:,} parts of 16 MiB, planned from files of 1 TiB, {DOCUMENTS} documents in each, made up: "
        f"CPU time, and peak memory beside that with {many // 100:,}"
    )
    folder = plan.folder / "sparse"
    try:
        words, met = [], True
        for name in ("concat", "best-fit"):
            say(f"{many:,} parts: {name}")
            few, all_ = (
                json.loads(measure.run([*command(STRATEGIES[name], parts), str(DOCUMENTS), str(folder)]).output)
                for parts in (many // 100, many)
            )
            low, high, each = few["memory"], all_["memory"], 1e6 * all_["seconds"] / many
            words.append(f"{name}: {each:.0f} µs a part, {low / 1e6:.0f} MB and {high / 1e6:.0f} MB")
            met &= high <= low * (1 + SAME)
        return [Row(what, "the same memory at both", "; ".join(words), plan.judged(met))]
    except Failed as failure:
        return [Row(what, "the same memory at both", could_not(failure), plan.judged(False))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bound_row(driven: Driven) -> Row:
    """Amdahl's bound: an id costs a worker what it costs a one-worker run, and the driver what was measured."""
    worker = 1e9 / median(cost.rate for cost in driven.packed)
    words = []
    for name in ("concat", "best-fit"):
        driver = median(driven.ids(name))
        rates = [bound(worker, driver, workers) for workers in WORKERS]
        words.append(f"{name}: {told_rates(rates)}; at most {1e9 / driver / 1e9:.0f} G with any number")
    many = f"{', '.join(map(str, WORKERS[:-1]))} and {WORKERS[-1]} workers"
    what = f"Ids per second at {many}, by Amdahl's law with that counting: computed"
    one = f"one worker makes {millions([cost.rate for cost in driven.packed])} {PER_SECOND}"
    return Row(what, "–", f"{'; '.join(words)}; {one}")


def bound(worker: float, driver: float, workers: int) -> float:
    """Ids per second, where one costs so many nanoseconds of some worker and of the only driver.

    >>> f"{bound(20, 0.02, 1000):.2e}"
    '2.50e+10'
    """
    return 1e9 / (worker / workers + driver)


def told_rates(rates: Sequence[float]) -> str:
    """
    >>> told_rates([4e8, 1.234e10])
    '0.4, 12.3 G'
    """
    return ", ".join(f"{rate / 1e9:.1f}" for rate in rates) + " G"
