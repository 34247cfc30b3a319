"""`millstream ask`: one row a request whatever happens, nothing asked twice, everything kept that was paid for."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest
from runs import PATIENCE, kept_port, wait_until
from wires import deciding_elsewhere, said

from millstream.errors import RequestError, RunError
from millstream.llm.simulator import Behaviour, Server, Stats, parse_fault, parse_latency, running
from millstream.runs.ask.asking import AskSettings, ask_to


class Held:
    """The latency of a server that falls silent: from its request number `at` on nobody is answered until it is let go.

    What is done to a client meanwhile meets one that is not over, however quick it is and however late we look.
    """

    def __init__(self, latency, at):
        self._latency, self._go, self._asked = parse_latency(latency), threading.Event(), 0
        self.hold(at)

    def hold(self, at):
        self._at = at
        self._go.clear()

    def seconds(self, draw):
        """The simulator calls it in the only thread that it has."""
        self._asked += 1
        assert self._asked < self._at or self._go.wait(PATIENCE)
        return self._latency.seconds(draw)

    def let_go(self):
        self._go.set()


@contextmanager
def serving(behaviour, port=0):
    """A simulator in another thread's loop: its `Server`, with live stats."""
    made = Queue()

    async def main():
        stop = asyncio.Event()
        async with running(behaviour, port=port) as server:
            made.put((server, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))  # which waits until all connections are closed
    thread.start()
    server, loop, stop = made.get(timeout=PATIENCE)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        if isinstance(behaviour.latency, Held):
            behaviour.latency.let_go()
        thread.join()


@contextmanager
def nobody():
    """A server that is not there, in whose place nobody else listens meanwhile."""
    kept, port = kept_port()
    with kept:
        yield Server(f"http://127.0.0.1:{port}/v1", Stats())


def all_seen(server):
    """Wait until a server has read what anybody has sent to it before."""
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/_simulator/stats", timeout=PATIENCE) as reply:
        reply.read()


def prompts_file(path, count):
    path.write_text("".join(json.dumps({"id": n, "prompt": f"question {n}"}) + "\n" for n in range(count)))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def settings_for(server, **more):
    return AskSettings(**{"model": "simulated", "base_urls": [server.url], "in_flight": 16, **more})


MESSY = ("429:0.1:0", "500:0.05", "disconnect:0.05", "cut:0.05", "garbage:0.05", "empty-choices:0.05")


@pytest.mark.parametrize("ordered", [False, True])
def test_one_row_each_from_a_server_that_misbehaves(tmp_path, monkeypatch, ordered):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    prompts = prompts_file(tmp_path / "prompts.jsonl", 300)
    behaviour = Behaviour(latency=parse_latency("lognormal 0.002 1.0"), faults=tuple(map(parse_fault, MESSY)), seed=7)
    with serving(behaviour) as server:
        report = ask_to(str(tmp_path / "out.jsonl"), prompts, settings_for(server, ordered=ordered, attempts=40))
        assert server.stats.most_in_flight <= 16
    rows = rows_of(tmp_path / "out.jsonl")
    assert (report.requests, report.replies, report.faults) == (300, 300, {})
    assert report.attempts > 300
    assert [row["id"] for row in (rows if ordered else sorted(rows, key=lambda row: row["index"]))] == [
        str(n) for n in range(300)
    ]
    assert all(f"question {row['index']}" in row["text"] for row in rows)


def test_nothing_is_asked_twice_and_edited_prompts_are_asked_anew(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 50), str(tmp_path / "out.jsonl")
    with serving(Behaviour()) as server:
        first = ask_to(out, prompts, settings_for(server, limit=30))
        assert (first.requests, server.stats.requests) == (30, 30)
        second = ask_to(out, prompts, settings_for(server, timeout=50.0, in_flight=3))
        assert (second.requests, second.again, server.stats.requests) == (50, 30, 50)
        lines = (tmp_path / "prompts.jsonl").read_text().replace("question 7", "edited 7")
        (tmp_path / "prompts.jsonl").write_text(lines)
        third = ask_to(out, prompts, settings_for(server))
        assert (third.again, server.stats.requests) == (49, 51)
    assert sorted(row["index"] for row in rows_of(out)) == list(range(50))
    assert any("edited 7" in row["text"] for row in rows_of(out))


