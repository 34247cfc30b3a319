"""Streams made of streams: whatever they are made of, wherever they stop, they go on as if they had never stopped."""

import itertools
import json
import pickle
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pipelines
import pytest
import runs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millstream import streams
from millstream.errors import DataError, RequestError, ResumeRefused
from millstream.records import Document, LearnedIds

MOST = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    pipelines.write_corpus(folder)
    return str(folder)


def cuts(rng, end):
    """One to three places to stop at, in order; often at the edges."""
    return sorted(rng.choice([0, 1, end - 1, end, rng.randint(0, end)]) for _ in range(rng.randint(1, 3)) if end > 0)


def sources(tree):
    """How many streams a pipeline begins with: each has a place of its own in the state, so that many need more."""
    return sum(json.dumps(tree).count(f'"{name}"') for name in ("read", "ids", "endless"))


def check(corpus, seed):
    """A pipeline by chance, stopped by chance."""
    rng = random.Random(seed)
    tree = pipelines.pipeline(rng)
    whole, state, at = pipelines.some(pipelines.build(tree, corpus), MOST), None, 0
    for cut in [*cuts(rng, len(whole)), MOST]:
        items, state = pipelines.gone_on(tree, corpus, state, cut - at)
        assert items == whole[at:cut], (seed, tree)
        assert len(json.dumps(state)) < max(4096, 512 * sources(tree)), (seed, tree)
        at = cut


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
@example(7700458)  # more than ten sources
def test_resumed_is_never_stopped(corpus, seed):
    check(corpus, seed)


@pytest.mark.slow
def test_resumed_is_never_stopped_of_many(corpus):
    for seed in range(600):
        check(corpus, seed)


def test_several_hops_in_new_processes(corpus):
    """Of each pipeline a part is made here, a part there, and a part in a third process."""
    cases = []
    for seed in range(10):
        tree = pipelines.pipeline(random.Random(seed))
        whole = pipelines.some(pipelines.build(tree, corpus), MOST)
        first, second = sorted(random.Random(seed).choices(range(len(whole) + 1), k=2))
        state = pipelines.gone_on(tree, corpus, None, first)[1]
        cases.append((tree, state, [whole[first:second], whole[second:MOST]]))
    for hop in range(2):
        lines = [json.dumps([tree, corpus, state, len(rest[hop])]) for tree, state, rest in cases]
        process = subprocess.run(
            [sys.executable, pipelines.__file__], input="\n".join(lines), capture_output=True, text=True, check=True
        )
        answers = map(json.loads, process.stdout.splitlines())
        for number, ((tree, _, rest), (items, state)) in enumerate(zip(cases, answers, strict=True)):
            assert items == rest[hop], tree
            cases[number] = tree, state, rest


def test_a_state_of_ten_corpora_is_small(corpus):
    def of_epoch(name, epoch):
        return streams.tokenize(streams.read(f"{corpus}/{name}"), eos=True)

    names = [name for name in pipelines.FILES if "none" not in name] + ["both", "few.jsonl", "few.jsonl"]
    several = [streams.repeat(partial(of_epoch, name)) for name in names]
    stream = streams.pack(streams.mix(several, range(1, 1 + len(names))), 64)
    assert len(list(itertools.islice(stream, 100))) == 100
    assert len(json.dumps(stream.state())) < 4096


LONG = [5] * 9 + [400] + [3] * 9


def long(state=None, epochs=3):
    """Of one document there are 50 samples; three epochs."""
    makes = [lambda epoch: [[epoch * 100 + number] * size for number, size in enumerate(LONG)], [[7] * 20] * 30]
    mixed = streams.mix([streams.repeat(makes[0], epochs), streams.repeat(makes[1])], [3, 1])
    return streams.pack(streams.shuffle(mixed, 4, 1), 8, state=state)


def test_every_place_inside_a_long_document_and_at_the_edges_of_epochs():
    whole = [sample.token_ids.tolist() for sample in long()]
    stream, begun = long(), long().state()
    states = [begun, *(stream.state() for _ in stream)]
    assert len(whole) > 150
    for cut, state in enumerate(states):
        again = [sample.token_ids.tolist() for sample in long(json.loads(json.dumps(state)))]
        assert whole[:cut] + again == whole


