"""Input that cannot be used: the run says where it is, loses nothing else, and goes on once it is mended."""

import contextlib
import gzip
import json
import os
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers import (
    MILLSTREAM,
    TEXTS,
    cli,
    document_ids,
    faults,
    gpt2_ids,
    jsonl,
    pack,
    read_little,
    rows,
    run_bytes,
    small_disk,
    stream,
    whole,
    without_fsync,
    write,
    write_jsonl,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import PATIENCE

import millstream
from millstream.corpus.documents import Fields, decode
from millstream.errors import DataError, RequestError, RunError
from millstream.folder.journal import Journal
from millstream.records import Slice

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

SMALL = {"seq_len": 16, "shard_size": 96}  # shards of three samples: something is sealed before the bad line

BAD_LINES = {
    "cut": (b'{"id": "bad", "text": "cut', "invalid_json", None),
    "no json": (b"just some words", "invalid_json", None),
    "a list": (b'["text", "x"]', "invalid_json", None),
    "a string": (b'"only words"', "invalid_json", None),
    "two values": (b'{"text": "a"} {"text": "b"}', "invalid_json", None),
    "deep": (b'{"text": ' + b"[" * 100_000, "invalid_json", None),
    "nothing": (b"{}", "missing_field", None),
    "no text": (b'{"id": "bad", "body": "x"}', "missing_field", "bad"),
    "null": (b'{"id": "bad", "text": null}', "missing_field", "bad"),
    "number": (b'{"id": "bad", "text": 5}', "not_text", "bad"),
    "list": (b'{"id": "bad", "text": ["x"]}', "not_text", "bad"),
    "nan": (b'{"id": "bad", "text": NaN}', "not_text", "bad"),
    "huge number": (b'{"id": "bad", "text": ' + b"7" * 5000 + b"}", None, None),
    "latin-1": ('{"id": "bad", "text": "caf\u00e9"}'.encode("latin-1"), "invalid_utf8", None),
    "utf-16": ('{"text": "x"}'.encode("utf-16-le"), None, None),
    "raw surrogate": (b'{"text": "\xed\xa0\x80"}', "invalid_utf8", None),
    "surrogate": (b'{"id": "bad", "text": "a \\ud800 b"}', "lone_surrogate", "bad"),
    "surrogates turned": (b'{"id": "bad", "text": "\\udc00\\ud800"}', "lone_surrogate", "bad"),
    "surrogate in a key": (b'{"id": "bad", "\\ud800": 1}', "missing_field", "bad"),
    "too long": (b'{"id": "bad", "text": "' + b"x" * 200_000 + b'"}', "too_long", None),
}
MAX = {"max_document": 150_000}


def corpus_with(path, bad):
    """Fifteen good documents, the bad line as line 8 (the file's seventh and eighth lines are blank and bad)."""
    items = [*rows(TEXTS), b"", bad, *[{"id": f"e{n}", "text": text} for n, text in enumerate(TEXTS)]]
    return write_jsonl(path, items)


BEFORE = len(TEXTS)  # documents before the bad one; it stands on line BEFORE + 2


@pytest.mark.parametrize("case", BAD_LINES)
def test_stop_at_a_bad_line_and_go_on_once_it_is_mended(tmp_path, monkeypatch, case):
    read_little(monkeypatch, 100)
    bad, _, name = BAD_LINES[case]
    corpus = corpus_with(tmp_path / "corpus.jsonl", bad)
    with pytest.raises(DataError, match=rf"corpus\.jsonl, line {BEFORE + 2}\b") as stopped:
        pack(tmp_path / "out", corpus, **SMALL, **MAX, block=100)
    monkeypatch.undo()
    assert "run the same command again" in str(stopped.value)
    assert "on_error='skip'" in str(stopped.value)
    assert len(str(stopped.value)) < 1000, "a message for a person"
    if name:
        assert name in str(stopped.value)
    sealed = len(list((tmp_path / "out").glob("samples-*.npy")))
    assert sealed > 0, "what came before the bad line is on disk"

    corpus_with(corpus, b'{"id": "mended", "text": "mended"}')
    report = pack(tmp_path / "out", corpus, **SMALL, **MAX)
    assert report.resumed
    assert whole(tmp_path / "out")
    pack(tmp_path / "at once", corpus, **SMALL, **MAX)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "at once")
    assert stream(tmp_path / "out") == gpt2_ids([*TEXTS, "mended", *TEXTS])


