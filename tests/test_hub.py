"""Datasets of a hub are read as a folder of this machine with the same files is."""

import gzip
from contextlib import closing
from dataclasses import replace
from itertools import islice

import hubs
import pytest
import zstandard
from helpers import TEXTS, document_ids, gpt2_ids, jsonl, pack, parquet, rows, run_bytes, stream, without_fsync
from runs import kept_port

import millstream
from millstream.corpus.find import find_inputs
from millstream.corpus.sources import chunks
from millstream.errors import DataError, RequestError, ResumeRefused, RunError
from millstream.runs.plan.plan import make_plan
from millstream.store import hub as hub_store

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

LINES = jsonl(rows(TEXTS))


@pytest.fixture(scope="module")
def server():
    with hubs.serving() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """An empty hub, to which huggingface_hub leads."""
    server.repos.clear()
    server.faults.clear()
    server.requests.clear()
    server.asked.clear()
    server.tokens.clear()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub_store, "_FIRST_WAIT", 0.001)
    return server


FILES = {
    "data/b.jsonl": LINES,
    "data/a/z.jsonl.gz": gzip.compress(LINES),
    "data/a.jsonl.zst": zstandard.compress(LINES),
    "data/c.parquet": parquet(TEXTS),
    "data/d e.txt": "\n".join(TEXTS).encode(),
    "data/.hidden/x.jsonl": LINES,
    "data/.hidden/y.jsonl": LINES,
    "data/x.json": b"{}",
    "README.md": b"A dataset.",
}


def write_all(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


SLOW = [(source, 1) for source in ("/data", "/data/", "/**/*.parquet", "/data/b.jsonl")] + [
    ("", 2),
    ("/**/*.jsonl*", 2),
]


@pytest.mark.parametrize(
    ("source", "workers"),
    [("", 1), ("/data/*.jsonl*", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_it_gives_the_bytes_of_a_folder(tmp_path, hub, source, workers):
    hub.commit("org/name", FILES)
    folder = write_all(tmp_path / "name", FILES)
    here = pack(tmp_path / "here", f"{folder}{source}", seq_len=32, workers=workers)
    there = pack(tmp_path / "there", f"hf://datasets/org/name{source}", seq_len=32, workers=workers)
    assert run_bytes(tmp_path / "here") == run_bytes(tmp_path / "there")
    assert here.ignored == there.ignored
    assert "Bearer hf_good" in hub.tokens
    assert "hf_good" not in str(list((tmp_path / "there").rglob("*.json*")))


def test_what_is_read_is_one_commit_though_the_branch_moves(tmp_path, hub):
    sha = hub.commit("org/name", {"a.jsonl": LINES})
    found = find_inputs(["hf://datasets/org/name"]).shards
    hub.commit("org/name", {"a.jsonl": LINES[100:]})
    assert [shard.uri for shard in found] == [f"hf://datasets/org/name@{sha}/a.jsonl"]
    assert b"".join(chunks(found[0])) == LINES
    assert find_inputs([f"hf://datasets/org/name@{sha}"]).shards == found


@pytest.mark.parametrize("revision", ["v1", "refs/convert/parquet", "refs%2Fpr%2F12", "feature%2Fx"])
def test_revisions(tmp_path, hub, revision):
    hub.commit("org/name", {"a.txt": b"of main"})
    hub.commit("org/name", {"a.txt": b"of another one"}, revision.replace("%2F", "/"))
    pack(tmp_path / "out", f"hf://datasets/org/name@{revision}", seq_len=8)
    assert stream(tmp_path / "out") == gpt2_ids(["of another one"])
    assert document_ids(tmp_path / "out") == ["name/a.txt"]


FAULTS = [[503], [500, 502, 504], [429], ["cut"], ["reset"], ["cut", 503, "reset", "cut"]]


@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_it_asks_again(hub, faults):
    hub.commit("org/name", {"a.jsonl": LINES})
    (shard,) = find_inputs(["hf://datasets/org/name/a.jsonl"]).shards
    hub.faults[:] = faults
    assert b"".join(chunks(shard)) == LINES
    assert not hub.faults


def test_a_hub_that_is_down_stops_the_run_whatever_is_skipped(tmp_path, hub):
    hub.commit("org/name", {"a.jsonl": LINES, "b.jsonl": LINES})
    hub.faults[:] = [503] * 8
    with pytest.raises(RunError, match=r"org/name@.*/a\.jsonl cannot be read from .*503.*: run the same command again"):
        pack(tmp_path / "out", "hf://datasets/org/name", seq_len=32, on_error="skip")
    pack(tmp_path / "out", "hf://datasets/org/name", seq_len=32, on_error="skip")
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS) * 2


def test_a_file_that_disappears_is_named(hub):
    sha = hub.commit("org/name", {"a.jsonl": LINES})
    (shard,) = find_inputs(["hf://datasets/org/name"]).shards
    del hub.repos["org/name"].revisions[sha]["a.jsonl"]
    with pytest.raises(RunError, match=r"a\.jsonl is not there any more, since it was listed"):
        list(chunks(shard))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hf://datasets/org/nowhere", "there is no dataset org/nowhere at http.*private: then log in with 'hf auth"),
        (
            "hf://datasets/org/gated",
            "org/gated is a gated dataset: ask for access at http.*/datasets/org/gated, and log",
        ),
        ("hf://datasets/org/name@v9/a.jsonl", "the dataset org/name has no revision v9"),
        ("hf://datasets/org/name/b.jsonl", "no such file or folder: hf://datasets/org/name/b.jsonl"),
        ("hf://datasets/org/name/a.jsonl@main", "a revision stands behind the dataset's name"),
        ("hf://datasets/org/name/*.txt", "no file matches hf://datasets/org/name@.*/\\*.txt"),
        ("hf://datasets/org/name/f*", "no file matches .*, only folders: name them, or"),
        ("hf://datasets/org/name/folder", "nothing to read in hf://datasets/org/name/folder: .*1 file: .xz 1"),
        ("hf://datasets/org/name/**/*.xz", "c.jsonl.xz cannot be read: .xz is not unpacked here"),
        ("hf://org/name", "hf://org/name is no address of a dataset: that is hf://datasets/ORG/NAME"),
        ("hf://datasets/org", "no address of a dataset"),
        ("hf://datasets/o rg/name", "no address of a dataset"),
    ],
)
def test_addresses_that_do_not_work(hub, monkeypatch, source, told):
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    hub.commit("org/name", {"a.jsonl": LINES, "folder/c.jsonl.xz": b""})
    hub.commit("org/gated", {"a.jsonl": LINES})
    hub.repos["org/gated"].gated = True
    with pytest.raises(RequestError, match=told) as raised:
        find_inputs([source])
    assert "\n" not in str(raised.value)
    assert "hf_bad" not in str(raised.value)


def test_no_network(monkeypatch):
    kept, port = kept_port()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub_store, "_FIRST_WAIT", 0.001)
    told = rf"hf://datasets/org/name cannot be read from http://127.0.0.1:{port}"
    with kept, pytest.raises(RunError, match=told) as raised:  # where nobody listens
        find_inputs(["hf://datasets/org/name"])
    assert "\n" not in str(raised.value)


