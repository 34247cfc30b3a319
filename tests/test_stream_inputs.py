"""Streams of files: a place in them, what is read to go on from it, what may change, and what is left out."""

import gzip
import io
import itertools
import json
import os
import pickle
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream import streams
from millstream.errors import DataError, RequestError, ResumeRefused
from millstream.records import Document

WORDS = ["to", "be", "or", "not", "to", "be", "that", "is", "the", "question"]


def line(number):
    return json.dumps({"id": f"d{number}", "text": " ".join(WORDS[: number % 9])})


def values(item):
    found = getattr(item, "token_ids", item)
    return item if isinstance(item, Document) else found.tolist()


PIPELINES = {
    "read": lambda source, state=None: millstream.read(source, state=state),
    "tokenize": lambda source, state=None: millstream.tokenize(millstream.read(source), state=state),
    "concat": lambda source, state=None: millstream.pack(millstream.tokenize(millstream.read(source)), 4, state=state),
    "split": lambda source, state=None: millstream.split(millstream.tokenize(millstream.read(source)), 3, state=state),
    "again": lambda source, state=None: millstream.pack(
        millstream.split(millstream.tokenize(millstream.read(source)), 3), 4, state=state
    ),
    "best-fit": lambda source, state=None: millstream.pack(
        millstream.tokenize(millstream.read(source)), 8, strategy="best-fit", pad_id=0, window=600, state=state
    ),
    "shuffled": lambda source, state=None: millstream.pack(
        millstream.tokenize(millstream.read(source)), 4, shuffle=1, shuffle_window=600, state=state
    ),
    "both": lambda source, state=None: millstream.pack(
        millstream.tokenize(millstream.read(source)),
        8,
        strategy="best-fit",
        pad_id=0,
        window=900,
        shuffle=1,
        shuffle_window=500,
        state=state,
    ),
}


# What may change --------------------------------------------------------------------------------------------------


def write(folder, files, packed):
    """Files of lines in a folder; whatever else is there goes."""
    for path in folder.iterdir():
        path.unlink()
    for name, lines in files.items():
        data = "".join(each + "\n" for each in lines).encode()
        path = folder / (name + (".jsonl.gz" if packed else ".jsonl"))
        path.write_bytes(gzip.compress(data, mtime=0) if packed else data)


@st.composite
def changes(draw):
    """(files, the same with one change, the number of the first document that is another one)."""
    numbers = itertools.count()
    files = {name: [line(next(numbers)) for _ in range(draw(st.integers(0, 9)))] for name in "bdf"}
    files["d"].append(line(next(numbers)))
    changed = {name: list(lines) for name, lines in files.items()}
    order = [(name, at) for name in "bdf" for at in range(len(files[name]) + 1)]
    name, at = draw(st.sampled_from(order))
    first = sum(len(files[other]) for other in "bdf" if other < name) + at
    what = draw(st.sampled_from(["insert", "remove", "blank", "edit", "file"]))
    if what == "insert" or (what != "file" and at == len(files[name])):
        changed[name].insert(at, line(77))
    elif what == "remove":
        del changed[name][at]
    elif what == "blank":
        changed[name][at] = ""
    elif what == "edit":
        changed[name][at] = changed[name][at].replace('"d', '"ee')
    else:
        new = draw(st.sampled_from("aceg"))
        changed[new] = [line(55)]
        first = sum(len(files[other]) for other in "bdf" if other < new)
    return files, changed, first


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PIPELINES)), changes(), st.booleans(), st.data())
def test_what_changed_before_a_place_is_refused_and_what_is_behind_is_read(
    tmp_path_factory, pipeline, change, packed, data
):
    """Going on is as if the stream had never stopped, over the inputs as they are now, or is refused."""
    made, folder = PIPELINES[pipeline], tmp_path_factory.mktemp("corpus")
    files, changed, first = change
    write(folder, files, packed)
    stream = made(folder)
    head = [values(item) for item in itertools.islice(stream, data.draw(st.integers(0, 30)))]
    state = json.loads(json.dumps(stream.state()))
    assert len(json.dumps(state)) < 4096
    write(folder, changed, packed)
    whole = [values(item) for item in made(folder)]
    try:
        found = head + [values(item) for item in made(folder, state)]
    except ResumeRefused:
        assert pipeline != "read" or first < len(head)
    else:
        assert found == whole
        assert pipeline != "read" or first >= len(head)


