"""Replies as servers and proxies really write them: what is whole, what is not, and what is too much."""

import asyncio
import gzip
import tracemalloc
import zlib
from contextlib import asynccontextmanager

import msgspec
import pytest
from wires import answering, body, http, told

from millstream.llm.wire import Answer, Wire, WireError

SAID = {"choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}], "usage": {"total_tokens": 9}}
MIB = 1 << 20


def reply_to(reply, **options):
    """What one attempt ends with at a server that answers it with these bytes: an Answer or a WireError."""

    async def main():
        async with answering(reply) as (address, _), Wire(f"http://{address}/v1", **options) as wire:
            try:
                return await wire.send(body("hello"))
            except WireError as error:
                return error

    return asyncio.run(main())


def stream_of(reply, **options):
    """The pieces of such a stream, and what it ended with."""

    async def main():
        pieces = []
        async with answering(reply) as (address, _), Wire(f"http://{address}/v1", **options) as wire:
            try:
                async with wire.pieces(body("hello")) as stream:
                    async for piece in stream:
                        pieces.append(piece)
                return pieces, stream.answer
            except WireError as error:
                return pieces, error

    return asyncio.run(main())


def whole(message=None, finish="stop", choice=None, **more):
    """A reply in the bytes of HTTP."""
    found = {"message": message or {"content": "Paris"}, "finish_reason": finish, **(choice or {})}
    return http(msgspec.json.encode({"choices": [found], "usage": {"total_tokens": 9}, **more}))


def events(*data, end="\n\n", form="text/event-stream"):
    """A stream in the bytes of HTTP: JSON for what is none yet."""
    lines = [each if isinstance(each, bytes) else msgspec.json.encode(each) for each in data]
    return http(b"".join(b"data: " + line + end.encode() for line in lines), Content_Type=form)


def piece(text=None, finish=None, **more):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish, **more}]}


# --- what is whole and what is not ---


NOT_WHOLE = [
    ({"choice": {"error": {"message": "upstream died", "code": 502}}}, ("server_error", 200, True, False)),
    ({"error": {"message": "upstream died"}}, ("server_error", 200, True, False)),
    ({"finish": "error"}, ("unusable", 200, True, False)),
    ({"finish": "abort"}, ("unusable", 200, True, False)),
]


@pytest.mark.parametrize(("more", "ends"), NOT_WHOLE)
def test_a_text_with_an_error_beside_it_is_no_answer(more, ends):
    failed = reply_to(whole(**more))
    assert told(failed) == ends
    assert failed.usage == {"total_tokens": 9}  # it was paid for


@pytest.mark.parametrize(
    ("last", "ends"),
    [
        (piece("", "stop", error={"message": "upstream died", "code": 502}), ("server_error", 200, True, False)),
        ({**piece("", "stop"), "error": {"message": "upstream died"}}, ("server_error", 200, True, False)),
        (piece("", "error"), ("unusable", 200, True, False)),
        (piece("", "abort"), ("unusable", 200, True, False)),
    ],
)
def test_a_stream_with_an_error_in_it_is_no_answer(last, ends):
    pieces, failed = stream_of(events(piece("Pa"), last, b"[DONE]"))
    assert (pieces, told(failed)) == (["Pa"], ends)


PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    {"type": "text", "text": "Pa"},
    {"text": "ris"},
]


def test_content_in_parts_is_joined():
    answer = reply_to(whole({"content": PARTS}))
    assert (answer.text, answer.reasoning) == ("Paris", "hm")
    pieces, answer = stream_of(events(piece(PARTS[:2]), piece(PARTS[2:], "stop"), b"[DONE]"))
    assert (pieces, answer.text, answer.reasoning) == (["Pa", "ris"], "Paris", "hm")


