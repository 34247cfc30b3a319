"""Several that join one run in a bucket: the bytes of one in a folder, whoever is killed, and few lists."""

import os
import re
import signal
import subprocess

import boto3
import chats
import pytest
from helpers import write_jsonl
from runs import PATIENCE, lines, write_gzip
from test_runs import SMALL, corpus, digests, flags, packing, when

import millstream
from millstream.errors import RequestError
from millstream.folder.manifest import is_journal
from millstream.runs.pack import planning
from millstream.runs.pack.pieces import StoredPieces
from millstream.store import at

__all__ = ["corpus"]  # the fixture


def without_journals(url):
    return {name: digest for name, digest in digests(url).items() if not is_journal(name)}


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    """A corpus of some parts."""
    path = tmp_path_factory.mktemp("larger") / "a.jsonl"
    path.write_bytes(b"".join(lines(3, 700_000, 0.01)))
    return path


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """Conversations, as many as that, in a folder with their tokenizer."""
    root = tmp_path_factory.mktemp("spoken")
    write_jsonl(root / "a.jsonl", [*chats.rows(3, 1500), {"id": "bad"}])
    return root / "a.jsonl", {"tokenizer": str(chats.write_tokenizer(root / "tokenizer")), "chat": True}


BEST_FIT = {"strategy": "best-fit", "shuffle": 7, "validation": 0.1, "format": "npy,mds"}


@pytest.mark.parametrize(("chat", "way"), [(False, {}), (False, BEST_FIT), (True, BEST_FIT)])
def test_two_that_join_write_what_one_does_in_a_folder_whoever_is_killed(
    bucket, larger, spoken, tmp_path, proxy, chat, way
):
    proxy.hold_the_end()
    larger, own = spoken if chat else (larger, {})
    there, store, way = f"{bucket}/run", at(f"{bucket}/run"), {"shard_size": 1 << 15, **own, **way}
    join = {"join": True, "lease": 1, "workers": 1, **way}
    with packing(there, larger, **join) as one, packing(there, larger, **join) as two:
        when(one, lambda: [name for name in store.list("records") if name.endswith(".told")])
        os.kill(one.pid, signal.SIGKILL)
        assert one.wait() == -signal.SIGKILL
        proxy.go.set()
        assert two.wait(PATIENCE) == 0, two.communicate()
    millstream.pack_to(tmp_path / "run", larger, **SMALL | way)
    assert without_journals(there) == digests(tmp_path / "run")
    assert millstream.verify(there).problems == []
    assert millstream.pack_to(there, larger, **SMALL | join, block=1 << 13).already
    assert not [name for name in store.list() if name.startswith(("leases", "records", "pieces", "run.json"))]


def test_a_large_packed_file_is_unpacked_for_all_by_way_of_the_bucket(bucket, larger, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "LARGE", 1 << 10)
    packed = write_gzip(tmp_path / "a.jsonl.gz", [larger.read_bytes()])
    dropped, own = [], StoredPieces.drop
    monkeypatch.setattr(StoredPieces, "drop", lambda self, ref: dropped.append(ref.name) or own(self, ref))
    report = millstream.pack_to(f"{bucket}/run", packed, **SMALL, join=True, workers=1)
    assert "1 of 1 parts" in report.shared
    assert "unpacked-0-0" in dropped
    millstream.pack_to(tmp_path / "run", packed, **SMALL)
    assert without_journals(f"{bucket}/run") == digests(tmp_path / "run")


def test_a_piece_that_a_rule_of_the_bucket_deletes_is_made_again(bucket, larger, tmp_path, proxy, server):
    gone = []

    def delete(asked):
        if asked.method == "GET" and asked.path.endswith(".piece") and not gone:
            place = asked.path.lstrip("/").split("/", 1)
            gone.append(boto3.client("s3", endpoint_url=server).delete_object(Bucket=place[0], Key=place[1]))

    proxy.fault = delete
    millstream.pack_to(f"{bucket}/run", larger, **SMALL, join=True, workers=1, block=1 << 15)
    assert gone
    millstream.pack_to(tmp_path / "run", larger, **SMALL)
    assert without_journals(f"{bucket}/run") == digests(tmp_path / "run")


def test_a_run_of_one_and_a_run_of_several_keep_each_other_out(bucket, corpus, proxy):
    there = f"{bucket}/run"
    proxy.hold_the_end()
    with packing(there, corpus, join=True, workers=1) as process:
        # Until it beats it holds the run as one that packs by itself does, which is told in other words.
        when(process, lambda: at(there).list("leases"))
        with pytest.raises(RequestError, match="is packed by several with join=True: give that too"):
            millstream.pack_to(there, corpus, **SMALL)


def test_a_joiner_lists_no_more_than_it_says(bucket, corpus, proxy):
    listed = []
    proxy.fault = lambda asked: listed.append(asked.path) if "list-type=2" in asked.path else None
    report = millstream.pack_to(f"{bucket}/run", corpus, **SMALL, join=True, workers=1)
    assert re.search("1 of 1 parts and [0-9]+ of [0-9]+ shard tasks were done here; this one wrote", report.shared)
    beats = [path for path in listed if "beats" in path]
    assert len(beats) <= 1 + report.seconds / 10
    assert len(listed) < 80 + len(beats)  # to begin and to end


def test_a_bad_network_is_survived(bucket, corpus, tmp_path, proxy):
    faults = iter([None, None, "503", None, None, None, "lost", None, None, None, "cut", None, None] * 1000)
    proxy.fault = lambda asked: next(faults)
    call = flags(f"{bucket}/run", corpus, "--join", "--workers=1")
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 3, done.stderr
    millstream.pack_to(tmp_path / "run", corpus, **SMALL)
    assert without_journals(f"{bucket}/run") == digests(tmp_path / "run")
