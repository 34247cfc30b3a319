"""A bucket is a store like a folder."""

import contextlib
import hashlib
import os
import pickle
import re
import time
import urllib.request
from urllib.parse import quote, urlencode

import boto3
import pytest
from bench.served import make_bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import is_read_as_written, is_whole_whoever_writes_on

from millstream.errors import RequestError, RunError
from millstream.store import WrittenFile, at, file_at, leftovers, written_now
from millstream.store.credentials import S3Keys
from millstream.store.held import refuse_without_claims


@pytest.fixture
def store(bucket):
    return at(f"{bucket}/deep/prefix")


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_what_is_written_is_what_is_read(bucket_of_all, data):
    parts, head = data.draw(st.lists(st.binary(max_size=40), max_size=8)), data.draw(st.binary(max_size=20))
    store = at(f"{bucket_of_all}/{os.urandom(4).hex()}")
    is_read_as_written(store, parts, head, data.draw(st.booleans()))


@pytest.fixture(scope="module")
def bucket_of_all(server):
    return make_bucket(server, f"all-{os.urandom(4).hex()}")


@pytest.mark.parametrize("late", [True, False])
def test_what_is_large_goes_up_in_parts(store, late):
    block, head = os.urandom(1 << 20), b"head"
    with store.write("big", late=late) as file:
        for _ in range(20):
            file.write(block)
        written = file.finish(head)
    whole = head + (block * 20)[4:]
    assert written == WrittenFile(20 << 20, hashlib.sha256(whole).hexdigest()) == written_now(store, "big")
    with store.open("big") as file:
        assert b"".join(iter(lambda: file.read(3_000_001), b"")) == whole
        assert file.seek(-5, 2) == len(whole) - 5
        assert file.read() == whole[-5:]


def test_what_changes_while_it_is_read_is_told(store):
    store.put("a", b"1" * 300_000)
    [found] = store.found()
    assert (found.name, found.state) == ("a", store.state("a"))
    with store.open("a", known=found.state) as file:
        assert file.read(10) == b"1" * 10
        store.put("a", b"2" * 300_000)
        with pytest.raises(RunError, match="/a has changed since"):
            file.read()
    with pytest.raises(RunError, match="has changed since"), store.open("a", known=found.state) as file:
        file.read()


