"""Documents that an engine cannot encode: one of them stops no run that could go on."""

import base64
import json
import struct

import pytest
from chats import write_tokenizer
from helpers import (
    TEXTS,
    cli,
    faults,
    gpt2_ids,
    pack,
    read_little,
    rows,
    run_here,
    stream,
    whole,
    without_fsync,
    write_jsonl,
)
from runs import events
from tokenizers import Tokenizer, models, pre_tokenizers

import millstream
from millstream.engines.ordered import map_ordered
from millstream.errors import DataError, MillstreamError, RequestError, ResumeRefused, RunError, Unusable, WorkerDied
from millstream.runs.plan.plan import make_plan
from millstream.stream.encoders import Fastokens
from millstream.stream.tokenizers import load_tokenizer

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

BLANKS = "a" + " " * 999_999 + "b"
"""tiktoken's regex runs out of its stack on it; the fast engine does not."""

WORDS = {"the": 0, "mill": 1, "stands": 2}


def without_unknown(kind):
    """A tokenizer that knows three words, and has no token for any other."""
    made = {
        "WordPiece": lambda: models.WordPiece(WORDS, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(WORDS, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram(
            [*((word, -1.0) for word in WORDS), *((c, -9.0) for c in "themilsand")], None, False
        ),
    }
    tokenizer = Tokenizer(made[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return json.loads(tokenizer.to_str())


def panics(trie):
    """A tokenizer whose normalizer has a table of `trie` bytes: letters beyond it make Rust panic."""
    made = without_unknown("WordLevel")
    made["model"]["unk_token"] = "the"
    table = base64.b64encode(struct.pack("<I", trie) + bytes(trie)).decode() if trie else ""
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    return made


def write_definition(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


KNOWN = ["the mill", "stands", "the mill stands"]
UNKNOWN = ["the mill", "", "the wheel é", "stands"]
SHAPES = {
    **{kind: without_unknown(kind) for kind in ("WordPiece", "WordLevel", "Unigram")},
    "panic": panics(128 * 4),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


@each_shape
@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_no_engine_encodes_is_a_fault(tmp_path, shape, workers):
    tokenizer = write_definition(tmp_path / "tok", SHAPES[shape])
    corpus = write_jsonl(tmp_path / "a.jsonl", [*rows(KNOWN), b"", *rows(UNKNOWN), b"[]"])
    given = {"tokenizer": tokenizer, "seq_len": 2, "workers": workers}
    with pytest.raises(
        DataError, match=r"(?s)a\.jsonl, line 7 \(id 'd2'\): tokenizers cannot encode it: .*on_error='skip'"
    ):
        pack(tmp_path / "out", corpus, **given)
    report = pack(tmp_path / "out", corpus, **given, on_error="skip")
    assert [(fault["reason"], fault["line"]) for fault in faults(tmp_path / "out")] == [
        ("tokenizer", 7),
        ("invalid_json", 9),
    ]
    assert report.ledger["documents"] == {**report.ledger["documents"], "in": 8, "empty": 1, "faulty": 2}
    assert report.ledger["faults"] == {"invalid_json": 1, "tokenizer": 1}
    assert stream(tmp_path / "out") == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert whole(tmp_path / "out")


def test_a_panic_is_told_without_a_traceback(tmp_path):
    tokenizer = write_definition(tmp_path / "tok", SHAPES["panic"])
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(UNKNOWN))
    done = cli("pack", corpus, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--workers", 2)
    assert done.returncode == 1
    assert "line 3 (id 'd2'): tokenizers cannot encode it: index out of bounds" in done.stderr


def test_a_panic_while_a_tokenizer_is_loaded(tmp_path):
    with pytest.raises(RequestError, match=r"tok is no tokenizer\.json that can be read: .*precompiled_charsmap"):
        load_tokenizer(write_definition(tmp_path / "tok", panics(0)))


@each_shape
def test_streams_hand_out_what_came_before_and_name_the_document(tmp_path, shape):
    tokenizer = write_definition(tmp_path / "tok", SHAPES[shape])
    documents = rows([*KNOWN, *UNKNOWN])
    documents[5]["id"] = "late"
    ids = millstream.tokenize(documents, tokenizer)
    assert [next(ids).tolist() for _ in range(5)] == [[0, 1], [2], [0, 1, 2], [0, 1], []]
    with pytest.raises(DataError, match="document 'late': tokenizers cannot encode it"):
        next(ids)
    assert ids.state()["at"]["item"] == 5


@each_shape
def test_a_plan_counts_such_documents(tmp_path, shape):
    tokenizer = write_definition(tmp_path / "tok", SHAPES[shape])
    corpus = write_jsonl(tmp_path / "a.jsonl", rows([*KNOWN, *UNKNOWN]))
    plan = make_plan(corpus, tokenizer=tokenizer, seq_lens=[2], strategies=["concat"])
    assert plan.faults == {"tokenizer": 1}
    assert plan.examples["tokenizer"].startswith("a.jsonl at 162: tokenizers cannot encode it")
    assert plan.ids.value == 9


@pytest.mark.parametrize("rest", [{}, {"validation": 0.5}, {"strategy": "best-fit", "pad_id": 0}])
def test_in_files_of_every_kind(tmp_path, rest):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = write_definition(tmp_path / "tok", SHAPES["panic"])
    folder = tmp_path / "corpus"
    write_jsonl(folder / "a.jsonl.zst", rows(UNKNOWN))
    pq.write_table(pa.table({"text": UNKNOWN}), folder / "b.parquet")
    for number, text in enumerate(UNKNOWN):
        (folder / f"c{number}.txt").write_text(text, encoding="utf-8")
    report = pack(tmp_path / "out", folder, tokenizer=tokenizer, seq_len=2, on_error="skip", **rest)
    assert report.ledger["faults"] == {"tokenizer": 3}
    places = [(fault["source"], fault["line"] or fault["offset"]) for fault in faults(tmp_path / "out")]
    assert places == [("corpus/a.jsonl.zst", 3), ("corpus/b.parquet", 2), ("corpus/c2.txt", 0)]
    assert whole(tmp_path / "out")


def test_a_conversation_that_cannot_be_encoded(tmp_path):
    tokenizer = write_definition(tmp_path / "tok", SHAPES["panic"])
    found = [{"prompt": "the", "completion": " mill"}, {"prompt": "the", "completion": " é"}]
    corpus = write_jsonl(tmp_path / "a.jsonl", found)
    report = pack(tmp_path / "out", corpus, tokenizer=tokenizer, seq_len=2, chat=True, on_error="skip")
    assert report.ledger["faults"] == {"tokenizer": 1}
    assert report.ledger["learned"]["in"] == 1


# --- one engine of two -----------------------------------------------------


def brittle(monkeypatch, letter="水"):
    """The fast engine, which cannot encode texts with this letter."""
    encode = Fastokens.encode

    def refusing(self, texts, specials=False):
        if any(letter in text for text in texts):
            raise Unusable("tokenizer", "fastokens cannot encode it: in this test")
        return encode(self, texts, specials)

    monkeypatch.setattr(Fastokens, "encode", refusing)


@pytest.mark.parametrize("eos", [False, True])
def test_what_the_fast_engine_cannot_encode_has_the_reference_s_ids(tmp_path, monkeypatch, eos):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    whole_run = pack(tmp_path / "whole", corpus, seq_len=8, eos=eos)
    brittle(monkeypatch)
    report = pack(tmp_path / "out", corpus, seq_len=8, eos=eos)
    assert stream(tmp_path / "out") == stream(tmp_path / "whole")
    assert report.ledger == whole_run.ledger
    assert report.not_compared == 0
    assert 0 < report.compared < whole_run.compared, "what the reference has encoded need not be compared with it"
    ids = [i for document in millstream.tokenize(TEXTS) for i in document.tolist()]
    assert ids == gpt2_ids(TEXTS)


def test_a_conversation_that_only_the_reference_encodes(tmp_path, monkeypatch):
    tokenizer = str(write_tokenizer(tmp_path / "tok"))
    content = {"role": "assistant", "content": "mill 水车"}
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"messages": [content]}, {"prompt": "a", "completion": "b"}])
    given = {"tokenizer": tokenizer, "seq_len": 4, "chat": True}
    wanted = pack(tmp_path / "whole", corpus, **given)
    brittle(monkeypatch)
    assert pack(tmp_path / "out", corpus, **given).ledger == wanted.ledger
    assert stream(tmp_path / "out") == stream(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_only_the_fast_engine_encodes_is_packed_and_not_compared(tmp_path, workers):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one", BLANKS, "two"]))
    report = pack(tmp_path / "out", corpus, seq_len=64, workers=workers)
    assert report.not_compared == 1
    assert report.compared == len("one" + "two")
    assert report.not_compared_such_as[0] == "d1"
    assert "tiktoken cannot encode it" in report.not_compared_such_as[1]
    assert report.faults == 0
    assert whole(tmp_path / "out")
    [event] = millstream_events(tmp_path / "out")
    assert list(event["documents"]) == ["d1"]


def millstream_events(folder):
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]
    return [line for line in lines if line["event"] == "not compared"]


call = pytest.fixture(run_here)


def test_the_report_says_what_was_not_compared(tmp_path, call):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one", BLANKS]))
    code, out, _ = call("pack", corpus, "--out", tmp_path / "out")
    assert code == 0
    assert "1 document not, such as 'd1', which the fast engine alone encodes: tiktoken cannot" in out
    code, out, _ = call("pack", corpus, "--out", tmp_path / "out", "--overwrite", "--json")
    assert json.loads(out)["not_compared"] == 1


def test_the_reference_alone_stops_at_what_it_cannot_encode_and_it_is_no_fault(tmp_path):
    """What is a fault does not depend on the engine."""
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one", BLANKS]))
    for on_error in ("stop", "skip"):
        with pytest.raises(RunError, match=r"document 'd1': tiktoken cannot encode it.*without engine='reference'"):
            pack(tmp_path / "out", corpus, seq_len=64, engine="reference", on_error=on_error)
    report = pack(tmp_path / "out", corpus, seq_len=64)
    assert report.faults == 0
    assert whole(tmp_path / "out")


def test_a_folder_with_such_documents_does_not_go_on_with_the_reference(tmp_path, monkeypatch):
    read_little(monkeypatch, 10_000)
    corpus = write_jsonl(tmp_path / "a.jsonl", [*rows(["one", BLANKS, *["two"] * 1000]), b"[]"])
    with pytest.raises(DataError):
        pack(tmp_path / "out", corpus, seq_len=64, shard_size=1 << 16, block=1000)
    assert "commit" in events(tmp_path / "out")
    with pytest.raises(ResumeRefused, match=r"engine='reference': document 'd1' was packed.*tiktoken cannot encode it"):
        pack(tmp_path / "out", corpus, seq_len=64, shard_size=1 << 16, block=1000, engine="reference")
    write_jsonl(corpus, rows(["one", BLANKS, *["two"] * 1000, "three"]))
    pack(tmp_path / "out", corpus, seq_len=64, shard_size=1 << 16, block=1000)
    assert whole(tmp_path / "out")


# --- what workers raise ----------------------------------------------------


def raises_what_cannot_be_sent(unit):
    raise type("PanicException", (BaseException,), {})(f"unit {unit}")


def test_an_error_whose_class_cannot_be_sent_is_told_all_the_same():
    with pytest.raises(MillstreamError, match="PanicException: unit 1"):
        list(map_ordered(raises_what_cannot_be_sent, [1, 2], workers=2))


class Unmakable:
    """Sent to another process it cannot be made again there."""

    def __reduce__(self):
        return raises_what_cannot_be_sent, ("sent",)

    def __call__(self, unit):
        return unit


def test_what_a_worker_cannot_make_again_ends_in_an_error_and_not_in_silence(capfd):
    with pytest.raises(WorkerDied, match="exit code 1"):
        list(map_ordered(Unmakable(), [1, 2], workers=2))
    assert "PanicException: unit sent" in capfd.readouterr().err