def test_identical_prompts_stay_distinct(tmp_path):
    (tmp_path / "prompts.txt").write_text("same\nsame\n\nsame\n")
    out = str(tmp_path / "out.jsonl")
    with serving(Behaviour()) as server:
        assert ask_to(out, str(tmp_path / "prompts.txt"), settings_for(server)).replies == 3
        assert ask_to(out, str(tmp_path / "prompts.txt"), settings_for(server)).again == 3
        assert server.stats.requests == 3


def test_bad_rows_are_faults_and_the_run_goes_on(tmp_path):
    lines = ['{"text": "a"}', "no json", "[1]", '{"other": 1}', '{"text": "b", "id": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with serving(Behaviour()) as server:
        settings = settings_for(server, template="Summarise: {text}", ordered=True)
        report = ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "rows.jsonl"), settings)
    rows = rows_of(tmp_path / "out.jsonl")
    assert (report.replies, report.faults) == (2, {"bad_row": 3})
    assert ["fault" in row for row in rows] == [False, True, True, True, False]
    assert "line 4" in rows[3]["fault"]["message"]
    assert "no field 'text'" in rows[3]["fault"]["message"]
    assert rows[4]["id"] == "x"
    assert "Summarise: b" in rows[4]["text"]


def test_faults_stay_unless_they_are_to_be_retried(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 10), str(tmp_path / "out.jsonl")
    with serving(Behaviour(faults=(parse_fault("413:1"),))) as server:
        assert ask_to(out, prompts, settings_for(server)).faults == {"too_large": 10}
    with serving(Behaviour()) as server:
        assert ask_to(out, prompts, settings_for(server)).faults == {"too_large": 10}
        assert server.stats.requests == 0
        assert ask_to(out, prompts, settings_for(server, retry_faults=True)).replies == 10


def test_a_wrong_key_stops_at_once_and_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 1000), str(tmp_path / "out.jsonl")
    with serving(Behaviour(api_key="right")) as server:
        with pytest.raises(RunError, match="OPENAI_API_KEY"):
            ask_to(out, prompts, settings_for(server, in_flight=4))
        assert server.stats.requests <= 8
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert ask_to(out, prompts, settings_for(server)).replies == 1000
    assert all("sk-wrong" not in path.read_text() for path in tmp_path.rglob("*.jsonl"))


def test_wrong_requests_say_what_to_give(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    prompts = prompts_file(tmp_path / "prompts.jsonl", 1)
    with pytest.raises(RequestError, match="base_url"):
        ask_to(str(tmp_path / "out"), prompts, AskSettings(model="m"))
    with pytest.raises(RequestError, match="one with model"):
        ask_to(str(tmp_path / "out"), prompts, AskSettings(base_urls=["http://127.0.0.1:1"]))


def command(server, prompts, out, *more):
    call = [sys.executable, "-m", "millstream", "ask", prompts, "--out", out, "--model", "simulated"]
    return [*call, "--base-url", server.url, *more]


def journalled(out):
    try:
        with open(f"{out}.run/journal.jsonl", "rb") as file:
            return file.read().count(b'{"key":')
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(("count", "kills"), [(2000, 3), pytest.param(20_000, 8, marks=pytest.mark.slow)])
def test_killed_anywhere_every_answered_request_is_there_once(tmp_path, count, kills):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", count), str(tmp_path / "out.jsonl")
    held = Held("lognormal 0.02 0.5", at=1)
    with serving(Behaviour(latency=held)) as server:
        call = command(server, prompts, out, "--in-flight", "16")
        for number in range(1, kills + 1):
            goal = number * count // (kills + 1)
            held.hold(goal + number * 16 + 1)  # each kill may have lost the replies to what was in flight
            asking = subprocess.Popen(call, stderr=subprocess.DEVNULL)
            wait_until(lambda goal=goal: journalled(out) >= goal, asking)
            asking.kill()
            assert asking.wait() == -9
            held.let_go()
            all_seen(server)
        kept = journalled(out)
        assert 0 < kept < count
        before = server.stats.requests
        done = subprocess.run(command(server, prompts, out, "--json"), capture_output=True, check=True)
        report = json.loads(done.stdout)
        assert (report["requests"], report["replies"]) == (count, count)
        assert report["again"] >= kept - 1  # a line may have been torn
        assert server.stats.requests - before == count - report["again"]
    rows = rows_of(out)
    assert sorted(row["index"] for row in rows) == list(range(count))
    assert all(f"question {row['index']}" in row["text"] for row in rows)
    assert journalled(out) == count


@pytest.mark.parametrize("out", ["out.jsonl", "-"])
def test_killed_while_replies_wait_for_their_turn_none_is_asked_twice(tmp_path, out):
    asked, mended = Counter(), []

    def decide(body, number):
        prompt = body["messages"][-1]["content"]
        asked[prompt] += 1
        return (200, said()) if mended or prompt != "question 5" else (503, {"error": {"message": "not yet"}})

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(100)))
    journal = tmp_path / "kept"
    with deciding_elsewhere(decide) as url:
        words = ["ask", str(prompts), "--out", out, "--ordered", "--journal", str(journal), "--model", "m"]
        line = [sys.executable, "-m", "millstream", *words, "--base-url", url, "--attempts", "99"]
        asking = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = journal / "journal.jsonl"
        wait_until(lambda: path.exists() and path.read_bytes().count(b'{"key":') == 99, asking)
        asking.kill()
        assert asking.wait() == -9
        mended.append(True)
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (done.stdout if out == "-" else (tmp_path / out).read_text()).splitlines()]
    assert [row["index"] for row in rows] == list(range(100))
    del asked["question 5"]
    assert set(asked.values()) == {1}


