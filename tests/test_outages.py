"""Servers that are busy, away, or behind a proxy: what they are to blame for is no prompt's fault, and no row."""

import asyncio
import threading

import pytest
import virtual
from runs import PATIENCE, kept_port
from scripted import AWAY, Scripted, Seconds, asking, error, rows_of
from test_asking import journalled, prompts_file
from wires import answering, http

from millstream.client.client import Client
from millstream.errors import RunError
from millstream.runs.ask.asking import AskSettings, ask_to

BUSY = {
    "429": (429, b"", {}),
    "503 with Retry-After": (503, b"", {"Retry-After": "1"}),
    "529": (529, b"", {}),
    "498": (498, b"", {}),
}
GONE = {"away": AWAY, "502": (502, b"<title>Bad Gateway</title>", {}), "503": (503, b"", {}), "504": (504, b"", {})}


@pytest.mark.parametrize("in_flight", [4, 64, 512, "auto"])
def test_a_server_that_serves_four_a_second_answers_them_all(monkeypatch, tmp_path, in_flight):
    report, wire, seconds = asking(monkeypatch, tmp_path, Seconds(4), in_flight=in_flight)
    assert (report.replies, report.faults) == (200, {})
    assert len(rows_of(tmp_path)) == 200
    assert seconds < 50 * 2.5
    assert len(wire.times) < 200 + 15 * seconds + 300  # the retry budget holds


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "20"}, {"retry-after-ms": "20000"}])
def test_so_does_one_that_serves_three_a_minute(monkeypatch, tmp_path, headers):
    report, _, seconds = asking(monkeypatch, tmp_path, Seconds(3, 60.0, **headers), count=15)
    assert (report.replies, report.faults) == (15, {})
    assert seconds < 15 * 60


@pytest.mark.parametrize("busy", BUSY)
def test_a_request_that_is_turned_away_twenty_times_is_answered_while_others_are(monkeypatch, tmp_path, busy):
    handle = lambda time, text, which: BUSY[busy] if text.endswith("7") and which <= 20 else None  # noqa: E731
    report, wire, _ = asking(monkeypatch, tmp_path, handle, count=4000, in_flight=2)
    assert (report.replies, report.faults) == (4000, {})
    assert wire.asked["question 7"] == 21


def test_a_deadline_bounds_it(monkeypatch, tmp_path):
    report, _, _ = asking(monkeypatch, tmp_path, Seconds(4), deadline=20.0)
    assert report.replies + report.faults["timeout"] + report.faults.get("rate_limited", 0) == 200
    assert 60 <= report.replies <= 84
    late = [row for row in rows_of(tmp_path) if row.get("fault", {}).get("kind") == "timeout"]
    assert all(row["latency_s"] <= 20.01 and "last: HTTP 429" in row["fault"]["message"] for row in late)


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("answered", [0, 30])
def test_where_all_are_turned_away_the_run_stops_and_goes_on_later(monkeypatch, tmp_path, busy, answered):
    left = iter(range(answered))
    with pytest.raises(RunError, match="the first requests all" if not answered else "in a row got no reply"):
        asking(monkeypatch, tmp_path, lambda *_: BUSY[busy] if next(left, None) is None else None)
    assert journalled(tmp_path / "out.jsonl") == answered
    report, wire, _ = asking(monkeypatch, tmp_path, lambda *_: None)
    assert (report.replies, report.again, report.faults) == (200, answered, {})
    assert sum(wire.asked.values()) == 200 - answered


def test_the_last_few_that_are_turned_away_stop_the_run_too(monkeypatch, tmp_path):
    handle = lambda time, text, which: (429, b"", {}) if text.endswith("9") else None  # noqa: E731
    with pytest.raises(RunError, match="nothing else was left to ask"):
        asking(monkeypatch, tmp_path, handle, count=100)
    assert journalled(tmp_path / "out.jsonl") == 90
    assert not any("fault" in row for row in rows_of(tmp_path))