@pytest.mark.parametrize("how", ["stop", "drop"])
@pytest.mark.parametrize("seed", range(4))
def test_every_place_of_a_mixture(seed, how):
    several = [["x" * size for size in random.Random(number).choices(range(1, 90), k=30)] for number in range(4)]

    def mixed(state=None):
        return streams.enumerate(streams.mix(several, [0.5, 0.2, 0.2, 0.1], seed, exhausted=how), state=state)

    whole, stream = list(mixed()), mixed()
    states = [stream.state(), *(stream.state() for _ in stream)]
    for cut, state in enumerate(states):
        assert list(mixed(json.loads(json.dumps(state)))) == whole[cut:]


# What goes through ---------------------------------------------------------------------------------------------------


ROWS = [{"prompt": "Hello" * (1 + number % 3), "completion": f" world {number}"} for number in range(30)]


def chats():
    return streams.tokenize(ROWS, chat=True, eos=True)


THROUGH = {
    "chain": lambda: streams.chain(chats(), chats()),
    "mix": lambda: streams.mix([chats(), chats()], [2, 1]),
    "repeat": lambda: streams.repeat(chats, 2),
    "shuffle": lambda: streams.shuffle(chats(), 7, 1),
    "filter": lambda: streams.filter(len, chats()),
    "map": lambda: streams.map(identity, chats()),
    "generator": lambda: (ids for ids in chats()),
    "sent": lambda: [pickle.loads(pickle.dumps(ids)) for ids in chats()],
}


@pytest.mark.parametrize("through", THROUGH)
def test_what_is_learned_goes_through_other_stages(through):
    """Each document has the mask that it has without them, and each sample that of its documents."""
    directly = {tuple(ids.tolist()): ids.learned.tolist() for ids in chats()}
    documents = [(ids.tolist(), ids.learned.tolist()) for ids in THROUGH[through]()]
    assert all(directly[tuple(ids)] == learned for ids, learned in documents)
    samples = list(streams.pack(THROUGH[through](), 8))
    packed = [np.concatenate([getattr(each, name) for each in samples]).tolist() for name in ("token_ids", "loss")]
    assert packed == [list(itertools.chain(*column)) for column in zip(*documents, strict=True)]
    for cut in (1, len(samples) - 1):
        stream = streams.pack(THROUGH[through](), 8)
        state = [next(stream) for _ in range(cut)] and stream.state()
        rest = list(streams.pack(THROUGH[through](), 8, state=json.loads(json.dumps(state))))
        assert [each.loss.tolist() for each in rest] == [each.loss.tolist() for each in samples[cut:]]


LOST = {
    "cut": lambda: streams.map(lambda ids: ids[:3], chats()),
    "cut by a generator": lambda: (ids[:3] for ids in chats()),
    "made anew": lambda: streams.map(list, chats()),
    "beside texts": lambda: streams.mix([chats(), streams.tokenize(["a text"] * 9)], [1, 1]),
    "behind texts": lambda: streams.chain(streams.tokenize(["a text"] * 9), chats()),
}


@pytest.mark.parametrize("how", LOST)
def test_what_is_learned_does_not_get_lost_in_silence(how):
    with pytest.raises(RequestError, match="do not say what is learned of them: tokenize all of them with chat=True"):
        list(streams.pack(LOST[how](), 2))


def test_texts_beside_conversations_are_rows_of_them():
    texts = [{"prompt": "", "completion": "All of it."}]
    both = streams.mix([chats(), streams.tokenize(texts, chat=True, eos=True)], [1, 1], exhausted="drop")
    assert sum(ids.learned.all() for ids in both) == 1


UNSIGNED = {
    "uint16": (
        lambda: streams.shuffle(streams.tokenize(["a b"] * 4), 2, 1),
        lambda: streams.mix([streams.tokenize(["a"]), streams.skip(streams.tokenize(["a b"] * 9), 2)], [1, 1]),
        lambda: streams.repeat(lambda epoch: streams.take(streams.tokenize(["a"]), 1), 2),
        lambda: streams.split(streams.filter(len, streams.tokenize(["a b"])), 1),
        lambda: streams.chain(THROUGH["mix"]()),
    ),
    "uint32": (
        lambda: streams.map(identity, streams.tokenize(["a b"])),
        lambda: streams.chain(streams.tokenize(["a b"]), [[1]]),
        lambda: streams.split([[1]], 1),
    ),
}


@pytest.mark.parametrize(("dtype", "make"), [(dtype, make) for dtype in UNSIGNED for make in UNSIGNED[dtype]])
def test_ids_that_are_handed_on_keep_their_type(dtype, make):
    assert {sample.token_ids.dtype.name for sample in streams.pack(make(), 1)} == {dtype}


