"""What `ask` writes over: no input, no file of anybody else's, and its own output only with more in its place."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import small_disk
from runs import PATIENCE, wait_until, without_progress
from test_asking import Held, command, journalled, nobody, prompts_file, rows_of, serving, settings_for

from millstream.errors import RequestError, RunError
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency
from millstream.runs.ask.answers import AnswerJournal
from millstream.runs.ask.asking import ask_to
from millstream.runs.ask.output import temporary_of

NOWHERE = "http://127.0.0.1:9/v1"


def ask(*arguments, **more):
    call = [sys.executable, "-m", "millstream", "ask", *map(str, arguments)]
    call += ["--model", "simulated", "--base-url", NOWHERE]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(call, text=True, timeout=PATIENCE, **more)


def other_name(kind, path, other):
    """Another name of the same file."""
    if kind == "the same":
        return path
    if kind == "from here":
        return os.path.relpath(path)
    (os.symlink if kind == "symlink" else os.link)(path, other)
    return str(other)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
@pytest.mark.parametrize("kind", ["the same", "from here", "symlink", "hard link"])
def test_an_output_that_is_the_prompts_is_refused(tmp_path, kind, flags):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3)
    before = Path(prompts).read_bytes()
    done = ask(prompts, "--out", other_name(kind, prompts, tmp_path / "other.jsonl"), *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is an input itself" in done.stderr
    assert Path(prompts).read_bytes() == before
    assert not list(tmp_path.glob("*.run"))


def test_parquet_that_would_be_written_over_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["one", "two"]}), path)
    before = path.read_bytes()
    done = ask(path, "--out", path, "--overwrite")
    assert (done.returncode, path.read_bytes()) == (2, before)
    assert "is an input itself" in done.stderr


def test_standard_streams_that_are_the_same_file_are_refused(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3)
    before = Path(prompts).read_bytes()
    with open(prompts, "rb") as source:
        done = ask("-", "--out", prompts, "--overwrite", stdin=source)
    assert done.returncode == 2
    assert "is an input itself (standard input)" in done.stderr
    for name in "-", prompts:
        with open(prompts, "rb") as source, open(prompts, "ab") as target:
            call = [
                sys.executable,
                "-m",
                "millstream",
                "ask",
                name,
                "--out",
                "-",
                "--model",
                "m",
                "--base-url",
                NOWHERE,
            ]
            done = subprocess.run(
                call, stdin=source, stdout=target, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
            )
        assert done.returncode == 2
        assert "standard output is an input itself" in done.stderr
    assert Path(prompts).read_bytes() == before


def test_prompts_that_are_the_temporary_output_are_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    prompts = prompts_file(Path(temporary_of(str(out))), 3)
    done = ask(prompts, "--out", out)
    assert done.returncode == 2
    assert len(rows_of(prompts)) == 3


def finished(server, folder, count=20, **more):
    """(prompts, out) of a run that has ended."""
    prompts, out = prompts_file(folder / "prompts.jsonl", count), str(folder / "out.jsonl")
    ask_to(out, prompts, settings_for(server, **more))
    return prompts, out


def test_a_journal_is_neither_asked_nor_written_over(tmp_path):
    with serving(Behaviour()) as server:
        prompts, out = finished(server, tmp_path)
        journal = tmp_path / "out.jsonl.run" / "journal.jsonl"
        before = journal.read_bytes()
        with pytest.raises(RequestError, match="the prompts are the journal"):
            ask_to(out, str(journal), settings_for(server, template="{text}"))
        os.symlink(journal, tmp_path / "link.jsonl")
        os.link(journal, tmp_path / "hard.jsonl")
        beside = journal.with_name("spent.jsonl")
        beside.write_text("")
        for target in journal, tmp_path / "link.jsonl", tmp_path / "hard.jsonl", beside:
            with pytest.raises(RequestError, match="belongs to a journal"):
                ask_to(str(target), prompts, settings_for(server, overwrite=True), journal=str(tmp_path / "new"))
        for name in "journal.jsonl", "spent.jsonl":  # of a journal that is still to be
            with pytest.raises(RequestError, match="belongs to a journal"):
                ask_to(str(tmp_path / "J" / name), prompts, settings_for(server), journal=str(tmp_path / "J"))
        assert server.stats.requests == 20
    assert journal.read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "J").exists()


# --- outputs that are there already -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "mine\n"])
def test_a_file_that_no_journal_of_ours_wrote_is_kept(tmp_path, content):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 5), tmp_path / "out.jsonl"
    out.write_text(content)
    with serving(Behaviour()) as server:
        for journal in None, str(tmp_path / "J"):
            with pytest.raises(RequestError, match=r"exists already.*overwrite=True"):
                ask_to(str(out), prompts, settings_for(server), journal=journal)
        assert (server.stats.requests, out.read_text()) == (0, content)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]
        (tmp_path / "out.jsonl.run").mkdir()
        (tmp_path / "out.jsonl.run" / "journal.jsonl").write_text("")  # an empty one of ours will do
        ask_to(str(out), prompts, settings_for(server))
        assert len(rows_of(out)) == 5


def test_overwrite_goes_on_with_a_journal_and_never_empties_it(tmp_path):
    with serving(Behaviour()) as server:
        prompts, out = finished(server, tmp_path)
        other = tmp_path / "other.jsonl"
        other.write_text("mine\n" * 50)
        with pytest.raises(RequestError, match="was not written with"):
            ask_to(str(other), prompts, settings_for(server), journal=f"{out}.run")
        assert other.read_text() == "mine\n" * 50
        report = ask_to(str(other), prompts, settings_for(server, overwrite=True), journal=f"{out}.run")
        assert (report.again, len(rows_of(other)), server.stats.requests) == (20, 20, 20)
        ask_to(str(other), prompts, settings_for(server), journal=f"{out}.run")  # from now on it belongs there
        ask_to(out, prompts, settings_for(server, overwrite=True))
        assert (journalled(out), server.stats.requests) == (20, 20)


def test_output_and_journal_may_move_together(tmp_path):
    (tmp_path / "one").mkdir()
    with serving(Behaviour()) as server:
        prompts, out = prompts_file(tmp_path / "prompts.jsonl", 20), str(tmp_path / "one" / "out.jsonl")
        ask_to(out, prompts, settings_for(server), journal=str(tmp_path / "one" / "J"))
        os.rename(tmp_path / "one", tmp_path / "two")
        moved = str(tmp_path / "two" / "out.jsonl")
        assert ask_to(moved, prompts, settings_for(server), journal=str(tmp_path / "two" / "J")).again == 20


@pytest.mark.parametrize("place", ["file", "others"])
def test_a_journal_is_a_folder_of_its_own(tmp_path, place):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3)
    folder = tmp_path / "J"
    if place == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    done = ask(prompts, "--out", tmp_path / "out.jsonl", "--journal", folder)
    assert done.returncode == 2
    assert ("it is a file" if place == "file" else "manifest.json") in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_leaves_no_journal(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3)
    (tmp_path / "folder").mkdir()
    done = ask(prompts, "--out", tmp_path / "folder", "--overwrite")
    assert (done.returncode, "it is a folder" in done.stderr) == (2, True)
    done = ask(prompts, "--out", tmp_path / "no" / "out.jsonl", "--journal", tmp_path / "J")
    assert (done.returncode, "there is no such folder" in done.stderr) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "prompts.jsonl"]


def test_the_journal_of_a_pack_run_is_refused(tmp_path):
    from millstream import pack_to

    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    pack_to(str(tmp_path / "packed"), str(tmp_path / "a.jsonl"), seq_len=4)
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3)
    done = ask(prompts, "--out", tmp_path / "out.jsonl", "--journal", tmp_path / "packed")
    assert done.returncode == 2
    assert "is none of millstream's" in done.stderr


# --- more in its place ------------------------------------------------------------------------------------------------


def indexes(path):
    return sorted(row["index"] for row in rows_of(path))


@pytest.mark.parametrize("ordered", [False, True])
def test_a_stop_leaves_no_fewer_rows_than_there_were(tmp_path, monkeypatch, ordered):
    """A finished run with faults, then --retry-faults on a server that is away."""
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    with serving(Behaviour(faults=(parse_fault("413:0.02"),), seed=3)) as server:
        prompts, out = finished(server, tmp_path, count=3000, in_flight=64)
    faults = sum("fault" in row for row in rows_of(out))
    assert 20 < faults < 200
    with nobody() as away, pytest.raises(RunError, match="the same command again goes on"):
        ask_to(out, prompts, settings_for(away, retry_faults=True, ordered=ordered))
    assert indexes(out) == list(range(3000))
    assert sum("fault" in row for row in rows_of(out)) == faults
    with serving(Behaviour()) as server:
        report = ask_to(out, prompts, settings_for(server, retry_faults=True, ordered=ordered))
        assert (report.replies, server.stats.requests) == (3000, faults)
    assert indexes(out) == list(range(3000))


@pytest.mark.parametrize("ordered", [False, True])
def test_what_a_damaged_journal_lost_stays_in_the_output_until_it_is_asked_again(tmp_path, monkeypatch, ordered):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    with serving(Behaviour()) as server:
        prompts, out = finished(server, tmp_path, count=300)
    before, journal = Path(out).read_bytes(), tmp_path / "out.jsonl.run" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:150]) + b"damage\n" * 50 + b"".join(lines[200:]))
    with nobody() as away, pytest.raises(RunError):
        ask_to(out, prompts, settings_for(away, ordered=ordered))
    assert Path(out).read_bytes() == before
    with serving(Behaviour()) as server:
        report = ask_to(out, prompts, settings_for(server, ordered=ordered))
        assert (report.again, report.damaged, server.stats.requests) == (250, 50, 50)
    assert indexes(out) == list(range(300))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_by_a_signal_all_that_was_known_is_there(tmp_path, number):
    with serving(Behaviour(latency=parse_latency("fixed 0.01"), faults=(parse_fault("413:0.02"),), seed=3)) as server:
        prompts, out = finished(server, tmp_path, count=1500, in_flight=64)
    lines = Path(prompts).read_text().splitlines(keepends=True)
    edited = [line.replace("question", "edited") if n % 2 else line for n, line in enumerate(lines)]
    Path(prompts).write_text("".join(edited))
    held = Held("fixed 0.05", at=12)
    with serving(Behaviour(latency=held)) as server:
        call = command(server, prompts, out, "--in-flight", "4", "--retry-faults")
        asking = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        wait_until(lambda: server.stats.requests >= 12, asking)
        asking.send_signal(number)
        held.let_go()
        _, said = asking.communicate(timeout=PATIENCE)
    assert asking.returncode == 130
    assert b"run the same command again" in said
    assert b"Traceback" not in said
    rows = rows_of(out)
    assert {row["index"] for row in rows} >= set(range(0, 1500, 2))
    assert any(row["index"] % 2 and "edited" in row["text"] for row in rows)
    assert not os.path.exists(temporary_of(out))


def test_nohup_is_left_alone(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 60), str(tmp_path / "out.jsonl")
    held = Held("fixed 0.05", at=13)
    with serving(Behaviour(latency=held)) as server:
        ignored = (
            "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
        )
        call = [sys.executable, "-c", ignored, *command(server, prompts, out, "--in-flight", "4")]
        asking = subprocess.Popen(call, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(lambda: journalled(out) >= 8, asking)
        asking.send_signal(signal.SIGHUP)
        held.let_go()
        assert asking.wait(PATIENCE) == 0
    assert len(rows_of(out)) == 60


def test_a_second_interrupt_ends_at_once_with_one_line(tmp_path):
    with serving(Behaviour()) as server:
        prompts, out = finished(server, tmp_path, count=30)
    prompts_file(tmp_path / "prompts.jsonl", 100)
    with serving(Behaviour(latency=parse_latency("fixed 50"))) as server:
        asking = subprocess.Popen(command(server, prompts, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        wait_until(lambda: server.stats.requests >= 2, asking)
        asking.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert asking.poll() is None
        asking.send_signal(signal.SIGTERM)
        told, said = asking.communicate(timeout=PATIENCE)
    assert (asking.returncode, told) == (130, b"")
    told = "millstream: stopped at once. Nothing is lost: run the same command again to go on.\n"
    assert without_progress(said.decode()) == told
    assert indexes(out) == list(range(30))
    assert not os.path.exists(temporary_of(out))


def test_without_a_journal_nobody_is_told_that_nothing_is_lost(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 1000)
    held = Held("fixed 0.02", at=500)
    with serving(Behaviour(latency=held)) as server:
        with open(tmp_path / "out", "wb") as target:
            asking = subprocess.Popen(command(server, prompts, "-"), stderr=subprocess.PIPE, stdout=target)
        wait_until(lambda: (tmp_path / "out").stat().st_size, asking)
        asking.send_signal(signal.SIGINT)
        held.let_go()
        _, said = asking.communicate(timeout=PATIENCE)
    assert asking.returncode == 130
    assert b"without --journal the same command asks everything again" in said
    assert b"Nothing is lost" not in said


def test_what_a_reader_of_standard_output_has_is_a_prefix_of_the_next_run(tmp_path):
    prompts, journal = prompts_file(tmp_path / "prompts.jsonl", 1200), str(tmp_path / "J")
    held = Held("lognormal 0.02 1.0", at=900)  # when the first twenty are answered, however long one of them takes
    with serving(Behaviour(latency=held)) as server:
        call = command(server, prompts, "-", "--journal", journal, "--in-flight", "32")
        with open(tmp_path / "first", "wb") as target:
            asking = subprocess.Popen(call, stderr=subprocess.DEVNULL, stdout=target)
        wait_until(lambda: (tmp_path / "first").read_bytes().count(b"\n") >= 20, asking)
        asking.send_signal(signal.SIGINT)
        held.let_go()
        assert asking.wait(PATIENCE) == 130
        first = (tmp_path / "first").read_bytes()
        whole = subprocess.run(call, capture_output=True, check=True).stdout
    assert whole.startswith(first)
    assert whole.count(b"\n") == 1200


def test_nothing_of_the_former_output_is_lost_before_there_is_something_in_its_place(tmp_path):
    """A prompt is edited: until the new output holds all that was known, the former one is as it was."""
    with serving(Behaviour()) as server:
        prompts, out = finished(server, tmp_path, count=500)
        before = Path(out).read_bytes()
        text = Path(prompts).read_text()
        with open(prompts, "a") as file:
            file.write('{"prompt": "one more"}\n')
        seen = []
        write = os.write

        def watching(file, data):
            seen.append(Path(out).read_bytes() == before)
            return write(file, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", watching)
            ask_to(out, prompts, settings_for(server))
    assert seen
    assert seen[0]
    assert len(rows_of(out)) == 501
    assert Path(prompts).read_text().startswith(text)


def test_a_symlink_keeps_its_target_and_a_file_its_rights(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 5)
    (tmp_path / "far").mkdir()
    link = tmp_path / "out.jsonl"
    os.symlink(tmp_path / "far" / "away.jsonl", link)
    with serving(Behaviour()) as server:
        ask_to(str(link), prompts, settings_for(server, limit=3))
        (tmp_path / "far" / "away.jsonl").chmod(0o640)
        ask_to(str(link), prompts, settings_for(server))
    assert link.is_symlink()
    assert len(rows_of(tmp_path / "far" / "away.jsonl")) == 5
    assert (tmp_path / "far" / "away.jsonl").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "far") == ["away.jsonl"]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_an_output_on_another_disk(tmp_path, disk):
    disk, _ = disk
    prompts = prompts_file(tmp_path / "prompts.jsonl", 5)
    os.symlink(disk / "far.jsonl", tmp_path / "out.jsonl")
    with serving(Behaviour()) as server:
        for _ in range(2):
            ask_to(str(tmp_path / "out.jsonl"), prompts, settings_for(server))
        assert server.stats.requests == 5
    assert len(rows_of(disk / "far.jsonl")) == 5


def test_devices_and_pipes_are_written_through(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 5)
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    with serving(Behaviour()) as server:
        with pytest.raises(RequestError, match="journal"):
            ask_to("/dev/null", prompts, settings_for(server))
        ask_to(str(tmp_path / "pipe"), prompts, settings_for(server), journal=str(tmp_path / "J"))
        ask_to("/dev/null", prompts, settings_for(server), journal=str(tmp_path / "J"))
    reader.join(PATIENCE)
    assert read[0].count(b"\n") == 5
    assert Path("/dev/null").is_char_device()


def test_two_runs_with_one_output_and_two_journals_are_refused(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 100_000), str(tmp_path / "out.jsonl")
    with serving(Behaviour(latency=parse_latency("fixed 0.05"))) as server:
        first = subprocess.Popen(command(server, prompts, out), stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: journalled(out) >= 10, first)
            call = command(server, prompts, out, "--journal", str(tmp_path / "J"), "--overwrite")
            second = subprocess.run(call, capture_output=True, text=True)
            assert second.returncode == 2
            assert "another millstream is writing" in second.stderr
        finally:
            first.kill()
            first.wait()


# --- batch files ------------------------------------------------------------------------------------------------------


def batch(*arguments, **more):
    call = [sys.executable, "-m", "millstream", "batch", *map(str, arguments)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(call, text=True, timeout=PATIENCE, **more)


@pytest.fixture
def batch_files(tmp_path):
    """Requests and their outputs; one is missing."""
    with open(tmp_path / "requests.jsonl", "w") as requests, open(tmp_path / "results.jsonl", "w") as results:
        for name in "abc":
            body = {"model": "m", "messages": [{"role": "user", "content": name}]}
            row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            requests.write(json.dumps(row) + "\n")
            if name != "c":
                response = {"status_code": 200, "body": {"choices": [{"message": {"content": "yes"}}]}}
                results.write(json.dumps({"id": name, "custom_id": name, "response": response, "error": None}) + "\n")
    return tmp_path / "requests.jsonl", tmp_path / "results.jsonl"


@pytest.mark.parametrize("what", ["merge", "retry-failed"])
def test_batch_files_are_not_written_over(tmp_path, batch_files, what):
    requests, results = batch_files
    before = requests.read_bytes(), results.read_bytes()
    os.link(results, tmp_path / "hard.jsonl")
    os.symlink(requests, tmp_path / "link.jsonl")
    for target in requests, results, tmp_path / "hard.jsonl", tmp_path / "link.jsonl":
        done = batch(what, requests, "--outputs", results, "--out", target, "--overwrite")
        assert (done.returncode, "is an input itself" in done.stderr) == (2, True)
        with open(results, "rb") as source:
            done = batch(what, requests, "--outputs", "-", "--out", target, "--overwrite", stdin=source)
        assert (done.returncode, "is an input itself" in done.stderr) == (2, True)
    with open(results, "ab") as target:
        done = batch(what, requests, "--outputs", results, "--out", "-", stdout=target)
        assert (done.returncode, "standard output is an input" in done.stderr) == (2, True)
    (tmp_path / "out.jsonl").write_text("mine")
    done = batch(what, requests, "--outputs", results, "--out", tmp_path / "out.jsonl")
    assert (done.returncode, (tmp_path / "out.jsonl").read_text()) == (2, "mine")
    done = batch(what, requests, "--outputs", results, "--out", tmp_path / "out.jsonl", "--overwrite")
    assert len(rows_of(tmp_path / "out.jsonl")) == (3 if what == "merge" else 1)
    assert (requests.read_bytes(), results.read_bytes()) == before
    assert not list(tmp_path.glob(".*"))


def test_a_split_deletes_no_requests_that_come_from_standard_input(tmp_path, batch_files):
    requests, _ = batch_files
    batch("split", requests, "--out", tmp_path / "parts")
    part = tmp_path / "parts" / "requests-00000.jsonl"
    before = part.read_bytes()
    with open(part, "rb") as source:
        done = batch("split", "-", "--out", tmp_path / "parts", "--overwrite", "--max-lines", "1", stdin=source)
    assert (done.returncode, part.read_bytes()) == (2, before)


# --- full disks and kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["both", *(pytest.param(one, marks=pytest.mark.slow) for one in ("out", "journal"))])
def test_a_full_disk_is_one_line_and_keeps_whole_rows(tmp_path, disk, which):
    disk, enlarge = disk
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3000)
    out = str((disk if which != "journal" else tmp_path) / "out.jsonl")
    journal = str((disk if which != "out" else tmp_path) / "J")
    with serving(Behaviour()) as server:
        for _ in range(2):
            call = command(server, prompts, out, "--journal", journal)
            done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 1, done.stderr
            [line] = without_progress(done.stderr).strip().splitlines()
            assert "No space left on device" in line
            assert "the same command again" in line
            assert "Traceback" not in done.stderr
            if os.path.exists(out):
                assert len(rows_of(out)) == Path(out).read_bytes().count(b"\n")
        enlarge()
        assert subprocess.run(call, capture_output=True, timeout=PATIENCE).returncode == 0
    assert indexes(out) == list(range(3000))


def test_a_full_standard_output_is_one_line(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 30)
    with serving(Behaviour()) as server, open("/dev/full", "wb") as full:
        call = command(server, prompts, "-", "--journal", str(tmp_path / "J"))
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    [line] = without_progress(done.stderr).strip().splitlines()
    assert "cannot write to standard output: No space left on device" in line


KILLED = """
import fcntl, os, signal, sys
from millstream.runs.ask.asking import AskSettings, ask_to
import millstream.client.client, aiohttp

