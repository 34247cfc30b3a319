"""The engine on a Ray cluster keeps the contract that the one of this machine keeps."""

import contextlib
import os
import socket
from itertools import count, islice

import numpy as np
import pytest
import ray
import runs

from millstream.engines.called import own_shelf
from millstream.engines.ray import Ray
from millstream.errors import RequestError, WorkerDied

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def in_time():
    with runs.in_time():
        yield


def puts(name):
    """The node where it does."""
    own_shelf().put(name, np.zeros(200_000, np.uint8))
    return ray.get_runtime_context().get_node_id()


def spins(unit):
    """The same, after some work."""
    runs.spin(unit)
    return ray.get_runtime_context().get_node_id()


def finds(name):
    data = own_shelf().get(name)
    return None if data is None else len(data)


def test_units_are_done_though_their_workers_die(nodes, tmp_path):
    told = []
    with contextlib.closing(Ray(None, on_death=told.append)) as pool:
        assert pool.slots == 2
        for number in range(4):
            unit = (5, str(tmp_path / "died"), 3 if number == 1 else -1)
            pool.submit(number, runs.counts_up, unit, ahead=0 if number == 2 else 1)
        pool.more(2)
        for number in range(4, 12):
            pool.submit(number, runs.kills_twice, (number, str(tmp_path / "twice") if number == 7 else ""))
        found = runs.answers_of(pool)
        # What a generator may not answer keeps nobody waiting, and when it is given up its place is free.
        for number in range(20, 24):
            pool.submit(number, runs.counts_up, (3, "", -1), ahead=1)
        pool.submit(24, abs, -5)
        early = [(done.number, done.result) for done in runs.next_of(pool, 5)]
        assert not pool.room
        for number in range(20, 24):
            pool.give_up(number)
        assert sorted(done.number for done in runs.next_of(pool, 4)) == [20, 21, 22, 23]
        pool.submit(25, runs.fails_at_five, (5, 0))
        (failed,) = pool.done()
    for number in range(4):
        assert [result for which, result in found if which == number] == [0, 1, 2, 3, 4, "end"]
    assert sorted(result for number, result in found if number >= 4) == list(range(4, 12))
    assert sorted(early) == [(20, 0), (21, 0), (22, 0), (23, 0), (24, 5)]
    assert isinstance(failed.error, ValueError)
    assert 3 <= len(told) <= 4
    assert all("127.0.0.1" in words for words in told)


def test_a_unit_that_kills_its_worker_three_times_is_named(nodes):
    with contextlib.closing(Ray(1, named=lambda unit: f"unit {unit}")) as pool:
        for number in range(6):
            pool.submit(number, runs.KillsItself(3), number)
        with pytest.raises(WorkerDied, match="3 times at unit 3; often"):
            runs.answers_of(pool)


def test_nodes_that_join_get_work_and_others_go_on_without_those_that_leave(nodes):
    told, numbers = [], count()
    pool = Ray(None, on_node=told.append, depth=40)
    with contextlib.closing(pool), nodes.more() as more:
        nodes_seen = set()
        while more.node_id not in nodes_seen:  # until it works: what is put meanwhile would fill the others' memory
            for number in islice(numbers, 12):
                pool.submit(number, spins, (number, 200))
            nodes_seen |= {node for _, node in runs.answers_of(pool)}
        there, put = set(), []
        while not there:
            put += (some := list(islice(numbers, 12)))
            for number in some:
                pool.submit(number, puts, str(number))
            found = runs.answers_of(pool)
            assert len(found) == len(some)
            there |= {number for number, node in found if node == more.node_id}
        assert pool.slots == 3
        some = list(islice(numbers, 60))
        for number in some:
            pool.submit(number, runs.spin, (number, 3000))
        nodes.kill(more)
        found = runs.answers_of(pool)
        while pool.slots > 2:
            some.append(number := next(numbers))
            pool.submit(number, runs.spin, (number, 200))
            found += runs.answers_of(pool)
        assert sorted(found) == [(number, number) for number in some]
        # What lay there is gone, and what lies elsewhere is handed to whoever needs it.
        for number in put:
            pool.submit(number, finds, str(number), needs=[str(number)])
        assert {number for number, size in runs.answers_of(pool) if size is None} == there
        pool.shelf.drop(kept := str(min(set(put) - there)))
        assert pool.shelf.get(kept) is None
    assert told == [f"the Ray node {socket.gethostname()} (127.0.0.1) is gone"]


@pytest.mark.parametrize("name", ["millstream", "fastokens", "pyarrow"])
def test_a_node_with_another_version_is_refused_and_one_that_joins_is_left_out(nodes, tmp_path, name):
    other = tmp_path / f"{name}-99.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    told, died = [], []
    pool = Ray(None, on_node=told.append, on_death=died.append)
    path = f"{tmp_path}:{os.environ['PYTHONPATH']}"
    with contextlib.closing(pool), nodes.more(env_vars={"PYTHONPATH": path}):
        while not told:
            pool.submit(0, runs.spin, (0, 200))
            runs.answers_of(pool)
        assert pool.slots == 2
        with pytest.raises(RequestError, match=rf"Ray node .*127\.0\.0\.1.* has {name} 99\.0, and this machine"):
            Ray(None)
    assert not died
    assert f"has {name} 99.0, and this machine {name}" in told[0]
    assert "left out" in told[0]
