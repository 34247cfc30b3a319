"""What a run is said to need: from the engine and the documents' size, before anything is read, and no fault of any."""

import gzip
import json

import pytest
from helpers import TEXTS, pack, rows, whole, without_fsync, write_jsonl
from test_tokenizer_shapes import trained

from millstream.errors import RequestError
from millstream.formats.corpus import find_inputs
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
    assert workers(packed, tokenizer, workers=1, memory=need * MIB, **given) == (1, "as asked")


def test_a_shorter_document_may_be_asked_for(packed):
    with pytest.raises(RequestError, match="or max_document=5 << 20") as refused:
        workers(packed, GPT2, memory=700 * MIB)
    assert "--max-document 5MiB" in refused.value.words.flags
    assert workers(packed, GPT2, memory=700 * MIB, max_document=5 * MIB)[0] == 1


def test_no_document_is_longer_than_its_input(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    assert workers(corpus, METASPACE, memory=650 * MIB, workers=1) == (1, "as asked")
    assert pack(tmp_path / "out", corpus, memory=400 * MIB).workers == 1
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", [GPT2, LLAMA_3, METASPACE])
def test_without_a_limit_there_is_room_for_any_document_and_two_workers(packed, tokenizer):
    shards = find_inputs([str(packed)]).shards
    need = need_of(Settings(), tokenizer, shards, None)
    assert limit_of(Settings(), need) >= max(DEFAULT_MEMORY, need.workers(2))
    assert limit_of(Settings(memory=5), need) == 5


def test_a_limit_makes_no_faults(tmp_path):
    """A document is a fault by its size, whatever memory there is."""
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 5000}, {"text": "b"}])
    for memory in (400 * MIB, 900 * MIB, None):
        given = {"memory": memory, "max_document": 4000, "on_error": "skip", "overwrite": True}
        assert pack(tmp_path / "out", corpus, **given).ledger["faults"] == {"too_long": 1}
