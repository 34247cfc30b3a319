"""An input that changed where a run has read it is noticed, at its ends and in its middle; what only moved is not."""

import contextlib
import gzip
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import zstandard
from helpers import cli, pack, stream, without_fsync

from millstream import Settings, distributed, pack_to
from millstream.corpus import sources
from millstream.errors import DataError, ResumeRefused, RunError
from millstream.folder import journal
from millstream.runs.pack import inputs

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)
BASE = {"seq_len": 16, "shard_size": 4096, "block": 2000}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ends of 300 bytes, so that small files have a middle."""
    monkeypatch.setattr(sources, "ENDS", 300)
    monkeypatch.setattr(inputs, "ENDS", 300)
    monkeypatch.setattr(sources, "READ", 1000)


def lines(count=1500, changed=None, bad=None):
    made = [f"document {number} has words of its own, {number * 7919}" for number in range(count)]
    if changed is not None:
        made[changed] = made[changed].replace("document", "DOCUMENT")
    found = [json.dumps({"text": text}).encode() + b"\n" for text in made]
    if bad is not None:
        found[bad] = b'{"text": 5, "why": "it has to be as long as others are, more or less"}\n'
    return found


def write(path, rows):
    """The lines as a file whose size and ends don't show that one word differs."""
    data = b"".join(rows)
    if path.suffix == ".gz":
        data = gzip.compress(data, 0, mtime=0)
    elif path.suffix == ".zst":
        packer = zstandard.ZstdCompressor(level=1, write_checksum=False)  # small frames: each is unpacked at once
        data = b"".join(packer.compress(data[at : at + 5000]) for at in range(0, len(data), 5000))
    elif path.suffix == ".parquet":
        texts = [json.loads(row)["text"] for row in rows]
        column = pa.array([str(text) if isinstance(text, str) else None for text in texts])
        pq.write_table(
            pa.table({"text": column}), path, compression="none", use_dictionary=False, write_statistics=False
        )
        return path
    elif path.suffix == ".txt":
        data = data.replace(b'{"text": ', b"").replace(b"}", b"")
    path.write_bytes(data)
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"]


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_notices_a_change_in_the_middle(tmp_path, name):
    path = write(tmp_path / name, lines())
    pack(tmp_path / "out", path, **BASE)
    before = runs.digests(tmp_path / "out")
    assert pack(tmp_path / "out", path, **BASE).already
    write(path, lines(changed=700))
    with pytest.raises(ResumeRefused, match=rf"{name} has changed"):
        pack(tmp_path / "out", path, **BASE)
    write(path, lines())
    assert pack(tmp_path / "out", path, **BASE).already
    assert runs.digests(tmp_path / "out") == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["in the file before", "in this file", "behind what was read"])
def test_an_unfinished_run_notices_a_change_in_what_it_has_read(tmp_path, name, where):
    first = write(tmp_path / name, lines())
    second = write(tmp_path / "b.jsonl", lines(bad=1200))
    with pytest.raises(DataError):
        pack(tmp_path / "out", [first, second], **BASE)
    assert runs.events(tmp_path / "out").count("commit") >= 3
    write(second, lines())
    if where == "in the file before":
        write(first, lines(changed=700))
    elif where == "in this file":
        write(second, lines(changed=500))
    else:
        write(second, lines(changed=1300))
        pack(tmp_path / "out", [first, second], **BASE)
        pack(tmp_path / "whole", [first, second], **BASE)
        assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")
        return
    with pytest.raises(ResumeRefused, match=rf"{name if where == 'in the file before' else 'b.jsonl'} has changed"):
        pack(tmp_path / "out", [first, second], **BASE)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_run_stopped_twice_notices_a_change_in_each_stretch(tmp_path, name):
    path = tmp_path / name
    for bad in (500, 1000):
        write(path, lines(bad=bad))
        with pytest.raises(DataError):
            pack(tmp_path / "out", path, **BASE)
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    for changed in (200, 700):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", tmp_path / "out")
        write(path, lines(changed=changed))
        with pytest.raises(ResumeRefused, match="has changed before"):
            pack(tmp_path / "out", path, **BASE)
    write(path, lines())
    pack(tmp_path / "out", path, **BASE)
    pack(tmp_path / "whole", path, **BASE)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_a_corpus_that_moved_is_read_once_more_and_goes_on(tmp_path, monkeypatch, finished):
    read = []
    hashed = inputs.content_hash
    monkeypatch.setattr(inputs, "content_hash", lambda *args: read.append(args[0].name) or hashed(*args))
    monkeypatch.setattr(journal, "_SETTLED", -(10**12))  # every file counts as long unchanged
    folder = tmp_path / "here"
    folder.mkdir()
    sources_ = [write(folder / "a.jsonl", lines()), write(folder / "b.jsonl", lines(bad=None if finished else 1200))]
    with contextlib.suppress(DataError):
        pack(tmp_path / "out", sources_, **BASE)
    moved = shutil.copytree(folder, tmp_path / "there")
    os.utime(moved / "a.jsonl", (1, 1))
    there = [moved / "a.jsonl", moved / "b.jsonl"]
    for again in (["a.jsonl", "b.jsonl"], []):
        read.clear()
        with contextlib.suppress(DataError):
            pack(tmp_path / "out", there, **BASE)
        assert sorted(set(read)) == again


