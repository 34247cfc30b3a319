"""What workers are given, in words."""

from collections.abc import Sequence

from millstream.corpus.sources import InputShard
from millstream.exports.tasks import Task
from millstream.records import Part, Range
from millstream.runs.pack.counts import ShardTask
from millstream.runs.pack.tokenizing import PartTask


def named(unit: Part | PartTask | ShardTask | Task, shards: Sequence[InputShard]) -> str:
    """A unit in words, for who has to find what kills workers.

    >>> shards = [InputShard("/c/a.jsonl", "c/a.jsonl", "jsonl"), InputShard("/c/b.parquet", "c/b.parquet", "parquet")]
    >>> named(Part(0, (Range(0, 1000, 2000),)), shards)
    'c/a.jsonl, bytes 1,000 to 2,000'
    >>> named(Part(0, (Range(0), Range(1, 0, 50))), shards)
    'c/a.jsonl, bytes 0 to c/b.parquet, rows to 50'
    >>> named(Part(0, (Range(1, 50),)), shards)
    'c/b.parquet, rows 50 to its end'
    >>> named(ShardTask("train", 3, 1, {}, ()), shards)
    'output shard 3 of train, documents 0 to 0'
    """
    if isinstance(unit, ShardTask):
        low = unit.pieces[0].before.ordinal if unit.pieces else 0
        high = unit.pieces[-1].after.ordinal if unit.pieces else 0
        return f"output shard {unit.first} of {unit.subset}, documents {low:,} to {high:,}"
    if isinstance(unit, PartTask):
        unit = unit.part
    if not isinstance(unit, Part):
        return unit.words
    first, last = unit.ranges[0], unit.ranges[-1]

    def what(each: Range) -> str:
        return "rows" if shards[each.source].kind == "parquet" else "bytes"

    behind = f"to {shards[last.source].name}, {what(last)} to" if last.source != first.source else "to"
    end = "its end" if last.stop is None else f"{last.stop:,}"
    return f"{shards[first.source].name}, {what(first)} {first.start:,} {behind} {end}"
