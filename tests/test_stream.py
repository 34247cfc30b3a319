"""A reply piece by piece: every way a stream can fail, against the simulator, and what a reader sees of it and when."""

import asyncio
import random
from contextlib import asynccontextmanager

import msgspec
import pytest
import virtual_sockets
from hypothesis import given
from hypothesis import strategies as st
from wires import FINE, STREAMED, answering, body, faulty, http, told

from millstream.aio import Fault
from millstream.client.pieces import StreamedReply
from millstream.client.requests import Reply
from millstream.llm.events import ReplyPieces
from millstream.llm.peers import Peer
from millstream.llm.simulator import KINDS, Behaviour, parse_latency, running
from millstream.llm.wire import Wire, WireError

STORY = body("Tell me a story of a mill.")
SAID = "reply to: Tell me a story of a mill."
PIECES = [SAID[start : start + 4] for start in range(0, len(SAID), 4)]
SLOWLY = {"latency": parse_latency("1"), "piece_latency": parse_latency("0.5")}


@asynccontextmanager
async def wired(behaviour=None):
    """A server and a wire to it; after the block nothing but the test itself is alive."""
    async with running(behaviour) as server, Wire(server.url) as wire:
        yield server, wire
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert server.stats.in_flight == 0


def streamed(behaviour, asked=STORY):
    """The pieces of one stream and the stream after its end, or what it raised."""

    async def main():
        async with wired(behaviour) as (_, wire):
            pieces = []
            try:
                async with wire.pieces(asked) as stream:
                    async for piece in stream:
                        pieces.append(piece)
            except WireError as error:
                return pieces, error
            return pieces, stream

    return asyncio.run(main())


# --- the wire ---


@pytest.mark.parametrize("latency", ["0", "0.001"])
def test_a_stream_gives_pieces_and_then_what_a_whole_reply_has(latency):
    pieces, stream = streamed(Behaviour(piece_latency=parse_latency(latency)))
    assert pieces == PIECES
    assert (stream.model, stream.finish_reason) == ("simulated", "stop")
    assert stream.usage == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    assert stream.answer.text == SAID
    assert stream.answer.body["choices"][0]["message"]["content"] == SAID


@pytest.mark.parametrize("latency", ["0", "0.001"])
@pytest.mark.parametrize("fault", STREAMED)
def test_each_fault_of_a_stream_is_told_apart(fault, latency):
    pieces, error = streamed(faulty(fault, piece_latency=parse_latency(latency)))
    assert told(error) == STREAMED[fault]
    assert bool(pieces) == (fault in ("cut:1", "error-event:1"))
    assert PIECES[: len(pieces)] == pieces
    assert str(error).isprintable()


@pytest.mark.parametrize("fault", FINE)
def test_what_is_odd_but_whole_is_streamed(fault):
    pieces, stream = streamed(faulty(fault))
    assert "".join(pieces) == stream.answer.text != ""


def test_every_fault_is_shown_here():
    assert {fault.split(":")[0] for fault in [*STREAMED, *FINE]} | {"hang"} <= set(KINDS)


def test_what_was_paid_for_a_stream_without_text_is_told():
    _, error = streamed(faulty("null-content:1"))
    assert error.usage["prompt_tokens"] == 7


def test_a_stream_asks_for_usage_unless_told_otherwise():
    assert streamed(Behaviour(), msgspec.json.encode(STORY))[1].usage["prompt_tokens"] == 7
    silent = {**STORY, "stream_options": {"include_usage": False}}
    assert streamed(Behaviour(), silent)[1].usage == {}