def test_a_change_is_told_by_name(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = {name: [line(number) for number in range(9)] for name in "bdf"}

    def told(**changed):
        write(folder, files, packed=False)
        stream = millstream.read(folder)
        list(itertools.islice(stream, 12))
        write(folder, {**files, **changed}, packed=False)
        with pytest.raises(ResumeRefused) as refused:
            millstream.pack(millstream.tokenize(millstream.read(folder, state=stream.state())), 4)
        return str(refused.value)

    assert "corpus/b.jsonl has changed" in told(b=files["b"][1:])
    assert "corpus/d.jsonl has changed before byte" in told(d=[line(3), *files["d"]])
    assert "corpus/d.jsonl was read to byte" in told(d=files["d"][:1])
    assert "input 2 was corpus/d.jsonl, and is corpus/b.jsonl now" in told(a=[line(1)])


def test_a_file_may_grow_behind_a_last_line_without_an_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(line, range(3))).encode())
    stream = millstream.read(path)
    assert [document.id for document in stream] == ["d0", "d1", "d2"]
    with path.open("a") as file:
        file.write("\r\n" + line(3))
    again = millstream.read(path, state=stream.state())
    assert [document.id for document in again] == ["d3"]
    assert again.state()["at"]["line"] == 3


def test_many_inputs_make_no_large_state(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    stream = millstream.read(tmp_path)
    texts = [next(stream).text for _ in range(70)]
    state = stream.state()
    assert len(json.dumps(state)) < 700
    assert texts + [document.text for document in millstream.read(tmp_path, state=state)] == [
        f"text {number}" for number in range(100)
    ]
    (tmp_path / "33.txt").write_text("another one")
    with pytest.raises(ResumeRefused, match=r"one of .*/32\.txt to .*/39\.txt has changed"):
        millstream.read(tmp_path, state=state)


def table(first, groups):
    texts = [f"row {number} " + "x" * (number % 50) for number in range(first, first + 100)]
    return pa.table({"id": [str(number) for number in range(first, first + 100)], "text": texts})


@pytest.mark.parametrize("taken", [1, 99, 100, 101, 250])
def test_parquet_by_its_row_groups(tmp_path, taken):
    path = tmp_path / "a.parquet"

    def write_groups(*tables):
        with pq.ParquetWriter(path, tables[0].schema) as writer:
            for each in tables:
                writer.write_table(each)

    tables = [table(0, 1), table(100, 1), table(200, 1)]
    write_groups(*tables)
    stream = millstream.read(path)
    head = [document.id for document in itertools.islice(stream, taken)]
    state = json.loads(json.dumps(stream.state()))
    assert head + [document.id for document in millstream.read(path, state=state)] == [str(n) for n in range(300)]
    write_groups(table(1, 1), *tables[1:])
    with pytest.raises(ResumeRefused, match=r"a\.parquet has changed before row"):
        millstream.read(path, state=state)
    write_groups(*tables, table(300, 1))
    assert len(list(millstream.read(path, state=state))) == 400 - taken


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(0, 21), st.sampled_from(["insert", "remove", "edit", "none"]))
def test_standard_input_is_given_again(taken, at, what):
    def piped(lines):
        sys.stdin = io.TextIOWrapper(io.BytesIO("".join(each + "\n" for each in lines).encode()))

    lines = [line(number) for number in range(20)]
    changed = list(lines)
    if what == "insert" or at >= 20:
        changed.insert(at, line(77))
    elif what != "none":
        changed[at : at + 1] = [] if what == "remove" else [changed[at].replace('"d', '"e')]
    kept = sys.stdin
    try:
        piped(lines)
        stream = millstream.read("-")
        head = list(itertools.islice(stream, taken))
        piped(changed)
        second = millstream.read("-", state=json.loads(json.dumps(stream.state())))
        if changed[:taken] == lines[:taken]:
            assert [document.id for document in [*head, *second]] == [json.loads(each)["id"] for each in changed]
        else:
            with pytest.raises(ResumeRefused, match=r"^- (has changed before|was read to) byte"):
                next(second)
    finally:
        sys.stdin = kept


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_going_on_anywhere_also_within_a_document_of_fifty_samples(tmp_path, pipeline, kind):
    texts = ["a b", "", "word " * 200, "c d e", "", "f"]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    else:
        (tmp_path / f"a.{kind}").write_bytes(data if kind == "jsonl" else gzip.compress(data))
    made = PIPELINES[pipeline]
    stream = made(tmp_path)
    whole, states = [], [stream.state()]
    for item in stream:
        whole.append(values(item))
        states.append(json.loads(json.dumps(stream.state())))
    assert len(whole) > 50 or pipeline in ("read", "tokenize", "best-fit", "both")
    for taken in {0, 1, 2, 3, 7, len(whole) // 2, len(whole) - 1, len(whole)}:
        if taken <= len(whole):
            assert len(json.dumps(states[taken])) < 2048
            assert [values(item) for item in made(tmp_path, states[taken])] == whole[taken:]


# What is read to go on ----------------------------------------------------------------------------------------------


def read_by(function):
    """Bytes that this process reads from anywhere while a function runs."""

    def count():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    function()
    return count() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="only Linux counts what a process reads")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["read", "tokenize", "concat", "again", "best-fit", "shuffled"])