@pytest.mark.parametrize("case", BAD_LINES)
def test_skip_a_bad_line(tmp_path, case):
    bad, reason, name = BAD_LINES[case]
    corpus = corpus_with(tmp_path / "corpus.jsonl", bad)
    report = pack(tmp_path / "out", corpus, **SMALL, **MAX, on_error="skip")
    [fault] = faults(tmp_path / "out")
    assert fault["ordinal"] == BEFORE
    assert (fault["source"], fault["line"]) == ("corpus.jsonl", BEFORE + 2)
    assert fault["offset"] == corpus.read_bytes().index(bad)
    assert fault["id"] == name
    assert 0 < len(fault["message"]) < 500
    if reason:
        assert fault["reason"] == reason
    assert report.faults == 1
    assert report.ledger["faults"] == {fault["reason"]: 1}
    assert report.ledger["documents"]["in"] == 2 * len(TEXTS) + 1
    assert stream(tmp_path / "out") == gpt2_ids([*TEXTS, *TEXTS])
    assert whole(tmp_path / "out")


def test_a_huge_number_as_id_is_no_crash(tmp_path):
    """Python refuses to write or read integers of more than 4,300 digits."""
    lines = [b'{"id": %s, "text": "one"}' % (b"7" * 5000), b'{"id": %s, "text": NaN}' % (b"7" * 5000)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*lines, {"text": "two"}])
    report = pack(tmp_path / "out", corpus, seq_len=4, on_error="skip")
    assert report.ledger["documents"]["in"] == 3
    assert stream(tmp_path / "out")[-1:] == gpt2_ids(["two"])
    assert whole(tmp_path / "out")


def test_ids_that_are_no_text(tmp_path):
    values = ["7", "-7", "1.5", "true", '["x"]', '"\\ud800"', '"caf\u00e9"', "123456789012345678901234567890"]
    lines = [f'{{"id": {value}, "text": "x"}}'.encode() for value in values]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", lines)
    pack(tmp_path / "out", corpus, seq_len=4)
    names = document_ids(tmp_path / "out")
    assert names[:3] == ["7", "-7", "1.5"]
    assert names[5:] == ["\\ud800", "caf\u00e9", "123456789012345678901234567890"]
    assert len(set(names)) == len(values)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("5", "not_ids"),
        ('"5"', "not_ids"),
        ("[1.0]", "not_ids"),
        ("[1e3]", "not_ids"),
        ("[true]", "not_ids"),
        ("[[1]]", "not_ids"),
        ("null", "missing_field"),
        ("[-1]", "id_range"),
        ("[4294967296]", "id_range"),
        ("[99999999999999999999999]", "id_range"),
    ],
)
def test_bad_token_ids(tmp_path, value, reason):
    lines = [b'{"ids": [1, 2]}', f'{{"ids": {value}}}'.encode(), b'{"ids": [3]}']
    corpus = write_jsonl(tmp_path / "corpus.jsonl", lines)
    report = pack(tmp_path / "out", corpus, tokenizer=None, ids_field="ids", seq_len=2, on_error="skip")
    assert report.ledger["faults"] == {reason: 1}
    assert stream(tmp_path / "out") == [1, 2, 3]


