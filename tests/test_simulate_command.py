"""`millstream simulate` as a user starts it: it listens, answers, and ends at Ctrl-C."""

import json
import signal
import subprocess
import sys
import urllib.request

from runs import PATIENCE


def test_it_answers_and_ends_at_interrupt():
    command = [sys.executable, "-m", "millstream", "simulate", "--port", "0", "--latency", "fixed 0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        try:
            url = server.stdout.readline().split()[2]
            body = {"model": "any", "messages": [{"role": "user", "content": "What is the capital of Italy?"}]}
            request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                answer = json.load(reply)
            assert "Rome" in answer["choices"][0]["message"]["content"]
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 130


def test_wrong_settings_say_what_to_give():
    command = [sys.executable, "-m", "millstream", "simulate", "--fault", "nonsense:2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