def test_interrupted_it_lets_what_runs_end_and_says_how_to_go_on(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 5000), str(tmp_path / "out.jsonl")
    held = Held("fixed 0.02", at=117)
    with serving(Behaviour(latency=held)) as server:
        call = command(server, prompts, out, "--in-flight", "16")
        asking = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        wait_until(lambda: journalled(out) >= 100, asking)
        asking.send_signal(signal.SIGINT)
        held.let_go()
        _, said = asking.communicate(timeout=PATIENCE)
        assert asking.returncode == 130
        assert b"run the same command again" in said
        assert b"Traceback" not in said
        assert server.stats.requests == journalled(out)  # whatever was asked was waited for and kept


def test_a_damaged_line_of_the_journal_is_told_and_its_prompt_asked_again(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 20), str(tmp_path / "out.jsonl")
    journal = tmp_path / "out.jsonl.run" / "journal.jsonl"
    with serving(Behaviour()) as server:
        ask_to(out, prompts, settings_for(server))
        lines = journal.read_bytes().splitlines(keepends=True)
        lines[3], lines[9], lines[12] = bytes(50) + b"\n", lines[9][:70] + b"\n", lines[12].replace(b'"text"', b'"te')
        journal.write_bytes(b"".join(lines))
        done = subprocess.run(command(server, prompts, out), capture_output=True, text=True, check=True)
        assert "3 lines (4, 10, 13) of the journal" in done.stdout
        assert server.stats.requests == 23
    assert sorted(row["index"] for row in rows_of(out)) == list(range(20))


def test_answers_stream_into_pack(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 200)
    with serving(Behaviour()) as server:
        pack = [sys.executable, "-m", "millstream", "pack", "-", "--out", str(tmp_path / "packed"), "--seq-len", "64"]
        asking = command(server, prompts, "-")
        with subprocess.Popen(asking, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as ask:
            subprocess.run(pack, stdin=ask.stdout, check=True, stdout=subprocess.DEVNULL)
        assert ask.returncode == 0
    import millstream

    dataset = millstream.open(tmp_path / "packed")
    assert dataset.ledger["documents"]["in"] == 200
    assert [part.id for part in dataset.documents(0)][:3] == ["0", "1", "2"]  # in input order
    assert not os.path.exists("-.run")


def test_two_runs_on_one_file_are_refused(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 100_000), str(tmp_path / "out.jsonl")
    with serving(Behaviour(latency=parse_latency("fixed 0.05"))) as server:
        first = subprocess.Popen(command(server, prompts, out), stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: journalled(out) >= 10, first)
            second = subprocess.run(command(server, prompts, out), capture_output=True, text=True)
            assert second.returncode == 2
            assert "another millstream" in second.stderr
        finally:
            first.kill()
            first.wait()