def test_a_size_that_is_too_large_for_the_quota_is_that_prompts_fault(monkeypatch, tmp_path):
    words = "Request too large for m on tokens per min (TPM): Limit 10, Requested 12."
    large = error(429, words, code="rate_limit_exceeded")
    report, wire, _ = asking(monkeypatch, tmp_path, lambda time, text, which: large if text.endswith(" 5") else None)
    assert (report.replies, report.faults) == (199, {"too_large": 1})
    assert wire.asked["question 5"] == 1


def test_a_server_that_asks_for_a_day_is_left_alone_and_not_waited_for(monkeypatch, tmp_path):
    day, notes = (429, b"", {"Retry-After": "86400"}), []
    handle = lambda time, text, which: day if text.endswith("3") else None  # noqa: E731
    with pytest.raises(RunError, match=r"left alone for 24 h. Stopped: nothing else was left to ask"):
        asking(monkeypatch, tmp_path, handle, on_note=notes.append)
    assert journalled(tmp_path / "out.jsonl") == 180
    assert len(notes) == 1
    assert "it asks to be left alone for 24 h. What it says so of waits" in notes[0]
    report, wire, seconds = asking(
        monkeypatch, tmp_path, lambda time, text, which: day if which == 1 else None, longest_wait=100_000.0
    )
    assert (report.replies, report.faults, set(wire.asked.values())) == (200, {}, {2})
    assert 86_400 <= seconds < 2.1 * 86_400  # two go ahead, and the others wait for them


def test_in_python_nobody_sleeps_for_a_day_either():
    reply = http(b"", "429 Slow", Retry_After=86_400)

    async def main():
        async with answering(reply) as (place, _), Client(f"http://{place}/v1", model="m", timeout=None) as client:
            async with client.stream("one") as pieces:
                assert [piece async for piece in pieces] == []
            return [pieces.outcome, await client.ask("one"), *await client.gather(["one", "two"])]

    outcomes = asyncio.run(main())
    assert [(outcome.kind, outcome.attempts) for outcome in outcomes] == [("rate_limited", 1)] * 4
    assert all("left alone for 24 h" in outcome.message for outcome in outcomes)


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("in_flight", [4, 64, 512])
def test_an_outage_costs_no_row(monkeypatch, tmp_path, gone, in_flight):
    handle = lambda time, *_: GONE[gone] if 2.0 <= time < 12.0 else None  # noqa: E731
    report, wire, seconds = asking(monkeypatch, tmp_path, handle, count=4000, in_flight=in_flight)
    assert (report.replies, report.faults) == (4000, {})
    assert seconds < 10.0 + 4000 * 0.1 / in_flight * 1.5 + 30.0
    assert sum(2.0 <= time < 12.0 for time in wire.times) < 4 * max(256, in_flight * 4) + 100 + 10 * 10


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_server_that_stays_away_stops_the_run_and_costs_no_row(monkeypatch, tmp_path, gone, ordered):
    left = iter(range(50))
    said = "could not be sent" if gone == "away" else "got no reply"
    with pytest.raises(RunError, match=f"64 requests in a row {said}"):
        asking(monkeypatch, tmp_path, lambda *_: GONE[gone] if next(left, None) is None else None, ordered=ordered)
    assert journalled(tmp_path / "out.jsonl") == 50
    report, *_ = asking(monkeypatch, tmp_path, lambda *_: None, ordered=ordered)
    assert (report.replies, report.again, report.faults) == (200, 50, {})


@pytest.mark.parametrize("gone", GONE)
def test_fewer_than_that_at_the_end_stop_it_as_well(monkeypatch, tmp_path, gone):
    left = iter(range(190))
    with pytest.raises(RunError, match="nothing else was left to ask"):
        asking(monkeypatch, tmp_path, lambda *_: GONE[gone] if next(left, None) is None else None)
    assert journalled(tmp_path / "out.jsonl") == 190


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("attempts", [1, 5])
def test_a_prompt_that_a_server_dies_of_is_a_fault_of_its_own(monkeypatch, tmp_path, gone, attempts):
    handle = lambda time, text, which: GONE[gone] if text == "question 7" else None  # noqa: E731
    report, wire, _ = asking(monkeypatch, tmp_path, handle, count=2000, in_flight=2, attempts=attempts)
    assert (report.replies, sum(report.faults.values())) == (1999, 1)
    assert attempts <= wire.asked["question 7"] <= attempts + 2


