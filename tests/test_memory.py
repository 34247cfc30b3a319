"""Memory stays under what was asked for, summed over all processes, whatever the input."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from test_tokenizer_shapes import trained

pytestmark = [pytest.mark.slow, runs.needs_proc]

NEVER_REPEATED = """
import sys
letters = str.maketrans("0123456789", "ghijklmnop")
number, size = 1, 0
while size < 150_000_000:
    words = ["%x" % (n * 2862933555777941757 % 2**45) for n in range(number, number + 1000)]
    line = '{"text": "' + " ".join(words).translate(letters) + '"}\\n'
    number, size = number + 1000, size + len(line)
    sys.stdout.write(line)
"""


def pss(pids):
    """Bytes of memory that the processes hold together, shared pages counted once."""
    total = 0
    for pid in pids:
        try:
            for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            pass  # it ended meanwhile
    return total


def peak(run):
    """The most that a run held when one looked, until it ends; how often that was while it had several processes."""
    most = looks = 0
    while run.process.poll() is None:
        pids = run.alive()
        most = max(most, pss(pids))
        looks += len(pids) > 1
        time.sleep(0.01)
    return most, looks


def check(what, limit, *args, piped=None):
    """One that works alone may be over before anybody has looked: what it held is known all the same."""
    with runs.Run(*args, piped=piped, measured=True) as run:
        most, looks = peak(run)
        code, stderr = run.end()
        assert code == 0, stderr
        most = max(most, run.own_peak())
    print(f"\n{what}: peak {most / 1e6:.0f} MB of {limit / 1e6:.0f} MB")
    assert looks == 0 or looks > 20, "it was over before it could be measured"
    assert 50e6 < most <= limit


def one_document(kind, size):
    """A row whose text is as bad for an engine as can be."""
    text = {"word": "a" * size, "blanks": " " * size, "short words": "a." * (size // 2)}[kind.removeprefix("learned ")]
    return {"prompt": "", "completion": text} if kind.startswith("learned") else {"text": text}


@pytest.mark.parametrize(
    ("shape", "text", "engine"),
    [
        (None, "word", "fast"),
        (None, "word", "reference"),
        (("bpe", "llama 3", "none"), "short words", "reference"),
        (("fallback unk", "metaspace", "none"), "blanks", "fast"),
        (("fallback unk", "metaspace", "none"), "learned blanks", "fast"),
    ],
    ids=["gpt2", "gpt2 by tiktoken", "llama 3 by tokenizers", "metaspace", "metaspace, learned"],
)
def test_what_a_long_document_is_said_to_need_is_enough_for_the_worst(tmp_path, shape, text, engine):
    (tmp_path / "a.jsonl").write_text(json.dumps(one_document(text, 8_000_000)) + "\n")
    args = ["pack", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--workers", 1, "--engine", engine]
    if shape:
        (tmp_path / "tokenizer.json").write_text(trained(*shape).to_str())
        args += ["--tokenizer", tmp_path / "tokenizer.json"]
    args += ["--chat"] if text.startswith("learned") else []
    refused = runs.cli(*args, "--memory", "350MiB")
    assert refused.returncode == 2
    enough = int(re.search(r"Give --memory (\d+)MiB", refused.stderr)[1])
    check(f"{shape} {text} {engine}", enough << 20, *args, "--memory", f"{enough}MiB")


LIMITS = pytest.mark.parametrize(
    ("args", "limit"),
    [(("--workers", 1), 400_000_000), ((), 1 << 30)],
    ids=["one-worker", "default"],
)


@LIMITS
def test_words_that_never_repeat(tmp_path, args, limit):
    with subprocess.Popen([sys.executable, "-c", NEVER_REPEATED], stdout=subprocess.PIPE) as source:
        command = ("pack", "-", "--out", tmp_path / "out", *args)
        check(f"never repeated words {args}", limit, *command, piped=source.stdout)
    assert source.returncode == 0


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """One plain text file of 500 MB in which no paragraph is like another."""
    rng = random.Random(11)
    syllables = re.findall("..", "kalomitenrasuveldorinaxpretionlyedungrafobuchawozenyquoisheral")
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3, 4)))) for _ in range(40_000)]
    words += ["Größe", "déjà", "naïve", "don't", "1984", "東京"]
    parts = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(60_000)]
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < 500_000_000:
            chosen = iter(rng.choices(parts, k=3000))
            text = "\n".join(f"{a.capitalize()} {b}, {c}." for a, b, c in zip(chosen, chosen, chosen, strict=True))
            size += file.write(text + "\n\n")
    yield path
    path.unlink()


@LIMITS
def test_one_long_text(tmp_path, prose, args, limit):
    command = ("pack", prose, "--out", tmp_path / "out", *args)
    check(f"one text of 500 MB {args}", limit, *command)
