"""`millstream ask` under limits, prices, schemas and servers that fail for everybody; other shapes in and out."""

import asyncio
import json
import os
import random
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import PATIENCE, kept_port, wait_until
from test_asking import Held, command, journalled, nobody, prompts_file, rows_of, serving, settings_for

from millstream.client.client import Client
from millstream.client.servers import Servers
from millstream.errors import RequestError, RunError
from millstream.llm.batch import read_outcome
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency
from millstream.llm.verdicts import CONNECTION
from millstream.llm.wire import WireError, wait_before_retry
from millstream.runs.ask.asking import ask_to


@pytest.mark.parametrize("fault", ["400:1", "html:1", "500:1", "garbage:1"])
@pytest.mark.parametrize("ordered", [False, True])
def test_what_every_request_would_end_in_is_one_message(tmp_path, monkeypatch, fault, ordered):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 10_000), str(tmp_path / "out.jsonl")
    with serving(Behaviour(faults=(parse_fault(fault),))) as server:
        with pytest.raises(RunError, match="the first requests all ended this way"):
            ask_to(out, prompts, settings_for(server, ordered=ordered, attempts=2))
        assert server.stats.requests <= 8  # the canaries and their retries
    assert journalled(out) == 0
    with serving(Behaviour()) as server:
        report = ask_to(out, prompts, settings_for(server, ordered=ordered, limit=50))
        assert (report.replies, report.again) == (50, 0)
    assert len(rows_of(out)) == 50


def test_a_server_that_is_not_there_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    prompts = prompts_file(tmp_path / "prompts.jsonl", 100)
    with nobody() as away, pytest.raises(RunError, match="is the server running"):
        ask_to(str(tmp_path / "out.jsonl"), prompts, settings_for(away))


def test_a_server_that_dies_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 5000), str(tmp_path / "out.jsonl")
    failure = []
    kept, port = kept_port()
    with kept:
        with serving(Behaviour(latency=Held("fixed 0.01", at=217)), port) as server:
            settings = settings_for(server, attempts=2)

            def asking():
                with pytest.raises(RunError, match="in a row could not be sent") as raised:
                    ask_to(out, prompts, settings)
                failure.append(raised)

            thread = threading.Thread(target=asking)
            thread.start()
            wait_until(lambda: journalled(out) >= 200)
        thread.join(timeout=PATIENCE)
    assert failure
    kept = journalled(out)
    assert 200 <= kept < 5000
    with serving(Behaviour()) as server:
        report = ask_to(out, prompts, settings_for(server))
        assert report.faults == {}, report.examples
        assert (report.requests, report.replies, report.again) == (5000, 5000, kept)  # no fault of theirs was kept
        assert server.stats.requests == 5000 - kept


def test_a_few_bad_first_prompts_do_not_stop_a_run(tmp_path):
    rows = [{"messages": "none"}, {"nothing": 1}, *({"prompt": f"question {n}"} for n in range(10))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(Behaviour()) as server:
        report = ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "rows.jsonl"), settings_for(server))
    assert (report.replies, report.faults) == (10, {"bad_row": 2})


def test_it_never_costs_more_than_it_may_and_goes_on_with_more(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 300), str(tmp_path / "out.jsonl")
    with serving(Behaviour(reply_ids=20, latency=parse_latency("fixed 0.005"))) as server:
        per_reply = {"price": (0.0, 1e6 / 20), "params": {"max_tokens": 20}}  # a reply costs 1
        report = ask_to(out, prompts, settings_for(server, max_cost=100.5, **per_reply))
        assert (report.stopped, report.replies, report.cost) == ("too dear", 100, pytest.approx(100.0))
        assert server.stats.requests == 100
        again = ask_to(out, prompts, settings_for(server, max_cost=100.5, **per_reply))
        assert (again.stopped, again.again, server.stats.requests) == ("too dear", 100, 100)
        rest = ask_to(out, prompts, settings_for(server, max_cost=1000.0, **per_reply))
        assert (rest.stopped, rest.replies, rest.cost) == (None, 300, pytest.approx(300.0))
    with pytest.raises(RequestError, match="price="):
        ask_to(out, prompts, settings_for(server, max_cost=1.0))


