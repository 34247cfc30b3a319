"""What a run promises holds in a bucket: the same bytes as in a folder, whatever happens on the way."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from runs import PATIENCE

import millstream
from millstream import distributed
from millstream.errors import RequestError, ResumeRefused
from millstream.store import at

KEEP = ("journal.jsonl", "manifest.json")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Documents of all lengths, a bad line and some empty ones among them."""
    folder, chance = tmp_path_factory.mktemp("corpus"), random.Random(1)
    words = [bytes(chance.choices(b"abcdefghij", k=chance.randint(1, 9))).decode() for _ in range(200)]
    for number in range(15):
        with open(folder / f"{number:02d}.jsonl", "w") as file:
            for line in range(20):
                text = " ".join(chance.choices(words, k=chance.choice((0, 3, 30, 300))))
                file.write(json.dumps({"id": f"{number}-{line}", "text": text}) + "\n")
            file.write("no json\n" if number % 5 == 0 else "")
    return folder


def digests(url):
    """What a run is: of each file but the journal and what tells of paths, its hash."""
    store = at(url)
    found = {name: hashlib.sha256(store.read(name)).hexdigest() for name in store.list() if name not in KEEP}
    manifest = json.loads(store.read("manifest.json"))
    return found | {"inputs": manifest["inputs"], "ledger": manifest["ledger"], "subsets": manifest["subsets"]}


SMALL = {"seq_len": 128, "eos": True, "shard_size": 1 << 13, "on_error": "skip", "text_field": "text", "id_field": "id"}
WAYS = [
    ({"strategy": "concat"}, 2),
    ({"strategy": "split"}, 1),
    ({"strategy": "best-fit"}, 1),
    ({"strategy": "concat", "shuffle": 7, "validation": 0.1}, 2),
    ({"strategy": "best-fit", "shuffle": 7, "format": "parquet"}, 1),
    ({"strategy": "concat", "format": "npy,mds,megatron"}, 1),
]


@pytest.mark.parametrize(("way", "workers"), WAYS, ids=lambda each: str(each) if isinstance(each, int) else None)
def test_the_same_bytes_as_in_a_folder(bucket, corpus, tmp_path, way, workers):
    here, there = f"{tmp_path}/run", f"{bucket}/a/run"
    millstream.pack_to(here, corpus, **SMALL, **way, workers=1)
    report = millstream.pack_to(there, corpus, **SMALL, **way, workers=workers)
    assert digests(there) == digests(here)
    assert report.ledger == millstream.open(there).ledger
    assert millstream.verify(there).problems == []
    assert millstream.pack_to(there, corpus, **SMALL, **way, workers=workers).already
    assert [name for name in at(bucket).list() if not name.startswith("a/run/")] == []


def test_functions_that_are_called_elsewhere_leave_pieces_in_the_bucket(bucket, corpus, tmp_path):
    def drive(job):
        tasks = [task for part in job.parts() for task in job.count(job.tokenize_part(part))] + job.finish()
        assert any(name.startswith("run/pieces/") for name in at(bucket).list())
        for task in tasks:
            job.wrote(task, job.write_shard(task))

    distributed.pack_with(drive, f"{bucket}/run", corpus, **SMALL)
    millstream.pack_to(tmp_path / "run", corpus, **SMALL, workers=1)
    assert digests(f"{bucket}/run") == digests(f"{tmp_path}/run")
    assert not any("pieces" in name or "records" in name for name in at(bucket).list())


# --- interruptions ------------------------------------------------------------


def flags(out, corpus, *more):
    told = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if value is not True]
    return [sys.executable, "-m", "millstream", "pack", str(corpus), "--out", out, "--eos", *told, *more]