def test_it_cannot_be_written_to(hub, tmp_path):
    with pytest.raises(RequestError, match="hf://datasets/org/name can only be read"):
        pack("hf://datasets/org/name", write_all(tmp_path, {"a.jsonl": LINES}))


def test_what_has_been_read_is_refused_when_it_changed_and_the_rest_may(tmp_path, hub):
    lines = LINES.splitlines(keepends=True) * 20
    files = {"a.jsonl": b"".join(lines), "b.jsonl": b"".join([*lines, b"no json\n", *lines]), "c.jsonl": b"no json"}
    hub.commit("org/name", files)
    settings = {"seq_len": 16, "shard_size": 4096, "block": 2000}
    with pytest.raises(DataError):
        pack(tmp_path / "out", "hf://datasets/org/name", **settings)
    hub.commit("org/name", {**files, "a.jsonl": files["a.jsonl"].replace(b"mill", b"MILL")})
    with pytest.raises(ResumeRefused, match=r"name/a\.jsonl has changed"):
        pack(tmp_path / "out", "hf://datasets/org/name", **settings)
    mended = {name: data.replace(b"no json", b'{"text": "json"}') for name, data in files.items()}
    hub.commit("org/name", mended)
    pack(tmp_path / "out", "hf://datasets/org/name", **settings)
    pack(tmp_path / "whole", write_all(tmp_path / "name", mended), **settings)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")
    assert millstream.verify(tmp_path / "out", against="hf://datasets/org/name").problems == []


def test_a_plan_is_that_of_the_same_folder(tmp_path, hub):
    hub.commit("org/name", FILES)
    here, there = (
        make_plan([source], tokenizer="gpt2", seq_lens=[32])
        for source in (write_all(tmp_path / "name", FILES), "hf://datasets/org/name")
    )
    same = {name: getattr(here, name) for name in ("choices", "ids_per_second")}
    assert replace(there, **same) == here
    assert [choice.samples for choice in there.choices] == [choice.samples for choice in here.choices]


def test_reading_goes_on_where_it_was(hub):
    big = LINES * 5000
    hub.commit("org/name", {"a.jsonl": big, "b.jsonl": LINES})
    with closing(millstream.read("hf://datasets/org/name")) as documents:
        first = list(islice(documents, len(TEXTS) * 4000))
        state = documents.state()
    assert len(first) == len(TEXTS) * 4000
    hub.asked.clear()
    with closing(millstream.read("hf://datasets/org/name", state=state)) as documents:
        rest = [document.text for document in documents]
    assert rest == TEXTS * 1001
    assert hub.asked["a.jsonl"] < len(big) // 5 + (1 << 20)


def test_a_branch_is_looked_up_once_for_all_addresses_and_files_are_asked_for_side_by_side(hub):
    sha = hub.commit("org/name", {f"{number}.jsonl": LINES for number in range(9)})
    some = [f"hf://datasets/org/name/{number}.jsonl" for number in range(9)]
    found = find_inputs([*some, "hf://datasets/org/name@main/*.jsonl"])
    assert {shard.uri for shard in found.shards} == {f"hf://datasets/org/name@{sha}/{n}.jsonl" for n in range(9)}
    assert len([path for path in hub.requests if "revision" in path or path.endswith("org/name")]) == 2
    assert "/0.jsonl is given 2 times and is read each time, and 8 more" in found.repeated()