# --- the place of a fault --------------------------------------------------


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
@pytest.mark.parametrize("block", [1, 90, 700, 1 << 20])
def test_every_fault_has_its_own_line(tmp_path, monkeypatch, name, block):
    """Whatever lies around it: lines that are too long, blank ones, and the borders of blocks."""
    lines, wanted = [], []
    for number in range(1, 61):
        if number % 7 == 3:
            lines.append(b"bad")
        elif number % 11 == 5:
            lines.append(b'{"text": "%s"}' % (b"y" * 500))
        elif number % 5 == 0:
            lines.append(b"")
        else:
            lines.append(b'{"text": "good"}')
        if number % 7 == 3 or number % 11 == 5:
            wanted.append((number, sum(len(line) + 1 for line in lines[:-1])))
    read_little(monkeypatch, block)
    write_jsonl(tmp_path / name, lines)
    given = {"seq_len": 4, "max_document": 400, "on_error": "skip", "block": block}
    pack(tmp_path / "out", tmp_path / name, **given)
    assert [(fault["line"], fault["offset"]) for fault in faults(tmp_path / "out")] == wanted
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_lines_are_counted_in_each_file_for_itself(tmp_path, monkeypatch, block):
    """Two files of the same name in different folders are two files."""
    read_little(monkeypatch, block)
    paths = []
    for folder, place in (("a", 9), ("b", 4), ("c", 2)):
        lines = [b'{"text": "good"}'] * 12
        lines[place - 1] = b"bad"
        paths.append(write_jsonl(tmp_path / folder / "same.jsonl", lines))
    pack(tmp_path / "out", paths, seq_len=4, on_error="skip", block=block)
    assert [fault["line"] for fault in faults(tmp_path / "out")] == [9, 4, 2]


def test_lines_are_counted_on_after_a_resume(tmp_path, monkeypatch):
    read_little(monkeypatch, 200)
    good = [{"text": f"document number {n} with some words in it"} for n in range(40)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*good[:30], b"bad", *good[30:], b"worse"])
    with pytest.raises(DataError, match="line 31"):
        pack(tmp_path / "out", corpus, **SMALL, block=200)
    report = pack(tmp_path / "out", corpus, **SMALL, block=200, on_error="skip")
    assert report.resumed
    assert [fault["line"] for fault in faults(tmp_path / "out")] == [31, 42]
    pack(tmp_path / "at once", corpus, **SMALL, on_error="skip")
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "at once")


# --- files -----------------------------------------------------------------