def test_tools_need_no_text():
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    answer = reply_to(whole({"content": None, "tool_calls": [call]}, "tool_calls"))
    assert (answer.text, answer.tool_calls) == ("", [call])
    answer = reply_to(whole({"content": None, "function_call": call["function"]}, "function_call"))
    assert (answer.text, answer.tool_calls[0]["function"]) == ("", call["function"])
    pieces = [{"choices": [{"delta": {"function_call": each}}]} for each in ({"name": "f"}, {"arguments": "{}"})]
    _, answer = stream_of(events(*pieces, piece(None, "function_call"), b"[DONE]"))
    assert (answer.text, answer.tool_calls[0]["function"]) == ("", call["function"])


@pytest.mark.parametrize(
    ("finish", "says"), [("length", "all of max_tokens went into thinking"), ("content_filter", "filter")]
)
def test_no_text_for_a_reason_that_will_come_again_is_final(finish, says):
    failed = reply_to(whole({"content": None, "reasoning_content": "hm"}, finish))
    assert (told(failed), says in str(failed)) == ((finish, 200, False, False), True)
    assert failed.usage == {"total_tokens": 9}
    _, failed = stream_of(events(piece(None), piece(None, finish), b"[DONE]"))
    assert (told(failed), says in str(failed)) == ((finish, 200, False, False), True)


def test_a_stream_that_ends_cleanly_needs_no_last_word():
    pieces, answer = stream_of(events(piece("Pa"), piece("ris", "stop")))
    assert (pieces, answer.text, answer.finish_reason) == (["Pa", "ris"], "Paris", "stop")


# --- what is read although it is not as it should be ---


USAGES = [
    ('"9 tokens"', {}),
    ("[7, 2]", {}),
    ("9.0", {}),
    ('{"prompt_tokens": 7.0, "completion_tokens": "2", "cost": 0.5}', {"prompt_tokens": 7, "completion_tokens": 2}),
    ('{"prompt_tokens": NaN, "completion_tokens": -2, "total_tokens": true}', {}),
    ('{"prompt_tokens": 1e999, "completion_tokens": 12345678901234567890123, "total_tokens": [1]}', {}),
    ("null", {}),
]


@pytest.mark.parametrize(("written", "usage"), USAGES)
def test_usage_that_is_none_costs_no_answer(written, usage):
    content = b'{"choices":[{"message":{"content":"Paris"},"finish_reason":"stop"}],"usage":%b}' % written.encode()
    answer = reply_to(http(content))
    assert answer.text == "Paris"
    assert {name: count for name, count in answer.usage.items() if name != "cost"} == usage
    stream = events(piece("Paris", "stop"), b'{"choices":[],"usage":%b}' % written.encode(), b"[DONE]")
    assert stream_of(stream)[1].usage == answer.usage


ODD = [
    (b'\xef\xbb\xbf{"choices":[{"message":{"content":"Paris"}}]}', "Paris"),
    (b'\r\n\n\n \xef\xbb\xbf {"choices":[{"message":{"content":"Paris"}}]}\n\n', "Paris"),
    (b'{"choices":[{"message":{"content":"Paris"},"logprobs":{"x":[NaN,-Infinity]}}]}', "Paris"),
    (b'{"choices":[{"message":{"content":"Paris \\ud83d"}}]}', "Paris \ufffd"),
    (b'{"choices":[{"message":{"content":"\\ud83d\\ude00"}}]}', "\N{GRINNING FACE}"),
    (b'{"choices":[{"message":{"content":"Paris \xf0\x9f"}}]}', "Paris \ufffd"),
    (b'{"choices":[{"message":{"content":"a\nb"}}]}', "a\nb"),
    (b'{"choices":[{"message":"Paris"}]}', "Paris"),
    (b'{"choices":[{"message":{"content":"Paris","refusal":5},"finish_reason":{"type":"stop"}}],"model":7}', "Paris"),
    ('{"choices":[{"message":{"content":"Zürich"}}]}'.encode("utf-16"), "Zürich"),
]


