"""The ask run in virtual time, against a server that is a function of the time and of what it is asked."""

import asyncio
import json
from collections import Counter

import virtual

from millstream.llm.peers import Peer
from millstream.llm.replies import answer_in
from millstream.llm.verdicts import CONNECTION
from millstream.runs.ask.asking import AskSettings, ask_to

REPLY = json.dumps({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": {}}).encode()
AWAY = "away"


class Scripted:
    """A wire whose server answers `handle(time, text, which)`, which is the text's attempt number from 1.

    The answer is None (a reply after `seconds`), AWAY (no connection), an exception, or (status, body, headers).
    """

    base_url = "http://127.0.0.1:1/v1"

    def __init__(self, handle, seconds=0.1):
        self.handle, self.seconds, self.asked = handle, seconds, Counter()
        self.times = []
        self._peer = Peer(self.base_url)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def send(self, data, path):
        text = json.loads(data)["messages"][-1]["content"]
        self.asked[text] += 1
        now = asyncio.get_running_loop().time()
        self.times.append(now)
        said = self.handle(now, text, self.asked[text])
        if said is None:
            await asyncio.sleep(self.seconds)
            return answer_in(self._peer, REPLY)
        await asyncio.sleep(0.001)
        if said == AWAY:
            raise self._peer.error(CONNECTION, "connection refused; is the server running?")
        if isinstance(said, Exception):
            raise said
        status, body, headers = said
        raise self._peer.refused(status, body, headers)


class Seconds:
    """So many a second, one after the other, and 429 for the rest."""

    def __init__(self, number, per=1.0, **headers):
        self.number, self.per, self.headers = number, per, headers
        self.second, self.served = -1, 0

    def __call__(self, time, text, which):
        if int(time / self.per) != self.second:
            self.second, self.served = int(time / self.per), 0
        self.served += 1
        return None if self.served <= self.number else (429, b"", self.headers)


def error(status, message="no", headers=None, **more):
    """What a server answers with an error in OpenAI's form."""
    return status, json.dumps({"error": {"message": message, **more}}).encode(), headers or {}


def asking(monkeypatch, tmp_path, handle, count=200, texts=None, out="out.jsonl", on_note=None, **settings):
    """Ask `count` prompts of a scripted server in virtual time: the report, the server, and how long it took.

    What stops the run is raised.
    """
    texts = [f"question {number}" for number in range(count)] if texts is None else texts
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    wire = handle if isinstance(handle, Scripted) else Scripted(handle)
    took = []

    def run(main, **_):
        async def timed():
            try:
                return await main
            finally:
                took.append(asyncio.get_running_loop().time())

        return virtual.run(timed())

    monkeypatch.setattr("millstream.client.client._wire", lambda *_, **__: wire)
    monkeypatch.setattr("millstream.runs.ask.asking.run", run)
    settings = AskSettings(**{"model": "m", "base_urls": [wire.base_url], "in_flight": 64, **settings})
    report = ask_to(str(tmp_path / out), str(tmp_path / "prompts.jsonl"), settings, on_note=on_note)
    return report, wire, took[0]


def rows_of(tmp_path, out="out.jsonl"):
    return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
