"""What an ask run costs, beside the bill of a server that knows it: never more than it may."""

import asyncio
import json
import subprocess

import pytest
from runs import wait_until
from test_asking import Held, all_seen, command, journalled, nobody, prompts_file, rows_of, serving, settings_for

from millstream.aio import Fault
from millstream.client.client import Client
from millstream.client.purse import RequestShape, shape_of
from millstream.client.requests import Reply, Request
from millstream.errors import RequestError
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency
from millstream.runs.ask.asking import ask_to

PRICE = (1e4, 3e4, 5e3)  # an id of a prompt costs 0.01
LIMIT = {"max_tokens": 12}


def behaving(*faults, **more):
    """A server whose replies have 20 ids, and which knows what its work costs."""
    return Behaviour(reply_ids=20, price=PRICE, faults=tuple(map(parse_fault, faults)), **more)


def bounded(server, most, **more):
    return settings_for(server, **{"price": PRICE, "max_cost": most, "params": LIMIT, **more})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("millstream.llm.wire.FIRST_WAIT", 0.001)


ODD = {
    "plain": (),
    "paid faults": ("bad-schema:0.5", "empty-choices:0.2"),
    "no usage": ("no-usage:0.5",),
    "other usage": ("other-usage:0.5",),
    "thinking outside of completion_tokens": ("hidden-thinking:0.7",),
    "cached prompts": ("cached:0.5",),
    "cut connections": ("cut:0.2", "disconnect:0.2", "garbage:0.1"),
    "refusals": ("429:0.2:0", "500:0.2", "503:0.1:0"),
    "everything": ("no-usage:0.1", "other-usage:0.1", "hidden-thinking:0.1", "cut:0.1", "500:0.1", "disconnect:0.1"),
}


@pytest.mark.parametrize("faults", ODD.values(), ids=ODD)
@pytest.mark.parametrize("n", [1, 3])
def test_the_servers_bill_is_never_above_the_bound(tmp_path, quick, faults, n):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 400), str(tmp_path / "out.jsonl")
    schema = {"type": "object"} if "bad-schema:0.5" in faults else None
    with serving(behaving(*faults, latency=parse_latency("lognormal 0.003 1"))) as server:
        for most in (5.0, 20.0, 45.0):  # reruns, each with more
            settings = bounded(server, most, params={**LIMIT, "n": n}, schema=schema, retry_faults=True)
            report = ask_to(out, prompts, settings)
            assert server.stats.cost <= most
            assert server.stats.cost <= report.cost + 1e-9 <= most + 2e-9
            assert report.stopped == "too dear"
        assert server.stats.cost > 10.0  # and it is not so careful that nothing is asked


def test_a_bound_counts_what_every_earlier_run_on_its_journal_has_spent(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 40), str(tmp_path / "out.jsonl")
    with serving(behaving()) as server:
        ask_to(out, prompts, settings_for(server, params=LIMIT))  # without prices
        spent = server.stats.cost
        lines = (tmp_path / "prompts.jsonl").read_text()
        new = "".join(json.dumps({"prompt": f"put in front {number}"}) + "\n" for number in range(40))
        (tmp_path / "prompts.jsonl").write_text(new + lines)
        report = ask_to(out, prompts, bounded(server, spent + 3.0))
        assert report.stopped == "too dear"
        assert server.stats.cost == pytest.approx(report.cost)
        assert spent < server.stats.cost <= spent + 3.0
        requests = server.stats.requests
        (tmp_path / "prompts.jsonl").write_text(new)  # what was paid for stays paid for
        assert ask_to(out, prompts, bounded(server, spent)).stopped == "too dear"
        assert server.stats.requests == requests


def test_attempts_in_vain_are_known_to_the_next_run(tmp_path, quick):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 6), str(tmp_path / "out.jsonl")
    with serving(behaving("bad-schema:1")) as server:
        report = ask_to(out, prompts, bounded(server, 100.0, schema={"type": "object"}, attempts=3))
        assert (report.faults, report.stopped) == ({"schema": 6}, None)
        assert report.cost == pytest.approx(server.stats.cost)
        assert server.stats.requests == 18
        paid = [row["usage"] for row in rows_of(out)]
        assert sum(usage["completion_tokens"] for usage in paid) == server.stats.ids_out
        spent = server.stats.cost
        assert ask_to(out, prompts, bounded(server, spent, retry_faults=True)).stopped == "too dear"
        assert server.stats.requests == 18