def packed_corpus(path, keep=1.0, items=400):
    """A compressed corpus, of which the first part is left; and its documents' texts."""
    # Texts that hardly compress, so that a cut in the middle leaves documents in front of it.
    texts = [f"{n} {n * 7919 % 100_003} {n * n * 104_729 % 1_000_003}" for n in range(items)]
    lines = [jsonl([row]) for row in rows(texts)]
    # In parts, since a decoder hands out what it has by the part.
    parts = [b"".join(lines[start : start + 100]) for start in range(0, items, 100)]
    whole_file = b"".join(map(gzip.compress if path.suffix == ".gz" else zstandard.compress, parts))
    path.write_bytes(whole_file[: int(len(whole_file) * keep)])
    return texts


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "corpus.jsonl.zst"])
def test_a_truncated_file(tmp_path, monkeypatch, name):
    """Everything before the cut is kept; the rest is one fault, at the line after the last whole one."""
    read_little(monkeypatch, 5000)
    texts = packed_corpus(tmp_path / name, keep=0.5, items=4000)
    given = {"seq_len": 64, "shard_size": 5000, "block": 5000}
    with pytest.raises(DataError, match=rf"{name}, line \d+.*ends early") as stopped:
        pack(tmp_path / "out", tmp_path / name, **given)
    assert list((tmp_path / "out").glob("samples-*.npy")), "what came before is on disk"

    report = pack(tmp_path / "skipped", tmp_path / name, **given, on_error="skip")
    assert report.ledger["faults"] == {"truncated": 1}
    kept = report.ledger["documents"]["in"] - 1
    assert 500 < kept < len(texts)
    assert stream(tmp_path / "skipped") == gpt2_ids(texts[:kept])
    [fault] = faults(tmp_path / "skipped")
    assert fault["line"] == kept + 1
    assert f"line {kept + 1}:" in str(stopped.value)
    assert whole(tmp_path / "skipped")

    packed_corpus(tmp_path / name, items=4000)
    report = pack(tmp_path / "out", tmp_path / name, **given)
    assert report.resumed
    assert report.ledger["documents"]["in"] == len(texts)
    pack(tmp_path / "at once", tmp_path / name, **given)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "at once")


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "corpus.jsonl.zst", "corpus.txt.gz", "corpus.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "cut in the end", "turned", "not packed at all", "header only"])
def test_a_damaged_file_is_a_fault_and_the_next_file_is_read(tmp_path, name, damage):
    path = tmp_path / name
    packed_corpus(path)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "cut in the end": data[:-3],
            "turned": data[:middle] + data[middle + 1 :: -1],
            "not packed at all": b'{"text": "x"}\n',
            "header only": data[:5],
        }[damage]
    )
    (tmp_path / "next.txt").write_text("the next file")
    sources = [path, tmp_path / "next.txt"]
    with pytest.raises(DataError, match=rf"{name}.*(ends early|damaged)"):
        pack(tmp_path / "out", sources, seq_len=32)
    report = pack(tmp_path / "out", sources, seq_len=32, on_error="skip")
    assert report.ledger["faults"] == {"truncated": 1}
    assert document_ids(tmp_path / "out")[-1] == "next.txt"
    last = gpt2_ids(["the next file"])
    assert stream(tmp_path / "out")[-len(last) :] == last
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_cannot_be_opened(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.txt").write_text("before ")
    (folder / "z.txt").write_text("after")
    (folder / name).symlink_to(folder / "not there")
    with pytest.raises(DataError, match=rf"data/{name}.*cannot be read: No such file"):
        pack(tmp_path / "out", folder, seq_len=4)

    report = pack(tmp_path / "skipped", folder, seq_len=4, on_error="skip")
    assert report.ledger["faults"] == {"unreadable": 1}
    assert stream(tmp_path / "skipped") == gpt2_ids(["before ", "after"])
    assert whole(tmp_path / "skipped")

    (folder / name).unlink()
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["mended"]}), folder / name)
    else:
        write(folder / name, b"mended" if name == "a.txt" else b'{"text": "mended"}\n')
    report = pack(tmp_path / "out", folder, seq_len=4)
    assert report.resumed
    assert stream(tmp_path / "out") == gpt2_ids(["before ", "mended", "after"])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(TEXTS)).chmod(0)
    with pytest.raises(DataError, match=r"a\.jsonl.*Permission denied"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", seq_len=4)


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xed\xa0\x80", b"ok \xf0\x9f"])
@pytest.mark.parametrize("long", [False, True])
def test_plain_text_that_is_not_utf8(tmp_path, monkeypatch, data, long):
    if long:
        monkeypatch.setattr("millstream.corpus.texts.LONG_TEXT", 500)
        read_little(monkeypatch, 200)
        data = b"words and words " * 100 + data
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("good")
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(DataError, match=r"a\.txt: not valid UTF-8.*byte"):
        pack(tmp_path / "out", sources, seq_len=4, block=200)
    report = pack(tmp_path / "out", sources, seq_len=4, block=200, on_error="skip")
    assert report.ledger["faults"] == {"invalid_utf8": 1}
    assert stream(tmp_path / "out") == gpt2_ids(["good"])
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_document_that_is_too_long(tmp_path, name):
    texts = ["short one", "long " * 1000, "short two"]
    if name.startswith("a.txt"):
        sources = [write(tmp_path / f"{n}{name}", text.encode()) for n, text in enumerate(texts)]
    elif name == "a.parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
        sources = [tmp_path / name]
    else:
        sources = [write_jsonl(tmp_path / name, rows(texts))]
    given = {"seq_len": 4, "max_document": 2000}
    with pytest.raises(DataError, match=r"5,0\d\d bytes.*max-document is 2,000"):
        pack(tmp_path / "out", sources, **given)
    report = pack(tmp_path / "skipped", sources, **given, on_error="skip")
    assert report.ledger["faults"] == {"too_long": 1}
    assert stream(tmp_path / "skipped") == gpt2_ids([texts[0], texts[2]])
    assert whole(tmp_path / "skipped")
    report = pack(tmp_path / "longer", sources, seq_len=4, max_document=6000)
    assert report.faults == 0


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_max_document_is_exact(tmp_path, monkeypatch, form):
    """A document of exactly --max-document bytes (a line without its end, a text in Parquet) still goes."""
    lines = [b'{"text": "%s"}' % (b"x" * n) for n in (88, 89, 90)]
    assert len(lines[1]) == 101
    if form == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        limit = 101
    else:
        pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in lines]}), tmp_path / "a.parquet")
        limit = 89
    for block in (1, 1 << 20):
        read_little(monkeypatch, block)
        out = tmp_path / str(block)
        pack(out, tmp_path / f"a.{form}", seq_len=4, max_document=limit, on_error="skip", block=block)
        assert [fault["ordinal"] for fault in faults(out)] == [2]


