"""Packing with an engine of your own: Dask, Spark, a queue of jobs, or whatever calls functions elsewhere.

`pack_with` opens and finishes a run folder as `pack_to` does, and between that calls a function of yours with a
`PackJob`: what there is to do, and who is told of what was done. The rest are the parts that a job is made of.
"""

from millstream.runs.pack.counts import Counts as Counts
from millstream.runs.pack.counts import ShardTask as ShardTask
from millstream.runs.pack.course import Course as Course
from millstream.runs.pack.course import Start as Start
from millstream.runs.pack.driven import PackJob as PackJob
from millstream.runs.pack.packing import pack_with as pack_with
from millstream.runs.pack.subset import Mark as Mark
from millstream.runs.pack.tokenizing import PartTask as PartTask
from millstream.runs.pack.tokenizing import TokenizePart as TokenizePart
from millstream.runs.pack.writing import WriteShards as WriteShards
from millstream.runs.pack.writing import Written as Written
from millstream.stream.line import Strategy as Strategy

__all__ = [
    "Counts",
    "Course",
    "Mark",
    "PackJob",
    "PartTask",
    "ShardTask",
    "Start",
    "Strategy",
    "TokenizePart",
    "WriteShards",
    "Written",
    "pack_with",
]