def test_a_server_that_does_not_stream_gives_one_piece():
    async def main():
        reply = msgspec.json.encode({"choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}]})
        whole = answering(http(reply, Content_Type="application/json"))
        async with whole as (address, _), Wire(f"http://{address}") as wire, wire.pieces(STORY) as stream:
            return [piece async for piece in stream], stream.answer.text

    assert asyncio.run(main()) == (["Paris"], "Paris")


def test_leaving_a_stream_early_closes_its_connection():
    async def main():
        async with wired(Behaviour(**SLOWLY)) as (server, wire):
            async with wire.pieces(STORY) as stream:
                first = await anext(stream)
            while not server.stats.gone:
                await asyncio.sleep(0.1)
            return first, server.stats.in_flight

    assert virtual_sockets.run(main()) == (PIECES[0], 0)


def test_a_hanging_stream_is_left_when_it_is_cancelled():
    async def main():
        async with wired(faulty("hang:1")) as (server, wire):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(3), wire.pieces(STORY):
                    pass
            while not server.stats.gone:
                await asyncio.sleep(0.1)

    virtual_sockets.run(main())


# --- bytes ---


class Chunks:
    """A reply whose body comes in these chunks."""

    def __init__(self, chunks):
        self.status, self.headers = 200, {"Content-Type": "text/event-stream"}
        self._chunks = iter(chunks)

    async def chunk(self):
        return next(self._chunks, b"")

    async def close(self):
        pass


def read(chunks):
    """The pieces of a stream that comes in these chunks, and the stream."""

    async def main():
        async def begin():
            return Chunks(chunks)

        async with ReplyPieces(Peer("http://127.0.0.1/v1"), begin) as stream:
            return [piece async for piece in stream], stream

    return asyncio.run(main())


def event(text=None, finish=None, index=0, **more):
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}], **more}


def written(events, end="\n", between=("",), done="data: [DONE]"):
    """The bytes of a stream; `between` are the lines between two events."""
    lines = []
    for each in events:
        lines += [f"data: {msgspec.json.encode(each).decode()}", *between]
    return end.join([*lines, done, "", ""]).encode()


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5)
NOISE = st.lists(st.sampled_from(["", ": keep-alive", "id: 7", "retry: 3", "event: message", "data:"]), max_size=3)


@given(TEXTS, st.sampled_from(["\n", "\r\n", "\r"]), NOISE, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_stream_may_be_cut_into_chunks_anywhere(texts, end, noise, sizes):
    content = written([*map(event, texts), event("", "stop")], end, ("", *noise, ""))
    chunks, start = [], 0
    while start < len(content):
        chunks.append(content[start : start + sizes[len(chunks) % len(sizes)]])
        start += len(chunks[-1])
    pieces, stream = read(chunks)
    assert pieces == texts
    assert (stream.answer.text, stream.finish_reason) == ("".join(texts), "stop")


@given(TEXTS, st.data())
def test_no_stream_that_lost_its_end_is_taken_for_a_whole_one(texts, data):
    content = written([*map(event, texts), event("", "stop")]).rstrip()
    told_how_it_ended = len(content.removesuffix(b"data: [DONE]").rstrip())
    kept = data.draw(st.integers(0, told_how_it_ended - 1))
    with pytest.raises(WireError) as failed:
        read([content[:kept]])
    assert told(failed.value) == ("cut", 200, True, False)
    assert read([content])[0] == texts  # an end of line is not asked for


@pytest.mark.parametrize("done", ["", "data: [DONE]", "data: [DONE]\n\n", 'data: {"usage": {"total_tokens": 3}}'])
def test_a_stream_that_told_how_it_ended_may_leave_the_last_word_out(done):
    events = written([event("a"), event("b", "length")], done=done).rstrip(b"\n")
    pieces, stream = read([events])
    assert (pieces, stream.answer.text, stream.finish_reason) == (["a", "b"], "ab", "length")
    assert stream.usage == ({"total_tokens": 3} if "usage" in done else {})


@pytest.mark.parametrize("rest", ["data: {", "da", ": by", 'data: {"usage": {"total_tokens": 3}'])
def test_a_stream_that_ends_in_the_middle_of_a_line_was_cut(rest):
    with pytest.raises(WireError) as failed:
        read([written([event("a", "stop")], done=rest).rstrip(b"\n")])
    assert told(failed.value) == ("cut", 200, True, False)


ENDS = [
    ([event("a")], ("cut", True)),  # no finish_reason
    ([], ("unusable", True)),
    ([event(None, "stop")], ("unusable", True)),
    ([event("a"), {"choices": 5}], ("unusable", True)),
    ([event("a"), {"error": {"message": "no", "code": 429}}], ("rate_limited", True)),
    ([{"error": {"message": "no", "type": "invalid_request_error"}}], ("bad_request", False)),
    ([{"error": {"message": "no", "code": "insufficient_quota"}}], ("quota", False)),
    ([{"error": "no"}], ("server_error", True)),
]


@pytest.mark.parametrize(("events", "ends"), ENDS)
def test_how_a_stream_may_fail_although_it_ends(events, ends):
    with pytest.raises(WireError) as failed:
        read([written(events)])
    assert (failed.value.kind, failed.value.retry) == ends


def test_an_event_that_is_called_an_error_is_one():
    with pytest.raises(WireError, match="overheated") as failed:
        read([b'event: error\ndata: {"message": "overheated"}\n\n'])
    assert failed.value.kind == "server_error"


def test_only_the_first_choice_is_read_and_tools_need_no_text():
    events = [event("a"), event("x", index=1), event("b", "stop"), {"choices": [], "usage": {"total_tokens": 3}}]
    pieces, stream = read([written(events)])
    assert (pieces, stream.usage) == (["a", "b"], {"total_tokens": 3})
    tool = {"choices": [{"delta": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}]}
    assert read([written([tool])])[1].answer.text == ""
    completion = {"choices": [{"text": "a", "finish_reason": "length"}]}
    assert read([written([completion])])[0] == ["a"]


def test_a_stream_tells_what_was_thought_refused_and_called():
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    deltas = [
        {"reasoning_content": "2 and"},
        {"reasoning_content": " 2"},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "sub", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "2}"}}]},
        {"refusal": "I will"},
        {"refusal": " not."},
    ]
    events = [{"choices": [{"delta": delta}]} for delta in deltas] + [event("", "tool_calls")]
    answer = read([written(events)])[1].answer
    assert (answer.reasoning, answer.refusal) == ("2 and 2", "I will not.")
    first, second = answer.tool_calls
    assert (first["id"], first["function"]) == ("c1", {"name": "add", "arguments": '{"x":2}'})
    assert (second["id"], second["function"]["arguments"]) == ("c2", "{}")
    message = answer.body["choices"][0]["message"]
    assert [message[name] for name in ("reasoning", "refusal", "tool_calls")] == [
        "2 and 2",
        "I will not.",
        [first, second],
    ]


