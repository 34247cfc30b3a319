"""Samples and states told from lengths alone are those of the packers, which have the ids."""

import itertools
import pickle
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.folder.shards import Shape
from millstream.records import Cursor, Part, Ref, TokenBatch
from millstream.runs.pack import subset as subset_module
from millstream.runs.pack.counts import Counts, SubsetCounts
from millstream.runs.pack.course import Course, Start
from millstream.runs.pack.pieces import joined
from millstream.runs.pack.subset import Mark, Subset
from millstream.stream import bestfit, shuffle
from millstream.stream.bins import opened, plan
from millstream.stream.lengths import Lengths, LineOfLengths
from millstream.stream.line import STRATEGIES, Line, Strategy

U32 = np.dtype(np.uint32)


@st.composite
def strategies(draw):
    n = draw(st.integers(1, 12))
    window = st.integers(1, 700)
    return Strategy(
        draw(st.sampled_from(STRATEGIES)),
        n,
        pad_id=7,
        window=draw(window),
        max_segments=draw(st.none() | st.integers(1, 3)),
        shuffle=draw(st.none() | st.integers(0, 9)),
        shuffle_window=draw(window),
    )


@st.composite
def documents(draw, n):
    """Lengths: empty ones, around n, several n, and some that are longer than any window."""
    size = st.one_of(st.sampled_from([0, 1, n - 1, n, n + 1]), st.integers(0, 5 * n), st.sampled_from([200, 500]))
    return draw(st.lists(size, max_size=15))


def batches(lengths, cuts):
    """(batches of documents of these lengths, the number of the batch in which the first document of each begins).

    They are cut before the places `cuts`, of which a document has as many as ids, or one if it is empty.
    """
    slots = [max(1, length) for length in lengths]
    stops = np.cumsum([0, *slots])
    bounds = sorted({0, int(stops[-1]), *(cut % (int(stops[-1]) + 1) for cut in cuts)})
    found = []
    for low, high in itertools.pairwise(bounds):
        first, last = (int(np.searchsorted(stops, place, side="right")) - 1 for place in (low, high - 1))
        rows = np.arange(first, last + 1)
        start = np.array([max(low - int(stops[row]), 0) for row in rows])
        end = np.array([min(high - int(stops[row]), lengths[row]) for row in rows])
        ids = np.concatenate([np.arange(a, b) + 10_000 * row for row, a, b in zip(rows, start, end, strict=True)])
        names = [f"d{row}" for row in rows]
        goes_on = high < stops[last + 1]
        found.append(TokenBatch(ids, end - start, rows, start, names, rows, rows, open=bool(goes_on)))
    begins = [k for k, batch in enumerate(found) if not batch.start[0]]
    return found, [max(b for b in begins if b <= k) for k in range(len(found))]


def without_ids(batch):
    return Lengths(batch.length, batch.ordinal, batch.start, batch.open)


def wheres(some, marks):
    """`where` of each batch: a mark that lies within no document, and the ordinal of the document."""

    def where_of(number):
        batch = some[number]

        def where(row):
            if row < len(batch):
                return {"mark": marks[number], "ordinal": int(batch.ordinal[row])}
            assert not batch.open
            return {"mark": number + 1, "ordinal": int(batch.ordinal[-1]) + 1}

        return where

    return [where_of(number) for number in range(len(some))]


def told(line, some, places, form):
    """The numbers and states that a line gives, and how many samples have come out after each batch and at the end."""
    states, counts, last = {}, [], 0
    for number in range(len(some) + 1):
        more = line.feed(form(some[number]), places[number]) if number < len(some) else line.flush()
        for span in more:
            for sample in range(span.first + 1, span.stop + 1):
                states[sample] = span.state(sample)
            last = max(last, span.stop)
        counts.append(last)
    return states, counts


@settings(max_examples=250, deadline=None)
@given(st.data(), strategies(), st.lists(st.integers(0, 10**6), max_size=8), st.integers(1, 64))
def test_states_from_lengths_are_states_from_ids(data, strategy, cuts, chunk):
    lengths = data.draw(documents(strategy.seq_len))
    some, marks = batches(lengths, cuts)
    places = wheres(some, marks)
    with pytest.MonkeyPatch.context() as patch:
        for module in (bestfit, shuffle):
            patch.setattr(module, "CHUNK", chunk)  # what is handed out at once changes nothing
        expected, counts = told(Line(strategy, U32), some, places, lambda batch: batch)
        assert told(LineOfLengths(strategy), some, places, without_ids) == (expected, counts)
        for number in data.draw(st.sets(st.sampled_from(sorted(expected)), max_size=5)) if expected else ():
            state = expected[number]
            mark, ordinal = state["mark"], state["ordinal"]
            rest = [batch.after(ordinal, 0) for batch in some[mark:]]
            kept = [k for k, batch in enumerate(rest) if len(batch)]
            later = [rest[k] for k in kept]
            where = wheres(rest, [max(m - mark, 0) for m in marks[mark:]])
            where = [where[k] for k in kept]
            both = [told(Line(strategy, U32, state), later, where, lambda batch: batch)]
            both += [told(LineOfLengths(strategy, state), later, where, without_ids)]
            assert both[0] == both[1]
            assert max(both[1][1]) in (counts[-1], 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.none() | st.integers(1, 5), st.lists(st.integers(1, 40), max_size=60))
