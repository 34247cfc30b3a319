"""Documents of more ids than a sample: what becomes of them, decided before any strategy sees them."""

from dataclasses import replace

import numpy as np

from millstream.records import LEARNED, Ids, TokenBatch

OVERLONG = ("cut", "truncate", "drop", "fault")


class Overlong:
    """Batches in, batches out, in which no document has more than `seq_len` ids; with `how` "cut", just as they come.

    A longer document keeps its first `seq_len` ids ("truncate"), the last of them `eos` if there is one, or none
    ("drop", and "fault", where whoever feeds makes a fault of it); `cut_off` counts the others. A document that comes
    in several batches is handed on with the one in which it ends.

    >>> row = np.arange(3)
    >>> batch = TokenBatch(np.arange(6), np.array([1, 4, 1]), row, row * 0, ["a", "b", "c"], row, row)
    >>> done = Overlong("truncate", 3, eos=9).feed(batch)
    >>> done.ids.tolist(), done.length.tolist(), done.cut_off.tolist()
    ([0, 1, 2, 9, 5], [1, 3, 1], [0, 1, 0])
    >>> Overlong("drop", 3).feed(batch).ids.tolist()
    [0, 5]
    """

    def __init__(self, how: str, seq_len: int, eos: int | None = None) -> None:
        self.how, self.seq_len, self.eos = how, seq_len, eos
        self._part: TokenBatch | None = None  # what is kept of a document that goes on
        self._length = 0  # ids that it has had

    def feed(self, batch: TokenBatch) -> TokenBatch:
        """The documents that end with `batch`."""
        if self.how == "cut":
            return batch
        whole, length = self._whole(batch)
        over = length > self.seq_len
        if not over.any():
            return whole
        keep = np.where(over, self.seq_len if self.how == "truncate" else 0, length)
        stops = np.cumsum(whole.length)
        within = np.arange(len(whole.ids)) - np.repeat(stops - whole.length, whole.length)
        ids = whole.ids[within < np.repeat(keep, whole.length)]
        if self.how == "truncate" and self.eos is not None:
            # Not to be learned where that is told: whoever spoke did not end here.
            ids[np.cumsum(keep)[over] - 1] = self.eos
        return replace(whole, ids=ids, length=keep, cut_off=length - keep)

    def _whole(self, batch: TokenBatch) -> tuple[TokenBatch, Ids]:
        """(the documents that end here, of long ones no more ids than a sample needs; how many each has)."""
        if self._part is not None and len(batch):
            self._length += int(batch.length[0])
            more = batch.ids[: min(self.seq_len - len(self._part.ids), int(batch.length[0]))]
            part = replace(self._part, ids=np.concatenate([self._part.ids, more]))
            if batch.open and len(batch) == 1:
                self._part = part
                return batch.rows(0, 0), np.zeros(0, np.int64)
            rest = batch.ids[int(batch.length[0]) :]
            length, start = batch.length.copy(), batch.start.copy()
            length[0], start[0] = len(part.ids), 0
            batch = replace(batch, ids=np.concatenate([part.ids, rest]), length=length, start=start)
            lengths = length.copy()
            lengths[0] = self._length
            self._part = None
        else:
            lengths = batch.length
        if batch.open:
            last = batch.rows(len(batch) - 1, len(batch))
            self._part = replace(last, ids=last.ids[: self.seq_len].copy())
            self._length = len(last.ids)
            batch, lengths = batch.rows(0, len(batch) - 1), lengths[:-1]
        return batch, lengths


def too_many(ids: int, seq_len: int) -> str:
    """What is wrong with a document, in words."""
    return f"it has {ids:,} ids, more than the {seq_len:,} of a sample"


def learned_cut_off(before: TokenBatch, after: TokenBatch) -> int:
    """How many ids that are to be learned were cut off, of documents that are whole in both."""
    return int((before.ids >= LEARNED).sum()) - int((after.ids >= LEARNED).sum())
