"""The engine: results in order, in bounded memory, and no process left behind however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from itertools import count

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream.engines import ordered
from millstream.engines.local import Local
from millstream.engines.ordered import map_ordered
from millstream.engines.worker import Desk
from millstream.errors import WorkerDied

pytestmark = runs.needs_proc


@pytest.fixture(autouse=True)
def in_time():
    with runs.in_time():
        yield


@pytest.mark.parametrize("workers", [1, 2, 5])
@settings(deadline=None, max_examples=4)
@given(st.lists(st.integers(0, 2000), max_size=30), st.integers(1, 5000))
def test_results_come_in_the_order_of_the_units(workers, costs, window):
    found = map_ordered(
        runs.spin, enumerate(costs), workers=workers, window_bytes=window, size=lambda unit: max(1, unit[1])
    )
    assert list(found) == list(range(len(costs)))
    assert not runs.children()


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 20))
def test_no_more_than_the_window_is_in_flight(sizes, window):
    workers = 2
    flying, most = [], 0

    def units():
        nonlocal most
        for number, size in enumerate(sizes):
            # All that was asked for before is with the workers or waits, if it was not handed on.
            assert sum(flying) <= window or len(flying) == 1
            most = max(most, len(flying))
            flying.append(size)
            yield number, size

    for number in map_ordered(runs.spin, units(), workers=workers, window_bytes=window, size=lambda unit: unit[1]):
        assert flying.pop(0) == sizes[number]
    assert not flying
    assert most <= 2 * workers or window > 2 * workers


@pytest.mark.parametrize("workers", [2, 3])
def test_results_that_wait_for_a_slow_unit_count_as_in_flight(tmp_path, monkeypatch, workers):
    window, gate = 8, tmp_path / "gate"
    handed_on, most = 0, 0
    monkeypatch.setattr(ordered, "_PATIENCE", runs.PATIENCE)  # or a slow machine gives out fewer units than fit

    def units():
        nonlocal most
        for number in range(50):
            most = max(most, number - handed_on)
            assert number - handed_on <= window
            if number == window:  # it is asked for when as many are given out as may be
                gate.touch()
            yield number, "" if number else str(gate)

    for number in map_ordered(runs.waits_for, units(), workers=workers, window_bytes=window):
        assert number == handed_on
        handed_on += 1
    assert handed_on == 50
    assert most == window, "the first unit was waited for, so the window filled up"


def test_a_unit_larger_than_the_window_goes_alone():
    found = list(map_ordered(runs.spin, ((n, 50) for n in range(6)), workers=2, window_bytes=1, size=lambda u: u[1]))
    assert found == list(range(6))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_endless_source_is_not_read_ahead_of_need(workers):
    asked = count()
    results = map_ordered(abs, asked, workers=workers, window_bytes=4)
    assert next(results) == 0
    assert next(asked) <= 6
    results.close()
    assert not runs.children()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_an_exception_is_raised_where_its_unit_stands(workers):
    found = []
    units = [(number, 3000 if number < 5 else 0) for number in range(20)]
    with pytest.raises(ValueError, match="five"):
        found.extend(map_ordered(runs.fails_at_five, units, workers=workers))
    assert not runs.children()
    results = map_ordered(runs.fails_at_five, units, workers=workers)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert not runs.children()


def test_an_exception_of_the_source_leaves_no_process():
    def units():
        yield from range(4)
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        list(map_ordered(abs, units(), workers=2))
    assert not runs.children()


def test_a_worker_killed_from_outside_is_started_anew():
    told = []
    results = map_ordered(runs.own_pid, range(300), workers=2, window_bytes=40, on_death=told.append)
    first = next(results)
    assert first in runs.children()
    os.kill(first, signal.SIGKILL)
    found = [first, *results]
    assert len(found) == 300
    assert len(set(found)) == 3
    assert told == ["killed by signal 9"]
    assert not runs.children()


def test_many_idle_workers_killed_at_once_end_no_run():
    """As when the system is out of memory: none of them was to blame, and none died twice."""
    told = []
    with contextlib.closing(Local(5, on_death=told.append)) as pool:
        for each in sorted(runs.children())[1:]:
            os.kill(each, signal.SIGKILL)
            os.waitid(os.P_PID, each, os.WEXITED | os.WNOWAIT)
        pool.submit(0, runs.own_pid, 0)
        assert [number for number, _ in runs.answers_of(pool)] == [0]
    assert told == ["killed by signal 9"] * 4
    assert not runs.children()


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_a_unit_that_killed_its_worker_may_do_so_no_more(tmp_path, bad):
    units = [(number, str(tmp_path / "twice") if number == bad else "") for number in range(20)]
    assert list(map_ordered(runs.kills_twice, units, workers=2)) == list(range(20))
    assert not runs.children()


@pytest.mark.parametrize("bad", [0, 3, 40])
def test_a_unit_that_kills_its_worker_three_times_is_named(bad):
    found, told = [], []
    with pytest.raises(WorkerDied, match=rf"killed by signal 9\), 3 times at unit {bad}; often"):
        found.extend(
            map_ordered(runs.KillsItself(bad), range(60), workers=2, named=lambda n: f"unit {n}", on_death=told.append)
        )
    assert set(told) == {"killed by signal 9"}
    assert 2 <= len(told) <= 3  # the first may be taken for that of a unit whose answer was lost with it
    assert not runs.children()


def test_a_worker_that_cannot_even_begin_is_an_error():
    with pytest.raises(WorkerDied, match=r"exit code 7\), 3 times at [01]"):
        list(map_ordered(runs.exits, range(10), workers=2))
    assert not runs.children()


@pytest.mark.parametrize("ahead", [None, 0, 1, 3])
@pytest.mark.parametrize("at", [-1, 0, 1, 4])
def test_a_generator_answers_in_order_and_once_though_its_worker_dies(tmp_path, ahead, at):
    with contextlib.closing(Local(2)) as pool:
        for number in range(4):
            pool.submit(number, runs.counts_up, (5, str(tmp_path / "died"), at if number == 1 else -1), ahead=ahead)
            if ahead == 0:
                pool.more(number)
        found = runs.answers_of(pool)
    for number in range(4):
        assert [result for which, result in found if which == number] == [0, 1, 2, 3, 4, "end"]
    assert (tmp_path / "died").exists() == (at >= 0)


def test_a_generator_that_kills_behind_an_answer_is_named():
    with contextlib.closing(Local(1, named=lambda unit: f"unit {unit}")) as pool:
        pool.submit(0, runs.dies_behind_the_first, "x")
        with pytest.raises(WorkerDied, match=r"exit code 7\), 3 times at unit x"):
            runs.answers_of(pool)
    assert not runs.children()


def test_what_a_generator_may_not_answer_yet_keeps_nobody_waiting():
    with contextlib.closing(Local(1)) as pool:
        pool.submit(0, runs.counts_up, (3, "", -1), ahead=1)
        pool.submit(1, abs, -5)
        found = [(done.number, done.result) for done in runs.next_of(pool, 2)]
        assert found == [(0, 0), (1, 5)]
        for _ in range(3):
            pool.more(0)
        assert runs.answers_of(pool) == [(0, 1), (0, 2), (0, "end")]


def test_what_is_urgent_is_done_first():
    answers = []
    desk = Desk(answers.append)
    desk.take(("function", runs.counts_up))
    desk.take(("function", abs))
    for message in ((0, 0, (2, "", -1), False, None), (1, 1, -1, False, None), (2, 1, -2, True, None)):
        desk.take(("unit", *message))
    desk.step()
    desk.take(("unit", 3, 1, -3, True, None))
    while desk.step():
        pass
    assert [number for number, *_ in answers] == [2, 3, 0, 0, 0, 1]


def test_closing_early_leaves_no_process():
    results = map_ordered(runs.own_pid, count(), workers=3)
    assert next(results) in runs.children()
    assert len(runs.children()) == 3
    results.close()
    assert not runs.children()


def interrupt_here():
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


def interrupt_elsewhere():
    """As the system may, where this thread has signals blocked."""

    def unblocked():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        interrupt_here()

    thread = threading.Thread(target=unblocked)
    thread.start()
    thread.join()


@pytest.mark.parametrize("interrupt", [interrupt_here, interrupt_elsewhere])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupt_while_a_worker_is_started_is_not_lost_and_leaves_no_process(monkeypatch, number, interrupt):
    """The third is one that is started anew, in the place of one that has died."""
    start, started = subprocess.Popen, []

    def interrupted(*given, **named):
        started.append(given)
        if len(started) == number:
            interrupt()
        return start(*given, **named)

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(map_ordered(runs.exits, range(10), workers=2))
    assert len(started) == max(2, number)
    assert not runs.children()


def test_one_worker_is_this_process_and_more_are_others():
    assert set(map_ordered(runs.own_pid, range(5))) == {os.getpid()}
    assert os.getpid() not in set(map_ordered(runs.own_pid, range(5), workers=2))


def test_what_a_worker_prints_does_not_disturb_the_results():
    assert list(map_ordered(runs.prints, range(10), workers=2)) == list(range(10))


def test_results_larger_than_a_pipe_do_not_lock_up():
    units = [bytes([number]) * 3_000_000 for number in range(8)]
    assert list(map_ordered(bytes, units, workers=2, window_bytes=10**9)) == units


def test_a_script_without_a_main_guard(tmp_path):
    corpus = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(1, 100_000))
    script = tmp_path / "script.py"
    script.write_text(
        "import millstream\n"
        "print('started')\n"
        f"report = millstream.pack_to('out', {str(corpus)!r}, workers=2, seq_len=64)\n"
        "print(report.samples, report.workers)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=runs.PATIENCE
    )
    assert done.returncode == 0, done.stderr
    samples = len(millstream.open(tmp_path / "out"))
    assert samples > 0
    assert done.stdout.split("\n") == ["started", f"{samples} 2", ""]


def test_a_generator_that_is_given_up_is_done_and_its_place_is_free():
    with contextlib.closing(Local(1, depth=2)) as pool:
        pool.submit(0, runs.counts_up, (3, "", -1), ahead=1)
        pool.submit(1, runs.counts_up, (3, "", -1), ahead=1)
        found = [done.number for done in runs.next_of(pool, 2)]
        assert (found, pool.room) == ([0, 1], False)
        pool.give_up(0)
        assert [(done.number, done.last) for done in pool.done()] == [(0, True)]
        assert pool.room
        pool.give_up(0)  # once more does no harm
        pool.submit(2, abs, -5)
        assert [(done.number, done.result) for done in pool.done()] == [(2, 5)]


def test_what_is_given_up_before_it_is_begun_is_not_done():
    answers = []
    desk = Desk(answers.append)
    desk.take(("function", abs))
    desk.take(("unit", 0, 0, -1, False, None))
    desk.take(("give up", 0))
    assert not desk.step()
    assert answers == [(0, "done", None)]
