"""Samples against their segments: every id within the vocabulary, padding where nothing else is, masks that fit."""

from collections.abc import Iterator

import numpy as np

from millstream.folder.columns import batch, schema
from millstream.folder.entries import Identity
from millstream.folder.reader import parquet
from millstream.folder.samples import Samples, ShardSamples
from millstream.integrity.documents import Spans
from millstream.records import Ids


class BlockOfSamples:
    """Samples that are looked at together: `ids` (samples, N or fewer for the remainder), `learned` (None without a
    mask), and their `segments`, in which samples count from this block's first."""

    def __init__(self, samples: Samples, ids: Ids, learned: Ids | None, segments: Ids) -> None:
        self.ids, self.learned, self.segments = ids, learned, segments
        rows, width = ids.shape
        length = segments["length"].astype(np.int64)
        self.used = np.bincount(segments["sample"], length, minlength=rows).astype(np.int64)
        ends = np.cumsum(length)
        begins = np.concatenate([[0], np.cumsum(self.used)])[segments["sample"]]
        left = (width - self.used)[segments["sample"]] if samples.pad_left else 0
        self.at = ends - length - begins + left  # of each segment's first id in its sample
        self._left = samples.pad_left

    def spans(self, number: int) -> Spans:
        """Its segments, numbered from `number`, with the ids at their ends."""
        some, stop = self.segments, self.at + self.segments["length"]
        start = some["start"].astype(np.int64)
        last = self.ids[some["sample"], stop - 1].astype(np.int64)
        first = self.ids[some["sample"], self.at].astype(np.int64)
        count = np.ones(len(some), np.int64)
        at = number + np.arange(len(some))
        return Spans(
            document=some["document"],
            start=start,
            stop=start + some["length"],
            first=first,
            last=last,
            pieces=count,
            at=at,
        )

    def problems(self, settings: Identity, pads: bool) -> Iterator[str]:
        """What is wrong in this block; `pads`: whether samples of a concat run may be padded here."""
        limit = settings.vocab_size or 1 << 32
        for number in (int(self.ids.min()), int(self.ids.max())) if self.ids.size else ():
            if not 0 <= number < limit:
                yield f"id {number}, the vocabulary ends at {limit - 1}"
        yield from self._padding_problems(settings)
        if settings.strategy == "concat" and not pads and (self.used < self.ids.shape[1]).any():
            yield "a sample before the last is padded"
        yield from self._order_problems(settings)

    def _padding_problems(self, settings: Identity) -> Iterator[str]:
        short = np.flatnonzero(self.used < self.ids.shape[1])
        if not len(short):
            return
        column, used = np.arange(self.ids.shape[1]), self.used[short][:, None]
        padding = column < self.ids.shape[1] - used if self._left else column >= used
        if (self.ids[short][padding] != settings.pad_id).any():
            yield f"padding that is not id {settings.pad_id}"
        if self.learned is not None and self.learned[short][padding].any():
            yield "padding that is to be learned"

    def _order_problems(self, settings: Identity) -> Iterator[str]:
        """Segments of one sample, and with concat and no shuffle all of them, are in the order of their documents."""
        some, most = self.segments, settings.max_segments
        counts = np.bincount(some["sample"], minlength=len(self.ids))
        if not counts.all():
            yield "a sample without a document"
        if most and counts.max(initial=0) > most:
            yield f"a sample has more documents than {most}"
        if settings.strategy == "split" and counts.max(initial=0) > 1:
            yield "a sample has more documents than 1"
        if settings.strategy != "concat" and (some["start"] % settings.seq_len).any():
            yield f"a document is cut elsewhere than every {settings.seq_len} ids"
        document, inside = some["document"], some["sample"][1:] == some["sample"][:-1]
        if (inside & (document[1:] == document[:-1])).any():
            yield "a sample has two segments of one document side by side"
        if settings.shuffle is None and (inside & (document[1:] < document[:-1])).any():
            yield "documents are not in order in a sample"


def segment_problems(shard: ShardSamples, segments: Ids, kept: bool) -> Iterator[str]:
    """Whether a shard's segments can be used at all: in the order of samples that are there, each with ids.

    `kept`: the remainder's segments may follow, in the sample after the last.
    """
    count, most, before = len(shard), len(shard) + kept, 0
    for low in range(0, len(segments), 1 << 20):
        part = segments[low : low + (1 << 20)]
        sample = part["sample"].astype(np.int64)
        if (np.diff(sample, prepend=before) < 0).any():
            yield "segments are not in the order of their samples"
            return
        before = int(sample[-1])
        if before >= most:
            yield f"segments of sample {before}, and there are {count}"
            return
        if not part["length"].all():
            yield "a segment of no ids"
            return
        used = np.bincount(sample - int(sample[0]), part["length"])
        if (used > shard.samples.seq_len).any():
            yield f"a sample has more ids than {shard.samples.seq_len}"
            return


def column_problems(shard: ShardSamples) -> Iterator[str]:
    """A Parquet shard's other columns are what its ids, segments and mask make."""
    samples = shard.samples
    columns = schema(samples.padded or samples.masked, {})
    with parquet(samples.store, shard.entry.files.samples.name) as file:
        stored = file.iter_batches(samples.rows, columns=columns.names, use_threads=False)
        for found, (first, ids, learned) in zip(stored, shard.blocks(), strict=True):
            expected = batch(columns, ids, shard.runs(first, len(ids)), learned)
            for name in columns.names:
                if not expected[name].equals(found[name]):
                    yield f"column {name} does not fit its ids and segments"
                    return
