"""Where documents went: every id is found where it is said to be, and every text comes back, or it says what lacks."""

import io
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import cli, jsonl, read_manifest, rows, run_here, without_fsync, write, write_jsonl, write_manifest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_boundaries import add_loss

import millstream
from millstream.errors import RequestError, RunError
from millstream.folder.opened import OPEN
from millstream.runs.pack.provenance import provenance, text_of, tokenizer_of
from millstream.view import show_sample

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def quick():
    yield from without_fsync()


@pytest.fixture
def run(monkeypatch, capfd):
    return run_here(monkeypatch, capfd)


# --- every document comes back ---------------------------------------------

PIECES = [
    "🙂",
    "👩‍👩‍👧",
    "水车",
    "é",
    "e\u0301",
    "\u200b",
    "\x00",
    "\x1b[31m",
    "\r\n",
    "  ",
    "\t",
    "<|endoftext|>",
    "\ufffd",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.sampled_from([*PIECES, "a", " mill", "'s"]), max_size=12).map("".join),
)
ORDERS = [
    {"strategy": "concat"},
    {"strategy": "concat", "remainder": "pad"},
    {"strategy": "concat", "remainder": "drop"},
    {"strategy": "concat", "remainder": "drop", "shuffle": 1, "shuffle_window": 300},
    {"strategy": "split", "shuffle": 2},
    {"strategy": "split", "pad_side": "left"},
    {"strategy": "best-fit", "window": 200, "pad_side": "left"},
    {"strategy": "best-fit", "max_segments": 2, "shuffle": 3, "shuffle_window": 300},
]


@QUICK
@given(
    st.lists(TEXTS, min_size=1, max_size=12),
    st.fixed_dictionaries(
        {
            "seq_len": st.integers(1, 9),
            "bos": st.booleans(),
            "eos": st.booleans(),
            "validation": st.sampled_from([0.0, 0.4]),
            "shard_size": st.sampled_from([8, 60, 100_000]),
            "format": st.sampled_from(["npy", "parquet"]),
        }
    ),
    st.sampled_from(ORDERS),
)
@example(["🙂" * 9, "", "<|endoftext|>"], {"seq_len": 1, "bos": True, "eos": True, "shard_size": 8}, ORDERS[2])
def test_every_text_is_recovered(tmp_path_factory, texts, how, order):
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "corpus.jsonl", rows(texts))
    report = millstream.pack_to(folder / "out", folder / "corpus.jsonl", workers=1, **how, **order)
    datasets = [millstream.open(folder / "out", name) for name in read_manifest(str(folder / "out"))["subsets"]]
    dropped = 0
    for number, text in enumerate(texts):
        [(dataset, found)] = provenance(folder / "out", f"d{number}").documents
        assert [dataset.locate(number), [d.locate(number) for d in datasets if d.subset != dataset.subset]] == [
            [found],
            [[]] * (len(datasets) - 1),
        ]
        ids = check_placements(dataset, found)
        if found.dropped:
            missing = rf"document 'd{number}' is not whole: {found.dropped} of its {found.length} ids, the last ones,"
            with pytest.raises(RunError, match=missing):
                text_of(dataset, found)
            dropped += found.dropped
        else:
            assert text_of(dataset, number) == text
            assert dataset.document_ids(number).tolist() == ids
    assert dropped == report.ledger["ids"]["dropped"]


def check_placements(dataset, found):
    """They are from the document's first id to its last, and its ids are where they say; the ids that there are."""
    rest = dataset.remainder
    at, ids = 0, []
    for part in found.placements:
        assert part.ordinal == found.ordinal
        assert part.start == at
        at += part.length
        if part.sample is None:
            assert part is found.placements[-1]
            continue
        sample = rest if part.sample == len(dataset) else dataset[part.sample]
        number = sample.segment_ids[part.at]
        assert sample.segments[number - 1] == (found.ordinal, part.start, part.length)
        assert sample.position_ids[part.at] == 0
        ids += sample.token_ids[part.at : part.at + part.length].tolist()
    assert at == found.length
    assert len(ids) == found.length - found.dropped
    return ids


