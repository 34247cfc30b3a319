"""Streams over sources that take their time, and over long ones: nothing is held back, and no batch bound is seen."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PATIENCE

import millstream
from millstream.streams import columns


class Clock:
    """Time that passes only where somebody lets it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def __enter__(self):
        self.kept = columns.time
        columns.time = self
        return self

    def __exit__(self, *_):
        columns.time = self.kept


def arriving(clock, items):
    """(item, the seconds it takes to come), one after the other."""
    for item, seconds in items:
        clock.now += seconds
        yield item


def test_what_comes_slowly_is_handed_on_as_it_comes():
    """A document every 10 ms: none waits for more than the 50 ms that a batch may take to fill."""
    with Clock() as clock:
        came, waits = [], []

        def texts():
            for number in range(300):
                clock.now += 0.01
                came.append(clock.now)
                yield f"document {number}"

        for number, _ in enumerate(millstream.tokenize(texts())):
            waits.append(clock.now - came[number])
    assert len(waits) == 300
    assert max(waits) < 0.06


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=9), st.sampled_from([0.0, 0.02, 1.0])), max_size=40),
    st.sampled_from([{}, {"strategy": "best-fit", "pad_id": 0, "window": 16}, {"shuffle": 3, "shuffle_window": 16}]),
)
def test_where_batches_end_is_never_seen(documents, how):
    """Neither in samples nor in states."""

    def packed(items):
        stream = millstream.pack(items, 4, **how)
        return [(sample.token_ids.tolist(), tuple(sample.segments), stream.state()) for sample in stream]

    with Clock() as clock:
        assert packed(arriving(clock, documents)) == packed([ids for ids, _ in documents])


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.0, 0.03])), max_size=200), st.integers(1, 20))
def test_lists_have_every_item_in_order_and_are_bounded(items, limit):
    with Clock() as clock:
        lists = list(columns.filled(arriving(clock, [(size, seconds) for size, seconds in items]), int, limit))
    assert [item for held in lists for item in held] == [size for size, _ in items]
    for number, held in enumerate(lists):
        assert held
        assert sum(held[:-1]) < limit
        assert len(held) <= 2**number


def test_a_long_iterable_of_long_documents():
    """More batches than an integer has bits."""
    documents = (np.zeros(1 << 20, np.uint32) for _ in range(80))
    assert sum(1 for _ in millstream.split(documents, 1 << 20)) == 80


@pytest.mark.parametrize("stage", ["documents", "millstream.pack(millstream.tokenize(documents), 1)"])
def test_standard_input_is_read_as_it_comes(stage):
    """Each document is answered before the next one is written."""
    program = f"import millstream; documents = millstream.read('-')\nfor _ in {stage}: print(flush=True)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        for _ in range(3):
            process.stdin.write('{"text": "a"}\n')
            process.stdin.flush()
            assert process.stdout.readline() == "\n"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
