"""What packing costs elsewhere: time, bytes moved, requests, and what is full first. Computed, from rates that are
measured here and from what is assumed of the machines, which is told beside every number.

`bill` is all of the model: each resource is busy for so many seconds, and the run takes as long as the busiest of them.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from bench import corpus, driving, measure
from bench.contenders import Plan, ids_on_disk, pack_command, say
from bench.measure import Failed
from bench.rows import Row, could_not
from millstream.records import Cursor
from millstream.runs.pack.joining import JOINED_PART
from millstream.runs.pack.pieces import StoredPieces
from millstream.runs.pack.run import Run
from millstream.runs.pack.settings import MIB, Settings
from millstream.runs.pack.spill import refs_of
from millstream.runs.pack.tokenizing import PIECE
from millstream.store import at
from millstream.store.ranges import AHEAD, FIRST
from millstream.store.uploads import PART as UPLOAD

ROWS = ("cost",)
TERABYTE = 10**12
SHARD = 256 * MIB
S3_GETS, S3_PUTS = 5_500, 3_500
"""Requests a second that one prefix of a bucket takes, as Amazon says."""


@dataclass(frozen=True)
class Rates:
    """What was measured: CPU seconds of a worker for a byte of text, with all that is done with it, and of who counts;
    ids of a byte of text; for each id the bytes of pieces and of output shards; bytes of the counts of a part, its
    `record` (of 16 MiB of text)."""

    worker: float
    driver: float
    ids: float
    piece: float
    shard: float
    record: float


@dataclass(frozen=True)
class Site:
    """What is assumed: machines with so many cores, and bytes a second that each of them reads from where the input
    lies and writes to where shards go. `part`: bytes of input in one. `requests`: whether both are a bucket; `shared`:
    whether pieces and counts go through it too, as with `--join`, where every machine counts for itself."""

    what: str
    machines: int
    cores: int
    read: float
    write: float
    part: int = 16 * MIB
    requests: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Bill:
    """Seconds that each resource is busy, were it alone; bytes that are read and written, and requests."""

    cpu: float
    driver: float
    read: float
    write: float
    requests: float
    bytes_in: float
    bytes_out: float
    gets: float
    puts: float

    @property
    def seconds(self) -> float:
        return max(getattr(self, name) for name in BUSY)

    @property
    def bottleneck(self) -> str:
        return max(BUSY, key=lambda name: getattr(self, name))


BUSY = ("cpu", "driver", "read", "write", "requests")
SITES = (
    Site("one machine with 64 cores and its own disks (4 GB/s in, 3.5 GB/s out)", 1, 64, 4e9, 3.5e9),
    Site(
        "8 machines with 16 cores, Ray, S3 (25 Gbit/s for each, pieces between the nodes)",
        8,
        16,
        3.1e9,
        3.1e9,
        128 * MIB,
        requests=True,
    ),
    Site(
        "8 machines with 16 cores, --join, S3 (25 Gbit/s for each, pieces in the bucket)",
        8,
        16,
        3.1e9,
        3.1e9,
        JOINED_PART,
        requests=True,
        shared=True,
    ),
    Site(
        "64 machines with 16 cores, --join, S3 (25 Gbit/s for each, pieces in the bucket)",
        64,
        16,
        3.1e9,
        3.1e9,
        JOINED_PART,
        requests=True,
        shared=True,
    ),
)


def bill(text: float, site: Site, rates: Rates) -> Bill:
    """Of so many bytes of plain JSONL, one subset, without exports.

    With a CPU second for 100 MB, a terabyte takes 10,000 of them:

    >>> rates = Rates(worker=1e-8, driver=1e-11, ids=0.4, piece=2.1, shard=2.1, record=2e4)
    >>> some = bill(1e12, Site("", 1, 100, 1e12, 1e12), rates)
    >>> round(some.cpu), some.bottleneck, f"{some.bytes_out:.2e}", some.gets
    (100, 'cpu', '1.68e+12', 0.0)
    """
    parts, ids = text / site.part, text * rates.ids
    pieces, counts = text / PIECE, parts * rates.record * site.part / PIECE
    shards = max(1.0, ids * 2 / SHARD)
    read = text + ids * rates.piece + (site.machines * counts if site.shared else 0.0)
    write = ids * (rates.piece + rates.shard) + counts
    gets = puts = 0.0
    if site.requests:
        gets += parts * (1 + gets_of(site.part))  # what there is to read, and then its ranges
        # Samples in many, and two to begin and to end that; segments, documents, and a record. That of each part.
        puts += shards * (SHARD / UPLOAD + 2 + 3) + parts
    if site.shared:
        gets += pieces + shards  # those at the ends of shards are read twice
        gets += site.machines * (parts + shards)  # what is told of both, by each; what is not there yet is not counted
        puts += pieces + parts + 2 * shards  # a lease of each part; a lease of each shard, and what is told of it
    return Bill(
        cpu=text * rates.worker / (site.machines * site.cores),
        driver=text * rates.driver,
        read=read / site.machines / site.read,
        write=write / site.machines / site.write,
        requests=max(gets / S3_GETS, puts / S3_PUTS) if site.requests else 0.0,
        bytes_in=read,
        bytes_out=write,
        gets=gets,
        puts=puts,
    )


def gets_of(size: float) -> int:
    """Requests for so many bytes that are read on and on: ever larger ranges.

    >>> gets_of(1 << 16), gets_of(16 << 20), gets_of(64 << 20)
    (1, 6, 12)
    """
    count, range_ = 0, float(FIRST)
    while size > 0:
        size, count, range_ = size - range_, count + 1, min(AHEAD, 4 * range_)
    return count


def cost_rows(plan: Plan) -> list[Row]:
    """A terabyte at some sites."""
    try:
        rates = measured(plan)
    except Failed as failure:
        return [Row("What a terabyte costs: computed", "–", could_not(failure))]
    head = (
        f"measured here: {1e9 * rates.worker:.2f} ns of CPU time a byte of text, {1e12 * rates.driver:.1f} ps of who "
        f"counts; {rates.ids:.3f} ids a byte, {rates.piece:.2f} bytes of pieces and {rates.shard:.2f} of shards an id"
    )
    return [Row("What 1 TB of JSONL is computed from", "–", head), *(row(site, rates) for site in SITES)]


def measured(plan: Plan) -> Rates:
    small = corpus.subset(plan.mixed, plan.folder, 1)
    size = Path(plan.mixed.path).stat().st_size
    costs, shard = [], 0.0
    for number in range(plan.repeats):
        say(f"round {number + 1} of {plan.repeats}: what a byte of text costs")
        shutil.rmtree(plan.packed, ignore_errors=True)
        start = measure.run(pack_command(plan, str(small), "--workers", "1")).cpu
        costs.append(measure.run(pack_command(plan, plan.mixed.path, "--workers", "1")).cpu - start)
        ids, _ = ids_on_disk(plan.packed)
        shard = sum(path.stat().st_size for path in shard_files(plan.packed)) / ids
        shutil.rmtree(plan.packed)
    parts = driving.PARTS // 10
    told = json.loads(measure.run(driving.command(driving.STRATEGIES["concat"], parts)).output)
    return Rates(
        worker=median(costs) / (size - small.stat().st_size),
        driver=told["seconds"] / (parts * 16 * MIB),
        ids=ids / size,
        shard=shard,
        **one_part(plan),
    )


def shard_files(folder: Path) -> Iterator[Path]:
    for names in ("samples-*", "segments-*", "documents-*"):
        yield from folder.glob(names)


def one_part(plan: Plan) -> dict[str, float]:
    """The bytes of pieces for each id, and those of the counts, of the first part."""
    folder = plan.folder / "piece"
    run = Run(str(plan.packed), [plan.mixed.path], Settings(workers=1))
    part = next(run.reading.parts(Cursor(), 16 * MIB))
    found = list(run.reading.tokenize_part(StoredPieces(at(str(folder))))(run.reading.part_task(part)))
    shutil.rmtree(folder)
    size = sum(ref.size for counts in found for ref in refs_of(counts))
    ids = sum(rows.ids for counts in found for rows in counts.subsets.values())
    return {"piece": size / ids, "record": float(sum(len(msgspec.msgpack.encode(counts)) for counts in found))}


def row(site: Site, rates: Rates) -> Row:
    found = bill(TERABYTE, site, rates)
    busy = ", ".join(f"{name} {getattr(found, name):,.0f} s" for name in BUSY if getattr(found, name) >= 0.5)
    asked = f", {found.gets:,.0f} GETs, {found.puts:,.0f} PUTs" if site.requests else ""
    measured_ = (
        f"{found.seconds:,.0f} s, the most of {busy}: bound by {found.bottleneck}; "
        f"{found.bytes_in / 1e12:.2f} TB read, {found.bytes_out / 1e12:.2f} TB written{asked}"
    )
    return Row(f"1 TB of JSONL on {site.what}: computed", "–", measured_)