def test_bad_rows_of_parquet(tmp_path):
    column = pa.array([b"good", None, b"caf\xe9", b"", b"end"], pa.binary())
    text = pa.StringArray.from_buffers(5, column.buffers()[1], column.buffers()[2], column.buffers()[0])
    pq.write_table(pa.table({"id": [1, 2, 3, 4, 5], "text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, .*1.*null"):
        pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=4)
    report = pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=4, on_error="skip")
    assert report.ledger["faults"] == {"invalid_utf8": 1, "missing_field": 1}
    assert [(fault["offset"], fault["reason"]) for fault in faults(tmp_path / "out")] == [
        (1, "missing_field"),
        (2, "invalid_utf8"),
    ]
    assert stream(tmp_path / "out") == gpt2_ids(["good", "end"])
    assert document_ids(tmp_path / "out") == ["1", "4", "5"]
    assert whole(tmp_path / "out")


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"a\.parquet has no column 'text'; it has body, n: .* text_field"):
        pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=4, on_error="skip")
    assert not (tmp_path / "out").exists()
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    report = pack(tmp_path / "b", tmp_path / "b.parquet", seq_len=4, on_error="skip")
    assert report.ledger["faults"] == {"not_text": 2}


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "middle"])
def test_damaged_parquet(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {n} {n * 7919}" for n in range(3000)]}), path, row_group_size=1000)
    data = path.read_bytes()
    middle = len(data) // 3
    path.write_bytes(
        {
            "empty": b"",
            "text": b"no parquet at all, just words",
            "cut": data[:-100],
            "middle": data[:middle] + b"\xff" * 300 + data[middle + 300 :],
        }[damage]
    )
    (tmp_path / "b.txt").write_text("good")
    sources = [path, tmp_path / "b.txt"]
    with pytest.raises(DataError, match=r"a\.parquet"):
        pack(tmp_path / "out", sources, seq_len=4)
    report = pack(tmp_path / "out", sources, seq_len=4, on_error="skip")
    assert report.faults == 1
    assert document_ids(tmp_path / "out")[-1] == "b.txt"
    assert whole(tmp_path / "out")


def test_plain_text_has_no_token_ids(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"a\.txt: plain text has no token ids"):
        pack(tmp_path / "out", tmp_path / "a.txt", tokenizer=None, ids_field="ids", seq_len=4)


def test_many_faults_of_all_kinds_with_a_stop_in_between(tmp_path, monkeypatch):
    """What `stop` stops at first, `skip` then leaves out: the folder is the one of a single run."""
    read_little(monkeypatch, 300)
    items = []
    for number, (bad, *_) in enumerate(BAD_LINES.values()):
        items += [{"id": f"g{number}", "text": TEXTS[number % len(TEXTS)]}, bad]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", items)
    given = {**SMALL, **MAX, "eos": True, "validation": 0.3}
    with pytest.raises(DataError, match="line 2"):
        pack(tmp_path / "out", corpus, **given, block=300)
    report = pack(tmp_path / "out", corpus, **given, block=300, on_error="skip")
    assert report.faults == len(BAD_LINES)
    assert [fault["line"] for fault in faults(tmp_path / "out")] == list(range(2, 2 * len(BAD_LINES) + 1, 2))
    assert whole(tmp_path / "out")
    pack(tmp_path / "at once", corpus, **given, on_error="skip")
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "at once")


# --- nothing in it ---------------------------------------------------------

