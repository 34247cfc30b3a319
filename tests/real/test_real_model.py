"""The client and `millstream ask` with a real model behind a real server."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from serve import MODEL, serving

from millstream import Client, Fault

COUNTRIES, CAPITALS = ("France", "Germany", "Italy"), ("Paris", "Berlin", "Rome")
QUESTIONS = [f"What is the capital of {country}?" for country in COUNTRIES]
BRIEFLY = "Answer the question in one short sentence."
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def url():
    with serving() as url:
        yield url


def asked(url, main):
    async def inside():
        async with Client(url, model=MODEL, system=BRIEFLY, params={"temperature": 0}) as client:
            return await main(client)

    return asyncio.run(inside())


def test_gather_answers_in_order(url):
    async def main(client):
        return await client.gather(QUESTIONS)

    replies = asked(url, main)
    assert [capital in reply.text for capital, reply in zip(CAPITALS, replies, strict=True)] == [True] * 3
    assert all(reply.usage["completion_tokens"] > 0 and reply.finish_reason == "stop" for reply in replies)


def test_as_completed_answers_each_once(url):
    async def main(client):
        async with client.as_completed(QUESTIONS) as outcomes:
            return [outcome async for outcome in outcomes]

    replies = asked(url, main)
    assert sorted(reply.index for reply in replies) == [0, 1, 2]
    assert all(CAPITALS[reply.index] in reply.text for reply in replies)


def test_race_gives_one_of_them(url):
    async def main(client):
        return await client.race(QUESTIONS)

    reply = asked(url, main)
    assert CAPITALS[reply.index] in reply.text


def test_an_answer_comes_in_pieces_and_can_be_left(url):
    async def main(client):
        async with client.stream(QUESTIONS[0]) as pieces:
            said = [piece async for piece in pieces]
        async with client.stream("Write a short story.") as story:
            begun = await anext(story)
        return said, pieces.outcome, begun, story.outcome

    said, reply, begun, left = asked(url, main)
    assert len(said) > 3
    assert "".join(said) == reply.text
    assert "Paris" in reply.text
    assert begun
    assert left.kind == "cancelled"


def test_a_story_is_cut_by_a_timeout_and_the_server_goes_on(url):
    async def main(client):
        return await client.ask("Write a short story.", timeout=0.1), await client.ask(QUESTIONS[0])

    story, reply = asked(url, main)
    assert isinstance(story, Fault)
    assert story.kind == "timeout"
    assert "Paris" in reply.text


def test_a_prompt_too_long_is_a_fault_after_one_attempt(url):
    async def main(client):
        return await client.ask("to be or not to be " * 2000)

    fault = asked(url, main)
    assert (fault.kind, fault.attempts) == ("too_large", 1)
    assert "context size" in fault.message  # the server's own words


def test_more_requests_than_the_server_has_places(url):
    async def main(client):
        return await client.gather(QUESTIONS * 3)

    replies = asked(url, main)
    assert all(CAPITALS[reply.index % 3] in reply.text for reply in replies)


def ask_file(url, folder):
    command = [
        sys.executable,
        "-m",
        "millstream",
        "ask",
        "questions.txt",
        "--out",
        "answers.jsonl",
        "--ordered",
        "--json",
    ]
    command += ["--base-url", url, "--model", MODEL, "--system", BRIEFLY, "--temperature", "0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), Path(folder, "answers.jsonl").read_text()


def test_a_file_of_questions_is_asked_once(url, tmp_path):
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    report, written = ask_file(url, tmp_path)
    assert (report["replies"], report["spent"]["attempts"], report["again"]) == (3, 3, 0)
    rows = [json.loads(line) for line in written.splitlines()]
    assert [capital in row["text"] for capital, row in zip(CAPITALS, rows, strict=True)] == [True] * 3

    report, again = ask_file(NOBODY, tmp_path)  # a question would be a fault
    assert (report["replies"], report["spent"]["attempts"], report["again"]) == (3, 0, 3)
    assert again == written