@pytest.mark.parametrize("ordered", [False, True])
def test_what_used_up_its_attempts_in_an_outage_is_asked_again_when_it_is_over(monkeypatch, tmp_path, ordered):
    """Fewer than 64 have; the first reply after it is no reason to write them off."""
    handle = lambda time, text, which: AWAY if 2.0 <= time < 2.04 else None  # noqa: E731
    report, wire, _ = asking(monkeypatch, tmp_path, handle, in_flight=1, attempts=1, ordered=ordered)
    assert (report.replies, report.faults) == (200, {})
    assert 20 <= sum(count > 1 for count in wire.asked.values()) < 64


def test_in_python_a_call_that_has_nobody_beside_it_is_given_up_after_its_attempts(monkeypatch):
    async def main(handle):
        wire = Scripted(handle)
        monkeypatch.setattr("millstream.client.client._wire", lambda *_, **__: wire)
        async with Client("http://127.0.0.1:1", model="m", attempts=4) as client:
            alone = await client.ask("one")
            return alone, await client.gather(["one", "two"]), set(wire.asked.values())

    alone, both, asked = virtual.run(main(lambda *_: (429, b"", {})))
    assert (alone.kind, alone.attempts, asked) == ("rate_limited", 4, {4, 8})
    assert [(fault.kind, fault.attempts) for fault in both] == [("rate_limited", 4)] * 2
    alone, both, asked = virtual.run(main(lambda *_: (502, b"", {})))
    assert [(fault.kind, fault.attempts) for fault in (alone, *both)] == [("server_error", 4)] * 3


@pytest.mark.parametrize("broken", [OSError(24, "Too many open files"), ValueError("nobody expected this")])
def test_exceptions_that_nobody_expected_count_as_well(monkeypatch, tmp_path, broken):
    left = iter(range(50))
    with pytest.raises(RunError, match="64 requests in a row got no reply"):
        asking(monkeypatch, tmp_path, lambda *_: broken if next(left, None) is None else None)
    assert journalled(tmp_path / "out.jsonl") == 50
    report, *_ = asking(monkeypatch, tmp_path, lambda *_: None)
    assert (report.replies, report.faults) == (200, {})


class Away:
    """A real server that goes away for a while: it closes its port and its connections, and comes back there."""

    def __init__(self, after, seconds):
        self.after, self.seconds = after, seconds
        self.answered, self.port, self.writers = 0, 0, set()
        self.outage = None

    async def serve(self, listening, stop):
        kept, self.port = kept_port()
        self.server = await asyncio.start_server(self.handle, "127.0.0.1", self.port, backlog=1024)
        listening.set()
        await stop.wait()
        self.close()
        kept.close()
        if self.outage:
            await asyncio.gather(self.outage, return_exceptions=True)

    def close(self):
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def go_away(self):
        self.close()
        await asyncio.sleep(self.seconds)
        self.server = await asyncio.start_server(self.handle, "127.0.0.1", self.port, backlog=1024)

    async def handle(self, reader, writer):
        self.writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(lengths[0]))
                self.answered += 1
                if self.answered == self.after:
                    self.outage = asyncio.create_task(self.go_away())
                body = b'{"choices": [{"message": {"content": "yes"}}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()


@pytest.mark.parametrize("in_flight", [pytest.param(16, marks=pytest.mark.slow), 512])
def test_a_real_server_that_is_away_for_a_while_costs_no_row(tmp_path, in_flight):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 6000), str(tmp_path / "out.jsonl")
    server, loop, stop = Away(after=1500, seconds=1.5), asyncio.new_event_loop(), asyncio.Event()
    listening = threading.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(listening, stop),))
    thread.start()
    try:
        assert listening.wait(PATIENCE)
        url = f"http://127.0.0.1:{server.port}/v1"
        report = ask_to(out, prompts, AskSettings(model="m", base_urls=[url], in_flight=in_flight))
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
    assert (report.replies, report.faults) == (6000, {})
    assert report.attempts > 6000
