"""Best-fit and shuffle: the plan is best-fit-decreasing, nothing is lost, documents alone decide the order."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import runs
from helpers import read_manifest, write_manifest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_lecture import in_hops

import millstream
from millstream.errors import DataError, RequestError
from millstream.records import TokenBatch
from millstream.runs.pack.memory import Need, choose_workers, window_memory
from millstream.runs.pack.settings import MIB, Settings
from millstream.stream.bins import assign, plan
from millstream.stream.line import STRATEGIES, Line, Strategy
from millstream.stream.shuffle import permutation

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PAD = 70_000


# --- the plan --------------------------------------------------------------


def best_fit_decreasing(lengths, n, most):
    """Item by item: longest first, into the bin that has the least room and still enough; contents of every bin."""
    bins = []
    for length in sorted(lengths, reverse=True):
        open_bins = [b for b in bins if n - sum(b) >= length and len(b) < most]
        if open_bins:
            min(open_bins, key=lambda b: (n - sum(b), most - len(b))).append(length)
        else:
            bins.append([length])
    return bins


@st.composite
def lengths(draw):
    """(N, lengths): random ones, and many of few lengths, which is where whole groups of bins move at once."""
    n = draw(st.one_of(st.sampled_from([1, 2, 8, 64, 100]), st.integers(1, 150)))
    few = draw(st.lists(st.integers(1, n), min_size=1, max_size=4))
    one = draw(st.sampled_from([st.integers(1, n), st.sampled_from(few), st.integers(1, max(1, n // 3))]))
    return n, draw(st.lists(one, max_size=120))


@settings(max_examples=400, deadline=None)
@given(lengths(), st.one_of(st.none(), st.integers(1, 6)))
@example((8, [6, 4, 2, 2, 2, 6]), None)
def test_the_plan_is_best_fit_decreasing(case, most):
    n, pieces = case
    expected = best_fit_decreasing(pieces, n, most or n)
    bins, count = assign(np.array(pieces, np.int64), n, most)
    found = [[] for _ in range(count)]
    for piece, number in zip(pieces, bins.tolist(), strict=True):
        found[number].append(piece)
    assert count == len(expected)
    assert sorted(n - sum(b) for b in found) == sorted(n - sum(b) for b in expected)
    assert sorted(sorted(b) for b in found) == sorted(sorted(b) for b in expected)


@given(lengths())
@settings(deadline=None)
def test_pieces_of_one_length_are_taken_in_order(case):
    n, pieces = case
    bins, _ = assign(np.array(pieces, np.int64), n)
    taken = {}
    for step in plan(np.bincount(pieces, minlength=n + 1), n):
        taken.setdefault(step.length, []).extend([step.each] * step.bins)
    for length, sizes in taken.items():
        mine = [number for piece, number in zip(pieces, bins.tolist(), strict=True) if piece == length]
        groups = [list(group) for _, group in itertools.groupby(mine)]
        # Neighbours in the plan may be the same bin only if they are one step's, and a step fills a bin at once.
        assert [len(group) for group in groups] == sizes


@pytest.mark.parametrize("n", [2048, 2000])
@pytest.mark.parametrize("most", [None, 5])
def test_a_plan_for_a_billion_documents_has_few_steps(n, most):
    rng = np.random.default_rng(1)
    histogram = np.bincount(np.clip(rng.lognormal(5.5, 1.2, 1_000_000), 1, n - 1).astype(int), minlength=n + 1) * 1000
    steps = plan(histogram, n, most)
    assert len(steps) < (3 if most is None else 2 * most) * n
    placed = Counter()
    for step in steps:
        placed[step.length] += step.each * step.bins
    assert [placed[length] for length in range(n + 1)] == histogram.tolist()


def test_hardly_anything_is_padded_on_a_long_tail():
    rng = np.random.default_rng(2)
    length = rng.lognormal(6, 1.3, 20_000).astype(np.int64)
    row = np.arange(len(length))
    batch = TokenBatch(np.zeros(length.sum(), np.uint16), length, row, row * 0, [""] * len(row), row, row)
    line = Line(Strategy("best-fit", 2048, pad_id=1), np.dtype(np.uint16))
    samples = sum(len(packed.ids) for packed in [*line.feed(batch), *line.flush()])
    assert samples * 2048 - length.sum() < 0.0005 * length.sum()
    # Documents alone would need so many, however they are placed.
    assert -(-length.sum() // 2048) <= samples <= -(-length.sum() // 2048) + 1


# --- a corpus and back -----------------------------------------------------


@st.composite
def corpora(draw):
    """(N, documents): empty ones, single ids, N, N + 1, and ones longer than most windows; ids count upward."""
    n = draw(st.one_of(st.sampled_from([1, 2, 16]), st.integers(1, 40)))
    size = st.one_of(st.sampled_from([0, 1, n - 1, n, n + 1, 2 * n, 30 * n]), st.integers(0, 3 * n))
    sizes = draw(st.lists(size, max_size=25))
    ids = itertools.count()
    return n, [list(itertools.islice(ids, size)) for size in sizes]


ORDERS = [
    {"strategy": "best-fit"},
    {"strategy": "best-fit", "window": 1},
    {"strategy": "best-fit", "window": 300},
    {"strategy": "best-fit", "window": 1000, "max_segments": 1},
    {"strategy": "best-fit", "window": 1000, "max_segments": 2, "shuffle": 3, "shuffle_window": 300},
    {"strategy": "best-fit", "window": 300, "shuffle": 0, "shuffle_window": 700},
    {"shuffle": 1},
    {"shuffle": 2, "shuffle_window": 1},
    {"shuffle": 2**64 - 1, "shuffle_window": 500},
    {"strategy": "split", "shuffle": 5, "shuffle_window": 400},
]


def write(path, documents):
    path.write_text("".join(json.dumps({"id": f"d{k}", "ids": ids}) + "\n" for k, ids in enumerate(documents)))
    return path


def read_back(dataset):
    """The documents that the samples hold, by ordinal, each put together by where its segments say."""
    found = {}
    for sample in [*dataset, *([dataset.remainder] if dataset.remainder else [])]:
        own = sample.token_ids[sample.segment_ids > 0].tolist()
        assert (sample.token_ids[sample.segment_ids == 0] == PAD).all()
        at = 0
        for segment in sample.segments:
            document = found.setdefault(segment.document, {})
            document |= zip(itertools.count(segment.start), own[at : at + segment.length], strict=False)
            at += segment.length
    return found


@settings(QUICK, max_examples=30)
@given(
    corpora(),
    st.sampled_from(ORDERS),
    st.sampled_from(["right", "left"]),
    st.sampled_from([100, 600, 100_000]),
    st.sampled_from(["npy", "parquet"]),
)
def test_every_id_is_found_again(tmp_path_factory, corpus, order, side, shard_size, format):
    n, documents = corpus
    folder = tmp_path_factory.mktemp("run")
    source = write(folder / "corpus.jsonl", documents)
    common = {"tokenizer": None, "ids_field": "ids", "seq_len": n, "pad_id": PAD, "pad_side": side, "workers": 1}
    report = millstream.pack_to(folder / "out", source, **common, **order, shard_size=shard_size, format=format)
    assert millstream.verify(folder / "out").problems == []
    dataset = millstream.open(folder / "out")
    found = read_back(dataset)
    assert {k: dict(enumerate(ids)) for k, ids in enumerate(documents) if ids} == found
    ledger = report.ledger
    assert ledger["ids"]["in"] == sum(map(len, documents))
    assert ledger["documents"]["empty"] == sum(not ids for ids in documents)
    for k, ids in enumerate(documents):
        places = dataset.find(f"d{k}")
        assert sum(place.length for place in places) == len(ids)
        row = dataset.document(k)
        assert (row["id"], row["length"]) == (f"d{k}", len(ids))
        assert row["split"] == (len({place.sample for place in places}) > 1)
    for number in range(len(dataset)):
        assert [part.id for part in dataset.documents(number)] == [f"d{s.document}" for s in dataset[number].segments]
    if order.get("strategy") == "best-fit":
        assert ledger["documents"]["split"] == sum(len(ids) > n for ids in documents)
        assert ledger["ids"]["remainder"] == ledger["ids"]["dropped"] == 0
        assert all(len(sample.segments) <= order.get("max_segments", n) for sample in dataset)
        assert all(len(sample) == n for sample in dataset)
        # Of what is read together no more than half of the samples' room is padding, or two would have been one.
        if order == ORDERS[0]:
            assert len(dataset) <= 2 * (sum(map(len, documents)) / n) + 1


@QUICK
@given(corpora(), st.sampled_from(ORDERS), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_the_python_stream_is_the_run_and_goes_on_from_its_state(tmp_path_factory, corpus, order, hops):
    n, documents = corpus
    folder = tmp_path_factory.mktemp("run")
    source = write(folder / "corpus.jsonl", documents)
    common = {"tokenizer": None, "ids_field": "ids", "seq_len": n, "pad_id": PAD, "workers": 1}
    millstream.pack_to(folder / "out", source, **common, **order)
    dataset = millstream.open(folder / "out")
    expected = [*dataset, *([dataset.remainder] if dataset.remainder else [])]

    def listed(samples):
        return [(s.token_ids.tolist(), s.segments, s.complete, s.segment_ids.tolist()) for s in samples]

    def build(state):
        return millstream.pack(documents, n, pad_id=PAD, **order, state=state)

    assert listed(build(None)) == listed(expected)
    assert in_hops(build, hops, listed) == listed(expected)


@pytest.mark.parametrize("order", [ORDERS[2], ORDERS[5], ORDERS[8]], ids=str)
def test_a_stream_of_files_goes_on_from_its_state(tmp_path, order):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(4, 30_000))

    def build(state):
        tokens = millstream.tokenize(millstream.read(source), eos=True)
        return millstream.pack(tokens, 32, pad_id=PAD % 50257, **order, state=state)

    def listed(samples):
        return [(s.token_ids.tolist(), s.segments) for s in samples]

    whole = listed(build(None))
    assert len(whole) > 200
    for hops in ([1], [0, 50, 3], [len(whole) - 1], [len(whole)], [7] * 10):
        assert in_hops(build, hops, listed) == whole


def test_a_closed_stream_has_no_more_samples():
    stream = millstream.pack(([7] * 100 for _ in itertools.count()), 64, strategy="best-fit", pad_id=0, window=1000)
    assert next(stream).token_ids.tolist() == [7] * 64
    stream.close()
    assert list(stream) == []


# --- edges -----------------------------------------------------------------


def packed(documents, n, **options):
    samples = millstream.pack(documents, n, strategy="best-fit", pad_id=0, **options)
    return [([s.document for s in sample.segments], sample.token_ids.tolist()) for sample in samples]


def test_documents_of_just_a_sample_and_one_more():
    assert packed([[1] * 4], 4) == [([0], [1] * 4)]
    assert packed([[1] * 5], 4) == [([0], [1] * 4), ([0], [1, 0, 0, 0])]
    assert packed([[1] * 5, [2] * 3], 4) == [([0], [1] * 4), ([0, 1], [1, 2, 2, 2])]
    assert packed([[1] * 8], 4) == [([0], [1] * 4)] * 2


def test_no_documents_and_empty_ones():
    assert packed([], 4) == []
    assert packed([[], []], 4) == []
    assert packed([[], [1], []], 2) == [([1], [1, 0])]


def test_one_document_in_a_sample():
    found = packed([[k] * (k % 3 + 1) for k in range(1, 20)], 4, max_segments=1)
    assert sorted(found) == sorted(([k - 1], [k] * (k % 3 + 1) + [0] * (3 - k % 3)) for k in range(1, 20))


def test_documents_of_one_id():
    found = packed([[k] for k in range(10)], 4)
    assert sorted(map(len, (documents for documents, _ in found))) == [2, 4, 4]
    assert all(documents == sorted(documents) for documents, _ in found)


@pytest.mark.parametrize("window", [1, 100, 3000])
def test_what_goes_beyond_the_window_comes_as_it_is_read(window):
    read = []

    def documents():
        for k in range(3):
            read.append(k)
            yield list(range(10_001))

    stream = millstream.pack(documents(), 100, strategy="best-fit", pad_id=0, window=window)
    samples = [next(stream)]
    first = window // 100 * 100
    assert samples[0].token_ids.tolist() == list(range(first, first + 100))
    assert read == [0]
    # Each is a window by itself, so its end is in a sample alone.
    samples += stream
    assert [len(sample.segments) for sample in samples] == [1] * (3 * 101)
    starts = [sample.segments[0].start for sample in samples[:101]]
    beyond = list(range(first, 10_000, 100))
    assert starts[: len(beyond)] == beyond
    assert sorted(starts[len(beyond) :]) == [*range(0, first, 100), 10_000]


def test_the_window_closes_at_the_document_that_fills_it():
    documents = [[k] * 150 for k in range(1, 9)]

    def together(window):
        found = packed(documents, 600, window=window)
        return sorted(sorted(set(ids) - {0}) for _, ids in found)

    assert together(600) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert together(601) == [[1, 2, 3, 4], [5], [6, 7, 8]]
    assert together(450) == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_the_order_of_samples_does_not_follow_length():
    rng = np.random.default_rng(3)
    documents = [[1] * int(length) for length in rng.integers(1, 64, 2000)]
    longest = [max(s.length for s in sample.segments) for sample in packed_samples(documents)]
    halves = np.mean(longest[: len(longest) // 2]), np.mean(longest[len(longest) // 2 :])
    assert abs(halves[0] - halves[1]) < 3
    assert sum(a < b for a, b in itertools.pairwise(longest)) > len(longest) // 3


def packed_samples(documents, **options):
    return list(millstream.pack(documents, 64, strategy="best-fit", pad_id=0, **options))


# --- shuffle ---------------------------------------------------------------


def order_of(documents, **options):
    """The ordinals of documents with ids as they come out of concat."""
    samples = millstream.pack(documents, 1, **options)
    return [k for k, _ in itertools.groupby(sample.segments[0].document for sample in samples)]


def test_documents_are_shuffled_within_their_window_by_the_seed():
    documents = [[1] * 200] * 50
    plain, one, two = (order_of(documents, shuffle=s, shuffle_window=2000) for s in (None, 1, 2))
    assert plain == list(range(50))
    assert one != plain
    assert two not in (one, plain)
    assert order_of(documents, shuffle=1, shuffle_window=2000) == one
    for order in (one, two):
        windows = [order[at : at + 10] for at in range(0, 50, 10)]
        assert [sorted(window) for window in windows] == [plain[at : at + 10] for at in range(0, 50, 10)]
        # Windows are shuffled each in its own way.
        assert len({tuple(k % 10 for k in window) for window in windows}) == 5


def test_short_documents_count_for_more_and_long_ones_stay_where_they_are():
    sizes = [1, 1, 1, 1, 1001, 1, 1, 1, 1, 1000, 5000, 1, 1]
    order = order_of([[1] * size for size in sizes], shuffle=3, shuffle_window=1000)
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert order[4] == 4
    assert sorted(order[5:9]) == [5, 6, 7, 8]
    assert order[9:11] == [9, 10]
    assert sorted(order[11:]) == [11, 12]
    # 1,000 ids of window are seven documents of at most 128.
    order = order_of([[1]] * 21, shuffle=3, shuffle_window=1000)
    assert [sorted(order[at : at + 7]) for at in (0, 7, 14)] == [[*range(at, at + 7)] for at in (0, 7, 14)]


# --- evenly spread ---------------------------------------------------------

SPREAD = [
    Strategy(name, 512, pad_id=1, window=window, shuffle=seed, shuffle_window=window)
    for name in STRATEGIES
    for seed in (None, 11)
    for window in (1 << 30, 1 << 20)
]


@pytest.mark.parametrize("strategy", SPREAD, ids=lambda s: f"{s.name}-{s.shuffle}-{s.window}")
def test_what_samples_hold_does_not_depend_on_where_in_the_run_they_are(strategy):
    """Documents in a sample, those longer than a sample, and padding: the same in every tenth of the run."""
    rng = np.random.default_rng(8)
    length = np.minimum(rng.lognormal(5, 1.3, 20_000).astype(np.int64) + 1, 20_000)
    line = Line(strategy, np.dtype(np.uint16))
    made = []
    for low in range(0, len(length), 1000):
        row = np.arange(low, low + 1000)
        some = length[row]
        batch = TokenBatch(np.zeros(some.sum(), np.uint16), some, row, row * 0, [""] * 1000, row * 0, row)
        made += line.feed(batch)
    made += line.flush()
    count = np.concatenate([np.bincount(p.segments["sample"], minlength=len(p.ids)) for p in made])
    long = np.concatenate(
        [
            np.bincount(p.segments["sample"], length[p.segments["document"].astype(np.int64)] > 512, len(p.ids))
            for p in made
        ]
    )
    filled = np.concatenate([np.bincount(p.segments["sample"], p.segments["length"], len(p.ids)) for p in made])
    assert len(count) > 10_000
    for measure in (count, long > 0, filled):
        tenths = np.array([part.mean() for part in np.array_split(measure, 10)])
        assert np.abs(tenths / measure.mean() - 1).max() < 0.15, tenths


def test_a_permutation_is_the_same_everywhere():
    assert permutation(8, 1, 2, "documents").tolist() == [4, 5, 6, 7, 1, 0, 2, 3]
    assert permutation(8, 1, 2, "bins").tolist() != permutation(8, 1, 2, "documents").tolist()
    assert sorted(permutation(1000, 2**64 - 1, 2**64 - 1, "bins").tolist()) == list(range(1000))


# --- what is asked for -----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1000}, "window=1000 does not work: it belongs to strategy='best-fit'"),
        ({"max_segments": 3}, "max_segments=3 does not work: it belongs to strategy='best-fit'"),
        ({"shuffle_window": 3}, "shuffle_window=3 does not work: it belongs to shuffle"),
        ({"strategy": "best-fit", "window": 0}, "window=0 does not work"),
        ({"strategy": "best-fit", "max_segments": 0}, "max_segments=0 does not work"),
        ({"shuffle": 1, "shuffle_window": 0}, "shuffle_window=0 does not work"),
        ({"shuffle": -1}, "shuffle=-1 does not work"),
        ({"shuffle": 2**64}, "give a seed from 0"),
        ({"strategy": "best-fit", "tokenizer": None, "ids_field": "ids"}, "give pad_id"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(tmp_path, options, message):
    source = write(tmp_path / "corpus.jsonl", [[1]])
    with pytest.raises(RequestError, match=message):
        millstream.pack_to(tmp_path / "out", source, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "give concat or"),
        ({"strategy": "best-fit"}, "strategy='best-fit' needs a pad_id"),
        ({"strategy": "best-fit", "pad_id": 0, "window": 0}, "window 0"),
        ({"strategy": "best-fit", "pad_id": 0, "max_segments": 0}, "max_segments 0"),
        ({"shuffle": -1}, "shuffle -1"),
        ({"shuffle": 1.5}, "shuffle 1.5"),
        ({"seq_len": "16"}, "seq_len '16' does not work"),
        ({"seq_len": 2.5}, "seq_len 2.5 does not work"),
        ({"strategy": "best-fit", "pad_id": 0, "window": 1.5}, "window 1.5"),
        ({"remainder": "pad", "pad_id": -1}, "pad_id -1 does not work: give an id"),
        ({"remainder": "pad", "pad_id": "x"}, "pad_id 'x' does not work: give an id"),
        (
            {"remainder": "pad", "pad_id": 0, "pad_side": "middle"},
            "pad_side 'middle' does not work: give right or left",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_python(options, message):
    with pytest.raises(RequestError, match=message):
        millstream.pack([[1]], **{"seq_len": 4, **options})


def test_padding_that_is_no_id_of_the_tokenizer_is_refused_at_the_first_document():
    stream = millstream.pack(millstream.tokenize(["Hello world"] * 9), 4, remainder="pad", pad_id=70_000)
    with pytest.raises(RequestError, match="pad_id 70000 does not work: these ids are at most 65,535"):
        next(stream)


def test_numbers_of_numpy_are_numbers_in_a_state_too():
    stream = millstream.pack([[1, 2, 3], [4]], np.int64(2))
    next(stream)
    state = json.loads(json.dumps(stream.state()))
    assert [sample.token_ids.tolist() for sample in millstream.pack([[1, 2, 3], [4]], 2, state=state)] == [[3, 4]]


@pytest.mark.parametrize("wrong", [5, None, "text", [[1], [2, 3]], [[1]], [1.5], [-1]], ids=str)
def test_what_are_no_ids_is_told(wrong):
    stream = millstream.pack([[1, 2], wrong], 2)
    with pytest.raises(DataError, match="ids must be"):
        list(stream)


def test_all_strategies_are_on_the_command_line(tmp_path):
    source = write(tmp_path / "corpus.jsonl", [[1, 2, 3], [4, 5]])
    for strategy in STRATEGIES:
        args = ("pack", source, "--ids-field", "ids", "--seq-len", 3, "--pad-id", 0, "--strategy", strategy)
        more = ("--window", "1Mi", "--max-segments", 2) if strategy == "best-fit" else ()
        done = runs.cli(*args, *more, "--shuffle", 7, "--shuffle-window", "2k", "--out", tmp_path / strategy, "--json")
        assert done.returncode == 0, done.stderr
        known = millstream.open(tmp_path / strategy).settings
        assert (known["strategy"], known["shuffle"], known["shuffle_window"]) == (strategy, 7, 2000)
        assert known["window"] == (1 << 20 if more else None)
        shown = runs.cli("show", tmp_path / strategy, 0)
        assert shown.returncode == 0, shown.stderr
        assert "sample 0 of" in shown.stdout
    refused = runs.cli("pack", source, "--strategy", "best-fit", "--window", "many", "--out", tmp_path / "no")
    assert refused.returncode == 2
    assert "32Mi" in refused.stderr


def test_a_window_counts_as_memory():
    wanted = Settings(strategy="best-fit", window=32 << 20, memory=1024 * MIB, workers=2)
    held = window_memory(wanted, 2, None)
    assert held >= 64 * MIB
    assert window_memory(Settings(strategy="best-fit", validation=0.5), 2, None) == 2 * held
    assert window_memory(Settings(strategy="best-fit", shuffle=1), 2, None) == 2 * held
    assert window_memory(Settings(), 2, None) == 0
    assert window_memory(wanted, 2, 1 * MIB) < held // 10  # so few ids never fill it
    tiny = Settings(strategy="best-fit", window=32 << 20, seq_len=1)
    assert window_memory(tiny, 2, None) > held + 512 * MIB  # the order of that many samples
    need = Need(32 * MIB, vocab_size=50_257)
    assert choose_workers(wanted, need, 1024 * MIB, None)[0] == 2
    with pytest.raises(RequestError, match="memory="):
        choose_workers(wanted, replace(need, held=held), 1024 * MIB, None)
    with pytest.raises(RequestError, match="MiB of windows"):
        choose_workers(wanted, replace(need, held=1 << 30), 1024 * MIB, None)


# --- in a run --------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_limit_may_be_a_text_that_is_read_in_pieces(tmp_path, strategy):
    (tmp_path / "a.txt").write_text("words and more words, one after the other. " * 150_000)
    sources = [tmp_path / "a.txt", tmp_path / "a.txt"]
    report = millstream.pack_to(tmp_path / "out", sources, strategy=strategy, limit=1, workers=1, seq_len=500)
    assert report.ledger["documents"]["in"] == report.ledger["documents"]["split"] == 1
    assert millstream.verify(tmp_path / "out").ok


@pytest.mark.parametrize("order", [ORDERS[2], ORDERS[5], ORDERS[8], ORDERS[9]], ids=str)
def test_a_text_in_pieces_is_packed_as_one_whole(tmp_path, order):
    rng = np.random.default_rng(5)
    words = np.array(["mill", "stream", "wheel", "water", "grain", "stone", "flour", "sack"])
    text = " ".join(words[rng.integers(0, 8, 1_000_000)])  # over 4 MiB: it is read in pieces
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": text[:k]}) + "\n" for k in range(0, 3000, 7)))
    (tmp_path / "long.txt").write_text(text)
    rows = [{"text": text}, {"text": "last"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "last.jsonl").write_text(json.dumps({"text": "last"}) + "\n")
    common = {"seq_len": 128, "workers": 1, "shard_size": 64 << 10, **order}
    pieces = [tmp_path / name for name in ("short.jsonl", "long.txt", "last.jsonl")]
    millstream.pack_to(tmp_path / "pieces", pieces, **common)
    millstream.pack_to(tmp_path / "one", [tmp_path / "short.jsonl", tmp_path / "long.jsonl"], **common)
    for kind in ("samples", "segments"):
        names = [sorted((tmp_path / out).glob(f"{kind}-*.npy")) for out in ("pieces", "one")]
        assert [path.name for path in names[0]] == [path.name for path in names[1]]
        assert [runs.sha256(path) for path in names[0]] == [runs.sha256(path) for path in names[1]]
        assert len(names[0]) > 5


def test_validation_has_its_own_windows(tmp_path):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(8, 100_000))
    common = {"strategy": "best-fit", "window": 4000, "seq_len": 64, "shuffle": 1, "workers": 1}
    report = millstream.pack_to(tmp_path / "out", source, **common, validation=0.3)
    assert millstream.verify(tmp_path / "out").ok
    subsets = [millstream.open(tmp_path / "out", name) for name in ("train", "validation")]
    ordinals = [{s.document for sample in subset for s in sample.segments} for subset in subsets]
    assert not ordinals[0] & ordinals[1]
    assert len(ordinals[0] | ordinals[1]) == report.ledger["documents"]["in"] - report.ledger["documents"]["empty"]


def test_verify_finds_what_best_fit_does_not_do(tmp_path):
    source = write(tmp_path / "corpus.jsonl", [[1, 2, 3], [4, 4], [5] * 9])
    common = {"tokenizer": None, "ids_field": "ids", "seq_len": 4, "pad_id": 0, "workers": 1}
    millstream.pack_to(tmp_path / "out", source, **common, strategy="best-fit", max_segments=2)
    millstream.pack_to(tmp_path / "concat", source, **common)
    for name, found in (
        ("out", {"max_segments": 1}),
        ("concat", {"strategy": "best-fit"}),
    ):
        out = shutil.copytree(tmp_path / name, tmp_path / f"{name}-changed")
        manifest = read_manifest(str(out))
        manifest["settings"] |= found
        write_manifest(str(out), manifest)
        problems = "\n".join(millstream.verify(out).problems)
        assert ("more documents than 1" in problems) == (name == "out")
        assert ("cut elsewhere than every 4 ids" in problems) == (name == "concat")
