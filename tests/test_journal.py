"""The journal of a pack run: typed events that come back as they were written, and in bounded number."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import runs
from here import pooled
from hypothesis import given
from hypothesis import strategies as st

import millstream
from millstream.errors import RequestError
from millstream.folder.journal import (
    LINES,
    Committed,
    FileState,
    Finished,
    InputUsed,
    Journal,
    Measured,
    NodeChanged,
    NodeTaken,
    NotCompared,
    Process,
    Resumed,
    Rhythm,
    Started,
    Stopped,
    Used,
    WorkerReplaced,
    all_events,
    events,
)
from millstream.runs.pack import measuring
from millstream.store import at

EVENTS = [
    Started(workers=2, ordinal=0),
    Resumed(workers=1, ordinal=7),
    Committed(ordinal=9, bytes=800),
    InputUsed(used=Used(0, "a.jsonl", 0, 9, "ab", FileState(1, 2, 3, 4, 5))),
    NotCompared(documents={"d1": "an unknown word"}),
    WorkerReplaced(why="out of memory"),
    NodeChanged(why="the Ray node b7 is gone"),
    Measured(
        seconds=1.5,
        share=None,
        documents=3,
        ids=4,
        bytes=5,
        faults=0,
        stages={"read": 0.5},
        queue=2,
        spilled=0,
        processes=[Process(7, 1 << 20, 0.25)],
        nodes=[NodeTaken("b7", 2, 1 << 21, 0.5)],
    ),
    Stopped(reason="KeyboardInterrupt: "),
    Finished(seconds=2.5),
]


def test_events_come_back_as_they_were_written(tmp_path):
    journal = Journal(str(tmp_path))
    with pytest.raises(RequestError, match="another millstream is writing to"):
        Journal(str(tmp_path))
    for event in EVENTS:
        journal.write(event)
    journal.close()
    found = list(all_events(at(tmp_path)))
    assert [(type(event), event.time > 1e9) for event in found] == [(type(event), True) for event in EVENTS]
    names = [event.__struct_fields__[1:] for event in EVENTS]
    told = [[getattr(event, name) for name in fields] for event, fields in zip(found, names, strict=True)]
    assert told == [[getattr(event, name) for name in fields] for event, fields in zip(EVENTS, names, strict=True)]
    assert [event.why for event in events(at(tmp_path), WorkerReplaced)] == ["out of memory"]


def test_lines_that_a_crash_cut_or_that_nobody_knows_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "done", "time": 1, "seconds": 2.0}\n{"event": "of another version"}\n{"event": "don')
    journal = Journal(str(tmp_path))
    journal.write(WorkerReplaced(why="lone \ud800 and \udcff, of a file's name"))
    journal.close()
    assert next(type(event) for event in all_events(at(tmp_path))) is Finished
    assert path.read_bytes().splitlines()[2] == b'{"event": "don'
    assert "of a file's name" in json.loads(path.read_bytes().splitlines()[3])["why"]


@given(lines=st.integers(0, 20 * LINES), steps=st.lists(st.floats(0.01, 5000), max_size=50))
def test_the_rhythm_never_writes_more_than_its_interval_allows(lines, steps):
    rhythm, now, written, interval = Rhythm(lines), 0.0, [], 2 ** (lines // LINES)
    for step in steps:
        now += step
        if rhythm.due(now):
            written.append(now)
    assert all(late - early >= interval for early, late in itertools.pairwise(written))
    assert written or not steps


def test_a_week_fits_into_some_thousand_lines():
    rhythm = Rhythm()
    lines = sum(rhythm.due(float(second)) for second in range(7 * 86_400))
    assert 2 * LINES < lines < 10 * LINES


def test_a_run_tells_how_far_it_is(tmp_path, monkeypatch):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(1, 100_000, 0.05))
    monkeypatch.setattr(Rhythm, "due", lambda self, now: True)
    wanted = {"seq_len": 16, "shard_size": 4096, "on_error": "skip", "workers": 1, "block": 2000}
    report = millstream.pack_to(tmp_path / "out", source, **wanted)
    found = list(all_events(at(tmp_path / "out")))
    assert [type(event) for event in (found[0], found[-1])] == [Started, Finished]
    told = [event for event in found if isinstance(event, Measured)]
    assert [event.documents for event in told] == sorted(event.documents for event in told)
    last = told[-1]
    assert (last.documents, last.ids, last.share) == (report.ledger["documents"]["in"], report.ledger["ids"]["in"], 1.0)
    assert last.faults == report.faults > 0
    assert last.stages.keys() >= {"read", "tokenize", "pack and write"}
    assert next(process.pid for process in last.processes) == os.getpid()
    assert all(process.memory > 1 << 20 and process.cpu >= 0 for process in last.processes)


def test_several_workers_tell_the_seconds_of_every_stage(tmp_path):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(1, 30_000))
    with pooled(1, part=3000):
        report = millstream.pack_to(tmp_path / "out", source, seq_len=16, shard_size=4096, workers=2, memory=8 << 30)
    assert {stage for stage, seconds in report.stages.items() if seconds} >= {"read", "tokenize", "pack and write"}


@runs.needs_proc
def test_processes_are_told_with_those_that_they_started():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = {process.pid: process for process in measuring.processes()}
        child.stdin.close()
    assert child.pid in found
    assert next(iter(found)) == os.getpid()


def test_where_the_system_tells_less_it_is_this_process_alone(monkeypatch):
    def nothing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(measuring, "at", nothing)
    [own] = measuring.processes()
    assert own.pid == os.getpid()
    assert own.memory > 10 << 20
    assert own.cpu > 0
