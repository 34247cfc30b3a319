"""Parts tokenized and shards written by tasks, in any order and some of them twice: the bytes of the streaming loop."""

import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import chats
import fuzz
import pytest
from helpers import TEXTS, pack, rows, without_fsync, write_jsonl
from pooled import Pooled, without_seconds
from runs import sha256

from millstream.records import Part, Range
from millstream.runs.pack.pieces import PieceLost, StoredPieces
from millstream.store import at

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)


def check(folder, sources, chance, size, **settings):
    """A run by tasks against the streaming loop."""
    settings = {"on_error": "skip", **settings}
    pack(folder / "inline", sources, **settings)
    entries, mark = Pooled(folder / "pooled", folder / "spill", sources, chance, size, **settings).go()
    told = json.loads((folder / "inline" / "manifest.json").read_text())
    assert entries == told["subsets"]
    assert mark.text_ids + mark.special_ids == told["ledger"]["ids"]["in"]
    expected = {path.name: path.read_bytes() for path in (folder / "inline").iterdir()}
    for name in ("manifest.json", "journal.jsonl", "tokenizer.json"):
        expected.pop(name, None)
    found = {path.name: path.read_bytes() for path in (folder / "pooled").iterdir()}
    assert sorted(found) == sorted(expected)
    for name in found:
        assert found[name] == expected[name], name


@pytest.mark.parametrize("seed", range(24))
def test_any_corpus_by_tasks_is_that_of_the_loop(tmp_path, seed):
    chance, case = random.Random(seed), fuzz.case_of(seed)
    (tmp_path / "corpus").mkdir()
    fuzz.write(case, tmp_path / "corpus", chance)
    settings = case.settings | {"validation": chance.choice([0.0, 0.0, 0.3])}
    settings["limit"] = chance.choice([None, None, 1, 17])
    settings["block"] = chance.choice([1, 300, 1 << 20])
    settings["format"] = chance.choice(["npy", "npy", "parquet"])
    check(tmp_path, [tmp_path / "corpus"], chance, chance.choice([1, 500, 1 << 20]), **settings)


WORDS = ["The", "mill", "stands", "by", "the", "stream,", "and", "1,024", "wheels", "turn.", "Größe", "水车", "it's\n"]


def settings_of(chance):
    strategy = chance.choice(["concat", "split", "best-fit"])
    return {
        "seq_len": chance.choice([3, 16, 50]),
        "strategy": strategy,
        "pad_id": 50256,
        "bos": chance.random() < 0.5,
        "eos": chance.random() < 0.5,
        "overlong": chance.choice(["cut", "cut", "cut", "truncate", "drop", "fault"]),
        "shuffle": chance.choice([None, 3]),
        "shard_size": chance.choice([300, 2000]),
        "validation": chance.choice([0.0, 0.4]),
        "limit": chance.choice([None, None, None, 3]),
        "remainder": chance.choice(["keep", "pad"]) if strategy == "concat" else "keep",
    }