EMPTY = {
    "empty.jsonl": (b"", 0),
    "blank.jsonl": (b"\n\n  \n\t\r\n", 0),
    "documents.jsonl": (b'{"text": ""}\n{"text": "", "id": "x"}\n', 2),
    "empty.jsonl.gz": (b"", 0),
    "empty.jsonl.zst": (b"", 0),
    "empty.txt": (b"", 1),
    "bom.txt": (b"\xef\xbb\xbf", 1),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize(
    "given",
    [{}, {"format": "parquet"}, {"strategy": "split"}, {"remainder": "pad"}, {"bos": True, "validation": 0.5}],
    ids=["npy", "parquet", "split", "pad", "specials"],
)
def test_an_empty_corpus_is_an_empty_result(tmp_path, name, given):
    data, documents = EMPTY[name]
    corpus = write(tmp_path / name, data)
    report = pack(tmp_path / "out", corpus, **{"seq_len": 8, "eos": True, **given})
    assert report.complete
    assert (report.samples, report.faults) == (0, 0)
    told = {name: count for name, count in report.ledger["documents"].items() if count}
    assert told == ({"in": documents, "empty": documents} if documents else {})
    assert report.ledger["ids"]["in"] == 0
    assert whole(tmp_path / "out")
    dataset = millstream.open(tmp_path / "out")
    assert len(dataset) == 0
    assert list(dataset) == []
    assert dataset.remainder is None
    assert len(document_ids(tmp_path / "out")) + len(document_ids(tmp_path / "out", "validation")) == documents
    assert pack(tmp_path / "out", corpus, **{"seq_len": 8, "eos": True, **given}).already


def test_an_empty_parquet_file_and_an_empty_pipe(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    report = pack(tmp_path / "out", tmp_path / "a.parquet", seq_len=8)
    assert report.ledger["documents"]["in"] == 0
    assert whole(tmp_path / "out")
    done = cli("pack", "-", "--out", tmp_path / "piped", stdin=b"")
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path / "piped")
    done = cli("show", tmp_path / "piped")
    assert done.returncode == 2
    assert "no samples" in done.stderr


# --- settings and folders --------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seq_len": 0}, "seq_len=0.*at least one id"),
        ({"seq_len": -3}, "seq_len=-3"),
        ({"tokenizer": "gpt5"}, "unknown tokenizer 'gpt5': give gpt2"),
        ({"strategy": "best"}, "strategy='best'.*concat or split"),
        ({"remainder": "burn"}, "remainder='burn'.*keep or drop or pad"),
        ({"format": "csv"}, "format='csv'.*npy, parquet"),
        ({"on_error": "cry"}, "on_error='cry'.*stop or skip"),
        ({"engine": "warp"}, "engine='warp'"),
        ({"pad_side": "top"}, "pad_side='top'"),
        ({"validation": 1.0}, "validation=1.0.*fraction"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"validation": float("nan")}, "validation=nan"),
        ({"limit": -1}, "limit=-1"),
        ({"workers": 0}, "workers=0.*at least 1"),
        ({"shard_size": 0}, "shard_size=0.*size"),
        ({"max_document": 0}, "max_document=0"),
        ({"id_field": "text"}, "id_field='text'"),
        ({"memory": 1 << 20}, "memory=1 << 20 is too little"),
        ({"workers": 500}, "workers=500.*Give memory"),
        ({"pad_id": -1, "remainder": "pad"}, "pad_id=-1.*0 to 50,256"),
        ({"pad_id": 50257, "remainder": "pad"}, "pad_id=50257"),
        ({"eos_token": "</s>"}, "no token '</s>'.*endoftext"),
        ({"tokenizer": None, "ids_field": "ids", "eos": True}, "eos.*tokenizer"),
        ({"tokenizer": None, "ids_field": "ids", "remainder": "pad"}, "pad_id"),
        ({"tokenizer": None, "ids_field": "ids", "strategy": "split"}, "pad_id"),
    ],
)
def test_settings_that_do_not_work(tmp_path, given, message):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    with pytest.raises(RequestError, match=message):
        pack(tmp_path / "out", corpus, **given)
    assert not (tmp_path / "out").exists()


OF_OTHERS = [(name, b'{"name": "my app"}') for name in ("manifest.json", "run.json", "journal.jsonl")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, overwrite):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    for name, content in (("notes.txt", b"mine"), *OF_OTHERS):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "samples-00000.npy").write_bytes(b"mine as well")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(RequestError, match="millstream"):
            pack(folder, corpus, seq_len=8, overwrite=overwrite)
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name: after.get(name) for name in before} == before


