"""What workers on other machines are given, and what is told where a machine will not do."""

import pickle
import sys

import pytest
from helpers import fill_tiktoken_cache, pack
from runs import train_tokenizer

from millstream.corpus.sources import InputShard
from millstream.engines.called import own_shelf
from millstream.errors import RequestError
from millstream.folder.manifest import PIECES
from millstream.records import Ref
from millstream.runs.pack.encode import engine_of
from millstream.runs.pack.objects import ObjectPieces
from millstream.runs.pack.pieces import PieceLost, StoredPieces
from millstream.runs.pack.site import LookAround
from millstream.store import at
from millstream.stream.tokenizers import from_definition, load_tokenizer


def sent(something):
    return pickle.loads(pickle.dumps(something))


def test_a_tokenizer_is_sent_by_content(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    here = load_tokenizer(str(path))
    again = sent(here.again)
    path.unlink()
    there = engine_of(again, here.sha256, "fast")
    assert there.sha256 == here.sha256
    assert there.engine.encode(["Hello world"])[0].tolist() == here.engine.encode(["Hello world"])[0].tolist()


def test_what_is_in_the_package_is_there_too():
    assert sent(load_tokenizer("gpt2").again)() is load_tokenizer("gpt2")


def test_ranks_are_sent_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(fill_tiktoken_cache(tmp_path)))
    here = load_tokenizer("cl100k_base")
    again = sent(here.again)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "elsewhere"))
    there = engine_of(again, here.sha256, "fast")
    assert there is not here
    assert there.engine.encode(["Hello world"])[0].tolist() == [9906, 1917]


def test_another_tokenizer_is_none(tmp_path):
    definition = train_tokenizer(tmp_path / "tokenizer.json").read_text()
    with pytest.raises(Exception, match="has changed"):
        engine_of(from_definition("x", definition).again, "0" * 64, "fast")


def test_ray_is_asked_for_only_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # it may be installed
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n')
    with pytest.raises(RequestError) as raised:
        pack(tmp_path / "out", tmp_path / "a.jsonl", on="ray", workers=None)
    assert "on='ray' needs Ray" in str(raised.value)
    assert "pip install 'millstream[ray]'" in raised.value.words.flags
    assert pack(tmp_path / "out", tmp_path / "a.jsonl").ledger["documents"]["in"] == 1


@pytest.mark.parametrize("on", ["", "slurm", "10.0.0.5", "ray://", "ray:/x:1", "http://a:1", None, 3])
def test_a_place_that_is_none(tmp_path, on):
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n')
    with pytest.raises(RequestError, match="give local, ray, HOST:PORT or ray://HOST:PORT"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", on=on)
    assert not (tmp_path / "out").exists()


def test_who_joins_has_workers_of_ones_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n')
    with pytest.raises(RequestError, match="each machine has its own workers"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", on="ray", join=True)


# --- a look around --------------------------------------------------------------


@pytest.fixture
def look(tmp_path, monkeypatch):
    """One that finds all as it is here."""
    monkeypatch.chdir(tmp_path)
    at(tmp_path / "out" / PIECES).make()
    at(tmp_path / "out" / PIECES).put("seen-from-everywhere", b"abc")
    (tmp_path / "a.jsonl").write_bytes(b"x" * 1000)
    shard = InputShard("a.jsonl", "a.jsonl", "jsonl")
    return lambda out="out", token="abc", size=1000, uri="a.jsonl": sent(
        LookAround(
            str(tmp_path), {f"{out}/{PIECES}": out}, token, [(shard, 1000), (InputShard(uri, uri, "jsonl"), size)]
        )
    )()


def test_a_machine_that_sees_what_the_driver_sees(look):
    found = look()
    assert found.problem is None
    assert found.memory > 1 << 20
    assert found.cores >= 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"out": "elsewhere"}, "does not see elsewhere as this machine does (No such file or directory)"),
        ({"token": "other"}, "does not see out as this machine does (abc)"),
        ({"size": 999}, "does not see a.jsonl as this machine does (1,000 bytes there, 999 here)"),
        ({"uri": "b.jsonl"}, "does not see b.jsonl as this machine does (No such file or directory)"),
    ],
)
def test_a_machine_that_does_not(look, other, told):
    assert look(**other).problem.startswith(told)


# --- pieces that are handed on -----------------------------------------------------


def test_pieces_are_on_the_shelf_and_lasting_ones_are_files(tmp_path):
    shelf = own_shelf()
    pieces = ObjectPieces(StoredPieces(at(tmp_path / "pieces")), shelf)
    ref = pieces.put("a", [b"12", memoryview(b"345")])
    kept = pieces.lasting.put("b", [b"678"])
    shelf.given, shelf.tray = shelf.tray, {}
    there = sent(pieces)
    assert (bytes(there.get(ref)), bytes(there.get(kept))) == (b"12345", b"678")
    assert there.has(ref)
    assert there.has(kept)
    with pytest.raises(PieceLost, match="is damaged"):
        there.get(Ref("a", 5, ref.crc + 1))
    there.drop(kept)
    shelf.given = {}
    for lost in (ref, kept):
        assert not there.has(lost)
        with pytest.raises(PieceLost, match="is missing"):
            there.get(lost)
    with there.turn():
        pass
