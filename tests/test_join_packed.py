"""A large packed file is unpacked by one of those who join and tokenized by all, whoever is killed, or slow."""

import os
from collections import Counter

import pytest
import runs
from helpers import pack, run_bytes, without_fsync
from joined import PATIENCE, Killed, World, several

from millstream.corpus import sources
from millstream.folder.manifest import is_journal
from millstream.runs.pack import hearing
from millstream.runs.pack.joiner import UNPACKED
from millstream.runs.pack.order import InOrder
from millstream.runs.pack.pieces import StoredPieces
from millstream.store.lease import Leases

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)

WANTED = {"seq_len": 16, "shard_size": 1024, "on_error": "skip", "strategy": "best-fit", "window": 1500}
PART = 400


@pytest.fixture
def world(tmp_path):
    """Two packed files, of which the first is cut off, and one that is not packed."""
    corpus = [
        runs.write_gzip(tmp_path / "a.jsonl.gz", runs.lines(1, 9_000, 0.1)),
        runs.write_plain(tmp_path / "b.jsonl", runs.lines(2, 1_000)),
        runs.write_zstd(tmp_path / "c.jsonl.zst", runs.lines(3, 4_000)),
    ]
    os.truncate(corpus[0], corpus[0].stat().st_size - 300)
    pack(tmp_path / "whole", corpus, **WANTED, memory=8 << 30)
    return World(tmp_path / "out", corpus, workers=1, block=200, **WANTED)


@pytest.fixture
def put(monkeypatch):
    """How often each piece was put whose name begins with `unpacked`."""
    counted, whole = Counter(), StoredPieces.put

    def put(self, name, chunks):
        counted[name] += name.startswith("unpacked-")
        return whole(self, name, chunks)

    monkeypatch.setattr(StoredPieces, "put", put)
    return counted


def is_whole(world):
    out, whole = run_bytes(world.out), run_bytes(world.out.with_name("whole"))
    return {name: data for name, data in out.items() if not is_journal(name)} == whole


def unpacked(world):
    return list(world.out.glob("pieces/unpacked-*.piece"))


def test_all_tokenize_what_one_has_unpacked_once(world, put):
    with several(1, world, part=PART, large=0):
        members = [world.join() for _ in range(3)]
        world.end()
    done = [int(member.report.shared.split()[0]) for member in members]
    assert sorted(done)[1] > 2
    assert len(+put) > 10
    assert max(put.values()) == 1
    assert is_whole(world)


@pytest.mark.parametrize("first", range(1, 20, 4))
def test_another_one_goes_on_with_what_was_killed_at_any_moment(world, first):
    with several(first, world, part=PART, large=0):
        for change in range(first, first + 100, 20):  # of its own, each
            world.join(change)
        world.end()
    assert any(isinstance(member.error, Killed) for member in world.members)
    assert is_whole(world)


def test_who_was_taken_for_dead_unpacks_the_same_and_leaves_nothing(world, put):
    most = []
    with several(1, world, part=PART, large=0):
        slow = world.join()
        while not unpacked(world):
            slow.step()
            assert not slow.over, slow.error
        other = world.join()
        for _ in range(5):
            other.step()
            world.now += PATIENCE / 2
        for number in range(60):
            world.step(number)
            most.append(len(unpacked(world)))
        world.end()
    assert max(put.values()) == 2
    assert max(most) <= 2 * UNPACKED + 2
    assert is_whole(world)


def test_no_more_is_unpacked_than_may_lie_about(world, monkeypatch):
    take, found = Leases.take, []
    monkeypatch.setattr(Leases, "take", lambda self, task: not task.startswith("part-") and take(self, task))
    with several(1, world, part=PART, large=0):
        world.join()
        world.join()
        for number in range(100):
            world.step(number)
            found.append(len(unpacked(world)))
        assert UNPACKED <= max(found) <= UNPACKED * 2 + 2
        monkeypatch.setattr(Leases, "take", take)
        world.end()
    assert is_whole(world)


@pytest.mark.parametrize("lose", [os.unlink, lambda path: os.truncate(path, 9), lambda path: path.write_bytes(b"")])
def test_what_was_unpacked_and_is_lost_is_read_again(world, lose):
    with several(1, world, part=PART, large=0):
        world.join()
        world.join()
        for number in range(60):
            world.step(number)
            for path in unpacked(world)[:1]:
                lose(path)
        world.end()
    assert is_whole(world)


def test_what_does_not_follow_on_what_was_told_is_refused(world):
    with several(1, world, part=PART, large=0):
        first = world.join()
        while not list(world.out.glob("records/*/unpack-0-0001.told")):
            first.step()
        world.members.clear()
        world.now += PATIENCE
        with pytest.MonkeyPatch.context() as patch:  # of this block alone, as `several` sets it as well
            patch.setattr(sources, "READ", 57)  # another way to cut it, as of another file
            other = world.join()
            while not other.over:
                other.step()
                world.now += PATIENCE / 2
    assert "a.jsonl.gz is not the same for all that join this run" in str(other.error)


def test_who_comes_late_holds_little_of_what_was_unpacked(world, monkeypatch):
    held, put_before = [], InOrder.put_before

    def put(self, packed, found):
        put_before(self, packed, found)
        held.append(self.unpacked)

    monkeypatch.setattr(InOrder, "put_before", put)
    monkeypatch.setattr(hearing, "_TAKEN", 3)
    with several(1, world, part=PART, large=0):
        first = world.join()
        while len(list(world.out.glob("records/*/unpack-0-*.told"))) < 12:
            first.step()
        world.members.clear()
        world.now += PATIENCE
        held.clear()
        world.join()
        world.end()
    assert len(held) > 12
    assert max(held) <= 4
    assert is_whole(world)


def test_of_many_packed_files_each_is_a_part(world, put, monkeypatch):
    monkeypatch.setattr("millstream.runs.pack.joining.PARTS", 2)
    with several(1, world, part=PART, large=0):
        world.join()
        world.join()
        world.end()
    assert not +put
    assert is_whole(world)