def test_another_vocabulary_in_a_later_epoch_is_no_other_id():
    def epochs(last):
        return streams.repeat(lambda epoch: [[1, last]] if epoch else streams.tokenize(["a"]), 2)

    assert [int(sample.token_ids[0]) for sample in streams.pack(epochs(65535), 1)] == [64, 1, 65535]
    with pytest.raises(DataError, match="id 65,536 is not of the vocabulary of the ids before, which are uint16"):
        list(streams.pack(epochs(65536), 1))


def test_another_vocabulary_in_a_later_epoch_of_conversations_is_no_other_id():
    learned = LearnedIds.of(np.array([65536], np.uint32), np.array([True]))
    epochs = streams.repeat(lambda epoch: [learned] if epoch else streams.take(chats(), 1), 2)
    with pytest.raises(DataError, match="id 65,536 is not of the vocabulary"):
        list(streams.pack(epochs, 1))


@pytest.mark.parametrize("eos", [True, False])
def test_what_ends_documents_is_known_behind_other_stages(eos):
    """A truncated document ends with its EOS again, if all of them do."""
    texts = [streams.tokenize(["one two three four"] * 2, eos=more) for more in (True, eos)]
    samples = list(streams.pack(streams.shuffle(streams.chain(*texts), 2, 1), 3, overlong="truncate"))
    assert [int(sample.token_ids[-1]) == 50256 for sample in samples] == [eos] * 4