def test_out_that_is_a_file(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    before = corpus.read_bytes()
    for out in (corpus, corpus / "below"):
        with pytest.raises(RequestError, match=r"a\.jsonl.*folder"):
            pack(out, corpus, seq_len=8, overwrite=True)
    assert corpus.read_bytes() == before


def test_a_damaged_manifest_is_said_to_be_damaged_and_can_be_overwritten(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    pack(tmp_path / "out", corpus, seq_len=8)
    good = run_bytes(tmp_path / "out")
    for damaged in (good["manifest.json"][:-30], good["manifest.json"].replace(b'"seq_len": 8', b'"seq_len": 9')):
        (tmp_path / "out" / "manifest.json").write_bytes(damaged)
        with pytest.raises(RunError, match=r"manifest\.json is damaged"):
            pack(tmp_path / "out", corpus, seq_len=8)
        pack(tmp_path / "out", corpus, seq_len=8, overwrite=True)
        assert run_bytes(tmp_path / "out") == good


def test_a_second_run_on_the_same_folder_at_the_same_time(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    command = [*MILLSTREAM, "pack", str(corpus), "--out", str(tmp_path / "out"), "--seq-len", "8"]
    seen = []

    def meanwhile(_):
        if not seen:
            for extra in ([], ["--overwrite"]):
                seen.append(subprocess.run([*command, *extra], capture_output=True, text=True, timeout=PATIENCE))

    report = pack(tmp_path / "out", corpus, seq_len=8, on_progress=meanwhile)
    assert len(seen) == 2
    for second in seen:
        assert second.returncode == 2
        assert "another millstream is writing" in second.stderr
        assert "Traceback" not in second.stderr
    assert report.complete
    assert whole(tmp_path / "out")


def test_the_lock_ends_with_the_run(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [b"bad"])
    (tmp_path / "out").mkdir()
    with contextlib.closing(Journal(str(tmp_path / "out"))), pytest.raises(RequestError, match="another millstream"):
        pack(tmp_path / "out", corpus, seq_len=8)
    for _ in range(2):
        with pytest.raises(DataError):
            pack(tmp_path / "out", corpus, seq_len=8)


# --- a full disk -----------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.parametrize("given", [{}, {"format": "parquet"}, {"strategy": "split"}], ids=["npy", "parquet", "split"])
@pytest.mark.parametrize("shard", ["20kB", "64MB"])
def test_a_full_disk(tmp_path, disk, given, shard):
    folder, enlarge = disk
    numbers = [[(n * 7919 + i * i * 31) % 4_000_000 for i in range(200)] for n in range(600)]
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"ids": ids} for ids in numbers])
    flags = ["--ids-field", "ids", "--seq-len", 64, "--shard-size", shard, "--pad-id", 0]
    flags += [part for key, value in given.items() for part in (f"--{key}", value)]
    done = cli("pack", corpus, "--out", folder / "out", *flags)
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "run the same command again" in done.stderr
    again = cli("pack", corpus, "--out", folder / "out", *flags)
    assert again.returncode == 1
    assert "no space left" in again.stderr
    enlarge()
    done = cli("pack", corpus, "--out", folder / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert whole(folder / "out")
    assert cli("pack", corpus, "--out", tmp_path / "at once", *flags).returncode == 0
    assert run_bytes(folder / "out") == run_bytes(tmp_path / "at once")


def test_a_disk_that_is_full_from_the_start(tmp_path, disk):
    folder, enlarge = disk
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(RunError, match="no space left"):
        pack(folder / "out", corpus, seq_len=8)
    enlarge()
    pack(folder / "out", corpus, seq_len=8)
    assert whole(folder / "out")


# --- all lines at once equals line by line ---------------------------------

LINES = st.sampled_from(
    [
        b'{"text": "one", "id": "a"}',
        b'{"text": "two"}',
        b'{"id": 7, "text": "an integer id"}',
        b'{"id": null, "text": ""}',
        b'{"id": 1.5, "text": "x"}',
        b'{"id": true, "text": "x"}',
        b'{"text": "twice", "text": "the last one counts"}',
        b'{"text": "escapes \\u00e9 \\n \\ud83d\\ude42"}',
        '{"text": "\u6c34\u8f66 \U0001f642 \u2028 \x85"}'.encode(),
        b'{"x": {"text": 1}, "text": "nested", "y": [{}, {"id": 2}]}',
        b' {"text": "blank before"}',
        b'{"text": "blank after"} ',
        b'{"text": "crlf"}\r',
        b'{"text": "two returns"}\r\r',
        b'\xef\xbb\xbf{"text": "bom"}',
        b"",
        b"   ",
        b"\r",
        b"\x0c",
        b"}",
        b"{",
        b"{}",
        b'{"text": NaN}',
        b'{"text": "with NaN", "x": NaN}',
        b'{"text": "with Infinity", "x": -Infinity}',
        b'{"text": "a"}{"text": "b"}',
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "over',
        b'two lines"}',
        b'{"text":',
        b'"over two lines"}',
        b'{"text": "x", "y": [{}',
        b',{}], "id": 1}',
        b'{"text": "comma",}',
        b'{"text": "half \\ud800"}',
        b'{"text": "x", "id": "\\udfff"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "x", "unread": "caf\xe9"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "nul \\u0000"}',
        b'{"text": "raw \x00 nul"}',
        b'{"text": "raw \t tab"}',
        b'{"text": 5}',
        b'{"text": null, "id": "none"}',
        b'{"text": [1, 2], "ids": [1]}',
        b'{"text": "%s"}' % (b"long " * 30),
        b'{"ids": [1, 2, 3]}',
        b'{"ids": []}',
        b'{"ids": [-1]}',
        b'{"ids": [1.0]}',
        b'{"ids": [true], "id": 3}',
        b'{"ids": [99999999999999999999999999]}',
        b'{"ids": [70000]}',
        b"[]",
        b"null",
        b"5",
    ]
)


def flat(batches):
    """Batches put together as a run does it: documents and faults numbered on, lines counted on."""
    documents, bad, count, lines = [], [], 0, 0
    for batch in batches:
        contents = batch.texts or [ids.tolist() for ids in batch.ids]
        positions = [count + position for position in batch.position]
        documents += zip(contents, batch.doc_ids, positions, batch.source, batch.offset, strict=True)
        bad += [fault._replace(ordinal=fault.ordinal + count, line=fault.line + lines) for fault in batch.faults]
        count += batch.count
        lines += sum(number for _, number in batch.lines)
    return documents, bad, count, lines


def decoded(data, cuts, fields):
    pieces = [
        Slice(0, "a.jsonl", "a.jsonl", "jsonl", start, stop, data[start:stop])
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)
        if stop > start
    ]
    return flat([decode((piece,), fields, 100) for piece in pieces])


