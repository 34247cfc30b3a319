"""Leases: one holder at a time by its own clock, whatever clocks say and whoever dies, and nothing waits for ever."""

import os

import pytest
from helpers import without_fsync
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.store.lease import Leases, beating
from millstream.store.local import LocalStore

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)
PATIENCE = 30
TASKS = ("one", "two")


class Process:
    """A process with a clock that is wrong by years; it may be stopped, and goes on as if nothing had been."""

    def __init__(self, world, number):
        self.world, self.alive, self.stopped = world, True, False
        skew = number * 1e8
        self.leases = Leases(LocalStore(world.folder), f"p{number}", patience=PATIENCE, clock=lambda: world.now + skew)
        self.leases.beat()
        self.mine = set()

    def holds(self, task):
        return self.alive and task in self.mine and self.leases.fresh


class World:
    def __init__(self, folder, processes):
        self.folder, self.now, self.done = str(folder), 0.0, set()
        self.processes = [Process(self, number) for number in range(processes)]

    def step(self, which, what, task):
        process = self.processes[which % len(self.processes)]
        if not process.alive:
            self.processes.append(Process(self, len(self.processes)))
        elif what == "die":
            process.alive = False
        elif what == "stop":
            process.stopped = not process.stopped
        elif what == "leave":
            process.leases.leave()
            process.alive = False
        elif process.stopped:
            pass
        elif what == "beat":
            process.leases.beat()
        elif what == "take" and task not in process.mine and process.leases.fresh and process.leases.take(task):
            process.mine.add(task)
        elif what == "finish" and task in process.mine:
            self.done.add(task)
            process.mine.discard(task)
            process.leases.done(task)

    def check(self):
        for task in set(TASKS) - self.done:  # what is done may be taken, and found to be done
            assert sum(process.holds(task) for process in self.processes) <= 1

    def end(self):
        """All who live go on as they should: how long until everything is done."""
        start = self.now
        self.processes.append(Process(self, len(self.processes)))
        while self.done < set(TASKS):
            self.now += 1
            for process in self.processes:
                if process.alive and not process.stopped:
                    process.leases.beat()
                    for task in TASKS:
                        if task in process.mine or (task not in self.done and process.leases.take(task)):
                            self.done.add(task)
            assert self.now - start <= 2 * PATIENCE + 2, "they wait for ever"


STEPS = st.tuples(
    st.integers(0, 5),
    st.sampled_from(["beat", "beat", "take", "take", "finish", "die", "stop", "leave"]),
    st.sampled_from(TASKS),
    st.sampled_from([0, 1, 9, 29, 31]),
)


@settings(deadline=None, max_examples=50)
@given(processes=st.integers(1, 3), steps=st.lists(STEPS, max_size=40))
def test_one_holder_at_a_time_and_none_for_ever(tmp_path_factory, processes, steps):
    world = World(tmp_path_factory.mktemp("leases"), processes)
    for which, what, task, seconds in steps:
        world.step(which, what, task)
        world.check()
        world.now += seconds
        world.check()
    world.end()


def pair(folder, now):
    made = [Leases(LocalStore(str(folder)), name, patience=PATIENCE, clock=lambda: now[0]) for name in ("one", "two")]
    for leases in made:
        leases.beat()
    return made


def test_what_was_left_is_taken_at_once(tmp_path):
    one, two = pair(tmp_path, [0.0])
    assert one.take("task")
    assert not two.take("task")
    assert two.holder("task") == "one"
    one.leave()
    assert two.take("task")


def test_a_slow_holder_is_seen_again(tmp_path):
    now = [0.0]
    one, two = pair(tmp_path, now)
    assert one.take("first")
    assert one.take("second")
    assert not two.take("first")
    now[0] = PATIENCE
    assert two.take("first")
    assert not one.fresh
    one.beat()
    two.beat()
    assert one.fresh
    assert not one.holds("first")
    assert two.holds("first")
    assert one.holds("second")
    assert not two.take("second")
    one.done("first")  # it was done twice
    two.done("first")
    assert sorted(name for name in os.listdir(tmp_path) if name != "beats") == ["second.1"]


def test_who_is_late_and_was_missed_by_nobody_still_holds_what_it_has(tmp_path):
    """A disk or a server may stand still for a while, and with it all who share it."""
    now = [0.0]
    one, two = pair(tmp_path, now)
    assert one.take("task")
    assert not two.take("task")
    now[0] = PATIENCE
    assert not one.fresh
    assert one.holds("task")
    assert one.fresh
    assert not two.take("task")  # who has heard of it since


def test_a_lease_that_was_begun_by_a_process_killed_in_it_is_taken_in_time(tmp_path):
    now = [0.0]
    one, _ = pair(tmp_path, now)
    (tmp_path / "task.1").touch()
    assert not one.take("task")
    now[0] = PATIENCE
    assert one.take("task")


def test_beats_are_seen_until_the_block_ends(tmp_path):
    leases = Leases(LocalStore(str(tmp_path)), "me", patience=0.003)
    with beating(leases):
        first = (tmp_path / "beats" / "me").read_bytes()
        while (tmp_path / "beats" / "me").read_bytes() == first:
            pass
    assert not (tmp_path / "beats" / "me").exists()
    assert not leases.fresh