def test_what_came_before_a_fault_is_handed_out_first(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    stream = streams.pack(streams.chain(streams.tokenize(streams.map(identity, streams.read(path)))), 1)
    assert [len(sample.token_ids) for sample in itertools.islice(stream, 2)] == [1, 1]
    with pytest.raises(DataError, match="line 3"):
        list(stream)


def identity(item):
    return item


# What is read again --------------------------------------------------------------------------------------------------


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def joined(folder, state=None, window=1):
    """Through nearly all stages; the large files are read from their middle on."""
    files = [streams.map(identity, streams.read(folder / f"{name}.jsonl")) for name in "abc"]
    mixed = streams.mix([streams.chain(files[0], files[1]), files[2]], [2, 1])
    documents = streams.filter(identity, streams.shuffle(streams.enumerate(mixed), window, 1))
    numbered = streams.zip(streams.skip(documents, 5), streams.repeat(partial(itertools.count, 0), 1))
    return streams.batch(streams.take(numbered, 10**6), 4, state=state)


@runs.needs_proc
def test_what_is_read_again_has_a_bound(tmp_path):
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(line * 1000)
    stream, before = joined(tmp_path), bytes_read()
    first = list(itertools.islice(stream, 400))
    passed, state = bytes_read() - before, first[-1].state
    expected, before = pipelines.values(next(stream)), bytes_read()
    assert pipelines.values(next(joined(tmp_path, json.loads(json.dumps(state))))) == expected
    assert passed > 15e6
    assert bytes_read() - before < 3e6


# What does not work --------------------------------------------------------------------------------------------------

ONE = streams.chain([1])
DOCUMENT = Document("id", "text")


@streams.stage
def without_place(documents):
    for document, _ in documents:
        yield document


REFUSED = {
    "chain has nothing to take from": streams.chain,
    "zip has nothing to take from": streams.zip,
    "mix has nothing to take from": lambda: streams.mix([], []),
    "chain was given a stream twice": lambda: streams.chain(ONE, ONE),
    "mix was given a stream twice": lambda: streams.mix([iter([]), *[iter([1])] * 2], [1, 1, 1]),
    "2 weights do not work for 1 streams": lambda: streams.mix([[1]], [1, 1]),
    "exhausted 'halt' does not work": lambda: streams.mix([[1]], [1], exhausted="halt"),
    "mix was given a function": lambda: streams.mix([identity], [1]),
    "a stream can be read only once: give repeat a function": lambda: streams.mix([ONE], [1], exhausted="repeat"),
    "a generator can be read only once: give repeat a function": lambda: streams.repeat(number for number in [1]),
    "epochs=0 does not work": lambda: streams.repeat([1], 0),
    "epoch 0 has no items": lambda: list(streams.repeat([])),
    "epoch 1 has no items": lambda: list(streams.repeat(partial(identity, iter([1])))),
    "has been read from already": lambda: list(streams.repeat(partial(identity, streams.chain([1])))),
    "weights .* do not work: give each a number": lambda: streams.mix([[1]], ["much"]),
    "weights None do not work": lambda: streams.mix([[1]], None),
    "weights .'a': 1. do not work": lambda: streams.mix([[1]], {"a": 1}),
    "weights .nan. do not work": lambda: streams.mix([[1]], [float("nan")]),
    "mix takes a list of streams, not dict": lambda: streams.mix({"a": [1]}, [1]),
    "mix takes a list of streams, not Stream": lambda: streams.mix(streams.chain([1]), [1]),
    "mix takes a list of streams, not str": lambda: streams.mix("ab", [1, 1]),
    "this is one text, not documents": lambda: streams.tokenize("corpus.jsonl"),
    "seed 'x' does not work": lambda: streams.mix([[1]], [1], "x"),
    "seed 1.5 does not work": lambda: streams.shuffle([1], 1, 1.5),
    "window=2.5 does not work": lambda: streams.shuffle([1], 2.5, 1),
    "epochs=1.5 does not work": lambda: streams.repeat([1], 1.5),
    "window=0 does not work": lambda: streams.shuffle([1], 0, 1),
    "seed -1 does not work": lambda: streams.shuffle([1], 1, -1),
    "size=0 does not work": lambda: streams.batch([1], 0),
    "remainder 'pad' does not work": lambda: streams.batch([1], 2, remainder="pad"),
    "count=-1 does not work": lambda: streams.take([1], -1),
    "5 is no function": lambda: streams.map(5, [1]),
    "5 can not be iterated": lambda: streams.take(5, 1),
    "None can not be iterated": lambda: streams.take(None, 1),
    "start 'a' does not work": lambda: streams.enumerate([1], "a"),
    "None can not be": lambda: streams.repeat(lambda: None),
    "window=1180591620717411303424 does not work": lambda: streams.shuffle([1], 1 << 70, 0),
    "without_place gave Document Document.*: give each item with its place": lambda: list(without_place([DOCUMENT])),
    "without_place gave int 5: give each item with its place": lambda: list(without_place([5])),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_does_not_work_is_refused_by_name(told):
    with pytest.raises(RequestError, match=told):
        REFUSED[told]()


@pytest.mark.parametrize("number", [np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(number):
    """They make the same order, and a state that JSON can hold."""

    def made(of):
        several = streams.mix([streams.repeat(range(9), of(3)), range(9)], [of(2), of(1)], of(5))
        some = streams.skip(streams.take(streams.shuffle(several, of(4), of(7)), of(9)), of(1))
        return streams.batch(some, of(2))

    assert json.dumps(made(number).state()) == json.dumps(made(int).state())
    assert list(made(number)) == list(made(int))


def test_strict_zip_tells_who_has_more():
    assert list(streams.zip([1, 2], "ab", strict=True)) == [(1, "a"), (2, "b")]
    for shorter, longer in ((0, 1), (1, 0)):
        several = [[1, 2], [1, 2]]
        several[shorter] = [1]
        with pytest.raises(DataError, match=f"stream {shorter} has ended, and stream {longer} has more"):
            list(streams.zip(*several, strict=True))


class Words:
    def lower(self, item):
        return item.lower()


CHANGED = {
    "function was 'identity' and is 'str.upper' now": (
        lambda **s: streams.map(identity, "ab", **s),
        lambda **s: streams.map(str.upper, "ab", **s),
    ),
    "function was 'str.lower' and is 'Words.lower' now": (
        lambda **s: streams.filter(str.lower, "ab", **s),
        lambda **s: streams.filter(Words().lower, "ab", **s),
    ),
    "version was None and is 2 now": (
        lambda **s: streams.map(identity, "ab", **s),
        lambda **s: streams.map(identity, "ab", version=2, **s),
    ),
    r"given was \['A'\] and is \['B'\] now": (
        lambda **s: streams.map(partial(max, "A"), "ab", **s),
        lambda **s: streams.map(partial(max, "B"), "ab", **s),
    ),
    r"weights was \[1.0, 2.0\] and is": (
        lambda **s: streams.mix(["ab", "c"], [1, 2], **s),
        lambda **s: streams.mix(["ab", "c"], [1, 3], **s),
    ),
    "window was 2 and is 3 now": (
        lambda **s: streams.shuffle("abc", 2, 1, **s),
        lambda **s: streams.shuffle("abc", 3, 1, **s),
    ),
    "of another take: count was 1 and is 2 now": (
        lambda **s: streams.chain(streams.take("ab", 1), "c", **s),
        lambda **s: streams.chain(streams.take("ab", 2), "c", **s),
    ),
}


@pytest.mark.parametrize("told", CHANGED)
def test_a_state_of_other_streams_is_refused_by_what_differs(told):
    before, now = CHANGED[told]
    stream = before()
    next(stream)
    with pytest.raises(ResumeRefused, match=told):
        now(state=stream.state())


def test_a_lambda_counts_wherever_it_stands():
    first = streams.map(lambda item: item * 2, "ab")
    assert next(first) == "aa"

    assert list(streams.map(lambda item: item * 3, "ab", state=first.state())) == ["bbb"]


def test_a_file_that_grew_goes_on_behind_the_window_that_was_shuffled():
    first = streams.shuffle(["a", "b", "c"], 5, 1)
    head = next(first)
    rest = list(streams.shuffle(["a", "b", "c", "d", "e", "f"], 5, 1, state=first.state()))
    assert sorted([head, *rest[:2]]) == ["a", "b", "c"]
    assert sorted(rest[2:]) == ["d", "e", "f"]
    with pytest.raises(ResumeRefused, match="2 items in the window that is shuffled; there were 3"):
        list(streams.shuffle(["a", "b"], 5, 1, state=first.state()))


def test_a_chain_opens_a_stream_when_its_turn_comes(tmp_path):
    opened = []

    def source(name):
        opened.append(name)
        yield from name

    stream = streams.chain(source("ab"), source("cd"))
    assert (next(stream), opened) == ("a", ["ab"])
    assert list(itertools.islice(stream, 2)) == ["b", "c"]
    assert list(streams.chain(source("ab"), source("cd"), state=stream.state())) == ["d"]
    assert opened == ["ab", "cd", "cd"]


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def epochs(folder, state=None):
    """Each epoch reads a file of its own and one that all read."""

    def of_epoch(epoch):
        return streams.read([folder / f"{epoch}.jsonl", folder / "all.jsonl"], on_error="skip")

    mixed = streams.mix([streams.repeat(of_epoch, 3), "x" * 99], [9, 1])
    return streams.batch(streams.shuffle(mixed, 3, 1), 2, state=state)


def test_inputs_are_looked_at_as_of_the_epoch_that_has_come(tmp_path):
    for epoch in range(3):
        write(tmp_path / f"{epoch}.jsonl", *(f"{epoch} {number}" for number in range(4)))
    write(tmp_path / "all.jsonl", "one", "two", "three", 4, "five")
    whole = [pipelines.values(item) for item in epochs(tmp_path)]
    stream = epochs(tmp_path)
    head = [pipelines.values(item) for item in itertools.islice(stream, 8)]
    state = json.loads(json.dumps(stream.state()))
    assert head + [pipelines.values(item) for item in epochs(tmp_path, state)] == whole
    (tmp_path / "0.jsonl").unlink()
    write(tmp_path / "0.jsonl", "of an epoch that has passed")
    assert head + [pipelines.values(item) for item in epochs(tmp_path, state)] == whole
    (tmp_path / "1.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(ResumeRefused, match=r"1\.jsonl"):
        epochs(tmp_path, state)


def test_what_each_epoch_leaves_out_is_told(tmp_path):
    for epoch in range(3):
        write(tmp_path / f"{epoch}.jsonl", "good", epoch)
    write(tmp_path / "all.jsonl", "good")
    stream = epochs(tmp_path)
    assert len(list(stream)) > 0
    assert stream.left_out == 3
    assert [(fault.shard, fault.line) for fault in stream.faults] == [(0, 2)] * 3


def test_a_chain_sees_that_an_input_has_changed_with_which_it_is_through(tmp_path):
    def both(state=None):
        return streams.chain(*(streams.read(tmp_path / f"{name}.jsonl") for name in "ab"), state=state)

    for name in "ab":
        write(tmp_path / f"{name}.jsonl", "one", "two", "three")
    stream = both()
    list(itertools.islice(stream, 4))
    write(tmp_path / "a.jsonl", "one", "two", "THREE")
    with pytest.raises(ResumeRefused, match=r"a\.jsonl"):
        both(stream.state())


def test_a_batch_goes_to_another_process_with_its_state():
    stream = streams.batch("abcdef", 2)
    first = pickle.loads(pickle.dumps(next(stream)))
    next(stream)
    assert first == ["a", "b"]
    assert list(streams.batch("abcdef", 2, state=first.state)) == [["c", "d"], ["e", "f"]]


def test_streams_that_have_not_begun_go_to_another_process():
    tree = ["shuffle", ["mix", [["ids", 9], ["take", ["ids", 12], 7]], [1, 2], 3, "drop"], 4, 1]
    mixed = pipelines.build(["map", tree], "")
    again = pickle.loads(pickle.dumps(mixed))
    assert pipelines.some(again, MOST) == pipelines.some(mixed, MOST)
