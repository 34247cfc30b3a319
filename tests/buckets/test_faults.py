"""What networks and servers do is survived, or told in one line."""

import os
import random
import re
import urllib.request
from collections import Counter

import pytest
from helpers import cli

import millstream
from millstream.errors import RequestError
from millstream.store import WrittenFile, at, written_now

KINDS = ("500", "503", "slow", "cut", "lost")


def some(chance, *kinds):
    """Faults of these kinds, now and then: never ten in a row for the same thing, which a client gives up at. Which
    request of those that are made side by side comes first is another one each time, and so is what each meets."""
    in_a_row = Counter()

    def fault(asked):
        what = asked.method, asked.path, asked.wanted
        in_a_row[what] = in_a_row[what] + 1 if in_a_row[what] < 5 and chance.random() < 0.3 else 0
        return chance.choice(kinds) if in_a_row[what] else None

    return fault


@pytest.mark.parametrize("kind", KINDS)
def test_faults_are_survived(bucket, proxy, kind):
    proxy.fault = some(random.Random(kind), kind)
    store = at(f"{bucket}/prefix")
    data = os.urandom(9 << 20)
    with store.write("big") as file:
        file.write(data)
    assert store.put("small", b"12") == WrittenFile(2, written_now(store, "small").sha256)
    assert [store.create(f"claim-{number}", b"%d" % number) for number in range(8)] == [True] * 8
    assert [store.create(f"claim-{number}", b"%d" % number) for number in range(8)] == [False] * 8
    assert store.read("big") == data
    assert store.read("big", 5, 1_000_000) == data[5:1_000_000]
    assert written_now(store, "big") == file.written
    assert len(store.list()) == 10
    assert store.state("small").size == 2
    with store.append("lines") as lines:
        for number in range(20):
            lines.write(b"%d\n" % number)
            lines.flush()
    assert store.read("lines").split() == [b"%d" % number for number in range(20)]
    store.delete("small")
    assert not store.exists("small")
    assert proxy.done.count(kind) > 5


@pytest.mark.parametrize("how", ["lost", "503"])
def test_an_upload_that_fails_leaves_nothing(bucket, proxy, how, server, monkeypatch):
    monkeypatch.setattr("millstream.store.client._TRIES", 1)
    store = at(f"{bucket}/a")
    store.put("big", b"former")
    proxy.fault = lambda asked: how if asked.method == "PUT" and "partNumber=2" in asked.path else None
    with pytest.raises(OSError, match="big"), store.write("big") as file:
        file.write(bytes(20 << 20))
    assert store.read("big") == b"former"
    assert store.list() == ["big"]
    assert uploads(server, bucket) == []


def uploads(server, bucket):
    with urllib.request.urlopen(f"{server}/{bucket.removeprefix('s3://')}?uploads") as answer:
        return re.findall("<UploadId>", answer.read().decode())


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("InvalidAccessKeyId", "does not know this access key"),
        ("SignatureDoesNotMatch", "the secret key does not fit"),
        ("RequestTimeTooSkewed", "clock differs"),
        ("ExpiredToken", "have expired"),
        ("AuthorizationHeaderMalformed", "another region: give it as AWS_REGION"),
        ("307 TemporaryRedirect", "another region: give it as AWS_REGION"),
    ],
)
def test_what_a_person_can_mend(bucket, proxy, code, told):
    proxy.fault = lambda asked: code
    store = at(bucket)
    for refused in (lambda: store.read("a"), lambda: store.put("a", b""), lambda: store.list()):
        with pytest.raises(RequestError, match=told) as error:
            refused()
        assert "\n" not in str(error.value)


def test_what_is_moved_cannot_be_written(bucket, proxy):
    proxy.fault = lambda asked: "moved" if asked.method == "PUT" else None
    with pytest.raises(RequestError, match="another region: give it as AWS_REGION"):
        at(bucket).put("a", b"")


def test_no_permission(bucket, proxy):
    proxy.fault = lambda asked: "AccessDenied" if asked.method in ("PUT", "POST") else None
    store = at(bucket)
    assert store.list() == []
    with pytest.raises(RequestError, match=f"{bucket}/a: the credentials may not do that there"):
        store.put("a", b"")


def test_a_bucket_without_conditional_writes_is_refused(bucket, proxy):
    proxy.fault = lambda asked: "unconditional" if asked.conditional else None
    with pytest.raises(RequestError, match=r"no conditional writes.*another bucket"), at(bucket).lock("", "to it"):
        pass


def test_those_who_join_refuse_it_too(bucket, proxy, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some"}\n')
    proxy.fault = lambda asked: "unconditional" if asked.conditional else None
    with pytest.raises(RequestError, match="no conditional writes"):
        millstream.pack_to(f"{bucket}/run", tmp_path, seq_len=8, join=True)


@pytest.mark.parametrize("command", ["verify", "show", "plan"])
@pytest.mark.parametrize("fault", ["AccessDenied", "NoSuchBucket"])
def test_commands_tell_in_one_line(bucket, proxy, command, fault):
    proxy.fault = lambda asked: fault
    done = cli(command, f"{bucket}/run", *(["0"] if command == "show" else []))
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert bucket in done.stderr


def test_an_account_is_missing():
    with pytest.raises(RequestError, match=r"az://container cannot be opened: .*[Aa]ccount"):
        at("az://container").read("a")


@pytest.mark.parametrize("kind", ["cut", "lost", "503"])
def test_leftovers_are_looked_for_again(bucket, proxy, server, kind):
    name = bucket.removeprefix("s3://")
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}/a/b?uploads", method="POST")).close()
    failing = [kind, kind, None] * 2
    proxy.fault = lambda asked: failing.pop(0) if failing else None
    at(f"{bucket}/a").sweep()
    assert uploads(server, bucket) == []
    proxy.fault = lambda asked: kind
    at(f"{bucket}/a").sweep()  # it is no error if that cannot be
