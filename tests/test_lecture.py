"""`pack` and `split` against the two loops one would write by hand.

The loops below know nothing of numpy, batches or states.
They are the definition; the fast path has to equal them on every corpus.
"""

import json
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import millstream

# --- the loops -------------------------------------------------------------


def split_by_hand(documents, seq_len):
    """Cut every document by itself. Only its last piece may be shorter than `seq_len`."""
    for document in documents:
        for start in range(0, len(document), seq_len):
            yield document[start : start + seq_len]


def pack_by_hand(documents, seq_len):
    """Pour all documents into one buffer and draw samples off its front.

    What is left at the end comes last, if there is anything left.
    """
    buffer = []
    for document in documents:
        buffer.extend(document)
        while len(buffer) >= seq_len:
            yield buffer[:seq_len]
            del buffer[:seq_len]
    if buffer:
        yield buffer[:]


# --- the corpora -----------------------------------------------------------

LARGEST_ID = 2**32 - 1  # without a vocabulary, ids are uint32


@st.composite
def corpora(draw):
    """(seq_len, documents): empty and one-id documents, some just about N, some of 50 N.

    The ids count upward through the corpus, so a lost, doubled or moved id shows.
    """
    seq_len = draw(st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, 40)))
    length = st.one_of(
        st.sampled_from([0, 1, seq_len - 1, seq_len, seq_len + 1, 50 * seq_len]),
        st.integers(0, 3 * seq_len),
    )
    lengths = draw(st.lists(length, max_size=12))
    total = sum(lengths)
    # Start low, across the border of uint16, or so that the last id is the largest there is.
    ids = count(draw(st.sampled_from([0, 65_530, LARGEST_ID + 1 - total])))
    return seq_len, [list(islice(ids, length)) for length in lengths]


def on_corpora(test):
    """The corners that must be tried on every run, then random corpora."""
    for corner in [
        (1, []),
        (1, [[]]),
        (1, [[7]]),
        (2, [[], [7]]),
        (2, [[], [], []]),
        (2, [[1, 2, 3], [], [4, 5]]),
        (3, [[1, 2, 3], [4, 5, 6]]),
        (4, [list(range(200)), [], [200]]),
    ]:
        test = example(corner)(test)
    return settings(deadline=None)(given(corpora())(test))


def lists(arrays):
    return [np.asarray(array).tolist() for array in arrays]


def samples(stream):
    return [(sample.token_ids.tolist(), sample.complete) for sample in stream]


def in_hops(build, hops, listed):
    """All items of a stream that is left after each of `hops` and built again from its state (as JSON)."""
    found, state = [], None
    for taken in hops:
        stream = build(state)
        found += listed(islice(stream, taken))
        state = json.loads(json.dumps(stream.state()))
        stream.close()
    return found + listed(build(state))


# --- pack ------------------------------------------------------------------


@on_corpora
def test_pack_equals_the_loop(corpus):
    seq_len, documents = corpus
    expected = [(ids, len(ids) == seq_len) for ids in pack_by_hand(documents, seq_len)]
    assert samples(millstream.pack(documents, seq_len)) == expected


@on_corpora
def test_pack_drop_equals_the_loop_without_its_remainder(corpus):
    seq_len, documents = corpus
    expected = [(ids, True) for ids in pack_by_hand(documents, seq_len) if len(ids) == seq_len]
    assert samples(millstream.pack(documents, seq_len, remainder="drop")) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@on_corpora
def test_pack_pad_equals_the_loop_with_its_remainder_filled_up(side, corpus):
    seq_len, documents = corpus
    expected = []
    for ids in pack_by_hand(documents, seq_len):
        padding = [0] * (seq_len - len(ids))
        expected.append(padding + ids if side == "left" else ids + padding)
    stream = millstream.pack(documents, seq_len, remainder="pad", pad_id=0, pad_side=side)
    assert lists(sample.token_ids for sample in stream) == expected


@on_corpora
def test_pack_takes_arrays_and_generators_as_it_takes_lists(corpus):
    seq_len, documents = corpus
    expected = list(pack_by_hand(documents, seq_len))
    arrays = [np.array(document, dtype=np.uint32) for document in documents]
    for ids in (arrays, iter(documents), (array for array in arrays), tuple(documents)):
        assert lists(s.token_ids for s in millstream.pack(ids, seq_len)) == expected


@pytest.mark.parametrize("remainder", ["keep", "drop", "pad"])
@settings(deadline=None)
@given(corpora(), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_pack_goes_on_from_its_state(remainder, corpus, hops):
    seq_len, documents = corpus

    def build(state):
        return millstream.pack(documents, seq_len, remainder=remainder, pad_id=0, state=state)

    assert in_hops(build, hops, samples) == samples(build(None))


@settings(deadline=None)
@given(corpora(), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_pack_of_pieces_goes_on_from_its_state(corpus, hops):
    seq_len, documents = corpus

    def build(state):
        return millstream.pack(millstream.split(documents, seq_len + 1), seq_len, state=state)

    assert in_hops(build, hops, samples) == samples(build(None))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 50), st.integers(1, 90))
def test_pack_on_a_source_without_end(seq_len, taken, length):
    def documents():
        ids = count()
        while True:
            yield list(islice(ids, length))

    stream = millstream.pack(documents(), seq_len)
    expected = list(islice(pack_by_hand(documents(), seq_len), taken))
    assert lists(s.token_ids for s in islice(stream, taken)) == expected
    stream.close()


# --- split -----------------------------------------------------------------


@on_corpora
def test_split_equals_the_loop(corpus):
    seq_len, documents = corpus
    expected = list(split_by_hand(documents, seq_len))
    assert lists(millstream.split(documents, seq_len)) == expected


@settings(deadline=None)
@given(corpora(), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_split_goes_on_from_its_state(corpus, hops):
    seq_len, documents = corpus

    def build(state):
        return millstream.split(documents, seq_len, state=state)

    assert in_hops(build, hops, lists) == list(split_by_hand(documents, seq_len))


# --- one after the other ---------------------------------------------------


@on_corpora
def test_packing_pieces_equals_packing_documents(corpus):
    """Cutting loses nothing: the pieces of `split`, packed, are the documents, packed."""
    seq_len, documents = corpus
    pieces = millstream.split(documents, seq_len)
    expected = list(pack_by_hand(documents, seq_len))
    assert lists(sample.token_ids for sample in millstream.pack(pieces, seq_len)) == expected


@on_corpora
def test_every_id_comes_out_once_and_in_order(corpus):
    seq_len, documents = corpus
    ids = [i for document in documents for i in document]
    packed = [i for s in millstream.pack(documents, seq_len) for i in s.token_ids.tolist()]
    cut = [i for piece in lists(millstream.split(documents, seq_len)) for i in piece]
    assert packed == cut == ids