def test_a_file_written_in_the_same_moment_is_compared(tmp_path):
    """Coarse clocks give it the time it had: only what was written long before it was read is known by its time."""
    path = write(tmp_path / "a.jsonl", lines())
    pack(tmp_path / "out", path, **BASE)
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(40_000)
        file.write(b"X")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ResumeRefused, match=r"a\.jsonl has changed"):
        pack(tmp_path / "out", path, **BASE)


@pytest.mark.parametrize("tail", [b'{"event": "used", "used": {"inp', b"\xff\xfe garbage", b"[1]\n5\nnull\n{}"])
def test_a_journal_with_a_torn_line_still_tells(tmp_path, tail):
    path = write(tmp_path / "a.jsonl", lines(bad=1200))
    with pytest.raises(DataError):
        pack(tmp_path / "out", path, **BASE)
    with open(tmp_path / "out" / "journal.jsonl", "ab") as file:
        file.write(tail)
    write(path, lines(bad=1201))
    with pytest.raises(DataError):
        pack(tmp_path / "out", path, **BASE)
    data = (tmp_path / "out" / "journal.jsonl").read_bytes()
    assert b"\n" + tail.splitlines()[-1] + b"\n" in data, "what came after stands on lines of its own"
    write(path, lines(changed=500))
    with pytest.raises(ResumeRefused, match="has changed before"):
        pack(tmp_path / "out", path, **BASE)
    write(path, lines())
    pack(tmp_path / "out", path, **BASE)
    assert len(stream(tmp_path / "out")) > 10_000


def test_the_journal_does_not_grow_with_what_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(20_000))
    pack(tmp_path / "out", path, **{**BASE, "shard_size": 1 << 20})
    events = runs.events(tmp_path / "out")
    assert events.count("used") <= events.count("commit") + 1


def test_a_file_called_like_standard_input_is_none_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "-", lines())
    data = b"".join(lines())
    for _ in range(2):
        done = cli("pack", "-", "--out", "out", "--seq-len", 16, stdin=data)
        assert done.returncode == 0, done.stderr
    assert "used" not in runs.events(tmp_path / "out")
    pack(tmp_path / "file", "./-", **BASE)


def test_small_inputs_are_known_by_their_ends(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(5))
    pack(tmp_path / "out", path, **BASE)
    assert "used" not in runs.events(tmp_path / "out")
    write(path, lines(5, changed=2))
    with pytest.raises(ResumeRefused, match="has changed"):
        pack(tmp_path / "out", path, **BASE)


# --- while it is read ------------------------------------------------------


def write_all(job, tasks):
    for task in tasks:
        job.wrote(task, job.write_shard(task))


def once(change):
    """As `behind`, after the first documents."""
    return behind(0, change)


def behind(count, change):
    """What a run is to tell its progress: once so many documents are packed, the inputs change."""
    waiting = [change]

    def on_progress(progress):
        if progress.documents >= count and waiting:
            waiting.pop()()

    return on_progress