def test_going_on_reads_little(tmp_path, name, kind):
    """Of 20 MB behind which the place is nothing, of JSONL; of Parquet one row group, of 1 MB here."""
    path = tmp_path / f"a.{kind}"
    texts = [os.urandom(400).hex() + f" {number}" for number in range(20_000)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="none", use_dictionary=False)
    source = millstream.read(path)
    list(itertools.islice(source, 18_500))
    made = PIPELINES[name]
    begun = made(path).state()
    place = source.state()["at"]
    for _ in begun["made"][1:]:
        place = {"in": place}
    stream = made(path, {**begun, "at": place})
    next(stream)
    state = stream.state()
    assert read_by(lambda: next(made(path, state))) < 3_000_000


# What is left out, and what else can be read ------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [5, None, b"a.jsonl", [5], ["a.jsonl", None]], ids=str)
def test_what_is_no_source_is_refused_by_name(wrong):
    with pytest.raises(RequestError, match="is no source: give the name of a file"):
        millstream.read(wrong)


@pytest.mark.parametrize("wrong", [0, -1, "32MiB", 1.5])
def test_a_length_that_no_line_can_have_is_refused(tmp_path, wrong):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RequestError, match=f"max_document {wrong!r} does not work"):
        millstream.read(tmp_path / "a.jsonl", max_document=wrong)


@pytest.mark.parametrize("wrong", [None, 5])
def test_what_names_no_tokenizer_is_refused(wrong):
    with pytest.raises(RequestError, match=f"tokenizer {wrong} does not work: give a name"):
        millstream.tokenize(["a"], wrong)


def test_what_is_left_out_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join((line(n) if n % 3 else "bad") + "\n" for n in range(3000)))
    told = []
    documents = millstream.read(path, on_error="skip", on_fault=told.append)
    samples = millstream.pack(millstream.tokenize(documents), 64)
    assert samples.faults == []
    list(samples)
    assert (samples.left_out, len(samples.faults), len(told)) == (1000, 1000, 1000)
    assert documents.faults == samples.faults == told
    assert [fault.line for fault in told] == list(range(1, 3000, 3))
    assert {(fault.reason, fault.source) for fault in told} == {("invalid_json", "a.jsonl")}
    with pytest.raises(RequestError, match="on_error='skip'"):
        millstream.read(path, on_fault=told.append)


@pytest.mark.parametrize("taken", range(5))
def test_a_line_that_is_too_long_is_passed_over_once(tmp_path, taken):
    lines = [line(0), line(1), "x" * 3_000_000, line(2), "x" * 3_000_000, line(3)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))

    def stream(state=None):
        return millstream.read(path, on_error="skip", max_document=1000, state=state)

    first = stream()
    head = [next(first).id for _ in range(taken)]
    second = stream(json.loads(json.dumps(first.state())))
    assert head + [document.id for document in second] == ["d0", "d1", "d2", "d3"]
    assert [fault.line for fault in second.faults] == [3, 5][sum(at <= taken for at in (3, 4)) :]


@pytest.mark.parametrize("taken", [0, 1, 700, 1333])
def test_lines_of_faults_are_right_after_a_stop(tmp_path, taken):
    path = tmp_path / "a.jsonl"
    path.write_text("".join((line(n) if n % 3 else "bad") + "\n" for n in range(2000)) + "bad")
    first = millstream.read(path, on_error="skip")
    list(itertools.islice(first, taken))
    second = millstream.read(path, on_error="skip", state=first.state())
    list(second)
    assert second.faults[-1].line == 2001
    path.write_text(path.read_text().replace("bad", "", 1))
    stream = millstream.read(path)
    with pytest.raises(DataError, match="line 4"):
        list(stream)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids_that_exist_already(tmp_path, kind):
    rows = [{"ids": list(range(number % 7)), "id": str(number)} for number in range(40)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)

    def stream(state=None):
        return millstream.pack(millstream.read(path, ids_field="ids"), 8, state=state)

    assert [ids.tolist() for ids in millstream.read(path, ids_field="ids")] == [row["ids"] for row in rows]
    whole = list(stream())
    expected = list(millstream.pack([row["ids"] for row in rows], 8))
    assert [(values(item), item.segments) for item in whole] == [(values(item), item.segments) for item in expected]
    for taken in (0, 1, 9, len(whole)):
        first = stream()
        list(itertools.islice(first, taken))
        rest = list(stream(json.loads(json.dumps(first.state()))))
        assert [(values(item), item.segments) for item in rest] == [
            (values(item), item.segments) for item in whole[taken:]
        ]
    with pytest.raises(RequestError, match="ids already"):
        next(millstream.tokenize(millstream.read(path, ids_field="ids")))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations(tmp_path, kind):
    rows = [{"id": str(n), "prompt": f"What is {n}?", "completion": f" {n}, of course"} for n in range(12)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)

    def stream(state=None):
        return millstream.pack(millstream.tokenize(millstream.read(path, chat=True), chat=True), 8, state=state)

    def told(samples):
        return [(values(sample), sample.loss.tolist()) for sample in samples]

    assert list(millstream.read(path, chat=True)) == rows
    whole = told(stream())
    assert whole == told(millstream.pack(millstream.tokenize(rows, chat=True), 8))
    first = stream()
    list(itertools.islice(first, 5))
    assert told(stream(json.loads(json.dumps(first.state())))) == whole[5:]
    with pytest.raises(RequestError, match="exclude each other"):
        millstream.read(path, chat=True, ids_field="ids")