@pytest.mark.parametrize(("content", "text"), ODD)
def test_what_is_not_quite_json_is_read(content, text):
    answer = reply_to(http(content))
    assert isinstance(answer, Answer), answer
    assert (answer.text, answer.model) == (text, None)
    assert answer.finish_reason in ("stop", None)
    assert msgspec.json.encode(answer.body)  # what is kept of it can be written


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"choices"', b"5", b'"Paris"', b"[]", b"[" * 100_000, b'{"choices":null}', b'{"usage":' + b"[" * 9999],
)
def test_what_is_no_reply_is_none(content):
    assert told(reply_to(http(content))) == ("unusable", 200, True, False)


STREAMS = [
    events(b"null", piece("Pa"), b'"ping"', piece("ris", "stop"), b"[DONE]"),
    events({"choices": [None]}, piece("Pa"), {"choices": None}, piece("ris", "stop"), b"[DONE]"),
    events(piece("Pa", index=None), piece("ris", "stop", index=None), b"[DONE]"),
    events(b'{"choices":[{"delta":\ndata: {"content":"Pa"}}]}', piece("ris", "stop"), b"[DONE]"),
    events(piece("Pa"), piece("ris", "stop"), b"[DONE]", end="\n"),  # no blank lines between them
    events(b'{"choices":[{"delta":{"content":"Pa"},"logprobs":NaN}]}', piece("ris", "stop"), b"[DONE]", end="\n"),
    events(piece("Pa"), piece("ris", {"type": "stop"}), b"[DONE]"),
    http(b"\xef\xbb\xbf" + events(piece("Pa"), piece("ris", "stop"), b"[DONE]").partition(b"\r\n\r\n")[2]),
    *(
        events(piece("Pa"), piece("ris", "stop"), b"[DONE]", form=form)
        for form in ("application/json", "text/html", "text/plain", "application/octet-stream")
    ),
]


@pytest.mark.parametrize("stream", STREAMS)
def test_what_is_not_quite_a_stream_is_read(stream):
    pieces, answer = stream_of(stream)
    assert isinstance(answer, Answer), answer
    assert ("".join(pieces), answer.text, answer.finish_reason) == ("Paris", "Paris", "stop")