def test_what_timed_out_is_counted_with_what_it_may_have_cost(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 100), str(tmp_path / "out.jsonl")
    with serving(behaving("hang:0.3")) as server:
        report = ask_to(out, prompts, bounded(server, 20.0, timeout=0.2, attempts=1))
        assert report.faults.keys() == {"timeout"}
        assert server.stats.cost <= report.cost <= 20.0
        assert ask_to(out, prompts, bounded(server, 20.0, timeout=0.2)).cost == pytest.approx(report.cost)


def test_a_server_that_is_not_there_costs_nothing(tmp_path, quick):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 200), str(tmp_path / "out.jsonl")
    with serving(behaving()) as server, nobody() as away:
        report = ask_to(out, prompts, bounded(server, 1000.0, base_urls=[server.url, away.url]))
        assert (report.replies, report.faults) == (200, {})
        assert report.cost == pytest.approx(server.stats.cost)


@pytest.mark.parametrize("letter", ["a", "\N{SNOWMAN}", "mixed"])
def test_text_with_an_id_a_byte_is_within_the_bound(tmp_path, letter):
    texts = [
        ("a" if letter == "mixed" and number < 150 else letter.replace("mixed", "\N{SNOWMAN}")) * 90
        for number in range(300)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with serving(behaving(latency=parse_latency("0.002"))) as server:
        settings = bounded(server, 250.0, in_flight=64)
        report = ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "prompts.jsonl"), settings)
        assert server.stats.cost == pytest.approx(report.cost)
        assert server.stats.cost <= 250.0
        assert report.stopped == (None if letter == "a" else "too dear")


def test_a_batch_rows_own_limit_and_choices_count(tmp_path):
    def row(number):
        body = {"model": "m", "messages": [{"role": "user", "content": f"question {number}"}], "n": 2}
        body["max_completion_tokens" if number % 2 else "max_tokens"] = 18
        return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}

    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(200)))
    with serving(behaving(latency=parse_latency("0.01"))) as server:
        report = ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / "batch.jsonl"), bounded(server, 30.0, params={}))
        assert report.stopped == "too dear"
        assert server.stats.cost == pytest.approx(report.cost)
        assert 20.0 < server.stats.cost <= 30.0


def test_losers_of_hedges_are_counted(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 400)
    with serving(behaving(latency=parse_latency("bimodal 0.005 0.3 0.04"))) as server:
        report = ask_to(str(tmp_path / "out.jsonl"), prompts, bounded(server, 1e6, hedge=True))
        assert report.spent["hedges"] > 0
        assert server.stats.cost <= report.cost < 1.3 * server.stats.cost


def test_without_a_limit_it_is_exceeded_by_at_most_what_was_in_flight(tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 300)
    with serving(Behaviour(reply_ids=400, price=PRICE, latency=parse_latency("0.005"))) as server:
        settings = bounded(server, 300.0, params={}, in_flight=8)
        report = ask_to(str(tmp_path / "out.jsonl"), prompts, settings)
        a_request = 400 * 0.03 + 0.05
        assert report.cost == pytest.approx(server.stats.cost)
        assert 300.0 - 2 * a_request <= server.stats.cost <= 300.0 + 8 * a_request


def test_after_a_kill_it_is_exceeded_by_at_most_what_was_in_flight(tmp_path):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 3000), str(tmp_path / "out.jsonl")
    most, a_request = 150.0, 12 * 0.03 + 1.0
    held = Held("0.02", at=1)
    with serving(behaving(latency=held)) as server:
        flags = ["--price", "1e4,3e4,5e3", "--max-cost", str(most), "--max-tokens", "12", "--in-flight", "16"]
        for number, goal in enumerate((40, 90), 1):
            held.hold(goal + number * 16 + 1)
            asking = subprocess.Popen(command(server, prompts, out, *flags), stderr=subprocess.DEVNULL)
            wait_until(lambda goal=goal: journalled(out) >= goal, asking)
            asking.kill()
            assert asking.wait() == -9
            held.let_go()
            all_seen(server)
        done = subprocess.run(command(server, prompts, out, *flags), capture_output=True, text=True)
        assert done.returncode == 1
        assert "--max-cost" in done.stderr
        assert most - a_request <= server.stats.cost <= most + 2 * 16 * a_request