def test_an_exception_leaves_nothing(store):
    store.put("there", b"former")
    for name in ("there", "new", "deep/new"):
        with pytest.raises(ZeroDivisionError), store.write(name) as file:
            file.write(b"x" * 20_000_000 + file.write(b"in the buffer") // 0 * b"")
    assert store.read("there") == b"former"
    assert store.list() == ["there"]


@pytest.mark.parametrize("versions", [False, True])
def test_one_creates(store, bucket, server, versions):
    if versions:  # where what is deleted stays, under a marker
        boto3.client("s3", endpoint_url=server).put_bucket_versioning(
            Bucket=bucket.removeprefix("s3://"), VersioningConfiguration={"Status": "Enabled"}
        )
    assert store.create("claim", b"one")
    assert not store.create("claim", b"two")
    assert not store.create("claim", b"one")
    assert store.read("claim") == b"one"
    store.delete("claim")
    assert store.create("claim", b"two")
    assert store.list() == ["claim"]


def test_names_and_states(store, bucket):
    with pytest.raises(FileNotFoundError):
        store.entries()
    store.put("a", b"12")
    store.put("deep/b", b"")
    store.put("deep/with space, ü and 100%", b"1")
    assert store.list() == ["a", "deep/b", "deep/with space, ü and 100%"]
    assert store.list("deep") == store.list("deep/") == store.list()[1:]
    assert store.read("deep/with space, ü and 100%") == b"1"
    assert [entry.name for entry in store.entries()] == ["a", "deep"]
    assert [entry.name for entry in at(bucket).entries()] == ["deep"]
    assert at(bucket).list("deep") == [f"deep/prefix/{name}" for name in store.list()]
    assert (store.state("a").kind, store.state("deep").kind, store.state("").kind) == ("file", "folder", "folder")
    assert store.state("a") == file_at(f"{store.url}/a").state()
    assert (store.size("a"), store.exists("a"), store.exists("deep"), store.exists("dee")) == (2, True, True, False)
    before = store.state("a")
    store.put("a", b"34")
    assert store.state("a") != before
    assert store.state("a").identity != before.identity
    with pytest.raises(FileNotFoundError):
        store.state("b")
    with pytest.raises(NotADirectoryError):
        store.entries("a")
    assert (store.read("deep/b"), bytes(store.map("deep/b")), store.read("a", 7, 9)) == (b"", b"", b"")
    store.delete("deep")
    store.delete("deep")
    assert store.list() == ["a"]
    again = pickle.loads(pickle.dumps(store))
    assert again == store == at(store.url)
    assert again.read("a") == b"34"


def test_a_fork_is_told_to_start_otherwise(store):
    store.put("a", b"")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            store.read("a")
        except RequestError as error:
            code = 7 if "forkserver" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# --- what a person can mend ---------------------------------------------------


def test_no_such_bucket():
    for refused in (lambda: at("s3://nowhere").list(), lambda: at("s3://nowhere").put("a", b"")):
        with pytest.raises(RequestError, match="s3://nowhere: there is no such bucket"):
            refused()


@pytest.mark.parametrize("address", ["nonsense", "http://", "ftp://127.0.0.1:9"])
def test_an_endpoint_that_is_none(store, monkeypatch, address):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(RequestError, match=f"{address} is no endpoint: AWS_ENDPOINT_URL is"):
        store.read("a")


def test_no_credentials(store, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(RequestError, match=r"found no credentials for s3://.*AWS_PROFILE"):
        store.read("a")


def test_the_profile_is_asked(store, monkeypatch, tmp_path, server):
    store.put("a", b"there")
    credentials, config = tmp_path / "credentials", tmp_path / "config"
    credentials.write_text("[default]\naws_access_key_id = x\n[other]\naws_access_key_id=y\naws_secret_access_key=z\n")
    config.write_text(f"[profile other]\nregion = eu-west-1\nendpoint_url = {server}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    with pytest.raises(RequestError, match="found no credentials"):
        store.read("a")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert store.read("a") == b"there"
    config.write_text("[profile other\nregion")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-2")
    with pytest.raises(RequestError, match="config"):
        store.read("a")


# --- appending ----------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_what_is_appended_survives_what_a_model_says(bucket_of_all, data):
    """Lines that were flushed are there after a kill, whatever came before; a part that is left is no harm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millstream.store.growing.FULL", 10)
        patch.setattr("millstream.store.growing.MOST", 30)
        store, name = at(f"{bucket_of_all}/{os.urandom(4).hex()}"), "lines"
        sure = whole = b""
        for _ in range(data.draw(st.integers(1, 3))):
            cut = data.draw(st.none() | st.integers(0, len(sure)))
            file = store.append(name, at=cut)
            held = file.size()
            assert len(sure) <= held <= len(whole) if cut is None else held == cut
            sure = whole = whole[:held]
            for line in data.draw(st.lists(st.binary(min_size=1, max_size=25), max_size=6)):
                file.write(line)
                whole += line
                if data.draw(st.booleans()):
                    file.flush()
                    sure = whole
                assert file.size() == len(whole)
            if data.draw(st.booleans()):
                assert file.read(2, 9) == whole[2:9]
                sure = whole
            if data.draw(st.booleans()):  # else it is killed
                file.close()
                file.close()
                sure = whole
                assert store.read(name) == whole
        file = store.append(name)
        file.close()
        assert whole.startswith(store.read(name))
        assert store.read(name).startswith(sure)
        assert store.list() == [name]


def test_what_is_appended_becomes_one_large_object(store):
    block = os.urandom(3 << 20)
    with store.append("big") as file:
        for _ in range(5):
            file.write(block)
    assert store.read("big") == block * 5
    with store.append("big", at=4 << 20) as file:
        file.write(b"more")
    assert store.read("big") == (block * 5)[: 4 << 20] + b"more"
    with pytest.raises(OSError, match="became shorter"):
        store.append("big", at=99 << 20)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_of_two_that_write_on_at_once_none_does_harm(bucket_of_all, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millstream.store.onward.MOST", 20)
        store = at(f"{bucket_of_all}/{os.urandom(4).hex()}")
        is_whole_whoever_writes_on(store, data)


def test_a_server_that_is_not_there_is_told_soon(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"cannot reach http://127.0.0.1:1 .*: mend AWS_ENDPOINT_URL"):
        at("s3://bucket").read("a")


def test_uploads_of_others_are_left_alone(bucket, server):
    name = bucket.removeprefix("s3://")
    for key in ("mine", "other/tool"):
        urllib.request.urlopen(urllib.request.Request(f"{server}/{name}/{key}?uploads", method="POST")).close()
    at(bucket).sweep()
    with urllib.request.urlopen(f"{server}/{name}?uploads") as answer:
        assert re.findall("<Key>(.*?)</Key>", answer.read().decode()) == ["other/tool"]


def test_many_pieces_that_do_not_all_come_leave_what_was_there(store, bucket, server):
    def pieces():
        yield bytes(20 << 20)
        raise ZeroDivisionError

    store.put("a", b"former")
    with pytest.raises(ZeroDivisionError):
        store.pour("a", pieces, 30 << 20)
    assert store.read("a") == b"former"
    assert store.list() == ["a"]


@pytest.mark.parametrize("token", [None, "a+token/="])
@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/bucket", {"uploads": "", "prefix": "run/ü b", "key-marker": "a/b c", "upload-id-marker": "x~y"}),
        ("/bucket/run/with space, ü and 100%", {"uploadId": "a.b_c-d=="}),
    ],
)
def test_what_we_sign_ourselves_is_signed_as_others_do(monkeypatch, path, query, token):
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    quoted, told = quote(path), urlencode(sorted(query.items()), quote_via=quote)
    request = AWSRequest("GET", f"https://s3.example.org{quoted}?{told}")
    S3SigV4Auth(Credentials("ID", "SECRET", token), "s3", "eu-west-1").add_auth(request)
    moment = time.strptime(request.context["timestamp"], "%Y%m%dT%H%M%SZ")
    monkeypatch.setattr("millstream.store.leftovers.time.gmtime", lambda: moment)
    ours = leftovers._signature(S3Keys("ID", "SECRET", token), "GET", "s3.example.org", quoted, told)
    assert ours["authorization"] == request.headers["Authorization"]


class Watched:
    """A store, and what its folder shows after each file that is made."""

    def __init__(self, store):
        self.store, self.url, self.seen = store, store.url, []

    def create(self, name, data):
        made = self.store.create(name, data)
        with contextlib.suppress(FileNotFoundError):  # as if nothing were there
            self.seen += self.store.entries()
        return made

    def delete(self, name):
        self.store.delete(name)


def test_nobody_sees_how_a_bucket_is_tried_out(bucket):
    """Another one that begins at the same moment looks whether the folder is empty."""
    watched = Watched(at(f"{bucket}/run"))
    refuse_without_claims(watched)
    assert watched.seen == []