@pytest.mark.parametrize("form", ["text/event-stream", "text/plain", "application/json"])
@pytest.mark.parametrize("before", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_whole_reply_is_read_whatever_it_is_called(form, before):
    pieces, answer = stream_of(http(before + msgspec.json.encode(SAID), Content_Type=form))
    assert (pieces, answer.text) == (["Paris"], "Paris")


def test_a_page_instead_of_a_stream_is_told():
    _, failed = stream_of(http(b"<html>Welcome</html>", Content_Type="text/event-stream"))
    assert told(failed) == ("unusable", 200, True, False)
    assert "HTML" in str(failed)


def test_a_letter_that_comes_in_halves_is_joined():
    halves = [b'{"choices":[{"delta":{"content":"%b"}}]}' % half for half in (b"a\\ud83d", b"\\ude00b", b"\\ud83d")]
    pieces, answer = stream_of(events(*halves, piece("", "stop"), b"[DONE]"))
    assert answer.text == "".join(pieces) == "a\N{GRINNING FACE}b\ufffd"


@pytest.mark.parametrize("headers", [{"X_Policy": "x" * 60_000}, {f"X_{number}": "x" * 1000 for number in range(60)}])
def test_headers_may_be_long(headers):
    content = msgspec.json.encode(SAID)
    assert reply_to(http(content, **headers)).text == "Paris"


# --- what is too much ---


@asynccontextmanager
async def sending(head, chunk, most):
    """A server that sends one chunk again and again, at most so many bytes; how many went out is in `sent`."""
    sent = []

    async def handle(reader, writer):
        await reader.read(1 << 16)
        writer.write(b"HTTP/1.1 " + head.encode() + b"\r\n\r\n")
        try:
            while sum(sent) < most:
                writer.write(chunk)
                await writer.drain()
                sent.append(len(chunk))
        except (ConnectionError, asyncio.CancelledError):  # the client has gone; so has the test
            pass
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", sent
    finally:
        server.close()


def read_of(head, chunk, most, ask, sends=1 << 30):
    """What one attempt failed with, how much the server could send, and the peak of memory."""

    async def main():
        async with sending(head, chunk, sends) as (url, sent), Wire(url, most=most) as wire:
            tracemalloc.start()
            try:
                with pytest.raises(WireError) as failed:
                    await ask(wire)
                return failed.value, sum(sent), tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    return asyncio.run(main())


async def send(wire):
    await wire.send(body("hello"))


async def stream(wire):
    async with wire.pieces(body("hello")) as pieces:
        async for _ in pieces:
            pass


@pytest.mark.parametrize("ask", [send, stream])
@pytest.mark.parametrize(
    ("head", "chunk"),
    [
        ("200 OK", b" " * 65_536),
        ("200 OK", b'{"a": "' + b"x" * 65_536),
        (f"200 OK\r\nContent-Length: {1 << 40}", b"x" * 65_536),
        ("200 OK\r\nContent-Type: text/event-stream", b"data: " + b"x" * 65_536),
        ("200 OK\r\nContent-Type: text/event-stream", b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n' * 1000),
    ],
)
def test_a_reply_without_end_is_not_read_without_end(head, chunk, ask):
    error, sent, peak = read_of(head, chunk, 2 * MIB, ask)
    assert told(error) == ("unusable", 200, False, False)  # and not asked again
    assert "over 2,097,152 bytes" in str(error)
    assert sent < 16 * MIB  # what sockets hold, too
    assert peak < 12 * MIB


@pytest.mark.parametrize("ask", [send, stream])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_what_is_small_but_unpacks_to_very_much_is_not_unpacked(pack, ask):
    bomb = pack(bytes(64 * MIB))
    packing = "gzip" if pack is gzip.compress else "deflate"
    head = f"200 OK\r\nContent-Encoding: {packing}\r\nContent-Length: {len(bomb)}"
    error, _, peak = read_of(head, bomb, 2 * MIB, ask, sends=1)
    assert told(error) == ("unusable", 200, False, False)
    assert peak < 12 * MIB


def test_a_page_without_end_is_judged_by_its_status():
    error, sent, _ = read_of("503 Service Unavailable", b"x" * 65_536, 64 * MIB, send)
    assert told(error) == ("server_error", 503, True, False)
    assert sent < 16 * MIB


def test_a_status_is_judged_although_its_page_cannot_be_unpacked():
    assert told(reply_to(http(b"abc", "401 Unauthorized", Content_Encoding="br"))) == ("unauthorized", 401, False, True)


def raw_deflate(content):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


PACKINGS = [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)]


@pytest.mark.parametrize(("packing", "pack"), [*PACKINGS, ("identity", bytes)])
def test_what_is_compressed_although_nobody_asked_is_read(packing, pack):
    assert reply_to(http(pack(msgspec.json.encode(SAID)), Content_Encoding=packing)).text == "Paris"
    events_of = events(piece("Pa"), piece("ris", "stop"), b"[DONE]").partition(b"\r\n\r\n")[2]
    assert stream_of(http(pack(events_of), Content_Encoding=packing))[1].text == "Paris"
    large = msgspec.json.encode({**SAID, "more": "x" * 3 * MIB})
    assert reply_to(http(pack(large), Content_Encoding=packing)).raw == large


@pytest.mark.parametrize(
    ("packing", "content"), [("br", b"abc"), ("gzip", b"no gzip"), ("gzip", gzip.compress(b"{}" * 100, mtime=0)[:-9])]
)
def test_what_cannot_be_unpacked_is_told(packing, content):
    failed = reply_to(http(content, Content_Encoding=packing))
    assert told(failed) == ("unusable", 200, True, False)
    assert "compressed" in str(failed)
