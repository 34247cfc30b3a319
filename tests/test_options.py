"""What a client and an ask run are given is looked at before anything is asked, and told in one line."""

import asyncio
import inspect
import subprocess
from dataclasses import fields

import pytest
from test_asking import command, prompts_file, serving

from millstream.client.checks import OPTIONS
from millstream.client.client import Client
from millstream.errors import RequestError
from millstream.llm.simulator import Behaviour
from millstream.runs.ask.settings import AskSettings

URL = "http://127.0.0.1:9/v1"
NO_NUMBERS = (0, -1, -0.5, float("nan"), float("inf"), "1", True, [])
WRONG = {
    **dict.fromkeys(("timeout", "deadline", "rpm", "tpm"), NO_NUMBERS),
    "attempts": (*NO_NUMBERS, 1.5, None),
    "in_flight": (*NO_NUMBERS, "x", 1.5, None),
    "max_cost": (-1, float("nan"), "1", True),
    "longest_wait": (-1, float("nan"), None, "10"),
    "max_reply": (0, 1.5, "1MiB", None),
    "hedge": (1, "yes", None),
    "model": (5, ["m"]),
    "system": (5,),
    "params": ([1], "temperature=0"),
    "headers": (["a: b"], "a: b"),
    "proxy": (8080,),
    "api_key": (5,),
}
OF_A_CLIENT = {**WRONG, "window": (0, 1.5, "x"), "seed": ("x", -1)}
OF_A_RUN = {
    **WRONG,
    "template": (5,),
    "limit": (-1, 1.5, "x"),
    "row_params": ("temperature", [1]),
    "retry_finish": ("length", None),
    **dict.fromkeys(("ordered", "retry_faults", "batch_format", "keep_input"), (1, None)),
    **dict.fromkeys(("reuse", "keep_body", "all_replies", "overwrite"), (0, "no")),
}


def pairs(wrong):
    return [(name, value) for name, values in wrong.items() for value in values]


@pytest.mark.parametrize(("name", "value"), pairs(OF_A_CLIENT))
def test_an_option_of_a_client_that_cannot_be_meant_is_told(name, value):
    with pytest.raises(RequestError, match=f"^{name} is "):
        Client(URL, **{"model": "m", name: value})


@pytest.mark.parametrize(("name", "value"), pairs(OF_A_RUN))
def test_a_setting_of_a_run_that_cannot_be_meant_is_told(name, value):
    with pytest.raises(RequestError, match=f"^{name} is "):
        AskSettings(**{"base_urls": [URL], "model": "m", name: value})


def test_all_options_are_looked_at():
    elsewhere = {"self", "base_url", "base_urls", "schema", "price"}
    of_a_client = set(inspect.signature(Client.__init__).parameters)
    of_a_run = {each.name for each in fields(AskSettings)}
    assert of_a_client - elsewhere == set(OF_A_CLIENT)
    assert of_a_run - elsewhere == set(OF_A_RUN)
    assert set(OPTIONS) == set(OF_A_CLIENT) | set(OF_A_RUN)


@pytest.mark.parametrize("secret", ["api_key", "headers", "proxy"])
def test_a_wrong_secret_is_not_shown(secret):
    with pytest.raises(RequestError) as raised:
        Client(URL, model="m", **{secret: ["sk-very-secret"]})
    assert "secret" not in str(raised.value)


CALLS = {
    "ask": lambda client, **more: client.ask("hello", **more),
    "gather": lambda client, **more: client.gather(["hello"], **more),
    "race": lambda client, **more: client.race(["hello", "you"], **more),
}
STREAMS = {
    "as_completed": lambda client, **more: client.as_completed(["hello"], **more),
    "ordered": lambda client, **more: client.ordered(["hello"], **more),
    "stream": lambda client, **more: client.stream("hello", **more),
}


async def called(name, client, **more):
    if name in CALLS:
        await CALLS[name](client, **more)
    else:
        STREAMS[name](client, **more)


@pytest.mark.parametrize("name", [*CALLS, *STREAMS])
@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "3"])
def test_a_timeout_of_a_call_is_looked_at_too(name, timeout):
    async def main():
        async with Client(URL, model="m") as client:
            with pytest.raises(RequestError, match=r"^timeout is a number of seconds above 0, or None"):
                await called(name, client, timeout=timeout)

    asyncio.run(main())


@pytest.mark.parametrize("name", [*CALLS, *STREAMS])
def test_a_client_that_was_not_entered_or_was_left_says_what_to_do(name):
    async def main():
        client = Client(URL, model="m")
        with pytest.raises(RequestError, match="the client was not entered: ask inside its block, async with Client"):
            await called(name, client)
        async with client:
            pass
        with pytest.raises(RequestError, match="the client was left: ask inside its block"):
            await called(name, client)

    asyncio.run(main())


def test_a_client_that_was_left_can_be_entered_again():
    async def main():
        client = Client(server.url, model="m")
        texts = []
        for _ in range(2):
            async with client:
                texts.append((await client.ask("Why?")).text)
        return texts

    with serving(Behaviour()) as server:
        assert asyncio.run(main()) == ["reply to: Why?"] * 2


def test_outcomes_that_are_read_after_their_client_was_left_end():
    async def main():
        async with Client(server.url, model="m") as client:
            outcomes = client.as_completed(["hello"])
        async with outcomes:
            return [outcome.message async for outcome in outcomes]

    with serving(Behaviour()) as server:
        [message] = asyncio.run(main())
        assert "the client was left" in message


@pytest.mark.parametrize("flags", [["--timeout", "0"], ["--timeout", "nan"], ["--deadline", "-1"], ["--limit", "-1"]])
def test_wrong_numbers_are_one_line_on_the_command_line(tmp_path, flags):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 1)
    with serving(Behaviour()) as server:
        done = subprocess.run(command(server, prompts, str(tmp_path / "out"), *flags), capture_output=True, text=True)
        assert done.returncode == 2
        assert flags[0].strip("-") in done.stderr
        assert "Traceback" not in done.stderr
        assert server.stats.requests == 0