@contextlib.contextmanager
def packing(out, corpus, **more):
    """Another process that packs, in small steps; behind the block it is gone, though the test failed while it was
    held."""
    script = "import json, sys, millstream; millstream.pack_to(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    told = json.dumps(SMALL | {"block": 1 << 13} | more)
    with subprocess.Popen([sys.executable, "-c", script, out, corpus, told], stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def when(process, found):
    """Wait for what another process does."""
    end = time.monotonic() + PATIENCE
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"waited {PATIENCE} s in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(bucket, corpus, tmp_path, proxy, workers):
    there, store = f"{bucket}/run", at(f"{bucket}/run")
    proxy.hold_the_end()
    for shards in (2, 5):
        with packing(there, corpus, workers=workers) as process:
            when(process, lambda shards=shards: len([each for each in store.list() if "samples" in each]) > shards)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(RequestError, match="is not finished"):
            millstream.open(there)
    proxy.fault = lambda asked: None
    report = millstream.pack_to(there, corpus, **SMALL, block=1 << 13, workers=workers)
    assert report.resumed
    assert workers > 1 or 0 < report.bytes < sum(each.stat().st_size for each in corpus.iterdir())
    millstream.pack_to(tmp_path / "run", corpus, **SMALL)
    assert digests(there) == digests(tmp_path / "run")
    told = [json.loads(line)["event"] for line in store.read("journal.jsonl").splitlines()]
    assert told.count("done") == 1
    assert "resume" in told
    assert [name for name in at(bucket).list() if not name.startswith("run/")] == []


def test_a_second_writer_is_refused_by_name(bucket, corpus, proxy):
    there = f"{bucket}/run"
    proxy.hold_the_end()
    with packing(there, corpus) as process:
        when(process, lambda: at(there).exists("run.json"))
        with pytest.raises(RequestError, match=f"another millstream is writing to {there} .process {process.pid} of "):
            millstream.pack_to(there, corpus, **SMALL)
        with pytest.raises(RequestError, match="another millstream is writing"):
            millstream.pack_to(there, corpus, **SMALL, overwrite=True)
        proxy.go.set()
        assert process.wait(PATIENCE) == 0
    assert millstream.verify(there).problems == []


def test_what_changed_is_refused_and_overwritten_when_asked(bucket, corpus):
    there = f"{bucket}/run"
    millstream.pack_to(there, corpus, **SMALL)
    with pytest.raises(ResumeRefused, match=f"{there} is finished, with other settings"):
        millstream.pack_to(there, corpus, **SMALL | {"seq_len": 64})
    millstream.pack_to(there, corpus, **SMALL | {"seq_len": 64}, overwrite=True)
    assert millstream.open(there).seq_len == 64
    assert millstream.verify(there).problems == []
    at(bucket).put("other/file", b"")
    with pytest.raises(RequestError, match="has files that are not millstream's"):
        millstream.pack_to(f"{bucket}/other", corpus, **SMALL)


def test_an_upload_that_was_killed_is_aborted_by_the_next_run(bucket, corpus, server):
    name, there = bucket.removeprefix("s3://"), f"{bucket}/run"
    for key in ("run/samples-00000.npy", "run/deep/er", "else/where"):
        urllib.request.urlopen(urllib.request.Request(f"{server}/{name}/{key}?uploads", method="POST")).close()
    millstream.pack_to(there, corpus, **SMALL)
    with urllib.request.urlopen(f"{server}/{name}?uploads") as answer:
        assert re.findall("<Key>(.*?)</Key>", answer.read().decode()) == ["else/where"]


def test_a_run_survives_a_bad_network(bucket, corpus, tmp_path, proxy):
    chance = random.Random(5)
    proxy.fault = lambda asked: chance.choice(("503", "cut", "lost", "500")) if chance.random() < 0.2 else None
    millstream.pack_to(f"{bucket}/run", corpus, **SMALL)
    millstream.pack_to(tmp_path / "run", corpus, **SMALL)
    assert digests(f"{bucket}/run") == digests(tmp_path / "run")
    assert len(proxy.done) > 20


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchBucket", "InvalidAccessKeyId"])
def test_what_a_person_can_mend_is_one_line(bucket, corpus, proxy, code):
    proxy.fault = lambda asked: code if asked.method in ("PUT", "POST") else None
    done = subprocess.run(flags(f"{bucket}/run", corpus), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
