"""A state of a stream: of the same streams alone, true before the first item, and no end where there was a fault."""

import itertools
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import DataError, RequestError, ResumeRefused
from millstream.streams import stage

TEXTS = [f"{number} " + "a word or two " * (number % 5) for number in range(12)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def values(item):
    ids = getattr(item, "token_ids", item)
    return ids.tolist()


STAGES = {
    "read": lambda source, **more: millstream.read(source, **more),
    "tokenize": lambda source, **more: millstream.tokenize(source, **more),
    "split": lambda source, **more: millstream.split(source, 5, **more),
    "pack": lambda source, **more: millstream.pack(source, 4, **more),
    "best": lambda source, **more: millstream.pack(source, 8, strategy="best-fit", pad_id=0, window=64, **more),
    "shuffled": lambda source, **more: millstream.pack(source, 4, shuffle=1, shuffle_window=16, **more),
}
PIPELINES = [
    ("read", "tokenize"),
    ("read", "tokenize", "pack"),
    ("read", "tokenize", "best"),
    ("read", "tokenize", "shuffled"),
    ("read", "tokenize", "split"),
    ("read", "tokenize", "split", "pack"),
]


def built(corpus, names, at=None, state=None):
    """The streams of these names, of which number `at` is given the state."""
    stream = str(corpus)
    for number, name in enumerate(names):
        stream = STAGES[name](stream, **({"state": state} if number == at else {}))
    return stream


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PIPELINES), st.data())
def test_resumed_is_never_stopped_wherever_the_state_was_given(corpus, names, data):
    """A first stop in any of the streams, and a second, maybe before an item has come, in the last."""
    at = data.draw(st.integers(0, len(names) - 1), label="the stream that is stopped")
    first = built(corpus, names[: at + 1])
    list(itertools.islice(first, data.draw(st.integers(0, 15))))
    state = json.loads(json.dumps(first.state()))
    expected = [values(item) for item in built(corpus, names, at, state)]
    second = built(corpus, names, at, state)
    head = [values(item) for item in itertools.islice(second, data.draw(st.integers(0, 15)))]
    last = json.loads(json.dumps(second.state()))
    assert len(json.dumps(last)) < 4096
    rest = built(corpus, names, len(names) - 1, last)
    assert head + [values(item) for item in rest] == expected


CHANGED = {
    "seq_len was 4 and is 5 now": lambda ids, state: millstream.pack(ids, 5, state=state),
    "strategy was 'concat' and is 'split' now": lambda ids, state: millstream.pack(
        ids, 4, strategy="split", pad_id=0, state=state
    ),
    "shuffle was None and is 2 now": lambda ids, state: millstream.pack(ids, 4, shuffle=2, state=state),
    "remainder was 'keep' and is 'drop' now": lambda ids, state: millstream.pack(ids, 4, remainder="drop", state=state),
    "and these streams are read → tokenize → split": lambda ids, state: millstream.split(ids, 4, state=state),
}


@pytest.mark.parametrize("told", CHANGED)
def test_a_state_of_other_streams_is_refused_by_what_differs(corpus, told):
    stream = built(corpus, ("read", "tokenize", "pack"))
    next(stream)
    with pytest.raises(ResumeRefused, match=told):
        CHANGED[told](built(corpus, ("read", "tokenize")), stream.state())


def test_what_differs_further_up_is_named_too(corpus):
    stream = built(corpus, ("read", "tokenize", "pack"))
    next(stream)
    with pytest.raises(ResumeRefused, match="another tokenize: eos was None and is 50256 now"):
        millstream.pack(millstream.tokenize(millstream.read(corpus), eos=True), 4, state=stream.state())
    with pytest.raises(ResumeRefused, match="another tokenize: text_field was 'text' and is 'body' now"):
        millstream.pack(millstream.tokenize(millstream.read(corpus), text_field="body"), 4, state=stream.state())
    with pytest.raises(ResumeRefused, match="another read: text_field was 'text' and is 'id' now"):
        millstream.pack(millstream.tokenize(millstream.read(corpus, text_field="id")), 4, state=stream.state())


STATES = [{}, {"item": 3}, {"v": 0}, {"v": 1, "made": []}]
MADE = [None, 5, [1], [["pack"]], [["pack", 7]], [["pack", {}, 5]], "pack"]


@pytest.mark.parametrize("wrong", STATES + [{"v": 1, "made": made, "at": None} for made in MADE], ids=str)
def test_what_is_no_state_is_refused(corpus, wrong):
    with pytest.raises(ResumeRefused, match="no state of a stream"):
        millstream.pack([[1, 2]], 2, state=wrong)