def test_requests_a_minute_are_kept_to(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 60)
    with serving(Behaviour(rpm=1200)) as server:
        report = ask_to(str(tmp_path / "out.jsonl"), prompts, settings_for(server, rpm=1200))
        assert (report.replies, report.spent["attempts"]) == (60, 60)
        assert report.spent["queue"] > 0.0
        assert server.stats.turned_away.total() == 0


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def test_replies_that_do_not_fit_the_schema_are_asked_again_and_are_faults_at_last(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 40), str(tmp_path / "out.jsonl")
    with serving(Behaviour(faults=(parse_fault("bad-schema:1:times=1"),))) as server:
        report = ask_to(out, prompts, settings_for(server, schema=SCHEMA))
        assert (report.replies, report.spent["attempts"]) == (40, 80)
        assert report.ids_wasted > 0
        assert all("name" in json.loads(row["text"]) for row in rows_of(out))
    with serving(Behaviour(faults=(parse_fault("bad-schema:1"),))) as server:
        report = ask_to(str(tmp_path / "other.jsonl"), prompts, settings_for(server, schema=SCHEMA, attempts=2))
        assert report.faults == {"schema": 40}
        assert "does not fit the schema" in report.examples["schema"]


def test_parquet_prompts_and_their_own_fields(tmp_path):
    table = pa.table({"id": ["a", "b"], "text": ["one", "two"], "score": [1, 2]})
    pq.write_table(table, tmp_path / "docs.parquet")
    with serving(Behaviour()) as server:
        settings = settings_for(server, template="Say {text}", ordered=True, keep_input=True)
        ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "docs.parquet"), settings)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"]
    assert [row["input"]["score"] for row in rows] == [1, 2]
    assert "Say two" in rows[1]["text"]


def batch_file(path, count):
    def row(number):
        body = {"model": "simulated", "messages": [{"role": "user", "content": f"question {number}"}]}
        return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}

    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)))
    return str(path)


def test_batch_files_in_and_out(tmp_path):
    prompts, out = batch_file(tmp_path / "requests.jsonl", 30), str(tmp_path / "out.jsonl")
    with serving(Behaviour(faults=(parse_fault("413:0.3"),), seed=3)) as server:
        settings = settings_for(server, model=None, batch_format=True)
        report = ask_to(out, prompts, settings)
        found = [read_outcome(row) for row in rows_of(out)]
        assert sorted(name for name, *_ in found) == sorted(f"r{number}" for number in range(30))
        assert sum(ok for _, ok, *_ in found) == report.replies
        assert 0 < report.replies < 30
        assert all(set(row) == {"id", "custom_id", "response", "error"} for row in rows_of(out))
        before = server.stats.requests
        assert ask_to(out, prompts, settings).again == 30
        assert server.stats.requests == before
        assert sorted(found) == sorted(read_outcome(row) for row in rows_of(out))  # the same from the journal


def test_a_duplicate_custom_id_is_a_fault_of_its_own(tmp_path):
    prompts = batch_file(tmp_path / "requests.jsonl", 3)
    with open(prompts, "a") as file:
        file.write((tmp_path / "requests.jsonl").read_text().splitlines()[1] + "\n")
    with serving(Behaviour()) as server:
        report = ask_to(str(tmp_path / "out.jsonl"), prompts, settings_for(server))
        assert (report.replies, report.faults) == (3, {"duplicate_id": 1})
        assert server.stats.requests == 3


@pytest.mark.parametrize("ordered", [False, True])
def test_known_rows_and_new_ones_come_together_in_place(tmp_path, ordered):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 400), str(tmp_path / "out.jsonl")
    with serving(Behaviour(latency=parse_latency("lognormal 0.002 1.0"))) as server:
        every_third = tmp_path / "some.jsonl"
        lines = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
        every_third.write_text("".join(lines[::3]))
        journal = str(tmp_path / "journal")
        ask_to(str(tmp_path / "some-out.jsonl"), str(every_third), settings_for(server), journal=journal)
        report = ask_to(out, prompts, settings_for(server, ordered=ordered), journal=journal)
        assert (report.again, report.replies, server.stats.requests) == (134, 400, 400)
    rows = rows_of(out)
    assert sorted(row["index"] for row in rows) == list(range(400))
    assert not ordered or [row["index"] for row in rows] == list(range(400))
    assert all(row["id"] == str(row["index"]) and f"question {row['index']}" in row["text"] for row in rows)