SHAPES = {
    b'{"messages":[{"content":"max_tokens","role":"user"}]}': RequestShape(53, 0, 1, None),
    b'{"max_tokens":5,"max_completion_tokens":7,"n":2}': RequestShape(48, 0, 2, 7),
    b'{"max_output_tokens":9,"best_of":3,"n":2}': RequestShape(41, 0, 3, 9),
    b'{"max_tokens":-1,"n":null}': RequestShape(26, 0, 1, None),
    b'{"max_tokens":"5"}': RequestShape(18, 0, 1, None),
    b'{"messages":[{"content":"\\"max_tokens\\":5","role":"user"}]}': RequestShape(59, 0, 1, None),
    b'{"url":"data:image/png;base64,iVBORw0KGgo="}': RequestShape(24, 1, 1, None),
}


@pytest.mark.parametrize("data", SHAPES, ids=str)
def test_what_bounds_a_reply_is_read_from_the_request(data):
    assert shape_of(Request(0, None, b"", data)) == SHAPES[data]


@pytest.mark.parametrize(
    ("prompt", "choices"), [("hello", 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ([], 1)]
)
def test_a_list_of_prompts_has_as_many_replies(prompt, choices):
    data = json.dumps({"prompt": prompt, "max_tokens": 5}).encode()
    assert shape_of(Request(0, None, b"", data, "/completions"))[2:] == (choices, 5)


def test_an_embedding_says_nothing():
    assert shape_of(Request(0, None, b"", b'{"input":"hello"}', "/embeddings")).limit == 0


# --- the Python client ---


def test_a_client_stops_before_it_costs_more_and_tells_what_it_cost():
    async def main():
        async with Client(server.url, model="m", price=PRICE, max_cost=10.0, params=LIMIT) as client:
            found = await client.gather([f"question {number}" for number in range(100)])
            singles = await asyncio.gather(*(client.ask(f"single {number}") for number in range(10)))
            return client.cost, [getattr(outcome, "kind", "reply") for outcome in found], singles

    with serving(behaving()) as server:
        cost, kinds, singles = asyncio.run(main())
        assert server.stats.cost == pytest.approx(cost)
        assert 8.0 < cost <= 10.0
        assert set(kinds) == {"reply", "stopped"}
        assert {single.message for single in singles if isinstance(single, Fault)} == {
            "not asked: the most that it may cost is reached"
        }


def test_many_calls_at_once_share_one_purse():
    async def main():
        async with Client(server.url, model="m", price=PRICE, max_cost=10.0, params=LIMIT) as client:
            return await asyncio.gather(*(client.ask(f"single {number}") for number in range(40)))

    with serving(behaving(latency=parse_latency("0.01"))) as server:
        replies = [outcome for outcome in asyncio.run(main()) if isinstance(outcome, Reply)]
        assert server.stats.cost <= 10.0
        # A call waits for what the others may give back: only then is it turned away.
        assert len(replies) == server.stats.requests >= 22


def test_the_losers_of_a_race_are_counted():
    async def main():
        async with Client(server.url, model="m", price=PRICE, params=LIMIT) as client:
            await client.race([f"question {number}" for number in range(8)])
            return client.cost

    with serving(behaving(latency=parse_latency("lognormal 0.05 1"))) as server:
        assert asyncio.run(main()) >= server.stats.cost > 0


@pytest.mark.parametrize(
    "options", [{"max_cost": 1.0}, {"price": (1.0,)}, {"price": (1.0, -2.0)}, {"price": "ab"}, {"price": 0.5}]
)
def test_prices_that_are_none_are_told(options):
    with pytest.raises(RequestError, match="price"):
        Client("http://127.0.0.1:9/v1", model="m", **options)


async def streamed(client, text, most=None):
    """The outcome of a stream, left after `most` pieces."""
    async with client.stream(text) as pieces:
        number = 0
        async for _ in pieces:
            number += 1
            if number == most:
                break
    return pieces.outcome


@pytest.mark.parametrize(
    ("fault", "most"), [(None, None), (None, 2), ("cut:1", None), ("hang:1", None), ("500:1", None)]
)
def test_streams_are_paid_from_the_same_purse(fault, most):
    async def main():
        options = {"price": PRICE, "max_cost": 10.0, "params": LIMIT, "attempts": 1, "timeout": 0.2}
        async with Client(server.url, model="m", **options) as client:
            outcomes = [await streamed(client, f"question {number}", most) for number in range(60)]
            single = await client.ask("one more")
            return client.cost, outcomes, single

    with serving(behaving(*([fault] if fault else []))) as server:
        cost, outcomes, single = asyncio.run(main())
        assert server.stats.cost <= cost <= 10.0
        if fault == "500:1":
            assert (cost, {outcome.kind for outcome in outcomes}) == (0.0, {"server_error"})
        else:
            assert {outcomes[-1].message, single.message} == {"not asked: the most that it may cost is reached"}