@QUICK
@given(
    st.lists(st.integers(0, 30), max_size=15), st.integers(1, 8), st.sampled_from([40, 100]), st.sampled_from(ORDERS)
)
def test_placements_partition_every_document(tmp_path_factory, lengths, n, shard_size, order):
    """Of ids that are all different, each is where the placements say, and nowhere else."""
    folder = tmp_path_factory.mktemp("run")
    bounds = [0, *np.cumsum(lengths).tolist()]
    documents = [list(range(low, high)) for low, high in itertools.pairwise(bounds)]
    write_jsonl(folder / "corpus.jsonl", [{"id": f"d{k}", "ids": ids} for k, ids in enumerate(documents)])
    common = {"tokenizer": None, "ids_field": "ids", "pad_id": 9999, "workers": 1}
    millstream.pack_to(folder / "out", folder / "corpus.jsonl", seq_len=n, shard_size=shard_size, **common, **order)
    dataset = millstream.open(folder / "out")
    for number, ids in enumerate(documents):
        [found] = dataset.locate(f"d{number}")
        assert found.length == len(ids)
        assert check_placements(dataset, found) == ids[: len(ids) - found.dropped]
        assert dataset.find(f"d{number}") == list(found.placements)


# --- in detail -------------------------------------------------------------


def test_documents_of_the_same_id_are_all_found(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "same", "text": text} for text in ("one", "", "one two three")])
    millstream.pack_to(tmp_path / "out", corpus, seq_len=2)
    dataset = millstream.open(tmp_path / "out")
    assert [(found.ordinal, found.length, len(found.placements)) for found in dataset.locate("same")] == [
        (0, 1, 1),
        (1, 0, 1),
        (2, 3, 2),
    ]
    assert [text_of(dataset, number) for number in range(3)] == ["one", "", "one two three"]
    with pytest.raises(RequestError, match=r"3 documents have the id 'same': ask for an ordinal, of 0, 1, 2"):
        text_of(dataset, "same")
    with pytest.raises(KeyError):
        text_of(dataset, "another")
    with pytest.raises(KeyError):
        dataset.document_ids(3)


def test_a_tokenizer_that_has_changed_gives_no_text(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one"]))
    millstream.pack_to(tmp_path / "out", corpus, seq_len=2)
    manifest = read_manifest(str(tmp_path / "out"))
    manifest["settings"]["tokenizer"]["sha256"] = "0" * 64
    write_manifest(str(tmp_path / "out"), manifest)
    with pytest.raises(RunError, match=r"tokenizer gpt2 has changed"):
        tokenizer_of(millstream.open(tmp_path / "out"))


def test_ids_without_a_tokenizer_have_no_text(tmp_path, run):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "ids": [7, 8, 9]}])
    millstream.pack_to(tmp_path / "out", corpus, seq_len=2, tokenizer=None, ids_field="ids")
    assert millstream.open(tmp_path / "out").document_ids(0).tolist() == [7, 8, 9]
    code, out, error = run("find", tmp_path / "out", "a", "--text")
    assert (code, out) == (2, "")
    assert "without a tokenizer" in error
    assert "7 8" in run("show", tmp_path / "out", 0)[1]


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_a_run_of_many_shards_holds_few_files_open(tmp_path, monkeypatch, format):
    """A memory-mapped file counts as an open one; and of Parquet a part of each is held decoded."""
    if format == "npy":
        monkeypatch.setattr("resource.getrlimit", lambda which: (384, 384))
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "long", "ids": list(range(600))}])
    settings = {"tokenizer": None, "ids_field": "ids", "workers": 1}
    millstream.pack_to(tmp_path / "out", corpus, seq_len=2, shard_size=8, format=format, **settings)
    dataset = millstream.open(tmp_path / "out")
    assert len(list((tmp_path / "out").glob(f"samples-*.{format}"))) == 300
    assert dataset.document_ids(0).tolist() == list(range(600))
    assert OPEN.of(dataset._owner) <= 64
    assert len(pickle.dumps(dataset)) < 1000
    assert pickle.loads(pickle.dumps(dataset))[299].token_ids.tolist() == [598, 599]
    first = dataset[0]
    assert [dataset[number].token_ids[0] for number in range(299, -1, -1)] == list(range(598, -1, -2))
    assert first.token_ids.tolist() == [0, 1]


MANY_FOLDERS = """
import gc, resource, sys
import millstream
from millstream.folder.opened import OPEN
resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
datasets = [millstream.open(sys.argv[1]) for _ in range(12)]
for number in range(len(datasets[0])):
    assert all(dataset[number].token_ids.tolist() == [2 * number, 2 * number + 1] for dataset in datasets)
assert sum(OPEN.of(dataset._owner) for dataset in datasets) <= 25
owner = datasets.pop()._owner
gc.collect()
assert OPEN.of(owner) == 0
try:
    kept = [sample for dataset in datasets for sample in dataset]
except millstream.errors.RunError as error:
    print(error)
"""


