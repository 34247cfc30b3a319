"""The openai package as its users write it: AsyncOpenAI with its defaults, `gather`, and a semaphore."""

import asyncio
import json
import sys

from openai import AsyncOpenAI


async def main(base_url: str, count: int, in_flight: int) -> None:
    semaphore = asyncio.Semaphore(in_flight)

    async def ask(client: AsyncOpenAI, number: int) -> str | None:
        async with semaphore:
            messages = [{"role": "user", "content": f"What is the capital of country number {number}?"}]
            reply = await client.chat.completions.create(model="simulated", messages=messages)
            return reply.choices[0].message.content

    async with AsyncOpenAI(base_url=base_url, api_key="none") as client:
        texts = await asyncio.gather(*(ask(client, number) for number in range(count)))
    print(json.dumps({"replies": sum(map(bool, texts))}))


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
