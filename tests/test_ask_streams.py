"""Asking inside a stream: in order, bounded, nothing asked twice, and nothing alive afterwards."""

import gc
import json
import pickle
import threading
import weakref
from collections import Counter
from itertools import count, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rated import IN_FLIGHT, keys, killed_and_gone_on, pipeline, told
from runs import PATIENCE, kept_port
from test_asking import serving

import millstream
from millstream import Client
from millstream.errors import DataError, RequestError, ResumeRefused, RunError
from millstream.llm.simulator import Behaviour, parse_fault, parse_latency
from millstream.runs.ask import answers
from millstream.streams import ask, stage

RATE = "Rate from 0 to 5: {text}"


@pytest.fixture(scope="module")
def server():
    behaviour = Behaviour(latency=parse_latency("lognormal 0.002 1"), faults=(parse_fault("content-policy:0.2"),))
    with serving(behaviour) as server:
        yield server


@pytest.fixture(scope="module")
def calm():
    with serving(Behaviour()) as server:
        yield server


def client(server, **more):
    return Client(server.url, **{"model": "simulated", **more})


def documents(n):
    return [{"id": f"d{number}", "text": f"text {number}"} for number in range(n)]


def nothing_runs():
    return not [thread.name for thread in threading.enumerate() if thread.name.startswith("millstream")]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_resumed_is_never_stopped_and_no_key_is_asked_twice(server, tmp_path_factory, n, window, data):
    journal = str(tmp_path_factory.mktemp("journal"))
    asked = [{"id": number % 30, "text": f"{journal} {number % 30}"} for number in range(n)]  # some come again
    found, state = [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_FRESH", data.draw(st.integers(1, 20)))
        for _ in range(data.draw(st.integers(1, 3), label="stops")):
            stream = ask(asked, client(server), RATE, journal=journal, window=window, state=state)
            found += islice(stream, data.draw(st.integers(0, n), label="taken"))
            state = json.loads(json.dumps(stream.state()))
            stream.close()
        found += ask(asked, client(server), RATE, journal=journal, window=window, state=state)
    assert [answered.document for answered in found] == asked
    assert [answered.outcome.index for answered in found] == list(range(n))
    assert set(Counter(keys(journal)).values()) <= {1}
    before = server.stats.requests
    assert list(ask(asked, client(server), RATE, journal=journal)) == found
    assert server.stats.requests == before
    assert nothing_runs()


def test_each_item_is_a_document_with_its_reply_or_its_fault(server, tmp_path):
    found = list(ask([*documents(50), {"id": "odd"}], client(server), RATE, journal=str(tmp_path)))
    replies = [answered for answered in found if answered.reply is not None]
    faults = [answered for answered in found if answered.fault is not None]
    assert len(replies) + len(faults) == 51
    assert 0 < len(replies) < 50
    assert {answered.reply.split(": ", 1)[1] for answered in replies} == {
        f"Rate from 0 to 5: {answered.document['text']}" for answered in replies
    }
    assert {answered.fault.kind for answered in faults} == {"filtered", "bad_row"}
    assert found[-1].fault.message == "item 50: no field 'text' for the template; there are id"


def test_no_more_than_the_window_is_read_ahead(calm, tmp_path):
    read, most = count(), 0
    pulled = 0

    def source():
        nonlocal pulled
        for number in read:
            pulled += 1
            yield f"text {number}"

    stream = ask(source(), client(calm), RATE, journal=str(tmp_path), window=20)
    for taken, _ in enumerate(islice(stream, 200)):
        most = max(most, pulled - taken)
    stream.close()
    assert 10 <= most <= 20
    assert nothing_runs()


def test_an_outcome_is_handed_out_while_the_source_waits_for_somebody(calm, tmp_path):
    answered = threading.Semaphore(1)

    def interactive():
        for number in range(5):
            assert answered.acquire(timeout=PATIENCE)
            yield f"question {number}"

    found = []
    for each in ask(interactive(), client(calm), "{text}", journal=str(tmp_path)):
        found.append(each.document)
        answered.release()
    assert found == [f"question {number}" for number in range(5)]


@pytest.mark.parametrize("how", ["close", "garbage", "exception"])
def test_ended_early_nothing_of_it_runs(tmp_path, how):
    with serving(Behaviour(latency=parse_latency("bimodal 0 30 0.5"))) as server:
        stream = ask(documents(1000), client(server), RATE, journal=str(tmp_path))
        gone = weakref.ref(stream)
        next(stream)
        assert not nothing_runs()
        if how == "close":
            stream.close()
            assert next(stream, None) is None
        elif how == "garbage":
            del stream
            gc.collect()
            assert gone() is None
        else:
            with pytest.raises(ZeroDivisionError):
                1 / sum(0 for _ in millstream.pack(([1] for _ in islice(stream, 1)), 1))
            stream.close()
        assert nothing_runs()


def test_what_everybody_would_share_stops_it_and_is_nobodys_fault(tmp_path):
    with serving(Behaviour(api_key="right")) as server:
        stream = ask(documents(9), client(server, api_key="wrong"), RATE, journal=str(tmp_path))
        with pytest.raises(RunError, match=r"every other request would end the same way\. What was answered"):
            list(stream)
        with pytest.raises(RunError, match="every other request"):
            next(stream)
        assert keys(tmp_path) == []
        state = stream.state()
        found = list(ask(documents(9), client(server, api_key="right"), RATE, journal=str(tmp_path), state=state))
        assert [answered.fault for answered in found] == [None] * 9


@pytest.mark.parametrize("window", [1, 3, 200])
def test_a_server_that_goes_away_stops_it_and_is_nobodys_fault(tmp_path, window):
    kept, port = kept_port()
    with kept:
        with serving(Behaviour(), port) as server:
            one = client(server, attempts=1, in_flight=4)
            stream = ask(documents(300), one, RATE, journal=str(tmp_path), window=window)
            found = list(islice(stream, 10))
        with pytest.raises(RunError, match="Stopped: "):
            found.extend(stream)
    assert len(found) >= 10
    faults = [answered.fault for answered in found if answered.fault]
    # With one attempt each, what was on its way as the server went may have been reset; what came after it waits.
    assert len(faults) <= 4
    assert {fault.kind for fault in faults} <= {"connection"}
    assert Path(tmp_path, "journal.jsonl").read_bytes().count(b'"fault"') <= 4
    assert nothing_runs()


def test_a_fault_of_the_source_comes_after_what_came_before_it(calm, tmp_path):
    @stage
    def breaking(texts):
        for number, (text, place) in enumerate(texts):
            if number == 40:
                raise DataError("cannot be read")
            yield text, place

    stream = ask(breaking(documents(90)), client(calm), RATE, journal=str(tmp_path))
    found = [next(stream) for _ in range(40)]
    with pytest.raises(DataError, match="cannot be read"):
        next(stream)
    assert [answered.document for answered in found] == documents(40)


def rating(document):
    return [{"role": "system", "content": "You rate."}, {"role": "user", "content": document["text"]}]


def test_a_function_makes_prompts_too_and_counts_by_name_and_version(calm, tmp_path):
    journal = str(tmp_path)
    stream = ask(documents(5), client(calm), rating, journal=journal, version="2")
    assert next(stream).reply == "reply to: text 0"
    state = stream.state()
    assert state["made"][0][1]["function"] == "rating"
    stream.close()
    with pytest.raises(ResumeRefused, match="version was '2' and is '3' now"):
        ask(documents(5), client(calm), rating, journal=journal, version="3", state=state)
    rest = pickle.loads(
        pickle.dumps(ask(documents(5), client(calm), rating, journal=journal, version="2", state=state))
    )
    assert [answered.document["id"] for answered in rest] == ["d1", "d2", "d3", "d4"]


def test_a_state_goes_on_with_its_own_journal_and_question_alone(calm, tmp_path):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    stream = ask(documents(5), client(calm), RATE, journal=one, window=2)
    next(stream)
    state = stream.state()
    stream.close()
    with pytest.raises(ResumeRefused, match=r"there is no journal in .*other"):
        next(ask(documents(5), client(calm), RATE, journal=other, state=state))
    list(ask(["something else"], client(calm), RATE, journal=other))
    with pytest.raises(ResumeRefused, match="has not what was handed out last"):
        next(ask(documents(5), client(calm), RATE, journal=other, state=state))
    with pytest.raises(ResumeRefused, match="template was 'Rate"):
        ask(documents(5), client(calm), "Rewrite: {text}", journal=one, state=state)
    with pytest.raises(ResumeRefused, match=r"params was \{\} and is \{'temperature': 0\} now"):
        ask(documents(5), client(calm, params={"temperature": 0}), RATE, journal=one, state=state)


def test_what_cannot_be_asked_is_told_at_once(calm, tmp_path):
    one, journal = client(calm), str(tmp_path)
    for tried, why in (
        ((one, RATE, journal, 0), "window 0"),
        ((one, RATE, journal, 1.5), "window 1.5"),
        ((one, RATE, None, 1), "journal=None does not work"),
        ((calm.url, RATE, journal, 1), "is no client: give a millstream.Client"),
        ((Client(calm.url), RATE, journal, 1), "no model given"),
    ):
        with pytest.raises(RequestError, match=why):
            ask([], *tried[:2], journal=tried[2], window=tried[3])
    first = ask(documents(3), one, RATE, journal=str(tmp_path / "a"), window=1)
    next(first)
    with pytest.raises(RequestError, match="needs one of its own"):
        next(ask(documents(3), one, RATE, journal=str(tmp_path / "b")))
    with pytest.raises(RequestError, match=r"another millstream is writing to .*; wait for it, or name another place"):
        next(ask(documents(3), client(calm), RATE, journal=str(tmp_path / "a")))
    first.close()
    assert len(list(ask(documents(3), one, RATE, journal=str(tmp_path / "b")))) == 3  # one after the other it may


def test_a_journal_of_the_command_is_gone_on_with(calm, tmp_path):
    from millstream.runs.ask.asking import ask_to
    from millstream.runs.ask.settings import AskSettings

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in documents(20)))
    asked = AskSettings(model="simulated", base_urls=[calm.url], template=RATE)
    ask_to(str(tmp_path / "out.jsonl"), str(prompts), asked, journal=str(tmp_path / "journal"))
    before = calm.stats.requests
    stream = ask(millstream.read(prompts), client(calm), RATE, journal=str(tmp_path / "journal"))
    assert [answered.reply is not None for answered in stream] == [True] * 20
    assert calm.stats.requests == before


