"""A file is whole under its name or not there, whoever is killed or whatever the disk says."""

import errno
import io
import itertools
import os
import pickle
import re
import signal
import sys
from contextlib import nullcontext as nothing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import run_here, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import is_read_as_written, is_whole_whoever_writes_on

from millstream.corpus.find import find_inputs
from millstream.errors import RequestError
from millstream.store import at, file_at, ranges
from millstream.store.ranges import RangeFile

call = pytest.fixture(run_here)


@pytest.fixture
def store(tmp_path):
    return at(tmp_path)


def forked(function):
    """Run a function in a fork of this process: its exit code, or the signal that ended it as a negative number."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = function() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(number):
    """Kill this process before its operation of that number on files."""
    left = number

    def tick(*_):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = tick  # a killed process loses nothing that it has written, and this is quick
    watched = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.link", "shutil.rmtree")
    sys.addaudithook(lambda event, args: tick() if event in watched else None)


def killed_everywhere(folder, prepare, function):
    """Kill a function before each of its operations on files in turn: the store that it was given, for each kill."""
    number = 1
    while True:
        store = at(folder / str(number))
        store.make()
        prepare(store)
        code = forked(lambda number=number, store=store: killed_at(number) or function(store))
        if code == 0:
            return
        assert code == -signal.SIGKILL
        yield store
        number += 1


def names(path):
    return sorted(os.listdir(path))


# --- whole or not at all -----------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8), st.binary(max_size=20), st.booleans())
def test_what_is_written_is_what_is_read(tmp_path_factory, parts, head, late):
    store = at(tmp_path_factory.mktemp("store"))
    is_read_as_written(store, parts, head, late)


def test_an_exception_leaves_nothing(tmp_path, store):
    store.put("there", b"former")
    for name in ("there", "new", "deep/new"):
        with pytest.raises(ZeroDivisionError), store.write(name) as file:
            file.write(b"x" * 3_000_000 + file.write(b"in the buffer") // 0 * b"")
    assert store.read("there") == b"former"
    assert store.list() == ["there"]
    assert names(tmp_path) == ["deep", "there"]
    assert names(tmp_path / "deep") == []


def test_nothing_is_seen_before_it_is_finished(tmp_path, store):
    file = store.write("a")
    file.write(b"1")
    assert store.list() == store.entries() == []
    assert not store.exists("a")
    file.close()
    file.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("how", ["write", "put", "create"])
def test_killed_before_any_operation(tmp_path, how):
    data = b"new " * 1000

    def write(store):
        if how == "write":
            with store.write("deep/file") as file:
                file.write(data)
        else:
            getattr(store, how)("deep/file", data)

    left = 0
    for store in killed_everywhere(tmp_path, lambda store: store.put("a", b""), write):
        assert store.list() in (["a"], ["a", "deep/file"])
        assert not store.exists("deep/file") or store.read("deep/file") == data
        if store.exists("deep"):
            left += len(names(f"{store.url}/deep")) - store.exists("deep/file")
            store.below("deep").sweep()
            assert [f"deep/{name}" for name in names(f"{store.url}/deep")] == store.list("deep")
    assert left


def test_what_a_killed_worker_left_in_a_draft_is_not_published(tmp_path):
    store = at(str(tmp_path))
    draft = store.draft("mds")
    draft.make()
    for name in ("1", "train/2"):
        with draft.write(name) as file:
            file.write(b"whole")

        def write_half(name=name):
            left = draft.write(name)
            left.write(b"half")
            left.flush()
            os._exit(0)

        assert forked(write_half) == 0
    assert len(list((tmp_path / "mds.tmp").rglob("*.*"))) == 2
    store.publish("mds")
    assert sorted(store.list("mds")) == ["mds/1", "mds/train/2"]
    assert sorted(path.name for path in (tmp_path / "mds").rglob("*")) == ["1", "2", "train"]


def test_killed_while_a_folder_is_published(tmp_path):
    def publish(store):
        draft = store.draft("mds")
        draft.delete("")
        draft.make()
        for name in ("1", "deep/2"):
            draft.put(name, b"new")
        store.publish("mds")

    seen = []
    for store in killed_everywhere(tmp_path, lambda store: store.put("mds/1", b"former"), publish):
        found = {name: store.read(name) for name in store.list()}
        assert found in ({"mds/1": b"former"}, {}, {"mds/1": b"new", "mds/deep/2": b"new"})
        seen.append(len(found))
        publish(store)
        assert names(store.url) == ["mds"]
        store.withdraw("mds")
        assert names(store.url) == []
    assert sorted(set(seen)) == [0, 1, 2]


@pytest.mark.parametrize("size", [10_000, 5_000_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    with small_disk(tmp_path / "disk") as (disk, enlarge):
        store = at(disk)
        store.put("a", b"former")
        with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            file.writelines(itertools.repeat(bytes(4096)))
        data = b"new" * size
        with pytest.raises(OSError, match="No space"):
            store.put("a", data)
        with pytest.raises(OSError, match="No space"):
            store.create("b", data)
        assert store.read("a") == b"former"
        assert names(disk) == ["a", "filler"]
        enlarge()
        assert store.create("b", data)
        store.put("a", data)
        assert store.read("a") == store.read("b") == data


# --- several writers ---------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_creates(tmp_path, monkeypatch, links):
    if not links:  # as on a disk that has none

        def refused(*_):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(os, "link", refused)
    store = at(tmp_path)
    for attempt in range(4):
        ready, go = os.pipe()
        pids = []
        for number in range(4):
            pid = os.fork()
            if not pid:
                code = 2
                try:
                    os.close(go)
                    os.read(ready, 1)  # until all are there
                    code = 0 if store.create(f"claim-{attempt}", b"%d" % number * 1000) else 1
                finally:
                    os._exit(code)
            pids.append(pid)
        os.close(ready)
        os.close(go)
        done = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert sorted(done) == [0, 1, 1, 1]
        assert store.read(f"claim-{attempt}") == b"%d" % done.index(0) * 1000
    assert len(names(tmp_path)) == 4


def test_two_writers_of_one_file_do_not_meet(store):
    with store.write("a") as one, store.write("a") as other:
        one.write(b"one")
        other.write(b"other, and longer")
    assert store.read("a") == b"one"
    assert store.list() == ["a"]


def test_a_lock_is_held_to_the_end_of_the_block_or_the_process(tmp_path, store):
    store.put("a", b"")
    for name in ("", "a"):
        with store.lock(name, ""):
            again = store.lock(name, "to out")
            with pytest.raises(RequestError, match="another millstream is writing to out;"):
                again.__enter__()
        assert forked(lambda name=name: store.lock(name, "").__enter__() and os._exit(0)) == 0
        with store.lock(name, "to out"):
            pass


def test_a_lock_on_a_file_that_is_replaced_is_on_the_new_one(tmp_path, store):
    store.put("a", b"former")
    held = store.append("a", lock="a")
    with pytest.raises(RequestError, match="another millstream"):
        store.append("a", lock="a")
    store.put("a", b"new")
    with store.append("a", lock="a") as file:
        assert file.read(0, 9) == b"new"
    held.close()


# --- appending ---------------------------------------------------------------


def test_appended(store):
    with store.append("a", buffer=10) as file:
        file.write(b"12345\n")
        assert (file.size(), store.size("a")) == (6, 0)
        file.write(b"67890\n")
        assert file.size() == store.size("a") == 12
        file.write(b"x")
    assert store.read("a") == b"12345\n67890\nx"
    with store.append("a", at=6) as file:
        file.write(b"new\n")
        assert file.read(4, 8) == b"5\nne"
        file.sync()
    assert store.read("a") == b"12345\nnew\n"
    with pytest.raises(OSError, match="became shorter"):
        store.append("a", at=99)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_of_two_that_write_on_at_once_none_does_harm(tmp_path_factory, data):
    is_whole_whoever_writes_on(at(tmp_path_factory.mktemp("store")), data)


def test_a_full_disk_takes_whole_lines_only(tmp_path):
    with small_disk(tmp_path / "disk") as (disk, enlarge):
        store, line = at(disk), b"x" * 99_999 + b"\n"
        with store.append("a") as file:
            lines = itertools.repeat(line)
            with pytest.raises(OSError, match="No space"):
                all(file.write(each) is None for each in lines)
            taken = store.size("a") // len(line)
            assert taken > 1
            assert store.read("a") == line * taken
            enlarge()
            file.write(line)
        assert store.read("a") == line * (taken + 1)


# --- names -------------------------------------------------------------------


def test_states_and_names(tmp_path, store):
    store.put("a", b"12")
    store.put("deep/b", b"")
    os.symlink("a", tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    Path(tmp_path, "yours.tmp").touch()
    assert store.list("deep") == ["deep/b"]
    assert [entry.name for entry in store.entries()] == ["a", "deep", "link", "pipe", "yours.tmp"]
    assert [entry.link for entry in store.entries()] == [False, False, True, False, False]
    kinds = [store.state(name).kind for name in ("a", "deep", "link", "pipe")]
    assert kinds == ["file", "folder", "file", "pipe"]
    assert store.state("a") == store.state("link") == file_at(tmp_path / "a").state()
    before = store.state("a")
    store.put("a", b"34")
    assert store.state("a") != before
    assert bytes(store.map("deep/b")) == b""
    store.sweep()
    store.delete("link")
    store.delete("deep")
    store.delete("deep")
    assert store.list() == ["a", "pipe", "yours.tmp"]
    with pytest.raises(FileNotFoundError):
        store.read("deep/b")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"34"


def test_what_another_one_deletes_while_files_are_listed_is_not_there(store, monkeypatch):
    for name in ("a", "b", "c"):
        store.put(name, name.encode())
    names = store.list()

    def before(self, prefix):
        self.delete("b")
        return names

    monkeypatch.setattr(type(store), "list", before)
    assert [found.name for found in store.found()] == ["a", "c"]


def test_what_is_mapped_stays_when_its_file_goes(store):
    store.put("a", b"12")
    mapped = store.map("a")
    store.delete("a")
    assert mapped == b"12"
    with pytest.raises(TypeError):
        mapped[0] = 0


def test_an_empty_address_is_not_this_folder():
    with pytest.raises(FileNotFoundError):
        file_at("")
    with pytest.raises(RequestError, match="no such file"):
        find_inputs([""])


def test_an_address_that_is_no_folder():
    with pytest.raises(RequestError, match="ftp://bucket"):
        at("ftp://bucket/corpus")


def test_a_bucket_without_its_client_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(RequestError, match=r"s3://bucket needs obstore: pip install 'millstream\[s3\]'"):
        at("s3://bucket/corpus").read("a")


def test_parquet_is_written_and_read_through_it(store):
    table = pa.table({"text": ["one", "two"] * 1000})
    with store.write("a.parquet") as file, pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
    with store.open("a.parquet") as file:
        assert pq.read_table(file) == table
    assert file_at(f"{store.url}/a.parquet").size() == file_at(f"{store.url}/a.parquet").state().size


# --- files that are read by ranges -------------------------------------------

READS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 80)),
    st.tuples(st.just("seek"), st.integers(0, 120)),
    st.tuples(st.just("end"), st.integers(0, 100)),
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=100), st.lists(READS, max_size=12), st.integers(0, 40), st.none() | st.integers(0, 120))
def test_ranges_are_those_of_the_file(data, reads, ahead, until):
    asked = []

    def fetch(start, stop):
        asked.append((start, stop))
        return data[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "BEHIND", 4)
        with RangeFile(fetch, len(data), ahead=ahead, until=until) as file, io.BytesIO(data) as same:
            furthest = until or 0
            for what, number in reads:
                if what == "read":
                    furthest = max(furthest, file.tell() + number)
                    assert file.read(number) == same.read(number)
                else:
                    place = (number, 0) if what == "seek" else (-min(number, len(data)), 2)
                    assert file.seek(*place) == same.seek(*place)
    assert all(0 <= start < stop <= len(data) for start, stop in asked)
    if until is not None or not ahead:
        assert all(stop <= furthest + 4 * bool(ahead) for _, stop in asked)


def test_what_will_be_read_is_fetched_at_once():
    asked = []

    def fetch(start, stop):
        asked.append((start, stop))
        return bytes(stop - start)

    with io.BufferedReader(RangeFile(fetch, 64 << 20, until=5 << 20)) as file:
        file.seek(1 << 20)
        assert len(file.read(4 << 20)) == 4 << 20
        assert len(file.read(ranges.BEHIND)) == ranges.BEHIND
    assert asked == [(1 << 20, (5 << 20) + ranges.BEHIND)]


def test_what_is_read_on_and_on_is_fetched_in_few_requests():
    asked = []

    def fetch(start, stop):
        asked.append(stop - start)
        return bytes(stop - start)

    with RangeFile(fetch, 64 << 20) as file:
        assert sum(map(len, iter(lambda: file.read(1 << 16), b""))) == 64 << 20
    assert asked[:3] == [1 << 16, 1 << 18, 1 << 20]
    assert sum(asked) == 64 << 20
    assert len(asked) < 14


def test_an_error_of_what_is_fetched_ahead_comes_when_it_is_read():
    def fetch(start, stop):
        if start >= 300:
            raise OSError(errno.EIO, "no more")
        return bytes(stop - start)

    for reads in (7, 6):  # of the second that ahead is on its way, and nobody asks for it
        with (
            RangeFile(fetch, 1000, ahead=100) as file,
            pytest.raises(OSError, match="no more") if reads == 7 else nothing(),
        ):
            assert [len(file.read(50)) for _ in range(reads)] == [50] * reads


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3:/bucket/a", "s3:/bucket/a is no address: give s3://bucket/a, with two slashes"),
        ("s3:bucket/a", "s3:bucket/a is no address: give s3://bucket/a, with two slashes"),
        ("S3://bucket/a", "cannot open S3://bucket/a: give s3://bucket/a, in small letters"),
        ("gs3://bucket/a", "there is no gs3://, but az://, gs://, hf://, s3:// and files of this machine\n"),
        ("s3://", "s3:// names no bucket"),
        ("s3:///a", "s3:///a names no bucket"),
        ("s3://bucket/a//b", "s3://bucket/a//b does not work: in a bucket no folder"),
        ("s3://bucket/../b", "s3://bucket/../b does not work: in a bucket no folder"),
        ("gs://bucket/a/.", "does not work: in a bucket no folder"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_by_name(address, told, tmp_path, call):
    with pytest.raises(RequestError, match=re.escape(told.strip())):
        at(address)
    corpus = tmp_path / "a.txt"
    corpus.write_text("a text")
    for command in (("verify", address), ("show", address, 0), ("pack", corpus, "--out", address)):
        code, out, err = call(*command)
        assert (code, out, told in err) == (2, "", True)


def test_what_the_system_refuses_is_one_line(tmp_path, call):
    (tmp_path / "manifest.json").symlink_to("manifest.json")
    for command in (("verify", tmp_path), ("show", tmp_path, 0), ("find", tmp_path, "a")):
        code, out, err = call(*command)
        assert (code, out, err) == (1, "", f"millstream: {tmp_path}/manifest.json: {os.strerror(errno.ELOOP)}\n")