def counted(function):
    def wrapper(*arguments, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return wrapper

out, prompts, url, left = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
for module, name in (os, "open"), (os, "write"), (os, "ftruncate"), (os, "replace"), (os, "unlink"), (fcntl, "flock"):
    setattr(module, name, counted(getattr(module, name)))
ask_to(out, prompts, AskSettings(model="simulated", base_urls=[url], retry_faults=True))
"""


def test_killed_at_any_step_the_output_has_no_fewer_rows_than_before(tmp_path):
    with serving(Behaviour(faults=(parse_fault("413:0.3"),), seed=5)) as server:
        prompts, out = finished(server, tmp_path, count=12)
    faults = sum("fault" in row for row in rows_of(out))
    assert 0 < faults < 12
    steps = 0
    with serving(Behaviour()) as server:
        while True:
            steps += 1
            folder = tmp_path / f"killed-{steps}"
            shutil.copytree(tmp_path / "out.jsonl.run", folder / "out.jsonl.run")
            shutil.copy(out, folder / "out.jsonl")
            call = [sys.executable, "-c", KILLED, folder / "out.jsonl", prompts, server.url, str(steps)]
            code = subprocess.run(call, timeout=PATIENCE).returncode
            there = [row["index"] for row in rows_of(folder / "out.jsonl")]
            assert len(there) == len(set(there)) >= 12 - faults
            if code == 0:
                break
            assert code == -signal.SIGKILL
            assert ask_to(str(folder / "out.jsonl"), prompts, settings_for(server, retry_faults=True)).replies == 12
            assert indexes(folder / "out.jsonl") == list(range(12))
            assert sorted(os.listdir(folder)) == ["out.jsonl", "out.jsonl.run"]
    assert steps > 8 + faults


def test_a_journal_that_is_open_elsewhere_is_left_alone(tmp_path):
    with serving(Behaviour()) as server:
        prompts, out = finished(server, tmp_path)
        with AnswerJournal(f"{out}.run"), pytest.raises(RequestError, match="another millstream"):
            ask_to(out, prompts, settings_for(server))
    assert len(rows_of(out)) == 20
