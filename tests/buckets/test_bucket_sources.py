"""Text in a bucket is read as a folder of this machine with the same files is."""

import gzip
import random
import signal
import socket
from contextlib import closing
from dataclasses import replace
from itertools import islice

import boto3
import pytest
import runs
import zstandard
from helpers import TEXTS, cli, gpt2_ids, jsonl, pack, parquet, rows, run_bytes, stream

import millstream
from millstream.corpus.find import find_inputs
from millstream.corpus.sources import chunks
from millstream.errors import DataError, RequestError, ResumeRefused, RunError
from millstream.runs.plan.plan import make_plan
from millstream.store import at

LINES = jsonl(rows(TEXTS))


FILES = {
    "data/b.jsonl": LINES,
    "data/a/z.jsonl.gz": gzip.compress(LINES, mtime=0),
    "data/a.jsonl.zst": zstandard.compress(LINES),
    "data/c.parquet": parquet(TEXTS),
    "data/d é 100%.txt": "\n".join(TEXTS).encode(),
    "data/e.md.gz": gzip.compress(b"A text.", mtime=0),
    "data/.hidden/x.jsonl": LINES,
    "data/.hidden/y.jsonl": LINES,
    "data/log": LINES,
    "README.md": b"A corpus.",
}


def write_all(folder, files):
    """Files in a folder, or in a bucket."""
    for name, data in files.items():
        if isinstance(folder, str):
            at(folder).put(name, data)
        else:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def many(seed, size):
    """Lines of JSON of about so many bytes, none like another."""
    random_words = random.Random(seed)
    words = ["the", "mill", "stands", "by", "a", "stream", "and", "grinds", "grain", "wheel", "water", "stone"]
    made, total = [], 0
    while total < size:
        text = " ".join(random_words.choices(words, k=random_words.randrange(5, 400)))
        made.append(jsonl([{"id": f"{seed}-{len(made)}", "text": text}]))
        total += len(made[-1])
    return b"".join(made)


def first(faults, of=".jsonl"):
    """What the first requests for an object meet, in order; a function is called, and nothing else happens."""
    left = list(faults)

    def fault(asked):
        if asked.method != "GET" or not asked.path.endswith(of) or not left:
            return None
        found = left.pop(0)
        return found() if callable(found) else found

    return fault


def sent(proxy, name):
    return sum(count for path, count in proxy.sent.items() if path.endswith(name))


@pytest.mark.parametrize(
    ("source", "workers"),
    [("", 1), ("/data/", 1), ("/data/*.jsonl*", 1), ("/**/[cd]*", 1), ("/data/log", 1), ("", 2)],
)
def test_it_gives_the_bytes_of_a_folder(tmp_path, bucket, source, workers):
    write_all(f"{bucket}/corpus", FILES)
    folder = write_all(tmp_path / "corpus", FILES)
    here = pack(tmp_path / "here", f"{folder}{source}", seq_len=32, workers=workers)
    there = pack(tmp_path / "there", f"{bucket}/corpus{source}", seq_len=32, workers=workers)
    assert run_bytes(tmp_path / "here") == run_bytes(tmp_path / "there")
    assert here.ignored == there.ignored
    assert millstream.verify(tmp_path / "here", against=f"{bucket}/corpus{source}", workers=1).problems == []


def test_a_bucket_as_a_whole_is_a_folder_too(tmp_path, bucket):
    write_all(bucket, FILES)
    folder = write_all(tmp_path / bucket.removeprefix("s3://"), FILES)
    pack(tmp_path / "here", folder, seq_len=32)
    pack(tmp_path / "there", bucket, seq_len=32)
    assert run_bytes(tmp_path / "here") == run_bytes(tmp_path / "there")


def test_a_plan_is_that_of_the_same_folder(tmp_path, bucket):
    large = {f"{number}.jsonl": many(number, 1 << 18) for number in range(4)}
    for name, files, sample in (("all", FILES, 1 << 26), ("some", large, 1 << 18)):
        write_all(f"{bucket}/{name}", files)
        here, there = (
            make_plan([source], tokenizer="gpt2", seq_lens=[32], sample=sample)
            for source in (write_all(tmp_path / name, files), f"{bucket}/{name}")
        )
        assert here.exact == (name == "all")
        same = {each: getattr(here, each) for each in ("choices", "ids_per_second")}
        assert replace(there, **same) == here
        assert [choice.samples for choice in there.choices] == [choice.samples for choice in here.choices]


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


def content(name, text):
    if name.endswith(".parquet"):
        return parquet([line.decode() for line in text.splitlines()], group=500)
    return {"gz": gzip.compress, "st": zstandard.compress}.get(name[-2:], bytes)(text)


