"""millstream's Client over prompts from a generator; prints what came back, and its memory on the way.

Run as `python bench/client_api.py URL COUNT IN_FLIGHT`; prints one JSON line, memory in bytes.
"""

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from millstream import Client, Reply

SHARES = (0.1, 0.5, 1.0)
"""When memory is read: after so many of all replies."""


def prompts(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"What is the capital of country number {number}?"


def memory(name: str) -> int:
    """Bytes that the kernel tells of this process, 0 where it tells none: `VmRSS` now, `VmHWM` at most so far."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


async def main(base_url: str, count: int, in_flight: int) -> None:
    marks = {round(share * count) for share in SHARES}
    replies, outcomes_so_far, resident = 0, 0, []
    async with (
        Client(base_url, model="simulated", in_flight=in_flight) as client,
        client.as_completed(prompts(count)) as outcomes,
    ):
        async for outcome in outcomes:
            replies += isinstance(outcome, Reply) and bool(outcome.text)
            outcomes_so_far += 1
            if outcomes_so_far in marks:
                resident.append(memory("VmRSS"))
    print(json.dumps({"replies": replies, "resident": resident, "peak": memory("VmHWM")}))


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
