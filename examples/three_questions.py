"""Three questions to a model: in order, as they are answered, as a race; and a story that takes too long.

It asks the server that OPENAI_BASE_URL names (and OPENAI_MODEL with OPENAI_API_KEY, where they are set), else
millstream's own simulator. It needs `pip install "millstream[ask]"`.
"""

import asyncio
import os
import sys
from contextlib import asynccontextmanager

import aiohttp

from millstream import Client, Fault
from millstream.errors import MillstreamError, RunError
from millstream.llm.simulator import Behaviour, parse_latency, running

QUESTIONS = [f"What is the capital of {country}?" for country in ("France", "Germany", "Italy")]


async def show(client):
    print("\nAll three, in order:")
    for outcome in await client.gather(QUESTIONS):
        print(" ", text_of(outcome))

    print("\nAs they are answered:")
    async with client.as_completed(QUESTIONS) as outcomes:
        async for outcome in outcomes:
            print(" ", text_of(outcome))

    print("\nThe first of them:")
    print(" ", text_of(await client.race(QUESTIONS)))

    print("\nA story, within 0.2 seconds:")
    outcome = await client.ask("Write a short story.", timeout=0.2)
    print(" ", "Timeout" if isinstance(outcome, Fault) and outcome.kind == "timeout" else text_of(outcome))


def text_of(outcome):
    if isinstance(outcome, Fault):
        raise RunError(outcome.message)
    return outcome.text


@asynccontextmanager
async def server():
    """The base URL of the server to ask."""
    if url := os.environ.get("OPENAI_BASE_URL"):
        yield url
    else:
        print("OPENAI_BASE_URL is not set, so this is millstream's own simulator.")
        async with running(Behaviour(latency=parse_latency("bimodal 0.25 0.4 0.5"), seed=3)) as simulator:
            yield simulator.url


async def first_model(url):
    """The first model that the server lists."""
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(10)) as session,
            session.get(f"{url.rstrip('/')}/models", raise_for_status=True) as response,
        ):
            return (await response.json())["data"][0]["id"]
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{url} lists no models ({type(error).__name__}: {error})") from error


async def main():
    async with server() as url:
        model = os.environ.get("OPENAI_MODEL") or await first_model(url)
        print(f"Asking {model} at {url}")
        system = "Answer the question in one short sentence."
        async with Client(url, model=model, system=system, params={"temperature": 0}, attempts=2) as client:
            await show(client)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except MillstreamError as error:
        sys.exit(f"{error}. Set OPENAI_BASE_URL to an OpenAI-compatible server, or unset it to ask the simulator.")