@pytest.mark.parametrize("name", NAMES)
def test_reading_goes_on_where_it_was(proxy, bucket, name):
    size = 5 << 20
    data = content(name, many(1, size))
    write_all(bucket, {name: data})
    options = {"text_field": "text"}
    with closing(millstream.read(f"{bucket}/{name}", **options)) as documents:
        whole = [document.text for document in documents]
    with closing(millstream.read(f"{bucket}/{name}", **options)) as documents:
        assert [document.text for document in islice(documents, len(whole) * 3 // 4)] == whole[: len(whole) * 3 // 4]
        state = documents.state()
    proxy.sent.clear()
    with closing(millstream.read(f"{bucket}/{name}", **options, state=state)) as documents:
        assert [document.text for document in documents] == whole[len(whole) * 3 // 4 :]
    if name in ("a.jsonl", "a.parquet"):
        assert sent(proxy, name) < len(data) / 4 + (2 << 20)
    else:
        assert sent(proxy, name) <= len(data) + (1 << 20)  # from the beginning, once


def test_a_stream_knows_objects_before_its_place_by_their_etags(bucket):
    write_all(bucket, {"a.jsonl": many(1, 10_000), "b.jsonl": many(2, 10_000)})
    with closing(millstream.read(bucket)) as documents:
        head = list(islice(documents, 12))
        state = documents.state()
    with closing(millstream.read(bucket, state=state)) as documents:
        assert head + list(documents) == list(millstream.read(bucket))
    assert head[-1].id.startswith("2-")
    changed = many(1, 10_000)
    write_all(bucket, {"a.jsonl": changed[:-3] + bytes([changed[-3] ^ 1]) + changed[-2:]})
    with pytest.raises(millstream.ResumeRefused, match=r"a\.jsonl has changed"):
        millstream.read(bucket, state=state)


def test_a_large_object_takes_few_requests(tmp_path, proxy, bucket):
    data = many(2, 24 << 20)
    write_all(bucket, {"a.jsonl": data})
    proxy.asked.clear()
    proxy.sent.clear()
    (shard,) = find_inputs([f"{bucket}/a.jsonl"]).shards
    assert b"".join(chunks(shard)) == data
    assert len(proxy.asked) < 12
    assert sent(proxy, "a.jsonl") == len(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_byte_is_fetched_once(tmp_path, proxy, bucket, workers):
    data = many(3, 6 << 20)
    write_all(bucket, {"a.jsonl": data})
    proxy.sent.clear()
    pack(tmp_path / "out", f"{bucket}/a.jsonl", seq_len=512, workers=workers)
    ends = 2 << 20  # for its fingerprint
    assert sent(proxy, "a.jsonl") < len(data) * 1.15 + ends


def test_small_objects_are_fetched_side_by_side(tmp_path, proxy, bucket):
    write_all(bucket, {f"{number:02}.jsonl": many(number, 1000) for number in range(40)})
    proxy.asked.clear()
    with closing(millstream.read(bucket)) as documents:
        assert next(documents).id == "0-0"
        assert len([each for each in proxy.asked if each.path.endswith(".jsonl")]) < 4
        assert len({document.id for document in documents}) > 40
    assert len([each for each in proxy.asked if each.path.endswith(".jsonl")]) == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_gone_on(tmp_path, bucket, workers):
    files = {
        "a.jsonl": many(4, 2 << 20),
        "b.jsonl.zst": zstandard.compress(many(5, 1 << 20)),
        "c.parquet": parquet(TEXTS),
    }
    write_all(f"{bucket}/corpus", files)
    args = ["pack", f"{bucket}/corpus", "--seq-len", 64, "--shard-size", 1 << 16, "--workers", workers]
    out = tmp_path / "out"
    for count in (2, 6)[: 3 - workers]:
        runs.kill_in_the_middle([*args, "--out", out], out, lambda at, c=count: runs.events(at).count("commit") >= c)
    assert runs.cli(*args, "--out", out).returncode == 0
    pack(tmp_path / "here", write_all(tmp_path / "corpus", files), seq_len=64, shard_size=1 << 16)
    assert runs.digests(out) == runs.digests(tmp_path / "here")


# --- what changes ------------------------------------------------------------


def test_what_has_been_read_is_refused_when_it_changed_and_the_rest_may(tmp_path, bucket):
    lines = LINES * 20
    files = {"a.jsonl": lines, "b.jsonl": lines + b"no json\n" + lines, "c.jsonl": b"no json"}
    write_all(f"{bucket}/corpus", files)
    settings = {"seq_len": 16, "shard_size": 4096, "block": 2000}
    with pytest.raises(DataError):
        pack(tmp_path / "out", f"{bucket}/corpus", **settings)
    write_all(f"{bucket}/corpus", {"a.jsonl": lines.replace(b"mill", b"MILL")})
    with pytest.raises(ResumeRefused, match=r"corpus/a\.jsonl has changed"):
        pack(tmp_path / "out", f"{bucket}/corpus", **settings)
    mended = {name: data.replace(b"no json", b'{"text": "json"}') for name, data in files.items()}
    write_all(f"{bucket}/corpus", mended)  # what has been read is written anew, and is the same
    pack(tmp_path / "out", f"{bucket}/corpus", **settings)
    pack(tmp_path / "whole", write_all(tmp_path / "corpus", mended), **settings)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def test_what_changed_in_its_middle_is_noticed_by_its_tag(tmp_path, bucket):
    data = many(6, 4 << 20)
    write_all(bucket, {"a.jsonl": data})
    pack(tmp_path / "out", f"{bucket}/a.jsonl", seq_len=64)
    assert pack(tmp_path / "out", f"{bucket}/a.jsonl", seq_len=64).already
    middle = data.index(b"mill", len(data) // 2)
    write_all(bucket, {"a.jsonl": data[:middle] + b"MILL" + data[middle + 4 :]})
    with pytest.raises(ResumeRefused, match=r"a\.jsonl has changed"):
        pack(tmp_path / "out", f"{bucket}/a.jsonl", seq_len=64)
    write_all(bucket, {"a.jsonl": data})
    assert pack(tmp_path / "out", f"{bucket}/a.jsonl", seq_len=64).already


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("gone", [False, True])
def test_what_changes_or_disappears_while_it_is_read_stops_the_run(tmp_path, server, proxy, bucket, workers, gone):
    write_all(bucket, {"a.jsonl": many(7, 3 << 20), "b.jsonl": LINES})
    client = boto3.client("s3", endpoint_url=server)
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": "a.jsonl"}

    def change():
        client.delete_object(**place) if gone else client.put_object(**place, Body=LINES * 9000)

    proxy.fault = first([None, change], "a.jsonl")
    told = "is not there any more" if gone else "has changed since it was looked at"
    with pytest.raises(RunError, match=rf"a\.jsonl {told}.*again"):
        pack(tmp_path / "out", bucket, seq_len=64, workers=workers, on_error="skip")


# --- what goes wrong ---------------------------------------------------------


@pytest.mark.parametrize("faults", [["503", "500"], ["lost"], ["cut"], ["503", "cut", "lost", "500"]], ids=str)
def test_it_asks_again(tmp_path, proxy, bucket, faults):
    data = many(8, 1 << 20)
    write_all(bucket, {"a.jsonl": data})
    (shard,) = find_inputs([f"{bucket}/a.jsonl"]).shards
    proxy.fault = first(faults)
    assert b"".join(chunks(shard)) == data
    assert proxy.done == faults


def test_a_store_that_refuses_in_the_middle_stops_the_run_whatever_is_skipped(tmp_path, proxy, bucket):
    write_all(bucket, {"a.jsonl": LINES, "b.jsonl": LINES})
    proxy.fault = first(["AccessDenied"] * 9)
    with pytest.raises(RunError, match=r"a\.jsonl cannot be read.*may not"):
        pack(tmp_path / "out", bucket, seq_len=32, on_error="skip")
    proxy.fault = lambda asked: None
    pack(tmp_path / "out", bucket, seq_len=32, on_error="skip")
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS) * 2


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("s3://nowhere-at-all", "s3://nowhere-at-all: there is no such bucket"),
        ("s3://nowhere-at-all/a.jsonl", "s3://nowhere-at-all: there is no such bucket"),
        ("BUCKET/b.jsonl", "no such file or folder: BUCKET/b.jsonl; for all that begins like this name the glob"),
        (
            "BUCKET/fold",
            "no such file or folder: BUCKET/fold; for all that begins like this name the glob BUCKET/fold*",
        ),
        ("BUCKET/*.txt", r"no file matches BUCKET/\*.txt"),
        ("BUCKET/f*", "no file matches .*, only folders: name them, or"),
        ("BUCKET/folder", "nothing to read in BUCKET/folder: .*1 file: .xz 1"),
        ("BUCKET/**/*.xz", "BUCKET/folder/c.jsonl.xz cannot be read: .xz is not unpacked here"),
        ("S3://bucket", "cannot open S3://bucket: give s3://bucket, in small letters"),
        ("s3:bucket/a", "s3:bucket/a is no address: give s3://bucket/a, with two slashes"),
        ("s4://bucket/a.jsonl", "cannot open s4://bucket/a.jsonl: there is no s4://, .*gs://.*hf://.*s3://"),
        ("https://host/a.jsonl", "cannot open https://host/a.jsonl: .*copy it here first"),
        ("s3://", "s3:// names no bucket"),
        ("s3://KEY:SECRET@bucket/a.jsonl", "credentials"),
    ],
)
def test_addresses_that_do_not_work(bucket, source, told):
    write_all(bucket, {"a.jsonl": LINES, "folder/c.jsonl.xz": b""})
    with pytest.raises(RequestError, match=told.replace("BUCKET", bucket)) as raised:
        find_inputs([source.replace("BUCKET", bucket)])
    assert "\n" not in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_objects_that_only_mark_folders_are_none(tmp_path, bucket, server):
    client = boto3.client("s3", endpoint_url=server)
    for key in ("corpus/", "corpus/deep/", "corpus/empty.jsonl", "run/"):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")
    write_all(f"{bucket}/corpus", {"deep/a.jsonl": LINES})
    assert at(f"{bucket}/corpus").list() == ["deep/a.jsonl", "empty.jsonl"]
    assert at(bucket).list("corpus") == ["corpus/deep/a.jsonl", "corpus/empty.jsonl"]
    report = pack(f"{bucket}/run", f"{bucket}/corpus", seq_len=32)
    assert (report.ignored, report.ledger["documents"]["in"]) == ({}, len(TEXTS))
    assert millstream.verify(f"{bucket}/run").problems == []


@pytest.mark.parametrize("key", ["corpus//a.jsonl", "corpus/../a.jsonl"])
def test_an_object_that_no_folder_can_have_is_named(bucket, server, key):
    write_all(f"{bucket}/corpus", {"b.jsonl": LINES})
    boto3.client("s3", endpoint_url=server).put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=LINES)
    with pytest.raises(RequestError, match=f'{bucket} has a name in it that cannot be read, "{key}": no folder may'):
        find_inputs([f"{bucket}/corpus"])
    with pytest.raises(RequestError, match=f"{bucket}/{key} does not work"):
        find_inputs([f"{bucket}/{key}"])


def test_the_command_line_says_it_in_one_line(bucket):
    done = cli("pack", f"{bucket}/nothing.jsonl", "--out", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for missing in ("plan", "pack"):
        done = cli(missing, f"{bucket}/a", *(["--out", "x"] if missing == "pack" else []), AWS_ACCESS_KEY_ID="")
        assert done.returncode == 2
        assert "found no credentials" in done.stderr


def test_no_network(bucket, monkeypatch, server):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=rf"cannot read {bucket}/a") as raised:
        find_inputs([f"{bucket}/a.jsonl"])
    assert "\n" not in str(raised.value)


def test_objects_of_a_bucket_with_versions(bucket, server):
    boto3.client("s3", endpoint_url=server).put_bucket_versioning(
        Bucket=bucket.removeprefix("s3://"), VersioningConfiguration={"Status": "Enabled"}
    )
    write_all(bucket, {"a.jsonl": LINES})
    (shard,) = find_inputs([bucket]).shards
    assert b"".join(chunks(shard)) == LINES


def test_no_message_has_credentials(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:SECRET@127.0.0.1:9/?token=SECRET")
    with pytest.raises(RunError) as raised:
        find_inputs([f"{bucket}/a.jsonl"])
    assert "SECRET" not in str(raised.value)
    assert "127.0.0.1:9" in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("301 PermanentRedirect", RequestError, "BUCKET: the bucket is in another region: give it as AWS_REGION"),
        (
            "400 AuthorizationHeaderMalformed",
            RequestError,
            "BUCKET: the bucket is in another region: give it as AWS_REGION",
        ),
        ("AccessDenied", RunError, "cannot read BUCKET.*: the credentials may not do that there"),
    ],
)
@pytest.mark.parametrize("path", ["", "/a.jsonl"])
def test_a_store_that_refuses_is_told_in_words(proxy, bucket, path, fault, kind, told):
    write_all(bucket, {"a.jsonl": LINES})
    proxy.fault = lambda asked: fault
    with pytest.raises(kind, match=told.replace("BUCKET", bucket)) as raised:
        find_inputs([f"{bucket}{path}"])
    assert "\n" not in str(raised.value)


def test_an_interrupt_does_not_wait_for_a_server_that_says_nothing(bucket, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with runs.Run("plan", f"{bucket}/a.jsonl") as run:
            silent.settimeout(runs.PATIENCE)
            connection, _ = silent.accept()
            while not connection.recv(10):  # it looks first whether anybody is there
                connection.close()
                connection, _ = silent.accept()
            with connection:
                run.signal(signal.SIGINT)
                code, told = run.end()
    assert code == 130
    assert "Traceback" not in told