def test_as_many_bins_are_opened_as_planned(n, most, pieces):
    histogram = np.bincount([min(piece, n) for piece in pieces], minlength=n + 1)
    assert opened(histogram, n, most) == sum(step.bins for step in plan(histogram, n, most) if step.into.free == n)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=50))
def test_the_order_of_a_permutation_is_that_of_its_numbers(raw):
    """Also where numbers are equal, or are so but for their lowest bits."""
    numbers = np.array(raw, np.uint64)
    assert shuffle._order(numbers).tolist() == np.argsort(numbers, kind="stable").tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_line_holds_few_lengths(name):
    """Best-fit a histogram, the others nothing, whatever came before."""
    line = LineOfLengths(Strategy(name, 64, window=1 << 40))
    batch = replace(Lengths.of(np.full(5000, 100)))
    for _ in range(50):
        list(line.feed(batch))
    held = [value for value in vars(line._counting).values() if isinstance(value, np.ndarray)]
    assert sum(value.size for value in held) <= 65


# --- the course of a run ---------------------------------------------------


@dataclass
class Corpus:
    """Documents over several pieces: the counts of each piece, as a worker tells them, and its rows by subset."""

    counts: list[Counts]
    rows: dict[Ref, TokenBatch]
    documents: dict[str, TokenBatch]


SUBSETS = ("train", "validation")


def made(lengths, kinds, cuts, truncated=None):
    """A corpus of documents of these lengths; `kinds` has the subset of each, or None for a fault.

    It is cut at the places `cuts`. Documents that are `truncated`, to so many ids, come with the piece they end in.
    """
    some, _ = batches(lengths, cuts)
    kept, rows, all_rows = [], {}, {name: [] for name in SUBSETS}
    opened, first = False, 0
    for number, batch in enumerate(some):
        begun = len(batch) - opened
        relative = np.arange(len(batch)) - opened
        subsets = {}
        for name in SUBSETS:
            mine = batch.where(np.array([kinds[document] == name for document in batch.ordinal.tolist()], bool))
            relative_mine = relative[np.isin(batch.ordinal, mine.ordinal)]
            if truncated is not None:
                ended = len(mine) - mine.open
                mine, relative_mine = mine.rows(0, ended), relative_mine[:ended]
                long = mine.start + mine.length
                keep = np.minimum(long, truncated)
                parts = [np.arange(size) + 10_000 * row for size, row in zip(keep, mine.ordinal, strict=True)]
                ids = np.concatenate([np.zeros(0, int), *parts])
                mine = replace(mine, ids=ids, length=keep, start=mine.start * 0, open=False, cut_off=long - keep)
            if not len(mine):
                subsets[name] = SubsetCounts(0, b"")
                continue
            ref = Ref(f"{number}-{name}", len(mine.ids), number)
            subsets[name] = SubsetCounts.of(
                mine.length, relative_mine, start=int(mine.start[0]), open=mine.open, ref=ref
            )
            rows[ref] = mine
            all_rows[name].append(mine)
        mark = Mark(Cursor(0, number + 1), ordinal=begun, line=begun, bytes=7)
        counts = Counts(Part(number, ()), 0, True, mark, subsets, opened=opened, open=batch.open)
        kept.append(pickle.loads(pickle.dumps(counts)))
        opened, first = batch.open, first + begun
    return Corpus(kept, rows, {name: as_one(found) for name, found in all_rows.items()})


def as_one(some):
    ids = [batch.ids for batch in some]
    return replace(joined(some), ids=np.concatenate(ids)) if some else None


class Held(NamedTuple):
    number: int
    ids: list
    segments: list
    documents: list


class InMemory:
    """In place of a ShardWriter: what it is given, as lists."""

    def __init__(self, folder, subset, number, shape, fills=True):
        self.number, self.ids, self.segments, self.documents = number, [], [], []

    def write(self, ids, segments, padding=0):
        self.ids += ids.tolist()
        self.segments += segments.tolist()

    def write_segments(self, segments):
        self.segments += segments.tolist()

    def write_documents(self, rows):
        numbers = (rows.ordinal, rows.source, rows.offset, rows.length, rows.split, rows.cut_off)
        self.documents += list(zip(*(column.tolist() for column in numbers), rows.id, strict=True))

    def seal(self):
        return Held(self.number, self.ids, self.segments, self.documents)

    def close(self):
        pass


