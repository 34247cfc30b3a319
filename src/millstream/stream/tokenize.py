"""Documents to token ids, a batch at a time, and the comparison with a reference engine."""

from collections.abc import Sequence

import numpy as np

from millstream.errors import EngineMismatch
from millstream.records import Ids
from millstream.stream.tokenizers import Engine, Tokenizer


def surround(
    ids: Ids,
    lengths: Ids,
    bos: int | None = None,
    eos: int | None = None,
    opened: bool = False,
    open: bool = False,
) -> tuple[Ids, Ids]:
    """BOS before and EOS after every document that has ids: the new flat ids and lengths (i64).

    `opened`: the first document goes on with an earlier one, so it gets no BOS; `open`: the last one goes on later, so
    it gets no EOS.

    >>> import numpy as np
    >>> surround(np.array([15496, 995]), np.array([2, 0]), eos=50256)
    (array([15496,   995, 50256]), array([3, 0]))
    """
    if bos is None and eos is None:
        return ids, lengths
    before = np.full(len(lengths), bos is not None) & (lengths > 0)
    after = np.full(len(lengths), eos is not None) & (lengths > 0)
    if opened:
        before[:1] = False
    if open:
        after[-1:] = False
    total = lengths + before + after
    stops = np.cumsum(total)
    out = np.empty(int(total.sum()), ids.dtype)
    own = np.ones(len(out), bool)
    for value, where in ((bos, (stops - total)[before]), (eos, stops[after] - 1)):
        if value is not None:
            own[where] = False
            out[where] = value
    out[own] = ids
    return out, total


def compare(tokenizer: Tokenizer, reference: Engine, texts: Sequence[str], names: Sequence[str]) -> int:
    """Tokenize `texts` with both engines; the number of bytes compared. Raises EngineMismatch, naming the document."""
    if not texts:
        return 0
    ours, our_lengths = tokenizer.engine.encode(texts)
    theirs, their_lengths = reference.encode(texts)
    if not (np.array_equal(our_lengths, their_lengths) and np.array_equal(ours, theirs)):
        our_stops, their_stops = np.cumsum(our_lengths), np.cumsum(their_lengths)
        for name, a, n, b, m in zip(names, our_stops, our_lengths, their_stops, their_lengths, strict=True):
            if n != m or not np.array_equal(ours[a - n : a], theirs[b - m : b]):
                raise EngineMismatch(
                    f"document {name!r}: engine {tokenizer.engine.name} gives {n} ids and {reference.name} gives {m}, "
                    f"or other ones, with tokenizer {tokenizer.name}; nothing of it was used. "
                    "Please report the document; --engine reference packs it all the same, slower"
                )
    return sum(map(len, texts))