@pytest.mark.parametrize("fields", [Fields(), Fields(ids="ids", max_id=65535)], ids=["text", "ids"])
@settings(max_examples=400, deadline=None)
@given(lines=st.lists(LINES, max_size=12), ended=st.booleans(), good=st.booleans())
@example([b'{"text": "a"}{"text": "b"}', b""], True, False)
@example([b'{"text": "a"}', b'{"text":', b'"b"}{"text": "c"}'], False, False)
def test_all_lines_at_once_equals_line_by_line(fields, lines, ended, good):
    if good:  # a batch that the fast path takes, where random lines nearly never are one
        start = b'{"ids"' if fields.ids else b'{"text": "'
        lines = [line for line in lines if line.startswith(start) and line.strip().endswith(b"}")]
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    cuts = [place + 1 for place in range(len(data) - 1) if data[place] == ord("\n")]
    assert decoded(data, [], fields) == decoded(data, cuts, fields)


def test_the_comparison_above_meets_both_paths(monkeypatch):
    from millstream.corpus import documents

    slow = []
    one = documents._one_line
    monkeypatch.setattr(documents, "_one_line", lambda *args: slow.append(args) or one(*args))
    good = b'{"text": "one"}\n{"text": "two"}\n'
    assert len(decoded(good, [], Fields())[0]) == 2
    assert slow == []
    assert len(decoded(good + b'{"text": "x", "y": NaN}\n', [], Fields())[0]) == 3
    assert len(slow) == 3
