"""Whatever a corpus holds and however it is packed, those who join write what one does, though one of them is killed
and another one comes late."""

import random

import chats
import pytest
import runs
from helpers import pack, run_bytes, without_fsync, write_jsonl
from joined import Killed, World, several
from test_resume import write_kind

import millstream
from millstream.folder.manifest import is_journal

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)

PLAIN = {"seq_len": 16, "shard_size": 1024, "on_error": "skip"}
IDS = {"tokenizer": None, "ids_field": "ids", "pad_id": 0}
CHAT = {"chat": True, "seq_len": 32}


def ready_ids(path, count):
    """Rows of ids, some of which are none."""
    rng = random.Random(1)
    rows = [{"id": f"d{number}", "ids": rng.choices(range(1, 99), k=rng.randrange(40))} for number in range(count)]
    return write_jsonl(path, [{"ids": -1}, *rows, {"ids": "none"}])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for kind in ("plain", "gzip", "zstd", "parquet", "texts"):
        (root / kind).mkdir()
        write_kind(root / kind, kind, runs.lines(2, 9_000, 0.1))
    write_jsonl(root / "chat" / "a.jsonl", [*chats.rows(3, 50), {"id": "bad"}, *chats.rows(4, 20)])
    ready_ids(root / "ids" / "a.jsonl", 300)
    chats.write_tokenizer(root / "tokenizer")
    return root


WAYS = [
    ("plain", {"validation": 0.3}),
    ("plain", {"limit": 40}),
    ("plain", {"shuffle": 3, "shuffle_window": 1500}),
    ("plain", {"strategy": "best-fit", "window": 1500, "max_segments": 4}),
    ("plain", {"format": "parquet,megatron,mds,datatrove,litdata,llm.c"}),
    ("plain", {"remainder": "pad", "overlong": "truncate", "strategy": "split"}),
    ("gzip", {"limit": 40, "shuffle": 3, "shuffle_window": 1500}),
    ("zstd", {"validation": 0.3, "strategy": "best-fit", "window": 1500}),
    ("parquet", {"limit": 40, "eos": True}),
    ("texts", {"validation": 0.3, "eos": True}),
    ("texts", {"limit": 9}),
    ("ids", IDS),
    ("ids", {**IDS, "strategy": "best-fit", "window": 500, "shuffle": 1, "limit": 100, "validation": 0.3}),
    ("chat", CHAT),
    ("chat", {**CHAT, "strategy": "best-fit", "window": 2000, "shuffle": 5, "validation": 0.3, "format": "npy,mds"}),
    ("chat", {**CHAT, "loss": "all", "limit": 30, "overlong": "drop"}),
]


@pytest.mark.parametrize("death", [20, 40])
@pytest.mark.parametrize(("kind", "way"), WAYS, ids=lambda given: given if isinstance(given, str) else "-".join(given))
def test_those_who_join_write_what_one_does(corpora, tmp_path, kind, way, death):
    tokenizer = {"tokenizer": str(corpora / "tokenizer")} if kind == "chat" else {}
    wanted = {**PLAIN, **tokenizer, **way}
    pack(tmp_path / "whole", corpora / kind, **wanted, memory=8 << 30)
    world = World(tmp_path / "out", [corpora / kind], workers=1, **wanted)
    with several(death, world, part=500, piece=300):
        killed, second = world.join(death), world.join()
        while not killed.over:
            world.step(0)
            world.step(1)
        assert isinstance(killed.error, Killed)
        assert not second.over
        third = world.join()
        world.end()
    assert second.report
    assert third.report
    out, whole = run_bytes(tmp_path / "out"), run_bytes(tmp_path / "whole")
    assert {name: data for name, data in out.items() if not is_journal(name)} == whole
    assert millstream.verify(tmp_path / "out").problems == []