def test_a_row_that_is_no_conversation_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"id": "odd", "prompt": 5}\n')
    stream = millstream.tokenize(millstream.read(path, chat=True), chat=True)
    next(stream)
    with pytest.raises(DataError, match="document 'odd'"):
        next(stream)


def test_a_long_text_is_one_document(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * (33 << 18))
    assert len(next(millstream.read(path)).text) == 5 * (33 << 18) > 32 << 20
    with pytest.raises(DataError, match="max-document is 1,000"):
        next(millstream.read(path, max_document=1000))


# Run folders --------------------------------------------------------------------------------------------------------


def test_the_samples_of_a_run_folder(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(line(number) + "\n" for number in range(40)))
    millstream.pack_to(tmp_path / "packed", path, seq_len=8)
    millstream.pack_to(tmp_path / "other", path, seq_len=8, eos=True)
    dataset = millstream.open(tmp_path / "packed")
    whole = [values(sample) for sample in [*dataset, dataset.remainder]]
    assert [values(sample) for sample in streams.samples(tmp_path / "packed")] == whole
    for taken in (0, 1, len(dataset), len(dataset) + 1):
        first = streams.samples(dataset)
        list(itertools.islice(first, taken))
        again = streams.samples(tmp_path / "packed", state=json.loads(json.dumps(first.state())))
        assert [values(sample) for sample in pickle.loads(pickle.dumps(again))] == whole[taken:]
    with pytest.raises(ResumeRefused, match="another samples: fingerprint was"):
        streams.samples(tmp_path / "other", state=first.state())


RUNS = {
    "samples": streams.samples,
    "repeat": lambda folder, *, state=None: streams.repeat(lambda: streams.samples(folder), 2, state=state),
    "shuffle": lambda folder, *, state=None: streams.shuffle(streams.samples(folder), 64, 7, state=state),
}


def mapped_of(folder):
    """Bytes of a folder's files that are here because this process looked at them, for which it called no read."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f" {folder}/" in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture(scope="module")
def run_of_20_mb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.jsonl").write_text((json.dumps({"text": "word " * 20_000}) + "\n") * 500)
    millstream.pack_to(folder / "packed", folder / "a.jsonl", seq_len=2048, workers=1, shard_size=4 << 20)
    return folder / "packed"


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="only Linux counts what a process reads")
@pytest.mark.parametrize("name", RUNS)
def test_going_on_in_a_run_folder_reads_little(run_of_20_mb, name):
    """Of 20 MB behind which the place is nothing but what says where it is."""
    assert sum(path.stat().st_size for path in run_of_20_mb.glob("samples-*")) > 19_000_000
    made = RUNS[name]
    stream = made(run_of_20_mb)
    count = len(millstream.open(run_of_20_mb)) * (2 if name == "repeat" else 1)
    assert all(sample.token_ids.max() for sample in itertools.islice(stream, count - 100))
    assert mapped_of(run_of_20_mb) > 10_000_000
    state = stream.state()
    del stream
    assert mapped_of(run_of_20_mb) == 0
    again = made(run_of_20_mb, state=state)
    assert read_by(lambda: values(next(again))) + mapped_of(run_of_20_mb) < 3_000_000


def test_a_state_of_now_can_be_asked_for_later(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(line(number) + "\n" for number in range(40)))
    stream = PIPELINES["again"](path)
    later, now = [stream.later()], [stream.state()]
    for _ in stream:
        later.append(stream.later())
        now.append(stream.state())
    assert [each() for each in later] == now
