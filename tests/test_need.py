"""What a run is said to need: from the engine and the documents' size, before anything is read, and no fault of any."""

import gzip
import json
import os

import pytest
from helpers import TEXTS, pack, rows, whole, without_fsync, write_jsonl
from test_tokenizer_shapes import trained

from millstream.corpus.find import find_inputs
from millstream.errors import RequestError
from millstream.runs.pack import machine, memory
from millstream.runs.pack.memory import limit_of, need_of, workers_of
from millstream.runs.pack.settings import DEFAULT_MEMORY, MIB, Settings
from millstream.stream.tokenizers import from_definition, load_tokenizer

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

GPT2 = load_tokenizer("gpt2")
METASPACE = from_definition("metaspace", trained("fallback unk", "metaspace", "none").to_str())
LLAMA_3 = from_definition("llama 3", trained("bpe", "llama 3", "none").to_str())


@pytest.fixture
def packed(tmp_path):
    """An input of which nobody knows how long its documents are."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows(TEXTS))))
    return path


def workers(source, tokenizer, **settings):
    return workers_of(Settings(**settings), tokenizer, find_inputs([str(source)]).shards)


@pytest.mark.parametrize(
    ("tokenizer", "given", "need"),
    [
        (GPT2, {}, 340 + 32 * 64),
        (GPT2, {"engine": "reference"}, 340 + 32 * 64),
        (LLAMA_3, {}, 340 + 276 + 32 * 64),
        (LLAMA_3, {"engine": "reference"}, 340 + 276 + 32 * 340),
        (METASPACE, {}, 340 + 276 + 32 * 340),
        (METASPACE, {"chat": True}, 340 + 436 + 32 * 500),
        (METASPACE, {"chat": True, "loss": "all"}, 340 + 276 + 32 * 340),
        (METASPACE, {"max_document": 1 << 20}, 340 + 276 + 340),
        (None, {"ids_field": "ids"}, 340 + 32 * 10),
    ],
)
def test_the_need_is_of_the_engine_and_of_the_longest_document(packed, tokenizer, given, need):
    with pytest.raises(RequestError, match=rf"need up to {need} MiB with this tokenizer\. Give memory={need} << 20"):
        workers(packed, tokenizer, workers=1, memory=(need - 1) * MIB, **given)
    assert workers(packed, tokenizer, workers=1, memory=need * MIB, **given) == (1, "as asked", 1)


def test_a_shorter_document_may_be_asked_for(packed):
    with pytest.raises(RequestError, match="or max_document=5 << 20") as refused:
        workers(packed, GPT2, memory=700 * MIB)
    assert "--max-document 5MiB" in refused.value.words.flags
    assert workers(packed, GPT2, memory=700 * MIB, max_document=5 * MIB)[0] == 1


def test_no_document_is_longer_than_its_input(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    assert workers(corpus, METASPACE, memory=650 * MIB, workers=1) == (1, "as asked", 1)
    assert pack(tmp_path / "out", corpus, memory=400 * MIB).workers == 1
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", [GPT2, LLAMA_3, METASPACE])
def test_without_a_limit_there_is_room_for_any_document_and_two_workers(packed, tokenizer):
    shards = find_inputs([str(packed)]).shards
    need = need_of(Settings(), tokenizer, shards, None)
    assert limit_of(Settings(), need) >= max(DEFAULT_MEMORY, need.workers(2))
    assert limit_of(Settings(memory=5), need) == 5


def test_too_little_memory_says_for_how_long_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n')
    told = r"documents of up to 1 MiB need up to 341 MiB with this tokenizer. Give memory=341"
    with pytest.raises(RequestError, match=told):
        workers(tmp_path / "a.jsonl", GPT2, memory=1024)


def test_the_limit_without_memory_is_told_in_whole_mib(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(RequestError, match=r"^memory=\d+ << 20 is too little: documents of up to 96 MiB"):
        workers(tmp_path / "a.jsonl", GPT2, max_document=200 * MIB)


def test_workers_that_are_asked_for_have_what_they_need(packed, monkeypatch):
    monkeypatch.setattr(memory, "memory", lambda: 8 << 30)
    asked, why, writers = workers(packed, GPT2, workers=3)
    assert (asked, why, writers) == (3, "as asked, with up to 3,018 MiB", 3)
    with pytest.raises(RequestError, match=r"workers=3 needs up to 3018 MiB, and the limit is memory=2752 << 20"):
        workers(packed, GPT2, workers=3, memory=2752 * MIB)
    both = {"strategy": "best-fit", "shuffle": 1}
    assert workers("-", GPT2, workers=2, **both)[:2] == (2, "as asked, with up to 3,036 MiB")
    assert workers(packed, GPT2, workers=2) == (2, "as asked", 2)
    monkeypatch.setattr(memory, "memory", lambda: 3000 * MIB)
    with pytest.raises(RequestError, match=r"workers=3 needs up to 3018 MiB, and the limit is memory=2752 << 20"):
        workers(packed, GPT2, workers=3)


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        (
            "0::/a/b\n",
            {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n", "a/memory.max": "1000\n"},
            (1, 1000),
        ),
        ("0::/\n", {"cpu.max": "50000 100000\n", "memory.max": "max\n"}, (1, None)),
        (
            "4:memory:/m\n3:cpu,cpuacct:/c\n0::/\n",
            {
                "cpu/c/cpu.cfs_quota_us": "100000",
                "cpu/c/cpu.cfs_period_us": "100000",
                "memory/m/memory.limit_in_bytes": "2000",
                "memory/memory.limit_in_bytes": "3000",
            },
            (1, 2000),
        ),
        ("3:cpu:/c\n", {"cpu/c/cpu.cfs_quota_us": "-1", "cpu/c/cpu.cfs_period_us": "100000"}, (2, None)),
        ("", {}, (2, None)),
    ],
)
def test_a_container_has_what_its_group_may_have(tmp_path, monkeypatch, groups, files, found):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_PROCESS", str(tmp_path / "groups"))
    monkeypatch.setattr(machine, "_ROOT", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (machine.cores(), machine.memory()) == (found[0], found[1] or whole)


def test_a_limit_makes_no_faults(tmp_path):
    """A document is a fault by its size, whatever memory there is."""
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 5000}, {"text": "b"}])
    for bound in (400 * MIB, 900 * MIB, None):
        given = {"memory": bound, "max_document": 4000, "on_error": "skip", "overwrite": True}
        assert pack(tmp_path / "out", corpus, **given).ledger["faults"] == {"too_long": 1}
