"""The rows about one huge packed file, which one worker unpacks for all."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from bench import corpus, measure
from bench.contenders import HERE, Cost, Costs, Plan, alternate, packed
from bench.measure import Failed
from bench.rows import Row, could_not, spread

ROWS = ("huge",)
LEAST = 120
"""MB of text: over what is unpacked for all, however small the bench is."""
KINDS = ("zst", "gz")


@dataclass(frozen=True)
class Unpacking:
    """What `unpacking.py` told of one file, in each round."""

    seconds: list[float]
    size: int

    @property
    def rates(self) -> list[float]:
        """MB of text per CPU second."""
        return [self.size / 1e6 / seconds for seconds in self.seconds]


def huge_rows(plan: Plan) -> list[Row]:
    """How fast a packed file is unpacked, how many workers that feeds, and what it costs beside plain lines."""
    plain = corpus.subset(plan.mixed, plan.folder, max(LEAST, plan.subset_mb))
    small = corpus.subset(plan.mixed, plan.folder, 1)
    contenders: dict[str, Callable[[], Cost]] = {
        "start": partial(packed, plan, str(small), "--workers", "2"),
        "jsonl": partial(packed, plan, str(plain), "--workers", "2"),
    }
    for kind in KINDS:
        contenders[kind] = partial(packed, plan, str(in_kind(plain, kind)), "--workers", "2")
    costs = alternate(contenders, plan.rival_repeats)
    return [row(plan, kind, costs, unpacked(plan, in_kind(plain, kind))) for kind in KINDS]


def in_kind(plain: Path, kind: str) -> Path:
    """The same lines, packed: gzip at its usual level 6, zstd at Arrow's, 1."""
    path = plain.with_name(f"{plain.name}.{kind}")
    if not path.exists():
        partial_ = path.with_suffix(".partial")
        with open(plain, "rb") as source, open(partial_, "wb") as out:
            if kind == "gz":
                with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6) as packing:
                    shutil.copyfileobj(source, packing, 1 << 20)
            else:
                import pyarrow as pa

                with pa.CompressedOutputStream(out, "zstd") as packing:
                    shutil.copyfileobj(source, packing, 1 << 20)
        partial_.replace(path)
    return path


def unpacked(plan: Plan, path: Path) -> Unpacking | Failed:
    folder = plan.folder / "unpacked"
    try:
        told = [
            json.loads(measure.run([sys.executable, str(HERE / "unpacking.py"), str(path), str(folder)]).output)
            for _ in range(plan.repeats)
        ]
    except Failed as failure:
        return failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Unpacking([one["seconds"] for one in told], told[0]["bytes"])


def row(plan: Plan, kind: str, costs: Costs, unpacking: Unpacking | Failed) -> Row:
    what = f"One .{kind} of {max(LEAST, plan.subset_mb)} MB of text, unpacked by one of two workers for both"
    start, plain, some = costs["start"], costs["jsonl"], costs[kind]
    for found in (unpacking, start, plain, some):
        if isinstance(found, Failed):
            return Row(what, "the same ids", could_not(found), False)
    ratios = [one.cpu / other.cpu for one, other in zip(some, plain, strict=True)]
    # Megabytes of text for each CPU second of a worker, but for the start: what a long run comes to.
    texts = [
        (unpacking.size / 1e6) * (1 - less.ids / one.ids) / (one.cpu - less.cpu)
        for less, one in zip(start, plain, strict=True)
    ]
    feeds = median(unpacking.rates) / median(texts)
    same = {cost.sha256 for cost in [*plain, *some]}
    measured = (
        f"{'the same' if len(same) == 1 else 'OTHER'} ids; {spread(unpacking.rates, 0)} MB of text per CPU second are "
        f"unpacked, which feeds {feeds:.1f} workers, each of which makes ids of {spread(texts)} MB in that time; "
        f"{spread(ratios, 2, ' times')} the CPU seconds of the same lines as .jsonl"
    )
    return Row(what, "the same ids", measured, plan.judged(len(same) == 1))