def test_an_empty_file_and_a_missing_one_are_said_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with serving(Behaviour()) as server:
        with pytest.raises(RequestError, match="empty"):
            ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "empty.jsonl"), settings_for(server))
        with pytest.raises(RequestError):
            ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "none.jsonl"), settings_for(server))
    assert not os.path.exists(tmp_path / "out.jsonl")


def test_prompts_that_come_slowly_on_a_pipe_are_asked_as_they_come(tmp_path):
    with serving(Behaviour()) as server:
        call = command(server, "-", "-")
        with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asking:
            for number in range(5):
                asking.stdin.write(json.dumps({"prompt": f"question {number}"}).encode() + b"\n")
                asking.stdin.flush()
                assert f"question {number}" in json.loads(asking.stdout.readline())["text"]  # before the next is sent
            asking.stdin.close()
            assert asking.stdout.read() == b""
            assert asking.wait() == 0


def test_no_key_is_told_by_any_way_out(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 20), str(tmp_path / "out.jsonl")
    key = "sk-very-secret-1234567890"
    with serving(Behaviour(faults=(parse_fault("400:0.5"), parse_fault("401:0.02")), seed=2)) as server:
        environment = {**os.environ, "OPENAI_API_KEY": key}
        done = subprocess.run(command(server, prompts, out, "--json"), capture_output=True, env=environment, text=True)
    said = done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "HTTP 40" in said
    assert key not in said


def test_one_client_never_has_more_in_flight_than_it_may():
    async def main():
        async with Client(server.url, model="simulated", in_flight=5) as client:
            many = [client.gather([f"q {n} {m}" for m in range(20)]) for n in range(4)]
            singles = [client.ask(f"single {n}") for n in range(10)]
            return await asyncio.gather(*many, *singles, client.race(["a", "b", "c"]))

    with serving(Behaviour(latency=parse_latency("fixed 0.01"))) as server:
        asyncio.run(main())
        assert server.stats.most_in_flight <= 5


def test_adaptive_and_hedged_runs_answer_everything(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 600)
    behaviour = Behaviour(latency=parse_latency("bimodal 0.01 0.2 0.02"), capacity=20, overload="429")
    with serving(behaviour) as server, serving(behaviour) as other:
        urls = [server.url, other.url]
        settings = settings_for(server, base_urls=urls, in_flight="auto", hedge=True)
        report = ask_to(str(tmp_path / "out.jsonl"), prompts, settings)
        assert (report.replies, report.faults) == (600, {})
        assert report.limits
        assert server.stats.requests > 100
        assert other.stats.requests > 100
        assert report.spent["hedges"] <= 0.05 * report.spent["attempts"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--in-flight", "0"], "--in-flight"),
        (["--in-flight", "many"], "--in-flight"),
        (["--price", "1"], "--price"),
        (["--price", "a,b"], "--price"),
        (["--max-cost", "3"], "--price"),
        (["--schema", "missing.json"], "missing.json"),
        (["--template", "{text"], "template"),
        (["--rpm", "0"], "--rpm"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(tmp_path, flags, said):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 1)
    call = [sys.executable, "-m", "millstream", "ask", prompts, "--out", str(tmp_path / "out"), "--model", "m"]
    done = subprocess.run([*call, "--base-url", "http://127.0.0.1:9", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_thousands_of_failures_in_a_row_are_only_failures():
    """The waits double with each; they must not do so beyond what a float holds."""

    class Gone:
        base_url = "http://127.0.0.1"

        async def send(self, data, path):
            raise WireError(CONNECTION, "refused")

    async def main():
        servers = Servers([Gone(), Gone()])
        for _ in range(3000):
            with pytest.raises(WireError):
                await servers.send(0, b"", "", lambda: 0.0)
        return servers.pick(-1, 59.0), servers.pick(-1, 61.0)

    assert asyncio.run(main()) == (1, 0)
    error = WireError(CONNECTION, "refused")
    assert 0.0 <= wait_before_retry(error, 3000, 5000, random.Random(0)) <= 60.0
