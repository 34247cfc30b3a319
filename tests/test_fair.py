"""Whose turn it is: every source has given its share at any point, to within one item, whatever the items' sizes."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream import streams
from millstream.errors import RequestError
from millstream.sampling.fair import FairTurns

SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.lists(st.sampled_from([1, 1.0, 0.1, 2.5]) | st.floats(1e-3, 1e3), min_size=1, max_size=8)


@settings(deadline=None)
@given(WEIGHTS, SEEDS, st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(0, 2**32))
def test_no_source_is_off_by_more_than_one_item(weights, seed, sizes, chance):
    turns, total = FairTurns(weights, seed=seed), sum(weights)
    pick = random.Random(chance)
    for source in range(len(weights)):
        turns.offer(source, pick.choice(sizes))
    for _ in range(60):
        turns.offer(turns.take(), pick.choice(sizes))
        for weight, count in zip(weights, turns.given, strict=True):
            assert abs(count - weight / total * sum(turns.given)) <= max(sizes) * (1 + 1e-9)


@settings(deadline=None)
@given(WEIGHTS, SEEDS, st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_what_was_given_and_is_due_is_all_there_is_to_know(weights, seed, sizes):
    """From every place on the order is that of who never stopped; sizes are those that the source has there."""

    def offer(turns, source):
        turns.offer(source, sizes[turns.given[source] % len(sizes)])

    def begun(**place):
        turns = FairTurns(weights, seed=seed, **place)
        for source in range(len(weights)):
            offer(turns, source)
        return turns

    def step(turns):
        source = turns.take()
        offer(turns, source)
        return source

    turns, places, order = begun(), [], []
    for _ in range(40):
        places.append({"given": list(turns.given), "due": turns.due})
        order.append(step(turns))
    for number, place in enumerate(places):
        again = begun(**place)
        assert [step(again) for _ in range(6)][: 40 - number] == order[number : number + 6]


def test_equals_do_not_simply_take_turns():
    """Or the first of two ranks would see one source, and the second the other."""
    seen = {seed: "".join(streams.take(streams.mix(["a" * 64, "b" * 64], [1, 1], seed), 64)) for seed in range(4)}
    assert len(set(seen.values())) == 4
    for order in seen.values():
        assert all({order[place], order[place + 1]} == {"a", "b"} for place in range(0, 64, 2))
        assert 8 < order[::2].count("a") < 24


@pytest.mark.parametrize("weights", [[2, 1, 1], [1, 3, 2], [5, 1, 7]])
def test_the_others_share_what_a_stream_had_that_has_ended(weights):
    order = "".join(streams.mix(["a" * 20, "b" * 999, "c" * 999], weights, 3, exhausted="drop"))
    ended, share = order.rindex("a") + 1, weights[1] / (weights[1] + weights[2])
    assert len(order) == 20 + 2 * 999
    for place in range(ended, ended + 300):
        b, c = order[:place].count("b"), order[:place].count("c")
        assert abs(b - share * (b + c)) <= 1.5


def test_a_stream_that_has_ended_begins_anew():
    """Each in epochs of its own, in an order of its own; where it is in them is in the state."""

    def corpus(name, size):
        return lambda epoch: streams.shuffle([f"{name}{number}" for number in range(size)], size, seed=epoch)

    mixed = streams.mix([corpus("a", 10), corpus("b", 4)], [1, 1], exhausted="repeat")
    order = list(streams.take(mixed, 200))
    for name, size in (("a", 10), ("b", 4)):
        own = [item for item in order if item[0] == name]
        epochs = [own[low : low + size] for low in range(0, 80, size)]
        assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(f"{name}{number}" for number in range(size))}
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_seed_decides_the_order_of_documents_of_any_length():
    sizes = random.Random(1).choices(range(1, 50), k=200)
    documents = [[name * size for size in sizes] for name in "abc"]
    orders = {tuple(item[0] for item in streams.mix(documents, [5, 2, 1], seed)) for seed in range(5)}
    assert len(orders) == 5


def test_proportions_of_ten_million_ids():
    """Sizes as those of documents, few very long: to draw the corpus of each document by weight is far off."""
    draw = np.random.default_rng(7)
    weights, medians = [0.6, 0.3, 0.1], [700, 200, 2000]
    longest = np.zeros(1 << 13, np.uint16)

    def documents(median):
        while True:
            yield longest[: 1 + int(draw.lognormal(0, 1) * median)]

    mixed, total = streams.mix([documents(median) for median in medians], weights, seed=1), 0
    while total < 10_000_000:
        total += len(next(mixed))
    assert sum(mixed.given) == total
    assert np.allclose(mixed.proportions(), weights, rtol=0.005)


@pytest.mark.parametrize(
    ("weights", "seed", "told"),
    [
        ([1, 0], 0, "weights"),
        ([1, -1], 0, "weights"),
        ([1, float("nan")], 0, "weights"),
        ([1, float("inf")], 0, "weights"),
        ([1, 1], -1, "seed -1"),
        ([1, 1], 2**64, "seed"),
    ],
)
def test_what_does_not_work_is_refused_by_name(weights, seed, told):
    with pytest.raises(RequestError, match=told):
        streams.mix([[1], [2]], weights, seed)