def test_read_ask_filter_tokenize_pack_killed_three_times(tmp_path):
    """The same samples as never killed, with the same replies; and what was answered is not asked again."""
    corpus, journal = tmp_path / "corpus.jsonl", tmp_path / "journal"
    rows = [{"id": f"d{number}", "text": f"text {number} " * (1 + number % 7)} for number in range(200)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = tuple(map(parse_fault, ("content-policy:0.1", "disconnect:0.02:times=1", "garbage:0.02:times=1")))
    with serving(Behaviour(latency=parse_latency("lognormal 0.005 1"), faults=faults)) as server:
        found = killed_and_gone_on(server.url, "simulated", corpus, tmp_path, counts=[1, 8, 5])
        stats = server.stats
        again = sum(stats.faults[kind] for kind in ("disconnect", "garbage")) + 3 * IN_FLIGHT
        assert stats.bodies == 200
        assert stats.asked_again <= again
        assert len(keys(journal)) == len(set(keys(journal))) == 200
        before = stats.requests
        assert [told(sample) for sample in pipeline(server.url, "simulated", corpus, str(journal))] == found
        assert stats.requests == before
    assert len(found) > 15


def test_a_source_that_fails_while_it_is_closed_is_told(calm, tmp_path):
    def stubborn():
        try:
            yield "one"
        finally:
            raise DataError("cannot be closed")

    stream = ask(stubborn(), client(calm), "{text}", journal=str(tmp_path))
    assert next(stream).reply == "reply to: one"
    with pytest.raises(DataError, match="cannot be closed"):
        next(stream)


def test_a_bound_on_the_cost_holds_over_all_runs_of_a_journal(tmp_path):
    with serving(Behaviour()) as server:
        for most in (200, 300, 300):
            dear = client(server, price=(1e6, 1e6), max_cost=most, params={"max_tokens": 4}, in_flight=2)
            stream, found = ask(documents(100), dear, RATE, journal=str(tmp_path)), []
            with pytest.raises(RunError, match="the most that it may cost is reached"):
                found.extend(stream)
            assert len(keys(tmp_path)) == server.stats.requests
            assert 0 < dear.cost <= most