# --- the client's pieces, in virtual time ---


async def all_of(pieces):
    """The pieces with the times in seconds at which they came."""
    clock = asyncio.get_running_loop().time
    async with pieces:
        began = clock()
        return [(piece, clock() - began) async for piece in pieces]


def told_story(behaviour, **options):
    """The pieces with their times, the outcome, and how many requests the server saw."""

    async def main():
        async with wired(behaviour) as (server, wire):
            pieces = StreamedReply(wire, STORY, draw=random.Random(0), **options)
            found = await all_of(pieces)
            assert pieces.text == "".join(piece for piece, _ in found)
            return found, pieces.outcome, server.stats.requests

    return virtual_sockets.run(main())


def test_pieces_come_when_they_are_said_and_end_in_a_reply():
    found, reply, _ = told_story(Behaviour(**SLOWLY))
    # The server begins after 1 s with an empty piece; then there is one every 0.5 s, and two more events without text.
    assert found == [(piece, pytest.approx(1.5 + number / 2)) for number, piece in enumerate(PIECES)]
    assert isinstance(reply, Reply)
    assert (reply.text, reply.attempts, reply.finish_reason, reply.index) == (SAID, 1, "stop", 0)
    assert reply.latency >= found[-1][1]
    assert reply.usage["completion_tokens"] == 9


def test_a_timeout_bounds_all_of_it_and_what_came_is_kept():
    found, fault, _ = told_story(Behaviour(**SLOWLY), timeout=3)
    assert [piece for piece, _ in found] == PIECES[:3]
    assert (fault.kind, fault.seconds, fault.attempts) == ("timeout", pytest.approx(3), 1)
    assert fault.message == "no end within 3 s, in 1 attempt"


def test_a_timeout_before_the_first_piece():
    found, fault, _ = told_story(faulty("hang:1"), timeout=3)
    assert (found, fault.kind, fault.seconds) == ([], "timeout", pytest.approx(3))