@pytest.mark.parametrize("seed", range(16))
def test_texts_that_go_on_over_several_pieces(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("millstream.corpus.texts.LONG_TEXT", 200)
    chance = random.Random(seed)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(chance.randint(1, 5)):
        text = " ".join(chance.choices(WORDS, k=chance.choice([0, 3, 60, 60, 900])))
        corpus.joinpath(f"{number}.txt").write_text(text, encoding="utf-8")
        if chance.random() < 0.3:
            write_jsonl(corpus / f"{number}b.jsonl", rows(TEXTS[: chance.randint(0, 6)]))
    settings = settings_of(chance)
    if settings["strategy"] == "best-fit":
        settings["window"] = chance.choice([50, 500])
    if settings["shuffle"] is not None:
        settings["shuffle_window"] = chance.choice([50, 500, 5000])
    check(tmp_path, [corpus], chance, chance.choice([1, 300, 2000]), block=chance.choice([64, 500]), **settings)


@pytest.mark.parametrize("seed", range(8))
def test_conversations_with_a_mask(tmp_path, seed, tokenizer):
    chance = random.Random(seed)
    corpus = write_jsonl(tmp_path / "chats.jsonl", chats.rows(seed, 30))
    settings = settings_of(chance) | {"seq_len": 64, "bos": False, "validation": chance.choice([0.0, 0.4])}
    settings |= {"chat": True, "tokenizer": str(tokenizer), "loss": chance.choice(["replies", "all"]), "eos": False}
    settings |= {"format": chance.choice(["npy", "parquet"]), "block": 400, "pad_id": 0}
    check(tmp_path, [corpus], chance, 1000, **settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chats.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("seed", range(6))
def test_ready_ids(tmp_path, seed):
    chance = random.Random(seed)
    ids = [[chance.randrange(100_000) for _ in range(chance.choice([0, 1, 5, 90]))] for _ in range(40)]
    rows = [{"n": number, "input_ids": each} for number, each in enumerate(ids)]
    corpus = write_jsonl(tmp_path / "ids.jsonl.gz", [*rows[:20], b'{"input_ids": ["no"]}', *rows[20:]])
    settings = settings_of(chance) | {"bos": False, "eos": False, "id_field": chance.choice(["n", "id"])}
    check(tmp_path, [corpus], chance, 500, ids_field="input_ids", block=200, **settings)


# --- pieces -----------------------------------------------------------------


def test_a_piece_that_is_not_what_was_put_is_told_from_one_that_is(tmp_path):
    pieces = StoredPieces(at(tmp_path / "spill"))
    ref = pieces.put("a", [b"one", b"", memoryview(b"two")])
    assert (ref.size, bytes(pieces.get(ref))) == (6, b"onetwo")
    assert pieces.put("a", [b"onetwo"]) == ref, "however it is cut"
    (path,) = (tmp_path / "spill").iterdir()
    for damage in (b"onetwO", b"onetw", b"onetwo\0", b""):
        path.write_bytes(damage)
        with pytest.raises(PieceLost, match="the piece a is damaged") as lost:
            pieces.get(ref)
        assert pickle.loads(pickle.dumps(lost.value)).name == "a"
    pieces.drop(ref)
    pieces.drop(ref)
    with pytest.raises(PieceLost, match="the piece a is missing"):
        pieces.get(ref)


def test_what_is_swept_is_what_nobody_needs(tmp_path):
    pieces = StoredPieces(at(tmp_path / "spill"))
    pieces.sweep()
    assert not (tmp_path / "spill").exists()
    refs = [pieces.put(name, [name.encode()]) for name in ("a", "b", "c")]
    (tmp_path / "spill" / "d.piece.01234567.millstream.tmp").write_bytes(b"of one that was killed")
    pieces.sweep({"b"})
    assert [path.name for path in (tmp_path / "spill").iterdir()] == ["b.piece"]
    assert bytes(pieces.get(refs[1])) == b"b"


def test_a_put_that_fails_leaves_nothing(tmp_path):
    def chunks():
        yield b"some"
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        StoredPieces(at(tmp_path / "spill")).put("a", chunks())
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_shard_is_not_written_from_a_damaged_piece(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    pooled = Pooled(tmp_path / "out", tmp_path / "spill", [corpus], random.Random(0), seq_len=8)
    counts = list(pooled.tokenize(Part(0, (Range(0),))))
    (task,) = pooled.tasks(pooled.in_order([Part(0, (Range(0),))], {0: counts}))
    path = next((tmp_path / "spill").iterdir())
    path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)
    with pytest.raises(PieceLost):
        pooled.write(task)
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.endswith(".tmp")]


def test_two_attempts_at_once_write_the_same_shards(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS * 50))
    pooled = Pooled(tmp_path / "out", tmp_path / "spill", [corpus], random.Random(0), seq_len=8, shard_size=2000)
    part = Part(0, (Range(0),))
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda part: without_seconds(pooled.tokenize(part)), [part] * 4))
        assert done == [done[0]] * 4
        tasks = pooled.tasks(pooled.in_order([part], {0: done[0]}))
        first = list(threads.map(pooled.write, tasks * 2))
    assert first[: len(tasks)] == first[len(tasks) :]
    assert not list((tmp_path / "out").glob("*.tmp"))
    for sealed in (sealed for written in first for sealed in written.shards):
        for file in sealed.entry.files:
            assert sha256(tmp_path / "out" / file.name) == file.sha256
