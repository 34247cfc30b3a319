"""Embeddings in Python: one outcome for each text, however many texts a request has."""

import asyncio
import base64
import json
import struct

import pytest
from wires import http, serving

from millstream import Client, Embedding, Fault
from millstream.errors import AskStopped, RequestError
from millstream.llm.simulator import Behaviour, running


def vector(text):
    return [float(len(text)), float(sum(map(ord, text)) % 97)]


def embedded(path, body):
    """A server that takes at most 10 letters a text, answers in any order, and packs floats where it is told to."""
    assert path == "/v1/embeddings"
    texts = body["input"]
    if "stop" in texts:
        return http(b'{"error": {"message": "no", "code": "invalid_api_key"}}', "401 No")
    if any(len(text) > 10 for text in texts):
        return http(
            json.dumps({"error": {"message": "maximum context length", "code": "context_length_exceeded"}}).encode(),
            "400 No",
        )
    packed = body.get("encoding_format") == "base64"
    data = [
        {
            "index": at,
            "embedding": base64.b64encode(struct.pack("<2f", *vector(text))).decode() if packed else vector(text),
        }
        for at, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return http(json.dumps({"data": data[::-1], "model": "e", "usage": usage}).encode())


def asked(texts, reply_to=embedded, options=None, **given):
    async def main():
        async with (
            serving(reply_to) as (address, heard),
            Client(f"http://{address}/v1", model="m", **(options or {})) as client,
        ):
            return await client.embed(texts, **given), heard

    return asyncio.run(main())


TEXTS = ["mill", "", "stream", "a", "stream", "grain"]


@pytest.mark.parametrize("per_request", [1, 2, 4, 6, 100])
def test_each_text_gets_its_vector_in_order(per_request):
    found, heard = asked(TEXTS, per_request=per_request)
    assert [each.index for each in found] == list(range(len(TEXTS)))
    assert [each.vector for each in found] == list(map(vector, TEXTS))
    assert len(heard) == -(-len(TEXTS) // per_request)
    assert {(each.model, each.attempts) for each in found} == {("e", 1)}
    assert found[0].usage["total_tokens"] == min(per_request, len(TEXTS))


def test_parameters_go_into_the_body_and_those_of_prompts_do_not():
    found, heard = asked(["mill"], options={"params": {"temperature": 0}}, encoding_format="base64", dimensions=2)
    assert heard[0][1] == {"model": "m", "encoding_format": "base64", "dimensions": 2, "input": ["mill"]}
    assert found[0].vector == vector("mill")


def test_a_text_that_is_refused_is_its_own_fault_whoever_it_is_with():
    found, heard = asked(["mill", "far too long a text", "grain"], per_request=3)
    assert [type(each) for each in found] == [Embedding, Fault, Embedding]
    assert (found[1].index, found[1].kind) == (1, "too_large")
    assert len(heard) == 4  # all three, then each alone
    assert found[2].vector == vector("grain")


def test_what_is_no_text_is_a_fault_in_its_place():
    found, _ = asked(["mill", 5, None, "a\ud83d", "grain"], per_request=2)
    assert [isinstance(each, Embedding) or each.kind for each in found] == [True, "bad_row", "bad_row", "bad_row", True]
    assert [each.index for each in found] == list(range(5))


async def slowly(texts):
    for text in texts:
        await asyncio.sleep(0)
        yield text


def test_texts_may_come_from_anywhere():
    assert [each.vector for each in asked(slowly(TEXTS), per_request=4)[0]] == list(map(vector, TEXTS))
    assert [each.vector for each in asked(iter(TEXTS), per_request=4)[0]] == list(map(vector, TEXTS))
    assert asked([])[0] == []


def test_what_stops_a_run_carries_what_came():
    with pytest.raises(AskStopped) as stopped:
        asked([*TEXTS, *["stop"] * 20], options={"in_flight": 1})
    found = stopped.value.outcomes
    assert [each.vector for each in found[:6]] == list(map(vector, TEXTS))
    assert (found[6].index, found[6].kind) == (6, "unauthorized")


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"index": 0, "embedding": [1.0]}],
        [{"embedding": [1.0]}, {"embedding": "no base64"}],
        [{"embedding": [1.0]}, {"embedding": ["a"]}],
        [{"embedding": [1.0]}, 5],
        "none",
    ],
)
def test_a_reply_without_as_many_vectors_is_a_fault(data):
    found, _ = asked(["a", "b"], lambda path, body: http(json.dumps({"data": data}).encode()), per_request=2)
    assert [each.kind for each in found] == ["unusable", "unusable"]
    assert [each.index for each in found] == [0, 1]


@pytest.mark.parametrize(("texts", "per_request"), [("mill", 1), (5, 1), (["mill"], 0), (["mill"], "2")])
def test_what_cannot_be_meant_is_refused(texts, per_request):
    with pytest.raises(RequestError):
        asked(texts, per_request=per_request)


def test_retries_are_those_of_prompts():
    async def main():
        behaviour = Behaviour(faults=())
        async with running(behaviour) as server, Client(server.url, model="simulated") as client:
            return await client.embed(["mill", "stream"], per_request=2)

    found = asyncio.run(main())
    assert all(isinstance(each, Embedding) and each.vector for each in found)
    busy = iter([http(b"", "503 Busy"), http(b"{", "200 OK")])
    found, heard = asked(["mill"], lambda path, body: next(busy, None) or embedded(path, body))
    assert (found[0].attempts, len(heard)) == (3, 3)