def test_it_is_tried_again_until_something_was_said():
    found, reply, requests = told_story(faulty("503:1:times=2"), timeout=600)
    assert ([piece for piece, _ in found], reply.attempts, requests) == (PIECES, 3, 3)
    _, fault, requests = told_story(faulty("503:1"), attempts=4)
    assert (fault.kind, fault.attempts, requests) == ("server_error", 4, 4)


@pytest.mark.parametrize(("fault", "kind"), [("cut:1:times=1", "cut"), ("error-event:1:times=1", "server_error")])
def test_it_is_not_tried_again_after_that(fault, kind):
    found, ended, requests = told_story(faulty(fault))
    assert found
    assert (ended.kind, ended.attempts, requests) == (kind, 1, 1)
    assert ended.error.kind == kind


@pytest.mark.parametrize(("fault", "kind"), [("401:1", "unauthorized"), ("400:1", "bad_request")])
def test_what_is_final_is_asked_once(fault, kind):
    _, ended, requests = told_story(faulty(fault))
    assert (ended.kind, requests) == (kind, 1)


def test_a_wait_that_would_end_too_late_is_not_waited_for():
    found, fault, requests = told_story(faulty("429:1:100"), timeout=50)
    assert (found, fault.kind, requests) == ([], "rate_limited", 1)
    assert fault.seconds < 1


def test_a_server_that_is_not_there():
    async def main():
        async with Wire("http://127.0.0.1:1/v1") as wire:
            pieces = StreamedReply(wire, STORY, attempts=2)
            return await all_of(pieces), pieces.outcome

    found, fault = virtual_sockets.run(main())
    assert (found, fault.kind, fault.attempts) == ([], "connection", 2)


def test_leaving_early_is_a_fault_and_leaves_nothing():
    async def main():
        async with wired(Behaviour(**SLOWLY)) as (server, wire):
            async with StreamedReply(wire, STORY) as pieces:
                async for _ in pieces:
                    break
                assert pieces.outcome is None
            while not server.stats.gone:
                await asyncio.sleep(0.1)
            return pieces

    pieces = virtual_sockets.run(main())
    assert (pieces.outcome.kind, pieces.text) == ("cancelled", PIECES[0])


def test_pieces_that_nobody_reads_ask_nothing():
    async def main():
        async with wired() as (server, wire):
            async with StreamedReply(wire, STORY) as pieces:
                pass
            return pieces.outcome, server.stats.requests

    fault, requests = asyncio.run(main())
    assert (fault.kind, fault.attempts, requests) == ("cancelled", 0, 0)


def test_a_reader_that_is_cancelled_stays_cancelled():
    async def main():
        async with wired(Behaviour(**SLOWLY)) as (server, wire):
            pieces = StreamedReply(wire, STORY)
            task = asyncio.create_task(all_of(pieces))
            await asyncio.sleep(2.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not server.stats.gone:
                await asyncio.sleep(0.1)
            return pieces

    pieces = virtual_sockets.run(main())
    assert isinstance(pieces.outcome, Fault)
    assert (pieces.outcome.kind, pieces.text) == ("cancelled", "".join(PIECES[:2]))


def test_an_error_of_the_reader_is_its_own():
    async def refusing(pieces):
        async with pieces:
            async for _ in pieces:
                raise TimeoutError("mine")

    async def main():
        async with wired(Behaviour()) as (_, wire):
            pieces = StreamedReply(wire, STORY, timeout=60)
            with pytest.raises(TimeoutError, match="mine"):
                await refusing(pieces)
            return pieces.outcome

    assert asyncio.run(main()).kind == "cancelled"


def test_a_reader_that_takes_too_long_times_out_although_all_is_here():
    async def main():
        async with wired(Behaviour()) as (_, wire):
            async with StreamedReply(wire, STORY, timeout=3) as pieces:
                async for _ in pieces:
                    await asyncio.sleep(2)
            return pieces

    pieces = virtual_sockets.run(main())
    assert (pieces.outcome.kind, pieces.text) == ("timeout", "".join(PIECES[:2]))
