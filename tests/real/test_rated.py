"""What a real model says of documents decides which are packed: killed three times, and nothing asked twice."""

import json
import threading
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rated import IN_FLIGHT, keys, killed_and_gone_on, pipeline, told
from serve import MODEL, serving

WORDS = ("mill", "stream", "wheel", "water", "grain", "stone", "flour", "sack", "miller")
DOCUMENTS = 60


@contextmanager
def counted(url):
    """A server that passes everything on to the one at `url`; and how often each body came."""
    asked: Counter[bytes] = Counter()

    class PassOn(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked[body] += 1
            request = urllib.request.Request(
                url + self.path.removeprefix("/v1"), body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                reply = response.read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            """Not on the terminal."""

        def handle(self):
            try:
                super().handle()
            except (ConnectionError, BrokenPipeError):
                self.close_connection = True  # who asked was killed

    with ThreadingHTTPServer(("127.0.0.1", 0), PassOn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


@pytest.fixture(scope="module")
def url():
    with serving() as url:
        yield url


def test_read_ask_filter_tokenize_pack_killed_three_times(url, tmp_path):
    corpus, journal = tmp_path / "corpus.jsonl", tmp_path / "journal"
    with corpus.open("w") as file:
        for number in range(DOCUMENTS):
            words = [WORDS[(number * step) % len(WORDS)] for step in range(1, 8 + number % 9)]
            print(json.dumps({"id": f"d{number}", "text": f"{number}: the {' and the '.join(words)}"}), file=file)
    with counted(url) as (through, asked):
        found = killed_and_gone_on(through, MODEL, corpus, tmp_path, counts=[1, 4, 3])
        assert len(asked) == DOCUMENTS
        assert asked.total() - DOCUMENTS <= 3 * IN_FLIGHT  # what was in flight at a kill, and had no reply yet
        assert len(keys(journal)) == len(set(keys(journal))) == DOCUMENTS
        before = asked.total()
        assert [told(sample) for sample in pipeline(through, MODEL, corpus, str(journal))] == found
        assert asked.total() == before
        assert len(found) > 8