def test_many_folders_hold_few_files_open_together(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "long", "ids": list(range(600))}])
    settings = {"tokenizer": None, "ids_field": "ids", "workers": 1}
    millstream.pack_to(tmp_path / "out", corpus, seq_len=2, shard_size=8, **settings)
    done = subprocess.run([sys.executable, "-c", MANY_FOLDERS, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "as many files open as it may, 150: samples that are kept keep theirs open" in done.stdout


def test_segments_that_are_in_order_are_not_all_read(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": f"d{k}", "ids": [k] * 3} for k in range(400)])
    settings = {"tokenizer": None, "ids_field": "ids", "seq_len": 2, "shard_size": 80, "workers": 1}
    millstream.pack_to(tmp_path / "out", corpus, **settings)
    dataset = millstream.open(tmp_path / "out")
    assert len(dataset.find("d200")) > 1
    assert OPEN.of(dataset._owner) <= 2


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("strategy", ["concat", "best-fit"])
def test_fine_tuning_data_comes_back_with_what_is_learned(tmp_path, strategy, format):
    items = [
        {"id": f"c{k}", "prompt": f"Question {k}? ", "completion": f"Answer {k} 🙂." * (1 + k % 4)} for k in range(20)
    ]
    corpus = write_jsonl(tmp_path / "a.jsonl", items)
    how = {"seq_len": 32, "strategy": strategy, "format": format, "workers": 1}
    millstream.pack_to(tmp_path / "out", corpus, chat=True, eos=True, **how)
    dataset = millstream.open(tmp_path / "out")
    samples = [*dataset, dataset.remainder]
    for item in items:
        assert text_of(dataset, item["id"]) == item["prompt"] + item["completion"]
        [found] = dataset.locate(item["id"])
        loss = [samples[p.sample].loss[p.at : p.at + p.length] for p in found.placements]
        learned = dataset.document_ids(found)[np.concatenate(loss)]
        assert tokenizer_of(dataset).engine.decode(learned.tolist()) == " " + item["completion"] + "<|endoftext|>"


# --- find ------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two runs of one corpus, with the remainder kept and dropped, not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    items = [
        {"id": "long", "text": "grain after grain " * 500},
        {"id": "void", "text": ""},
        {"id": "twice", "text": "Wasser 🙂"},
        {"text": "no id of its own"},
        {"id": "bad", "text": 5},
        {"id": "twice", "text": "x\x1b[31m"},
        {"other": 1},
        {"id": "last", "text": "the end of it all, in a few more words"},
    ]
    corpus = write_jsonl(folder / "a.jsonl", items)
    for name in ("keep", "drop"):
        how = {"seq_len": 16, "eos": True, "on_error": "skip", "workers": 1, "validation": 0.3}
        millstream.pack_to(folder / name, corpus, remainder=name, **how)
    folder.joinpath("offsets.json").write_text(json.dumps([len(jsonl(items[:number])) for number in range(len(items))]))
    return folder


def offset(packed, number):
    return json.loads((packed / "offsets.json").read_text())[number]


def test_find_says_where_every_id_went(packed, run):
    code, out, error = run("find", packed / "keep", "long")
    assert (code, error) == (0, "")
    head, *lines = out.splitlines()
    [(dataset, found)] = provenance(str(packed / "keep"), "long").documents
    assert head == f"document long (number 0, a.jsonl at byte 0): {found.length:,} ids"
    assert found.length > 1000
    assert len(lines) == len(found.placements)
    assert lines[1] == f"  {found.subset} sample 1: ids 16 to 31 of {found.length:,}"
    at = 0
    for line in lines:
        where, low, high = re.fullmatch(
            r"  (\w+ (?:sample [\d,]+|remainder)): ids ([\d,]+) to ([\d,]+) of .*", line
        ).groups()
        assert int(low.replace(",", "")) == at
        at = int(high.replace(",", "")) + 1
    assert at == found.length
    assert dataset.subset in where


def test_find_names_the_remainder_and_what_was_dropped(packed, run):
    kept, dropped = (run("find", packed / name, "last")[1].splitlines() for name in ("keep", "drop"))
    subset = provenance(str(packed / "keep"), "last").documents[0][1].subset
    assert kept[0] == dropped[0]
    assert kept[-1].startswith(f"  {subset} remainder: ids ")
    assert dropped[-1].startswith(f"  dropped with the remainder of {subset}: ids ")
    assert kept[-1].partition(": ")[2] == dropped[-1].partition(": ")[2]
    assert kept[1:-1] == dropped[1:-1]


def test_find_shows_all_of_an_id_the_empty_and_the_faulty(packed, run):
    out = run("find", packed / "keep", "twice")[1].splitlines()
    assert [line for line in out if not line.startswith("  ")] == [
        f"document twice (number 2, a.jsonl at byte {offset(packed, 2):,}): 4 ids",
        f"document twice (number 5, a.jsonl at byte {offset(packed, 5):,}): 6 ids",
    ]
    code, out, error = run("find", packed / "keep", "void")
    place = f"number 1, a.jsonl at byte {offset(packed, 1):,}"
    assert (code, out, error) == (0, f"document void ({place}): empty, so it is in no sample\n", "")
    code, out, error = run("find", packed / "keep", "bad")
    message = "left out, not text: field 'text' is not text but int"
    assert (code, out, error) == (0, f"document bad (number 4, a.jsonl, line 5): {message}\n", "")


def test_documents_without_an_id_are_found_by_their_place(packed, run):
    code, out, _ = run("find", packed / "keep", f"a.jsonl#{offset(packed, 3)}")
    assert code == 0
    assert f"(number 3, a.jsonl at byte {offset(packed, 3):,}): " in out
    code, out, _ = run("find", packed / "keep", f"a.jsonl#{offset(packed, 6)}")
    assert code == 0
    assert "(number 6, a.jsonl, line 7): left out, missing field: " in out


def test_find_what_is_not_there(packed, run):
    code, out, error = run("find", packed / "keep", "nobody")
    assert (code, out) == (2, "")
    assert error.startswith(f"millstream: {packed / 'keep'} has no document with the id 'nobody'")
    assert "'a.jsonl#0'" in error
    assert run("find", packed, "long")[0] == 2
    assert run("find", packed / "keep")[0] == 2


def test_find_as_json(packed, run):
    code, out, error = run("find", packed / "drop", "last", "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    [document] = found["documents"]
    parts = document["placements"]
    assert [part["where"] for part in parts] == ["sample"] * (len(parts) - 1) + ["dropped"]
    assert sum(part["length"] for part in parts) == document["length"]
    assert parts[-1]["sample"] is parts[-1]["at"] is None
    assert (found["id"], document["source"], document["offset"]) == ("last", "a.jsonl", offset(packed, 7))

    [one, two] = json.loads(run("find", packed / "keep", "twice", "--json", "--text")[1])["documents"]
    assert (one["text"], two["text"]) == ("Wasser 🙂", "x\x1b[31m")
    [fault] = json.loads(run("find", packed / "keep", "bad", "--json")[1])["faults"]
    assert (fault["reason"], fault["line"]) == ("not_text", 5)
    void = json.loads(run("find", packed / "keep", "void", "--json", "--text")[1])["documents"][0]
    assert (void["placements"], void["text"]) == ([], "")


def test_find_gives_the_text_and_nothing_else(packed, run):
    assert run("find", packed / "keep", "long", "--text") == (0, "grain after grain " * 500, "")
    code, out, error = run("find", packed / "keep", "twice", "--text")
    assert (code, out) == (2, "")
    assert "2 documents have the id 'twice': choose one with --number, of 2, 5" in error
    assert run("find", packed / "keep", "twice", "--text", "--number", 2) == (0, "Wasser 🙂", "")
    assert run("find", packed / "keep", "twice", "--text", "--number", 5) == (0, "x\x1b[31m", "")
    assert run("find", packed / "keep", "twice", "--number", 5)[1].count("document twice") == 1
    code, _, error = run("find", packed / "keep", "twice", "--number", 3)
    assert (code, "number 3 has not the id 'twice': give one of 2, 5" in error) == (2, True)
    assert run("find", packed / "keep", "void", "--text") == (0, "", "")
    code, out, error = run("find", packed / "drop", "last", "--text")
    assert (code, out) == (1, "")
    assert re.search(r"document 'last' is not whole: \d+ of its \d+ ids, the last ones, were dropped", error)
    code, out, error = run("find", packed / "keep", "bad", "--text")
    assert (code, out) == (1, "")
    assert "left out, not text" in error


# --- show ------------------------------------------------------------------


def test_show_and_find_name_the_place_in_every_kind_of_source(tmp_path, monkeypatch, run):
    texts = ["one two three", "four five six"]
    lines = jsonl(rows(texts))
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "b.jsonl.gz", lines)
    pq.write_table(pa.table({"id": ["p0", "p1"], "text": texts}), tmp_path / "c.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "d.txt").write_text(texts[0])
    second = len(jsonl(rows(texts)[:1]))
    monkeypatch.chdir(tmp_path)
    cases = {
        "a.jsonl": ("d1", f"a.jsonl at byte {second}"),
        "b.jsonl.gz": ("d1", f"b.jsonl.gz at byte {second}, unpacked"),
        "c.parquet": ("p1", "c.parquet, row 1"),
        "folder": ("folder/d.txt", "folder/d.txt"),
    }
    for source, (document, place) in cases.items():
        assert run("pack", source, "--out", "out", "--seq-len", 2, "--overwrite")[0] == 0
        assert f" {place}): " in run("find", "out", document)[1]
        shown = run("show", "out", millstream.open("out").find(document)[0].sample)[1]
        assert re.search(rf"^── {re.escape(document)} ── .* ── {re.escape(place)}$", shown, re.M), shown
    assert run("pack", "stdlib:", "--limit", 1, "--out", "out", "--seq-len", 64, "--overwrite")[0] == 0
    name = millstream.open("out").documents(0)[0].id
    assert name.startswith("stdlib:")
    assert f"── {name} ── ids 0 to 63 of " in (shown := run("show", "out")[1])
    assert f" ── {name}\n" in shown


def test_standard_input_is_named(tmp_path, run):
    items = jsonl([{"text": "one two three"}, {"text": "four five six"}])
    assert cli("pack", "-", "--out", tmp_path / "out", "--seq-len", 2, stdin=items).returncode == 0
    second = len(jsonl([{"text": "one two three"}]))
    code, out, _ = run("find", tmp_path / "out", f"-#{second}")
    assert code == 0
    assert out.startswith(f"document -#{second} (number 1, standard input at byte {second}): 3 ids\n")
    assert f"standard input at byte {second}" in run("show", tmp_path / "out", -1)[1]


def test_show_the_remainder(packed, run):
    dataset = millstream.open(packed / "keep", provenance(str(packed / "keep"), "last").documents[0][1].subset)
    code, out, error = run("show", packed / "keep", "remainder", "--subset", dataset.subset)
    assert (code, error) == (0, "")
    assert out.startswith(f"remainder of {dataset.subset}: {len(dataset.remainder)} ids, ")
    assert "── last ── ids " in out
    assert "more words<|endoftext|>" in out
    assert [part.id for part in dataset.documents(len(dataset))][-1] == "last"
    code, out, error = run("show", packed / "drop", "remainder", "--subset", dataset.subset)
    assert (code, out) == (2, "")
    assert error.endswith(f"has no remainder in {dataset.subset}: its {len(dataset.remainder)} ids were dropped\n")


def test_show_a_corpus_smaller_than_a_sample(tmp_path, run):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one"]))
    millstream.pack_to(tmp_path / "out", corpus, seq_len=64)
    code, _, error = run("show", tmp_path / "out")
    assert code == 2
    assert "fewer ids than one sample holds; show 'remainder'" in error
    assert "one" in run("show", tmp_path / "out", "remainder")[1]
    shutil.rmtree(tmp_path / "out")
    millstream.pack_to(tmp_path / "out", corpus, seq_len=1)
    code, _, error = run("show", tmp_path / "out", "remainder")
    assert code == 2
    assert "there were no ids left over" in error


def test_show_dims_what_is_not_learned(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["one two three four five six"]))
    millstream.pack_to(tmp_path / "out", corpus, seq_len=4)
    folder = add_loss(tmp_path / "out", lambda ids: (ids == 734) | (ids == 1115))  # " two", " three"
    drawn = Console(file=(file := io.StringIO()), force_terminal=True, highlight=False, color_system="standard")
    show_sample(str(folder), 0, console=drawn)
    assert "sample 0 of 1: 4 ids, 1 document, 2 ids to be learned" in file.getvalue()
    assert "\x1b[2;32mone\x1b[0m\x1b[32m two three\x1b[0m\x1b[2;32m four\x1b[0m" in file.getvalue()
    show_sample(str(folder), None, console=Console(file=(plain := io.StringIO()), highlight=False))
    assert "remainder of train: 2 ids, 1 document, 0 ids to be learned" in plain.getvalue()
    assert " five six\n" in plain.getvalue()
