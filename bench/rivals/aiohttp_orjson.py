"""Bare aiohttp: as many workers as there are requests in flight, `post`, `read`, `orjson.loads`, and nothing else."""

import asyncio
import json
import sys

import aiohttp
import orjson


async def main(base_url: str, count: int, in_flight: int) -> None:
    numbers = iter(range(count))
    replies = 0

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal replies
        for number in numbers:
            messages = [{"role": "user", "content": f"What is the capital of country number {number}?"}]
            body = orjson.dumps({"model": "simulated", "messages": messages})
            async with session.post(f"{base_url}/chat/completions", data=body, headers=HEADERS) as response:
                reply = orjson.loads(await response.read())
            replies += bool(reply["choices"][0]["message"]["content"])

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(in_flight)))
    print(json.dumps({"replies": replies}))


HEADERS = {"Content-Type": "application/json"}

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
