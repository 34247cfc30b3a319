"""Which sample a training run takes next: each once an epoch, weights kept, whatever the number of ranks."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.errors import RequestError, ResumeRefused
from millstream.sampling import mixture
from millstream.sampling.mixture import Mixture, shares
from millstream.sampling.order import BLOCK, Order, Source, place_in, steps
from millstream.sampling.permutation import Permutation, key_of

SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
SOURCES = st.lists(st.integers(1, 300), min_size=1, max_size=4).map(
    lambda sizes: [Source(size, f"folder {number}") for number, size in enumerate(sizes)]
)


def pairs(found):
    return list(zip(*(column.tolist() for column in found), strict=True))


@given(st.integers(1, 5000), SEEDS)
def test_a_permutation_has_each_number_once(n, seed):
    assert np.array_equal(np.sort(Permutation(n, key_of(seed))(np.arange(n))), np.arange(n))


@given(st.integers(1, 2**62), SEEDS, st.lists(st.integers(0, 2**62), min_size=1, max_size=50))
def test_a_permutation_of_any_size_looks_at_nothing_but_its_places(n, seed, places):
    places = np.unique(np.array(places, np.int64) % n)
    order = Permutation(n, key_of(seed))
    found = order(places)
    assert 0 <= found.min() <= found.max() < n
    assert len(np.unique(found)) == len(places)
    assert [int(order(places[[number]])[0]) for number in range(len(places))] == found.tolist()


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_of_a_few_is_as_likely(n):
    rounds = 200 * len(list(itertools.permutations(range(n))))
    orders = [tuple(Permutation(n, key_of(seed))(np.arange(n)).tolist()) for seed in range(rounds)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    # Chi square over n! orders: its mean is n! - 1 and its variance twice that.
    chance = ((counts - 200) ** 2 / 200).sum()
    assert len(counts) == rounds // 200
    assert abs(chance - (len(counts) - 1)) < 4 * (2 * (len(counts) - 1)) ** 0.5


def test_neighbours_have_nothing_to_do_with_each_other():
    n = 100_003
    found = Permutation(n, key_of("any"))(np.arange(n)).astype(float)
    for distance in (1, 2, 64, 4096):
        assert abs(np.corrcoef(found[:-distance], found[distance:])[0, 1]) < 0.015
    steps_, _ = np.histogram(np.diff(found) % n, 16, (0, n))
    assert ((steps_ - n / 16) ** 2 / (n / 16)).sum() < 45  # 15 degrees of freedom: one in 10,000 is above 44


def test_golden_values():
    """What these are, checkpoints rest on: another value needs another VERSION."""
    large = Permutation(10**12 + 39, key_of(1, 2, "x"))(np.array([0, 1, 10**12]))
    assert large.tolist() == GOLDEN["large"]
    order = Order([Source(1000, "a"), Source(70_000, "b")], seed=3)
    assert pairs(order(np.array([0, 1, 70_999, 71_000, 10**9]))) == GOLDEN["joined"]
    weighted = Order([Source(1000, "a"), Source(70_000, "b"), Source(5, "c")], seed=3, weights=[0.6, 0.3, 0.1])
    assert pairs(weighted(np.array([0, 1, 2, 3, 65_536, 10**9]))) == GOLDEN["weighted"]


GOLDEN = {
    "large": [168127584656, 954725495987, 280931297920],
    "joined": [(1, 28448), (1, 38956), (1, 31969), (1, 5188), (1, 27100)],
    "weighted": [(1, 33918), (0, 889), (0, 450), (0, 474), (0, 827), (0, 914)],
}


def test_seed_and_epoch_are_not_added():
    def epoch(seed, number):
        return pairs(Order([Source(100, "a")], seed=seed)(np.arange(100) + 100 * number))

    seen = [epoch(seed, number) for seed in range(4) for number in range(4)]
    assert len({tuple(one) for one in seen}) == 16


@settings(max_examples=20, deadline=None)
@given(SOURCES, SEEDS, st.integers(0, 3))
def test_every_epoch_has_each_sample_once(sources, seed, epoch):
    order = Order(sources, seed=seed)
    found = pairs(order(np.arange(order.samples) + epoch * order.samples))
    expected = [(which, number) for which, source in enumerate(sources) for number in range(source.samples)]
    assert sorted(found) == expected
    assert pairs(Order(sources, seed=seed, shuffle=False)(np.arange(order.samples))) == expected


@settings(max_examples=20, deadline=None)
@given(SOURCES, SEEDS, st.data())
def test_a_place_has_its_sample_however_it_is_asked_for(sources, seed, data):
    """One by one, in any selection and out of order: by blocks or without them."""
    weights = data.draw(st.none() | st.lists(st.floats(0.01, 1), min_size=len(sources), max_size=len(sources)))
    order = Order(sources, seed=seed, weights=weights)
    places = np.array(data.draw(st.lists(st.integers(0, 12 * BLOCK), min_size=1, max_size=40)))
    found = pairs(order(places))
    again = Order(sources, seed=seed, weights=weights)
    assert [pairs(again(places[[number]]))[0] for number in range(len(places))] == found


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, SEEDS)
def test_a_mixture_keeps_its_weights_at_every_point(weights, seed):
    mixed = Mixture(weights, seed)
    places = np.arange(mixture.BLOCK + 500)
    source, number = mixed(places)
    for which, count in enumerate(mixed.counts):
        here = source == which
        assert np.array_equal(number[here], np.arange(here.sum()))
        # In whole numbers: what it had, and what was due to it, after each place.
        assert np.abs(np.cumsum(here) * mixture.BLOCK - count * (places + 1)).max() < mixture.BLOCK
        due = weights[which] / sum(weights) * mixture.BLOCK
        assert abs(count - due) <= len(weights)


def test_ranks_see_the_same_mixture():
    """Without a seeded order, two sources of one weight would take turns, and so would the ranks."""
    source, _ = Mixture([1, 1], 5)(np.arange(20_000))
    for world in (2, 4):
        for rank in range(world):
            assert abs(source[rank::world].mean() - 0.5) < 0.02


@given(WEIGHTS)
def test_shares_fill_a_block(weights):
    assert sum(shares(weights)) == mixture.BLOCK
    assert min(shares(weights)) >= 1


@settings(max_examples=20, deadline=None)
@given(SOURCES, SEEDS, st.data())
def test_each_source_of_a_mixture_runs_through_epochs_of_its_own(sources, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(sources), max_size=len(sources)))
    source, number = Order(sources, seed=seed, weights=weights)(np.arange(3000))
    for which, (samples, _) in enumerate(sources):
        own = number[source == which].tolist()
        for begin in range(0, len(own) - samples, samples):
            assert sorted(own[begin : begin + samples]) == list(range(samples))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ranks_and_batches_keep_the_global_order(data):
    """Stopped after any step, to go on with any other number of ranks and batch size."""
    stop = data.draw(st.integers(0, 200))
    at, taken = 0, []
    while at < stop:
        world, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
        rest = [list(steps(at, stop, batch=batch, rank=rank, world=world)) for rank in range(world)]
        assert len({len(own) for own in rest}) == 1  # no rank waits for another at the end
        together = list(zip(*rest, strict=True))
        if not together:
            assert stop - at < world
            break
        for ranks in together[: data.draw(st.integers(1, len(together)))]:
            assert len({len(places) for places in ranks}) == 1
            step = [place for row in zip(*ranks, strict=True) for place in row]
            taken += step
            at += len(step)
    assert taken == list(range(at))


@pytest.mark.parametrize("first", [10, 11, 500])
def test_behind_the_end_there_are_no_steps(first):
    """As when a run goes on with fewer epochs than it has had."""
    assert list(steps(first, 10, batch=4, world=2)) == []


def test_a_state_is_of_one_order():
    order = Order([Source(10, "a"), Source(20, "b")], seed=1, weights=[1, 2])
    state = json.loads(json.dumps({"next": 7, "order": order.identity}))
    assert place_in(state, order.identity) == 7
    others = {
        "seed": Order(order.sources, seed=2, weights=[1, 2]),
        "shares": Order(order.sources, seed=1),
        "shuffle": Order(order.sources, seed=1, weights=[1, 2], shuffle=False),
        "folders": Order([Source(10, "a"), Source(20, "c")], seed=1, weights=[1, 2]),
    }
    for name, other in others.items():
        with pytest.raises(ResumeRefused, match=f"another order: {name} was"):
            place_in(state, other.identity)
    for wrong in ({}, {"next": -1, "order": {}}, {"next": True, "order": {}}, {"next": 1}, {"next": 1, "order": []}):
        with pytest.raises(ResumeRefused, match="no state of a loader"):
            place_in(wrong, order.identity)


@pytest.mark.parametrize(
    ("sources", "given", "told"),
    [
        ([], {}, "nothing to train on"),
        ([Source(0, "a")], {}, "nothing to train on"),
        ([Source(0, "a"), Source(1, "b")], {"weights": [1, 1]}, "nothing to train on"),
        ([Source(1, "a")], {"weights": [1, 1]}, "2 weights do not work for 1 folders"),
        ([Source(1, "a")], {"weights": [0.0]}, "give each a number above 0"),
        ([Source(1, "a")], {"weights": [float("nan")]}, "give each a number above 0"),
        ([Source(1, "a")], {"seed": -1}, "seed -1 does not work"),
    ],
)
def test_what_cannot_be_ordered_is_named(sources, given, told):
    with pytest.raises(RequestError, match=told):
        Order(sources, **{"seed": 0, **given})


def test_it_remembers_a_few_blocks_and_no_more():
    order = Order([Source(10**12, "a"), Source(10**11, "b")], seed=0, weights=[3, 1])
    for block in range(20):
        order(np.arange(8) + block * BLOCK)
    assert len(order._blocks) <= 4
    assert sum(column.nbytes for found in order._blocks.values() for column in found) <= 4 * 16 * BLOCK
