"""Tokenizing ahead in other processes: the same ids and states as here, bounded, and nothing alive afterwards."""

import json
import os
import pickle
import signal
from contextlib import closing
from functools import partial
from itertools import count, islice
from pathlib import Path

import pytest
import runs
from here import pooled
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import lines, needs_proc, train_tokenizer

import millstream
from millstream.errors import DataError, RequestError
from millstream.streams import stage
from millstream.streams.ahead import encoded_ahead
from millstream.streams.columns import Texts


def corpus_of(path, seed, size=25_000):
    path.write_bytes(b"".join(lines(seed, size)))
    return path


def packed_of(source, workers=1, state=None, **more):
    ids = millstream.tokenize(source, eos=True, workers=workers, **more)
    return millstream.pack(ids, 64, state=state)


def values(sample):
    return sample.token_ids.tolist(), None if sample.loss is None else sample.loss.tolist()


def told(stream):
    return [(*values(sample), stream.state()["at"]) for sample in stream]


def children():
    """The workers that this process has started, and that live. Not by `ps`, which cuts lines where it sees fit."""
    return [pid for pid in runs.children() if b"millstream.engines.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 0)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_ids_and_states_are_those_of_one_worker(corpus, data):
    """With the engine here, whose workers answer in any order."""
    rows = [{"id": f"d{n}", "text": "a word or two " * (n % 9)} for n in range(60)]
    talks = [{"prompt": row["text"], "completion": row["id"]} for row in rows]
    source = data.draw(st.sampled_from(["files", "items", "stage", "chat"]))
    made = {
        "files": lambda: millstream.read(corpus),
        "items": lambda: rows,
        "stage": lambda: changed(rows),
        "chat": lambda: talks,
    }[source]
    packed = partial(packed_of, chat=source == "chat")
    whole = told(packed(made()))
    taken = data.draw(st.integers(0, len(whole)))
    workers, bound = data.draw(st.integers(2, 5)), data.draw(st.sampled_from([1, 200, 5000, "1MiB"]))
    with pooled(data.draw(st.integers(0, 1 << 20))):
        stream = packed(made(), workers, ahead=bound)
        found = [(*values(sample), stream.state()["at"]) for sample in islice(stream, taken)]
        state = json.loads(json.dumps(stream.state()))
        stream.close()
        assert found + told(packed(made(), workers, state, ahead=bound)) == whole
    assert whole[:taken] + told(packed(made(), 1, state)) == whole


@stage
def changed(rows):
    for row, place in rows:
        yield {**row, "text": row["text"].upper()}, place


@needs_proc
def test_a_worker_that_dies_is_started_anew_and_close_ends_them(corpus):
    whole = told(packed_of(millstream.read(corpus)))
    stream = packed_of(millstream.read(corpus), 2)
    assert children() == []  # they begin with the first item
    found = [next(stream)]
    first, _ = children()
    os.kill(first, signal.SIGKILL)
    found += islice(stream, 2)
    rest = told(stream)
    assert [values(sample) for sample in found] == [(ids, loss) for ids, loss, _ in whole[:3]]
    assert rest == whole[3:]
    assert children() == []
    again = packed_of(millstream.read(corpus), 2)
    next(again)
    assert len(children()) == 2
    again.close()
    assert children() == []


def test_a_stream_goes_to_another_process_before_it_has_begun(corpus):
    whole = told(packed_of(millstream.read(corpus)))
    with pooled(2):
        assert told(pickle.loads(pickle.dumps(packed_of(millstream.read(corpus), 2)))) == whole


def test_no_more_than_ahead_is_in_hand():
    read = 0

    def batches():
        nonlocal read
        for number in count():
            read += 5
            yield Texts(["word " * 200] * 5, [str(number)] * 5, int)

    with pooled(0), closing(encoded_ahead(len, batches(), workers=4, ahead=100_000)) as found:
        taken = most = 0
        for texts, _ in islice(found, 300):
            most = max(most, read - taken)
            taken += len(texts.texts)
    assert 60 < most <= 100  # of 1 kB each


def test_what_came_before_a_fault_is_handed_out_first(tmp_path):
    def broken():
        for number in range(50):
            yield {"text": f"text {number}"}
        raise DataError("cannot be read")

    for workers in (1, 3):
        with pooled(1):
            ids = millstream.tokenize(broken(), workers=workers)
            assert len([next(ids) for _ in range(50)]) == 50
            with pytest.raises(DataError, match="cannot be read"):
                next(ids)
            ids = millstream.tokenize([{"text": "good"}, {"id": "odd", "text": "half \ud800"}], workers=workers)
            next(ids)
            with pytest.raises(DataError, match="document 'odd': "):
                next(ids)


def test_a_tokenizer_that_changes_meanwhile_is_refused(tmp_path):
    definition = train_tokenizer(tmp_path / "tokenizer.json", 0)
    ids = millstream.tokenize(["one text"], str(definition), workers=2)
    train_tokenizer(Path(definition), 1)
    with pytest.raises(RequestError, match="was changed while a stream used it"):
        next(ids)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"workers": 0}, "workers=0 does not work"), ({"ahead": "much"}, "ahead='much'"), ({"ahead": 0}, "ahead=0")],
)
def test_what_cannot_be_meant_is_told_at_once(options, why):
    with pytest.raises(RequestError, match=why):
        millstream.tokenize([], **options)