@pytest.mark.parametrize("at", [5, {}, [], {"in": 5}, {"in": [None]}, {"in": {"in": {"input": "1"}}}])
def test_what_is_no_place_is_refused_too(corpus, at):
    made = built(corpus, ("read", "tokenize", "pack")).state()["made"]
    with pytest.raises(ResumeRefused, match="no place of these streams"):
        built(corpus, ("read", "tokenize", "pack"), 2, {"v": 1, "made": made, "at": at})
    with pytest.raises(ResumeRefused, match="no place of these streams"):
        millstream.split([[1]], 2, state={**millstream.split([], 2).state(), "at": {"in": -1}})


def test_a_state_of_an_earlier_version_is_refused_by_name():
    with pytest.raises(ResumeRefused, match="of an earlier version"):
        millstream.pack([[1, 2]], 2, state={"version": 1, "made": [], "at": {}, "within": None})


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PIPELINES), st.integers(0, 15), st.booleans())
def test_before_the_first_item_the_state_is_the_one_given(corpus, names, taken, inside):
    first = built(corpus, names)
    list(itertools.islice(first, taken))
    state = first.state()
    assert built(corpus, names, len(names) - 1, state).state() == state
    if not inside:
        return
    source = built(corpus, names[:-1])
    list(itertools.islice(source, taken))
    place = source.state()["at"]
    assert built(corpus, names, len(names) - 2, source.state()).state()["at"] == (place and {"in": place})


@pytest.mark.parametrize("names", PIPELINES)
@pytest.mark.parametrize("taken", [0, 2])
def test_a_stream_that_has_not_begun_can_be_sent_to_another_process(corpus, names, taken):
    first = built(corpus, names)
    list(itertools.islice(first, taken))
    sent = pickle.loads(pickle.dumps(built(corpus, names, len(names) - 1, first.state())))
    assert [values(item) for item in sent] == [values(item) for item in first]


def test_a_stream_is_read_by_one_stage(corpus):
    source = millstream.read(corpus)
    next(source)
    with pytest.raises(RequestError, match="read from already"):
        next(millstream.tokenize(source))


def test_closing_a_stream_closes_those_within(corpus):
    source = millstream.read(corpus)
    stream = millstream.pack(millstream.tokenize(source), 4)
    next(stream)
    stream.close()
    assert list(stream) == list(source) == []


# A stage of one's own --------------------------------------------------------------------------------------------


@stage
def words(items, least=1):
    for document, place in items:
        found = [word for word in getattr(document, "text", document).split() if len(word) >= least]
        for number, word in enumerate(found, 1):
            yield word, place if number == len(found) else None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["", "a", "a bc", "bc d ef"]), max_size=8), st.lists(st.integers(0, 5), max_size=3))
def test_a_stage_of_ones_own_goes_on(texts, hops):
    whole, found, state = list(words(texts, 1)), [], None
    for hop in hops:
        stream = words(texts, 1, state=state)
        found += itertools.islice(stream, hop)
        state = json.loads(json.dumps(stream.state()))
    assert found + list(words(texts, least=1, state=state)) == whole


def test_a_stage_of_ones_own_between_two_of_ours(corpus):
    def stream(least=2, state=None):
        return millstream.pack(millstream.tokenize(words(millstream.read(corpus), least)), 3, state=state)

    whole = [values(item) for item in stream()]
    first = pickle.loads(pickle.dumps(stream()))
    head = [values(next(first)) for _ in range(5)]
    state = json.loads(json.dumps(first.state()))
    assert head + [values(item) for item in stream(state=state)] == whole
    with pytest.raises(ResumeRefused, match="another words: least was 2 and is 3 now"):
        stream(3, state)


def test_what_a_stage_is_told_has_to_be_told_in_a_state():
    with pytest.raises(RequestError, match="what JSON cannot hold"):
        words(["a"], least=object())


@stage
def breaking(items):
    for item, place in items:
        yield 6 // item, place


def test_an_error_of_ones_own_does_not_end_the_stream_either():
    stream = breaking([3, 0, 2])
    assert next(stream) == 2
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(stream)


@pytest.mark.parametrize("names", [("read",), ("read", "tokenize"), ("read", "tokenize", "pack")])
def test_after_a_fault_the_corpus_does_not_seem_to_end(tmp_path, names):
    """A loop that catches the error and asks for the next item must not take the rest for read."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good, and good again"}\nbad\n{"text": "good"}\n')
    stream = built(path, names)
    with pytest.raises(DataError, match="line 2") as first:
        list(stream)
    with pytest.raises(DataError) as second:
        next(stream)
    assert second.value is first.value
    stream.close()
    assert list(stream) == []
