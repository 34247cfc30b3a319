"""Who writes a folder where no system keeps a lock: one at a time, and told by name."""

import contextlib
import os
import signal
from functools import partial

import pytest
from runs import wait_until

from millstream.errors import RequestError, RunError
from millstream.store.held import held, own_name
from millstream.store.lease import Leases
from millstream.store.local import LocalStore

ELSEWHERE = "elsewhere.7.boot.space.start.token"
PATIENCE = 0.4


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path))


@contextlib.contextmanager
def elsewhere(function):
    """A process that enters what a function gives, and stays until it is killed: its number."""
    done, say = os.pipe()
    over, end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(end)
            entered = function()
            entered.__enter__()
            os.write(say, b"1")
            os.read(over, 1)
        finally:
            os._exit(1)
    os.close(say)  # so that a child that has failed is heard of
    assert os.read(done, 1) == b"1"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for file in (done, over, end):
            os.close(file)


def test_another_process_is_refused_by_name_until_it_is_killed(store):
    with elsewhere(lambda: held(store, "to it")) as pid:
        told = rf"another millstream is writing to it \(process {pid} of "
        with pytest.raises(RequestError, match=told), held(store, "to it"):
            pass
    with held(store, "to it") as mine:  # at once, as it is known to have ended
        mine.check()
    assert store.list() == []


def test_one_on_another_machine_is_waited_for_and_then_taken_for_dead(store):
    store.put("writer.1", ELSEWHERE.encode())
    store.put(f"beats/{ELSEWHERE}", b"1")
    with held(store, "to it", PATIENCE):
        assert store.read("writer.2").decode().startswith(own_name().rpartition(".")[0])
    assert store.list() == []


class _Beats(LocalStore):
    """A folder in which the process elsewhere has beaten again whenever one looks."""

    def read(self, name, *between):
        before = super().read(name, *between)
        if name == f"beats/{ELSEWHERE}":
            self.put(name, b"%d" % (int(before) + 1))
        return before


def test_one_on_another_machine_that_beats_is_refused(tmp_path):
    store = _Beats(str(tmp_path))
    store.put("writer.1", ELSEWHERE.encode())
    store.put(f"beats/{ELSEWHERE}", b"0")
    with pytest.raises(RequestError, match=r"process 7 of elsewhere"), held(store, "to it", PATIENCE):
        pass
    assert store.read("writer.1").decode() == ELSEWHERE


def test_who_cannot_be_seen_for_too_long_says_so(store, monkeypatch):
    """A beat that succeeds counts from its own time, and one that fails does not."""
    now, tried, away = [0.0], [], []
    put = LocalStore.put

    def putting(*given):
        tried.append(now[0])
        if away:
            raise OSError("away")
        return put(*given)

    monkeypatch.setattr(LocalStore, "put", putting)
    monkeypatch.setattr("millstream.store.held.Leases", partial(Leases, clock=lambda: now[0]))
    with held(store, "to it", PATIENCE) as mine:
        mine.check()
        now[0] = 1000.0
        # The first of them may have begun before that by its own clock, and the third begins when the second has ended.
        wait_until(lambda: tried.count(1000.0) > 2)
        mine.check()
        away.append(True)
        now[0] += PATIENCE / 2
        wait_until(lambda: tried[-1] > 1000.0)
        mine.check()
        now[0] += PATIENCE / 2
        with pytest.raises(RunError, match="another millstream may be writing to it by now"):
            mine.check()
