"""Streams in one process, measured by `bench/streaming.py`; prints one JSON line.

Run as ``python bench/streams.py pack CORPUS SEQ_LEN WORKERS`` (how many ids, and their SHA-256 in order), or as
``... ask COUNT IN_FLIGHT LATENCY`` (CPU seconds of asking by the client alone, in a stream, and out of the journal).
"""

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import millstream
from millstream import Client, streams

RATE = "Rate from 0 to 5: {text}"


def packed(corpus: str, seq_len: int, workers: int) -> dict[str, int | str]:
    count, sha256 = 0, hashlib.sha256()
    for sample in millstream.pack(millstream.tokenize(millstream.read(corpus), eos=True, workers=workers), seq_len):
        count += len(sample.token_ids)
        sha256.update(sample.token_ids)
    return {"ids": count, "sha256": sha256.hexdigest()}


@contextmanager
def serving(latency: float) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).parent / "server.py"), str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def asked(count: int, in_flight: int, latency: float) -> dict[str, float]:
    documents = [{"id": f"d{number}", "text": f"Document number {number}."} for number in range(count)]
    with serving(latency) as url, tempfile.TemporaryDirectory() as journal:

        def client() -> Client:
            return Client(url, model="simulated", in_flight=in_flight)

        async def alone() -> int:
            prompts = (RATE.replace("{text}", document["text"]) for document in documents)
            async with client() as one, one.ordered(prompts) as outcomes:
                return len([outcome async for outcome in outcomes])

        def in_a_stream() -> int:
            return sum(1 for _ in streams.ask(documents, client(), RATE, journal=journal))

        def seconds(found: int, begun: float) -> float:
            assert found == count
            return time.process_time() - begun

        return {
            "client": seconds(begun=time.process_time(), found=asyncio.run(alone())),
            "stream": seconds(begun=time.process_time(), found=in_a_stream()),
            "journal": seconds(begun=time.process_time(), found=in_a_stream()),
        }


if __name__ == "__main__":
    which, *words = sys.argv[1:]
    if which == "pack":
        told: dict[str, int | str] | dict[str, float] = packed(words[0], int(words[1]), int(words[2]))
    else:
        told = asked(int(words[0]), int(words[1]), float(words[2]))
    print(json.dumps(told))