def inline(strategy, per_shard, batch, stop):
    """(the shards of a subset whose documents come in one batch, its remainder)."""
    subset = Subset("s", "", Shape(strategy.seq_len, U32, per_shard), strategy)
    if batch is not None:
        subset.add(batch, Mark(), Mark(), stop)
    subset.finish("drop", 0, "right")
    return {sealed.entry.number: sealed for sealed in subset.sealed}, subset.remainder


def done(task, start, rows):
    """What a worker does with a task: the shards that it writes, and the remainder of a final one."""
    shape = Shape(start.strategy.seq_len, U32, start.per_shard)
    which = {"first": task.first, "count": task.count, "final": task.final}
    subset = Subset(task.subset, "", shape, start.strategy, state=task.state, **which)
    for piece in task.pieces:
        if subset.full:
            break
        batch = rows[piece.ref]
        ordinal = batch.ordinal
        assert piece.before.ordinal <= int(ordinal[-1]) + 1 <= piece.after.ordinal
        assert piece.start == int(batch.start[0])
        subset.add(batch, piece.begin, piece.end, piece.next)
    if task.final:
        subset.finish("drop", 0, "right")
    elif task.over and not subset.full:
        subset.flush()
    assert task.final or subset.full
    return {sealed.entry.number: sealed for sealed in subset.sealed}, subset.remainder


def tasks_of(corpus, starts, mark=None):
    """(the tasks of a course, what pieces it lets go), where it begins with the piece behind `mark`."""
    course, tasks, gone = Course(starts), [], []
    before = Mark()
    for number, counts in enumerate([*corpus.counts, None]):
        after = before.plus(counts.mark) if counts else before
        if counts and (mark is None or before.cursor[:2] >= mark.cursor[:2]):
            new = course.add(counts, before)
        else:
            new = [] if counts else course.finish()
        assert not {piece.ref for task in new for piece in task.pieces} & set(gone)  # what is let go is let go
        # No mark lies within a document, and what a task reads begins with the document that its state needs.
        assert all(task.state["mark"].ordinal <= task.state["ordinal"] for task in new)
        tasks += [(number, task) for task in new]
        gone += course.droppable()
        before = after
    assert len(gone) == len(set(gone))
    return tasks, gone


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    strategies(),
    st.integers(1, 40),
    st.lists(st.integers(0, 10**6), max_size=10),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_tasks_in_any_order_write_the_shards_of_an_inline_run(data, strategy, per_shard, cuts, truncates, chance):
    lengths = data.draw(documents(strategy.seq_len))
    kinds = data.draw(
        st.lists(st.sampled_from([*SUBSETS, "train", None]), min_size=len(lengths), max_size=len(lengths))
    )
    corpus = made(lengths, kinds, cuts, strategy.seq_len if truncates else None)
    starts = {"train": Start(strategy, per_shard), "validation": Start(strategy, max(1, per_shard // 3))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subset_module, "ShardWriter", InMemory)
        expected = {
            name: inline(start.strategy, start.per_shard, corpus.documents[name], len(lengths))
            for name, start in starts.items()
        }
        tasks, gone = tasks_of(corpus, starts)
        assert set(gone) == set(corpus.rows)
        found = {name: {} for name in SUBSETS}
        again = chance.sample(tasks, len(tasks) // 2)
        for _, task in chance.sample([*tasks, *again], len(tasks) + len(again)):
            shards, remainder = done(task, starts[task.subset], corpus.rows)
            assert (remainder == expected[task.subset][1]) == task.final or not task.final
            assert set(shards) <= set(range(task.first, task.first + task.count))
            for number, sealed in shards.items():
                assert found[task.subset].setdefault(number, sealed) == sealed
        for name in SUBSETS:
            shards = {number: sealed.entry for number, sealed in found[name].items()}
            assert shards == {number: sealed.entry for number, sealed in expected[name][0].items()}
            states = {task.first: task.state for _, task in tasks if task.subset == name and task.first}
            assert {number: found[name][number - 1].end for number in states} == states
        check_going_on(data, corpus, starts, tasks, found)


def check_going_on(data, corpus, starts, tasks, found):
    """A course begins from any state that a shard was sealed with, and skips those that are sealed already."""
    states = {}
    resumed = {}
    for name, start in starts.items():
        begins = [0, *(number + 1 for number, sealed in sorted(found[name].items()) if sealed.end is not None)]
        first = data.draw(st.sampled_from(begins))
        state = found[name][first - 1].end if first else None
        later = [number for number in found[name] if number > first]
        sealed = frozenset(data.draw(st.sets(st.sampled_from(later), max_size=3))) if later else frozenset()
        states[name], resumed[name] = state, Start(start.strategy, start.per_shard, first, state, sealed)
    mark = min((state["mark"] if state else Mark() for state in states.values()), key=lambda mark: mark.ordinal)
    again, _ = tasks_of(corpus, resumed, mark)
    for name, start in resumed.items():
        written = {}
        for _, task in again:
            if task.subset == name:
                written |= done(task, start, corpus.rows)[0]
        expected = {n: sealed for n, sealed in found[name].items() if n >= start.first and n not in start.sealed}
        assert written == expected
