"""Few file descriptors: fewer requests run at once, and none of them fails. In processes of their own."""

import asyncio
import json
import sys

import pytest
from helpers import jsonl

from millstream.llm.simulator import Behaviour, parse_latency, running

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no limit to set")

ASK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from millstream.cli import main
main()
"""

LATER = """
import asyncio, json, os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from millstream import Client, Reply

async def main():
    async with Client(sys.argv[1], model="m", in_flight=150, timeout=300) as client:
        others = []  # what others in this process open when the client has counted what is left
        try:
            while True:
                others.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        if sys.argv[2] == "few":
            for each in others[-4:]:
                os.close(each)
        else:
            asyncio.get_running_loop().call_later(0.7, lambda: [os.close(each) for each in others[-4:]])
        outcomes = await client.gather(f"prompt {number}" for number in range(40))
        told = [isinstance(each, Reply) and each.attempts for each in outcomes]
        print(json.dumps({"attempts": told, "shortage": client.shortage}))

asyncio.run(main())
"""


def run_with(code, *arguments, latency="0.02"):
    """What a process prints, and what the server has counted, whose `latency` is to be longer than it takes to ask all
    that may be asked at once."""

    async def main():
        async with running(Behaviour(latency=parse_latency(latency))) as server:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", code, *(argument.replace("{}", server.url) for argument in arguments)),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            shown, said = await process.communicate()
            assert process.returncode == 0, said.decode()
            return shown, said.decode(), server.stats

    return asyncio.run(main())


def asked(tmp_path, soft, hard, count, latency):
    (tmp_path / "prompts.jsonl").write_bytes(jsonl([{"prompt": f"prompt {number}"} for number in range(count)]))
    paths = (str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl"))
    given = ("--base-url", "{}", "--model", "m", "--in-flight", "150", "--json")
    shown, said, stats = run_with(ASK.format(soft=soft, hard=hard), "ask", *paths, *given, latency=latency)
    return json.loads(shown), said, stats


def test_all_are_answered_by_as_many_at_once_as_there_are_files(tmp_path):
    report, said, stats = asked(tmp_path, 64, 64, 300, "0.3")
    assert (report["replies"], report["faults"]) == (300, {})
    assert report["spent"]["attempts"] == stats.requests == 300  # none failed
    assert 16 <= stats.most_in_flight <= 60
    assert any("ulimit -n is 64" in note for note in report["notes"])
    assert "ulimit -n is 64" in said


def test_what_the_system_gives_without_asking_is_taken(tmp_path):
    report, said, stats = asked(tmp_path, 64, 1024, 300, "1.0")
    assert (report["replies"], report["spent"]["attempts"]) == (300, 300)
    assert 64 < stats.most_in_flight <= 150
    assert "ulimit" not in said


@pytest.mark.parametrize("left", ["few", "none"])
def test_running_out_is_no_attempt(left):
    """Somebody else takes what was free: four are left, or none until some are given back."""
    shown, _, stats = run_with(LATER, "{}", left)
    told = json.loads(shown)
    assert told["attempts"] == [1] * 40
    assert stats.requests == 40
    assert "open files" in told["shortage"]