def write_anew(path, rows):
    """Another file in the place of the first, of which whoever has it open still reads the first."""
    made = write(path.parent / "new" / path.name, rows)
    os.utime(made, ns=(1, 1))  # within one tick of the clock it could be the same
    os.replace(made, path)


@pytest.mark.parametrize("name", NAMES[:-1])  # this text is read at once
def test_a_file_that_changes_where_it_has_been_read_stops_the_run(tmp_path, name):
    (tmp_path / "new").mkdir()
    path = write(tmp_path / name, lines())
    progress = once(lambda: write_anew(path, lines(changed=0)))
    with pytest.raises(RunError, match=f"{name} has changed while it was read"):
        pack_to(tmp_path / "out", path, Settings(**BASE), on_progress=progress)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["truncated", "gone"])
def test_a_file_that_ends_early_or_is_gone_stops_the_run(tmp_path, name, change):
    path = write(tmp_path / name, lines())
    write(tmp_path / "z.jsonl", lines(10))

    def drive(job):
        for part in job.parts():
            counts = job.tokenize_part(part)
            if change == "truncated" and path.exists():
                os.truncate(path, 3000)
            else:
                path.unlink(missing_ok=True)
            write_all(job, job.count(counts))
        write_all(job, job.finish())

    with pytest.raises(RunError, match=f"{name} has changed while it was read"):
        distributed.pack_with(drive, tmp_path / "out", [path, tmp_path / "z.jsonl"], Settings(**BASE))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_that_is_gone_before_its_place_is_known(tmp_path):
    path = write(tmp_path / "a.jsonl", lines())
    told = r"^\S*a.jsonl: No such file or directory. Run the same command again to go on$"
    with pytest.raises(RunError, match=told):
        pack_to(tmp_path / "out", path, Settings(**BASE), on_progress=once(path.unlink))


def test_a_small_file_that_changes_while_it_is_read_stops_the_run(tmp_path):
    (tmp_path / "new").mkdir()
    small, large = write(tmp_path / "a.jsonl", lines(3)), write(tmp_path / "b.jsonl", lines())
    progress = once(lambda: write_anew(small, lines(3, changed=0)))
    with pytest.raises(RunError, match=r"a.jsonl has changed while it was read"):
        pack_to(tmp_path / "out", [small, large], Settings(**BASE), on_progress=progress)


@pytest.mark.parametrize("change", ["grown", "touched"])
@pytest.mark.parametrize("count", [3, 1500])
def test_a_file_that_grows_behind_what_was_read_stops_no_run(tmp_path, count, change):
    path, rest = write(tmp_path / "a.jsonl", lines(count)), write(tmp_path / "b.jsonl", lines())

    def later():
        os.utime(path, ns=(1, 1))
        if change == "grown":
            with open(path, "ab") as file:
                file.write(lines(1)[0])

    settings = Settings(**BASE, limit=count + 700)
    report = pack_to(tmp_path / "out", [path, rest], settings, on_progress=behind(count, later))
    assert report.ledger["documents"]["in"] == count + 700


def test_a_file_that_nothing_was_read_of_may_change(tmp_path):
    (tmp_path / "new").mkdir()
    path, rest = write(tmp_path / "a.jsonl", lines()), write(tmp_path / "b.jsonl", lines(3))
    progress = behind(1500, lambda: write_anew(rest, lines(3, changed=0)))
    pack_to(tmp_path / "out", [path, rest], Settings(**BASE, limit=1500), on_progress=progress)
    pack(tmp_path / "whole", [path, rest], **BASE, limit=1500)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


@pytest.mark.parametrize(("name", "change"), [*((name, "touched") for name in NAMES), ("a.jsonl", "behind")])
def test_what_changes_where_nothing_was_read_stops_no_run(tmp_path, name, change):
    (tmp_path / "new").mkdir()
    path = write(tmp_path / name, lines())

    def write_behind():
        rows = lines()
        with open(path, "r+b") as file:
            file.seek(len(b"".join(rows[:-1])))
            file.write(rows[-1].replace(b"words", b"WORDS"))

    later = (lambda: write_anew(path, lines())) if change == "touched" else write_behind
    pack_to(tmp_path / "out", path, Settings(**BASE), on_progress=once(later))
    pack(tmp_path / "whole", path, **BASE)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")
