"""The example as a reader runs it: with the simulator, with a server of one's own, and with one that is not there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PATIENCE
from test_asking import serving

from millstream.llm.simulator import Behaviour, parse_latency

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "three_questions.py"
ANSWERS = ["The capital of France is Paris.", "The capital of Germany is Berlin.", "The capital of Italy is Rome."]


def run(**settings):
    own = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return subprocess.run(
        [sys.executable, EXAMPLE], env={**own, **settings}, capture_output=True, text=True, timeout=PATIENCE
    )


def parts(done):
    """What it printed under each heading, after the lines that say whom it asks."""
    assert done.returncode == 0, done.stderr
    asked, *shown = done.stdout.split("\n\n")
    return asked, [[line.strip() for line in part.splitlines()[1:]] for part in shown]


def check(shown):
    in_order, as_completed, race, story = shown
    assert in_order == ANSWERS
    assert sorted(as_completed) == ANSWERS
    assert len(race) == 1
    assert race[0] in ANSWERS
    assert story == ["Timeout"]


def test_without_a_server_it_asks_the_simulator_and_says_so():
    asked, shown = parts(run())
    assert "simulator" in asked
    check(shown)


@pytest.mark.parametrize(("chosen", "model"), [({}, "first"), ({"OPENAI_MODEL": "second"}, "second")])
def test_it_asks_the_server_that_is_named(chosen, model):
    slow = Behaviour(latency=parse_latency("fixed 0.5"), models=("first", "second"), api_key="right")
    with serving(slow) as server:
        asked, shown = parts(run(OPENAI_BASE_URL=server.url, OPENAI_API_KEY="right", **chosen))
        assert server.stats.requests >= 9  # the story may be left before it is sent
    assert asked.splitlines() == [f"Asking {model} at {server.url}"]
    check(shown)


@pytest.fixture
def nobody():
    """A base URL of this machine where nobody listens, and nobody else will: the port is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


@pytest.mark.parametrize("chosen", [{}, {"OPENAI_MODEL": "any"}], ids=["", "model"])
@pytest.mark.parametrize("wrong", ["nobody", "no-path", "no-key", "no-url"])
def test_a_wrong_server_is_one_line_that_says_what_to_do(nobody, wrong, chosen):
    with serving(Behaviour(api_key="right")) as server:
        root = server.url.removesuffix("/v1")
        url = {"nobody": nobody, "no-path": root, "no-key": server.url, "no-url": "nonsense"}[wrong]
        done = run(OPENAI_BASE_URL=url, **chosen)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert url in line
    assert "Set OPENAI_BASE_URL to" in line
