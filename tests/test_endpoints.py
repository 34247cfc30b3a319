"""Endpoints without choices: embeddings, responses, rerank and score, in files of requests; their bodies are kept."""

import asyncio
import json

import pytest
from helpers import jsonl
from wires import http, serving, told

from millstream.llm.wire import Wire, WireError
from millstream.runs.ask.asking import ask_to
from millstream.runs.ask.settings import AskSettings
from millstream.runs.batch.joining import merge

BODIES = {
    "/v1/embeddings": {
        "object": "list",
        "data": [{"index": 0, "embedding": [0.5, -1.25]}],
        "model": "e",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    },
    "/v1/responses": {
        "status": "completed",
        "error": None,
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "Paris"}]}],
        "model": "r",
        "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
    },
    "/v1/rerank": {"results": [{"index": 1, "relevance_score": 0.9}], "usage": {"total_tokens": 7}},
    "/v1/score": {"data": [{"index": 0, "score": 0.25}], "usage": {}},
    "/v2/rerank": {"results": []},
    "/v1/plain": [{"index": 0, "score": 0.25}],
}
COMPLETION = {"choices": [{"text": "Paris", "finish_reason": "stop"}], "usage": {"total_tokens": 2}}


def answer(path, body):
    found = COMPLETION if path == "/v1/completions" else BODIES[path]
    return http(json.dumps(found, indent=1).encode())  # over several lines, and a row is one


def request(name, url, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def asked(tmp_path, rows, reply_to=answer, base="http://{}/v1", **settings):
    """The rows that come out, by id, and what the server heard."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(jsonl(rows))

    async def main():
        async with serving(reply_to) as (address, heard):
            given = AskSettings(base_urls=[base.format(address)], attempts=2, **settings)
            report = await asyncio.to_thread(ask_to, str(out), str(prompts), given)
            return report, heard

    report, heard = asyncio.run(main())
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    return (
        report,
        {row.get("id", row.get("custom_id")) if "custom_id" not in row else row["custom_id"]: row for row in found},
        heard,
    )


@pytest.mark.parametrize("url", BODIES)
def test_the_body_of_a_reply_without_choices_is_kept(tmp_path, url):
    report, rows, heard = asked(tmp_path, [request("a", url, model="m", input="mill")])
    assert heard == [(url, {"model": "m", "input": "mill"})]
    row, body = rows["a"], BODIES[url]
    assert (row["text"], row["body"]) == (None, body)
    told = body if isinstance(body, dict) else {}
    assert (row["usage"], row["model"]) == (told.get("usage", {}), told.get("model"))
    assert (report.requests, report.faults) == (1, {})


def test_all_of_them_in_one_file_asked_once(tmp_path):
    rows = [request(url, url, model="m", input=url) for url in BODIES]
    rows.append(request("text", "/v1/completions", model="m", prompt="?"))
    _, found, heard = asked(tmp_path, rows)
    assert found["text"]["text"] == "Paris"
    assert "body" not in found["text"]
    assert sorted(path for path, _ in heard) == sorted([*BODIES, "/v1/completions"])
    report, again, heard = asked(tmp_path, rows)
    assert (again, heard, report.again) == (found, [], len(rows))


def test_batch_lines_have_the_body_as_it_came(tmp_path):
    rows = [request(url, url, model="m") for url in BODIES]
    _, found, _ = asked(tmp_path, rows, batch_format=True)
    assert {name: row["response"]["body"] for name, row in found.items()} == BODIES
    report = merge([tmp_path / "prompts.jsonl"], [tmp_path / "out.jsonl"], str(tmp_path / "merged.jsonl"))
    assert report.ok == len(BODIES)


def test_a_schema_is_only_for_replies_that_have_a_text(tmp_path):
    schema = {"type": "object"}
    report, found, heard = asked(tmp_path, [request("a", "/v1/embeddings", input="x")], schema=schema, model="m")
    assert report.faults == {}
    assert "response_format" not in heard[0][1]
    assert found["a"]["body"] == BODIES["/v1/embeddings"]


def test_a_server_that_scores_needs_no_model_and_may_have_no_version_in_its_address(tmp_path):
    report, _, heard = asked(
        tmp_path, [request("a", "/v2/rerank", query="x"), request("b", "/v1/score", text_1="x")], base="http://{}/v1"
    )
    assert report.faults == {}
    assert dict(heard) == {"/v2/rerank": {"query": "x"}, "/v1/score": {"text_1": "x"}}
    (tmp_path / "bare").mkdir()
    _, _, heard = asked(
        tmp_path / "bare", [request("a", "/rerank", query="x")], lambda path, body: http(b"[]"), base="http://{}"
    )
    assert heard == [("/rerank", {"query": "x"})]


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        (b'{"error": {"message": "overheated", "code": 503}}', ("server_error", 200, True)),
        (b'{"data": [], "error": {"message": "overheated"}}', ("server_error", 200, True)),
        (b'{"status": "failed", "error": null}', ("unusable", 200, True)),
        (b"<html>", ("unusable", 200, True)),
        (b"5", ("unusable", 200, True)),
        (b"", ("unusable", 200, True)),
    ],
)
def test_what_is_no_reply_of_an_endpoint(content, ends):
    async def main():
        async with serving(lambda path, body: http(content)) as (address, _), Wire(f"http://{address}/v1") as wire:
            with pytest.raises(WireError) as failed:
                await wire.send(b'{"input": "x"}', "/embeddings")
            return told(failed.value)[:3]

    assert asyncio.run(main()) == ends
