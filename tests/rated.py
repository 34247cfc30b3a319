"""Documents that a model rates, and samples of those that it thinks well of.

As a script it appends each sample to a file, with the state after it, goes on where that file ends, and kills itself
after so many: ``python rated.py URL MODEL CORPUS JOURNAL OUT COUNT``.
"""

import json
import os
import signal
import sys
from pathlib import Path

import millstream
from millstream import Client, streams

IN_FLIGHT = 8
RATE = "Rate from 0 to 5: {text}"


def good(answered):
    """Half of the documents, and always the same for the same reply."""
    return answered.reply is not None and sum(answered.reply.encode()) % 2 == 0


def document(answered):
    return answered.document


def pipeline(url, model, corpus, journal, state=None):
    client = Client(url, model=model, in_flight=IN_FLIGHT, params={"temperature": 0, "max_tokens": 8})
    rated = streams.ask(millstream.read(corpus), client, RATE, journal=journal, window=32)
    kept = streams.map(document, streams.filter(good, rated))
    return millstream.pack(millstream.tokenize(kept, eos=True), 64, state=state)


def told(sample):
    return {"ids": sample.token_ids.tolist(), "lengths": [segment.length for segment in sample.segments]}


def written(out):
    """The whole lines of the file, decoded; the last one may have been torn by a kill."""
    lines = Path(out).read_bytes().split(b"\n")[:-1] if Path(out).exists() else []
    return [json.loads(line) for line in lines]


def main(url, model, corpus, journal, out, count):
    before = written(out)
    Path(out).write_text("".join(json.dumps(line) + "\n" for line in before))
    stream = pipeline(url, model, corpus, journal, before[-1]["state"] if before else None)
    with open(out, "a", buffering=1) as file:
        for number, sample in enumerate(stream, 1):
            print(json.dumps({**told(sample), "state": stream.state()}), file=file)
            if number == int(count):
                os.kill(os.getpid(), signal.SIGKILL)


def killed_and_gone_on(url, model, corpus, folder, counts):
    """The samples of runs that are killed after so many samples each, and of one that is not."""
    import subprocess

    folder, out = Path(folder), Path(folder, "out.jsonl")
    for count in [*counts, 0]:
        command = [sys.executable, __file__, url, model, str(corpus), str(folder / "journal"), str(out), str(count)]
        ended = subprocess.run(command, stderr=subprocess.PIPE)
        assert ended.returncode == (-signal.SIGKILL if count else 0), ended.stderr.decode()
    return [{"ids": line["ids"], "lengths": line["lengths"]} for line in written(out)]


def keys(journal):
    """Those of all outcomes in a journal."""
    lines = Path(journal, "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["key"] for line in lines if line.startswith('{"key"')]


if __name__ == "__main__":
    main(*sys.argv[1:])
