"""A run that is killed, interrupted or stopped goes on to the bytes of one that never was; and nothing else goes on."""

import contextlib
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream.corpus import sources
from millstream.errors import DataError, ResumeRefused, WorkerDied
from millstream.records import Part, Range
from millstream.runs.pack import run
from millstream.runs.pack.words import named

SMALL = ("--seq-len", "128", "--shard-size", "64KiB")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing cuts the power here, so nothing has to reach the disk; and a small input takes many reads."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(sources, "READ", 1000)


# --- corpora and settings that are killed ----------------------------------


def _mixed(folder, rows):
    third = len(rows) // 3
    runs.write_zstd(folder / "a.jsonl.zst", rows[:third])
    runs.write_parquet(folder / "b.parquet", rows[third : 2 * third])
    runs.write_plain(folder / "c.jsonl", rows[2 * third :])
    return [folder]


def _long_between(folder, rows):
    """Lines, a text that is read in pieces, and lines."""
    half = len(rows) // 2
    runs.write_plain(folder / "a.jsonl", rows[:half])
    (folder / "b.txt").write_text("longer than a sample, and than a unit. " * 150_000)
    runs.write_plain(folder / "c.jsonl", rows[half:])
    return [folder]


@dataclass(frozen=True)
class Case:
    """A command that is killed: what it reads, and its options."""

    name: str
    write: object  # (folder, rows) -> sources; "-" is corpus.jsonl on standard input
    args: tuple = ()
    faulty: float = 0.0
    workers: int = 1

    def make(self, folder, size):
        folder.mkdir()
        sources = self.write(folder, runs.lines(self.name, size, self.faulty))
        piped = folder / "corpus.jsonl" if "-" in sources else None
        return ["pack", *sources, *SMALL, *self.args], piped


def one(write, name):
    return lambda folder, rows: [write(folder / name, rows)]


def _piped(folder, rows):
    runs.write_plain(folder / "corpus.jsonl", rows)
    return ["-"]


PLAIN = one(runs.write_plain, "corpus.jsonl")
GZIP = one(runs.write_gzip, "corpus.jsonl.gz")
ZSTD = one(runs.write_zstd, "corpus.jsonl.zst")
PARQUET = one(runs.write_parquet, "corpus.parquet")
TEXTS = one(runs.write_texts, "corpus")
PROMPTS = one(runs.write_prompts, "corpus.jsonl")
SKIP = ("--on-error", "skip")
LONGER = ("--seq-len", "1500", "--shard-size", "20KiB")
BEST_FIT = ("--strategy", "best-fit", "--window")


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [
    Case("plain", PLAIN),
    Case("plain-two", PLAIN, ("--eos", "--bos"), workers=2),
    Case("split-parquet", PLAIN, ("--strategy", "split", "--format", "parquet"), workers=2),
    Case("split-left", PLAIN, ("--strategy", "split", "--eos", "--pad-side", "left")),
    Case("gzip-validation", GZIP, ("--validation", "0.1")),
    Case("zstd-validation", ZSTD, ("--validation", "0.7", "--format", "parquet"), workers=2),
    Case("parquet", PARQUET, ("--eos", "--remainder", "pad"), workers=2),
    Case("texts", TEXTS, ("--eos",)),
    Case("texts-two", TEXTS, ("--strategy", "split", "--validation", "0.5"), workers=2),
    Case("piped", _piped),
    Case("piped-two", _piped, ("--validation", "0.2", "--remainder", "drop"), workers=2),
    Case("faulty-gzip", GZIP, SKIP, 0.05),
    Case("faulty-piped", _piped, (*SKIP, "--format", "parquet"), 0.05, workers=2),
    Case("faulty-parquet", PARQUET, (*SKIP, "--validation", "0.3", "--strategy", "split"), 0.05, workers=2),
    Case("mixed", _mixed, (*SKIP, "--limit", "9000", "--eos"), 0.02, workers=2),
    Case("best-fit", PLAIN, (*BEST_FIT, "150k", "--eos")),
    Case("best-fit-piped", _piped, (*BEST_FIT, "20k", "--shuffle", "3", "--shuffle-window", "30k"), workers=2),
    Case("best-fit-validation", GZIP, (*BEST_FIT, "100k", "--validation", "0.3", "--max-segments", "3"), workers=2),
    Case("best-fit-faulty", PARQUET, (*SKIP, *BEST_FIT, "60k", "--format", "parquet"), 0.05, workers=2),
    Case("best-fit-texts", TEXTS, (*BEST_FIT, "50k", "--pad-side", "left"), workers=2),
    Case("shuffled", PLAIN, ("--shuffle", "1", "--shuffle-window", "50k"), workers=2),
    Case("shuffled-texts", TEXTS, ("--shuffle", "2", "--shuffle-window", "400k", "--strategy", "split")),
    Case("shuffled-mixed", _mixed, (*SKIP, "--shuffle", "4", "--shuffle-window", "5k", "--validation", "0.2"), 0.02),
    Case("exports", PLAIN, ("--eos", "--validation", "0.2", "--format", "npy,megatron,mds,llm.c"), workers=2),
    Case("exports-best-fit", ZSTD, (*BEST_FIT, "60k", "--format", "parquet,datatrove,litdata,npy"), workers=2),
    Case("chats", PROMPTS, ("--chat", "--eos", "--validation", "0.2", "--format", "npy,mds"), workers=2),
    Case("chats-faulty", PROMPTS, (*SKIP, "--chat", *BEST_FIT, "60k", "--shuffle", "5", "--format", "parquet"), 0.05),
    Case("truncate", PLAIN, ("--overlong", "truncate", "--eos", "--validation", "0.2"), workers=2),
    Case("truncate-best-fit", _long_between, ("--overlong", "truncate", *LONGER, *BEST_FIT, "50k"), workers=2),
    Case("overlong-faults", _long_between, ("--overlong", "fault", *SKIP, *LONGER, "--validation", "0.4"), 0.01, 2),
    Case("overlong-left-out", GZIP, (*SKIP, "--overlong", "drop", *LONGER), 0.05),
]


def kill_again_and_again(case, folder, kills, size):
    """Run to the end in one go, then with `kills` kills in runs of up to three; the same files each time."""
    rng = random.Random(case.name)
    args, piped = case.make(folder / "corpus", size)
    done = runs.cli(*args, "--workers", 1, "--out", folder / "whole", piped=piped)
    assert done.returncode == (3 if case.faulty else 0), done.stderr
    expected = runs.digests(folder / "whole")
    files, commits = len(expected), runs.events(folder / "whole").count("commit")
    assert commits >= 3
    args += ["--workers", case.workers, "--out", folder / "out"]
    while kills:
        for moment in sorted(rng.uniform(0.02, 0.8) for _ in range(min(rng.randint(1, 3), kills))):
            by_files, group = rng.random() < 0.6, rng.random() < 0.5
            runs.kill_in_the_middle(
                args,
                folder / "out",
                lambda out, moment=moment, by_files=by_files: (
                    runs.finished_files(out) >= int(moment * files)
                    if by_files
                    else runs.events(out).count("commit") >= int(moment * commits)
                ),
                piped=piped,
                group=group,
            )
            kills -= 1
        done = runs.cli(*args, piped=piped)
        assert done.returncode in (0, 3), done.stderr
        assert runs.digests(folder / "out") == expected
        shutil.rmtree(folder / "out")


@runs.needs_proc
def test_a_few_kills(tmp_path):
    kill_again_and_again(CASES[0], tmp_path, 2, 5_500_000)


@runs.needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_many_kills(tmp_path, case):
    kill_again_and_again(case, tmp_path, 4, 6_500_000)


# --- a crash before every file operation -----------------------------------

_CRASHES = {
    "concat": {"seq_len": 32, "remainder": "keep"},
    "validation-parquet-skip": {"seq_len": 16, "validation": 0.4, "format": "parquet", "on_error": "skip"},
    "best-fit": {
        "seq_len": 32,
        "strategy": "best-fit",
        "pad_id": 0,
        "window": 900,
        "shuffle": 1,
        "shuffle_window": 700,
    },
    "exports": {
        "seq_len": 16,
        "validation": 0.4,
        "format": "npy,mds,megatron",
    },
    "split-tokenizer": {"seq_len": 32, "strategy": "split", "pad_id": 0, "tokenizer": "tokenizer.json"},
}


def crashed_everywhere(job):
    """How many file operations a run has, before each of which it was killed."""
    done = subprocess.run(
        [sys.executable, runs.__file__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=runs.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    wrong, operations = json.loads(done.stdout)
    assert wrong == []
    return operations


@pytest.mark.parametrize("overwrite", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    "name", ["concat", *(pytest.param(name, marks=pytest.mark.slow) for name in list(_CRASHES)[1:])]
)
def test_a_crash_before_any_file_operation(tmp_path, name, overwrite):
    chosen = {"tokenizer": None, **_CRASHES[name], "ids_field": "ids", "shard_size": 2048, "block": 2000, "workers": 1}
    if chosen["tokenizer"]:
        chosen["tokenizer"] = str(runs.train_tokenizer(tmp_path / "tokenizer.json"))
    corpus = runs.write_id_lists(tmp_path / "corpus.jsonl", 3, 18, faulty="on_error" in chosen)
    job = {"folder": str(tmp_path), "sources": [str(corpus)], "settings": chosen, "first": None}
    if overwrite:
        job |= {"first": {**chosen, "seq_len": 8}, "settings": {**chosen, "overwrite": True}}
    assert crashed_everywhere(job) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("concat", 1), ("validation-parquet-skip", 3), ("best-fit", 3)])
def test_a_crash_of_several_workers_before_any_file_operation(tmp_path, name, last):
    """Theirs, for parts, pieces and shards, and the driver's, for records: all of them are gone at once."""
    chosen = {"tokenizer": None, **_CRASHES[name], "ids_field": "ids", "shard_size": 2048, "block": 300}
    corpus = runs.write_id_lists(tmp_path / "corpus.jsonl", 3, 18, faulty="on_error" in chosen)
    job = {"folder": str(tmp_path), "sources": [str(corpus)], "settings": {**chosen, "workers": 2}, "first": None}
    job |= {"then": {"workers": last}, "pooled": {"seed": 1, "part": 1500, "piece": 500}}
    assert crashed_everywhere(job) > 100


# --- interrupted at a commit, with any size of block -----------------------


class _Interrupted(BaseException):
    pass


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 3),
    kind=st.sampled_from(["plain", "gzip", "zstd", "parquet", "texts"]),
    options=st.sampled_from(
        [
            {},
            {"strategy": "split", "eos": True},
            {"validation": 0.4, "bos": True},
            {"strategy": "best-fit", "window": 700, "eos": True},
            {"strategy": "best-fit", "window": 3000, "validation": 0.4},
            {"strategy": "best-fit", "window": 1500, "shuffle": 2, "shuffle_window": 2000, "max_segments": 2},
            {"shuffle": 1, "shuffle_window": 1000},
            {"shuffle": 3, "shuffle_window": 3000, "strategy": "split", "validation": 0.3},
            {"overlong": "truncate", "eos": True, "validation": 0.3},
            {"overlong": "truncate", "strategy": "best-fit", "window": 900, "shuffle": 1, "shuffle_window": 700},
            {"overlong": "drop", "strategy": "split"},
            {"overlong": "fault", "seq_len": 100},
        ]
    ),
    blocks=st.tuples(st.integers(64, 4000), st.integers(64, 4000)),
    stops=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_a_run_interrupted_at_any_commit(tmp_path_factory, seed, kind, options, blocks, stops):
    folder = tmp_path_factory.mktemp("run")
    source = write_kind(folder, kind, runs.lines(seed, 15_000, 0.1))
    wanted = {"seq_len": 16, "shard_size": 1024, "on_error": "skip", "workers": 1, **options}
    millstream.pack_to(folder / "whole", source, **wanted)
    write = run.record_shard
    for stop in stops:
        left = stop

        def written(out, manifest):
            nonlocal left
            write(out, manifest)
            left -= 1
            if not left:
                raise _Interrupted

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Interrupted):
            patch.setattr(run, "record_shard", written)
            millstream.pack_to(folder / "out", source, **wanted, block=blocks[0])
    millstream.pack_to(folder / "out", source, **wanted, block=blocks[1])
    assert runs.digests(folder / "out") == runs.digests(folder / "whole")


def test_a_run_interrupted_just_before_a_long_text_that_is_truncated(tmp_path):
    """Its beginning was read, but it is in no batch yet, as it is cut when it is whole: going on begins with it."""
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.txt").write_text("hello world")
    (source / "b.txt").write_text("the mill goes round and round. " * 200_000)
    wanted = {"seq_len": 1, "shard_size": 2, "overlong": "truncate", "workers": 1}
    millstream.pack_to(tmp_path / "whole", source, **wanted)
    write = run.record_shard

    def written(*given):
        write(*given)
        raise _Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "record_shard", written)
        with pytest.raises(_Interrupted):
            millstream.pack_to(tmp_path / "out", source, **wanted)
    millstream.pack_to(tmp_path / "out", source, **wanted)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


def write_kind(folder, kind, rows):
    write, name = {
        "plain": (runs.write_plain, "corpus.jsonl"),
        "gzip": (runs.write_gzip, "corpus.jsonl.gz"),
        "zstd": (runs.write_zstd, "corpus.jsonl.zst"),
        "parquet": (lambda path, rows: runs.write_parquet(path, rows, 11), "corpus.parquet"),
        "texts": (runs.write_texts, "corpus"),
    }[kind]
    return write(folder / name, rows)


# --- the same bytes whatever does not decide them ---------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 5),
    kind=st.sampled_from(["plain", "gzip", "zstd", "parquet", "texts"]),
    options=st.sampled_from(
        [
            {},
            {"strategy": "split"},
            {"format": "parquet", "eos": True},
            {"validation": 0.3},
            {"limit": 37},
            {"strategy": "best-fit", "window": 1000, "format": "parquet"},
            {"strategy": "best-fit", "window": 2500, "shuffle": 1, "shuffle_window": 1500, "validation": 0.3},
            {"shuffle": 5, "shuffle_window": 2000, "limit": 37},
        ]
    ),
    block=st.one_of(st.integers(64, 300), st.integers(64, 40_000)),
)
def test_the_same_bytes_for_any_block(tmp_path_factory, seed, kind, options, block):
    folder = tmp_path_factory.mktemp("run")
    source = write_kind(folder, kind, runs.lines(seed, 20_000, 0.1))
    wanted = {"seq_len": 32, "shard_size": 4096, "on_error": "skip", "workers": 1, **options}
    millstream.pack_to(folder / "a", source, **wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "READ", block)
        millstream.pack_to(folder / "b", source, **wanted, block=block)
    assert runs.digests(folder / "b") == runs.digests(folder / "a")


@pytest.mark.parametrize(
    "case",
    [
        CASES[17],
        *(slowly(CASES[number]) for number in (2, 5, 7, 13, 18, 19, 20, 22, 25)),
    ],
    ids=lambda case: case.name,
)
def test_the_same_bytes_for_any_number_of_workers(tmp_path, case):
    args, _ = case.make(tmp_path / "corpus", 1_200_000)
    found = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out-{workers}"
        done = runs.cli(*args, "--memory", "4GiB", "--workers", workers, "--out", out)
        assert done.returncode == (3 if case.faulty else 0), done.stderr
        found.append(runs.digests(out))
    assert len(found[0]) > 10
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("block", [64, 500, 20_000])
def test_the_same_bytes_for_small_blocks_and_workers(tmp_path, monkeypatch, block):
    source = write_kind(tmp_path, "plain", runs.lines(1, 60_000, 0.1))
    wanted = {"seq_len": 32, "shard_size": 4096, "on_error": "skip", "memory": 3 << 30}
    millstream.pack_to(tmp_path / "a", source, **wanted, workers=1)
    monkeypatch.setattr(sources, "READ", block)
    with runs.in_time():
        millstream.pack_to(tmp_path / "b", source, **wanted, workers=3, block=block)
    assert runs.digests(tmp_path / "b") == runs.digests(tmp_path / "a")


# --- Ctrl-C ----------------------------------------------------------------


@runs.needs_proc
@pytest.mark.parametrize("workers", [slowly(1), 2])
def test_interrupted_at_the_keyboard(tmp_path, workers):
    args, _ = CASES[0].make(tmp_path / "corpus", 4_500_000)
    assert runs.cli(*args, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    args += ["--out", tmp_path / "out", "--workers", workers]
    with runs.Run(*args, held="manifest.json") as run:
        runs.wait_until(lambda: "commit" in runs.events(tmp_path / "out") or not run.goes_on())
        run.signal(signal.SIGINT)
        code, stderr = run.end()
        runs.wait_until(lambda: not run.alive())
    assert code == 130, stderr
    assert "run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    assert not runs.is_complete(tmp_path / "out")
    assert runs.cli(*args).returncode == 0
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


# --- going on with something else ------------------------------------------

BASE = {"seq_len": 16, "shard_size": 4096, "workers": 1, "block": 1000}


def rows_with_a_bad_one(seed=7, size=150_000):
    rows = runs.lines(seed, size)
    rows.insert(2 * len(rows) // 3, b'{"text": broken\n')
    return rows


def mended(rows):
    return [b'{"text": "mended, it is", "id": "m"}\n' if row == b'{"text": broken\n' else row for row in rows]


def stopped(folder, source, **named):
    """A run that stopped at a bad document, after some commits."""
    with pytest.raises(DataError):
        millstream.pack_to(folder / "out", source, **{**BASE, **named})
    assert runs.events(folder / "out").count("commit") >= 2
    assert not runs.is_complete(folder / "out")


CHANGES = {
    "--seq-len": {"seq_len": 17},
    "--tokenizer": {"tokenizer": "other"},
    "--eos": {"eos": True},
    "--bos": {"bos": True},
    "--strategy": {"strategy": "split"},
    "--window": {"strategy": "best-fit", "window": 1000},
    "--max-segments": {"strategy": "best-fit", "max_segments": 3},
    "--shuffle": {"shuffle": 0},
    "--shuffle-window": {"shuffle": 0, "shuffle_window": 1000},
    "--overlong": {"overlong": "drop"},
    "--remainder": {"remainder": "drop"},
    "--text-field": {"text_field": "body"},
    "--chat": {"chat": True},
    "--id-field": {"id_field": "name"},
    "--validation": {"validation": 0.1},
    "--format": {"format": "parquet"},
    "--format was not given": {"format": "npy,mds"},
    "--shard-size": {"shard_size": 2048},
    "--limit": {"limit": 1000},
    "--max-document": {"max_document": 1 << 20},
}


@pytest.mark.parametrize("flag", CHANGES)
@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
def test_settings_that_change_the_bytes_are_refused(tmp_path, flag, finished):
    rows = rows_with_a_bad_one()
    source = runs.write_plain(tmp_path / "corpus.jsonl", mended(rows) if finished else rows)
    if finished:
        millstream.pack_to(tmp_path / "out", source, **BASE)
    else:
        stopped(tmp_path, source)
    before = runs.digests(tmp_path / "out")
    change = dict(CHANGES[flag])
    if flag == "--tokenizer":
        change = {"tokenizer": str(runs.train_tokenizer(tmp_path / "other.json"))}
    with pytest.raises(ResumeRefused, match=flag.removeprefix("--").replace("-", "_")) as refused:
        millstream.pack_to(tmp_path / "out", source, **{**BASE, **change})
    assert refused.value.exit_code == 2
    assert runs.digests(tmp_path / "out") == before


def test_another_tokenizer_under_the_same_name_is_refused(tmp_path):
    source = runs.write_plain(tmp_path / "corpus.jsonl", rows_with_a_bad_one(size=3_000_000))
    path = runs.train_tokenizer(tmp_path / "tokenizer.json")
    args = ["pack", source, "--out", tmp_path / "out", "--tokenizer", path, *SMALL]
    assert runs.cli(*args).returncode == 1
    runs.train_tokenizer(path, seed=1)
    refused = runs.cli(*args)
    assert refused.returncode == 2
    assert "--tokenizer was tokenizer.json" in refused.stderr
    runs.train_tokenizer(path)
    assert runs.cli(*args, "--on-error", "skip").returncode == 3


def test_settings_that_do_not_change_the_bytes_may_change(tmp_path):
    rows = rows_with_a_bad_one()
    source = runs.write_plain(tmp_path / "corpus.jsonl", rows)
    stopped(tmp_path, source)
    changed = {**BASE, "workers": 2, "memory": 2 << 30, "on_error": "skip", "engine": "reference", "block": 5000}
    with runs.in_time():
        report = millstream.pack_to(tmp_path / "out", source, **changed)
    assert report.resumed
    assert report.faults == 1
    millstream.pack_to(tmp_path / "whole", source, **BASE, on_error="skip")
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd", "parquet"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": 0.3},
        {"strategy": "split"},
        {"strategy": "best-fit", "window": 2000},
        {"shuffle": 1, "shuffle_window": 1500},
    ],
    ids=str,
)
def test_a_mended_document_is_packed(tmp_path, kind, options):
    rows = rows_with_a_bad_one()
    source = write_kind(tmp_path, kind, rows)
    stopped(tmp_path, source, **options)
    write_kind(tmp_path, kind, mended(rows))
    report = millstream.pack_to(tmp_path / "out", source, **BASE, **options)
    assert report.resumed
    assert not report.faults
    millstream.pack_to(tmp_path / "whole", source, **BASE, **options)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


def test_a_mended_text_file_is_packed(tmp_path):
    folder = runs.write_texts(tmp_path / "corpus", runs.lines(2, 150_000))
    bad = sorted(folder.iterdir())[-2]
    bad.write_bytes(b"not \xff UTF-8")
    stopped(tmp_path, folder)
    bad.write_bytes(b"it is now")
    assert millstream.pack_to(tmp_path / "out", folder, **BASE).resumed
    millstream.pack_to(tmp_path / "whole", folder, **BASE)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


def _same_length(row):
    """Another text of the same length."""
    found = json.loads(row)
    found["text"] = found["text"][::-1].replace("e", "a")
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def _changed_first(rows):
    number = next(n for n, row in enumerate(rows) if len(row) > 100)
    return [*rows[:number], _same_length(rows[number]), *rows[number + 1 :]]


INPUT_CHANGES = {
    "text": _changed_first,
    "line-more": lambda rows: [b'{"text": "one more"}\n', *rows],
    "line-less": lambda rows: rows[1:],
    "cut": lambda rows: rows[:3],
}


@pytest.mark.parametrize("change", INPUT_CHANGES)
@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd", "parquet"])
def test_an_input_changed_before_the_place_is_refused(tmp_path, kind, change):
    rows = rows_with_a_bad_one()
    source = write_kind(tmp_path, kind, rows)
    stopped(tmp_path, source)
    write_kind(tmp_path, kind, INPUT_CHANGES[change](mended(rows)))
    with pytest.raises(ResumeRefused, match="corpus"):
        millstream.pack_to(tmp_path / "out", source, **BASE)


def test_one_row_group_changed_before_the_place_is_refused(tmp_path):
    rows = rows_with_a_bad_one()
    source = runs.write_parquet(tmp_path / "corpus.parquet", rows, 1 << 20)
    stopped(tmp_path, source)
    runs.write_parquet(source, [b'{"text": "one more"}\n', *mended(rows)], 1 << 20)
    with pytest.raises(ResumeRefused, match="corpus"):
        millstream.pack_to(tmp_path / "out", source, **BASE)


def test_a_long_text_changed_before_the_place_is_refused(tmp_path, monkeypatch):
    text = "\n".join(json.loads(row)["text"] for row in runs.lines(3, 6_000_000))
    source = tmp_path / "long.txt"
    source.write_text(text, encoding="utf-8")
    write = run.record_shard
    left = 3

    def written(out, manifest):
        nonlocal left
        write(out, manifest)
        left -= 1
        if not left:
            raise _Interrupted

    wanted = {"seq_len": 128, "shard_size": 1 << 20, "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(run, "record_shard", written)
        with pytest.raises(_Interrupted):
            millstream.pack_to(tmp_path / "out", source, **wanted)
    source.write_text("Something else at its beginning. " + text, encoding="utf-8")
    with pytest.raises(ResumeRefused, match=r"long\.txt"):
        millstream.pack_to(tmp_path / "out", source, **wanted)


def test_a_file_that_was_read_may_not_change(tmp_path):
    folder = runs.write_texts(tmp_path / "corpus", runs.lines(2, 150_000))
    files = sorted(folder.iterdir())
    files[-1].write_bytes(b"not \xff UTF-8")
    stopped(tmp_path, folder)
    files[0].write_text("changed", encoding="utf-8")
    with pytest.raises(ResumeRefused, match=files[0].name):
        millstream.pack_to(tmp_path / "out", folder, **BASE)
    files[0].unlink()
    with pytest.raises(ResumeRefused, match=files[0].name):
        millstream.pack_to(tmp_path / "out", folder, **BASE)


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd"])
def test_what_is_appended_behind_the_place_is_packed(tmp_path, kind):
    rows = rows_with_a_bad_one()
    source = write_kind(tmp_path, kind, rows)
    stopped(tmp_path, source)
    more = [b'{"text": "appended later"}\n'] * 50
    if kind == "gzip":
        source.write_bytes(source.read_bytes() + gzip.compress(b"".join(more)))
    else:
        write_kind(tmp_path, kind, rows + more)
    millstream.pack_to(tmp_path / "out", source, **BASE, on_error="skip")
    millstream.pack_to(tmp_path / "whole", source, **BASE, on_error="skip")
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


def test_a_finished_run_says_so(tmp_path):
    rows = runs.lines(1, 20_000, 0.1)
    source = runs.write_plain(tmp_path / "corpus.jsonl", rows)
    args = ["pack", source, "--out", tmp_path / "out", "--on-error", "skip"]
    assert runs.cli(*args).returncode == 3
    before = runs.digests(tmp_path / "out")
    again = runs.cli(*args)
    assert again.returncode == 0
    assert "finished already" in again.stdout
    other = runs.cli(*args, "--seq-len", 100)
    assert other.returncode == 2
    assert "--seq-len was 2048, is 100" in other.stderr
    runs.write_plain(source, [*rows, b'{"text": "more"}\n'])
    assert runs.cli(*args).returncode == 2
    assert runs.digests(tmp_path / "out") == before


def test_another_stream_on_standard_input_is_refused(tmp_path):
    rows = rows_with_a_bad_one(size=3_000_000)
    piped = runs.write_plain(tmp_path / "piped.jsonl", rows)
    args = ["pack", "-", *SMALL, "--out"]
    assert runs.cli(*args, tmp_path / "out", piped=piped).returncode == 1
    assert runs.events(tmp_path / "out").count("commit") >= 1
    for number, change in enumerate(INPUT_CHANGES.values()):
        other = runs.write_plain(tmp_path / f"other-{number}.jsonl", change(mended(rows)))
        refused = runs.cli(*args, tmp_path / "out", piped=other)
        assert refused.returncode == 2, refused.stderr
        assert "--overwrite" in refused.stderr
    good = runs.write_plain(tmp_path / "mended.jsonl", mended(rows))
    assert runs.cli(*args, tmp_path / "out", piped=good).returncode == 0
    assert runs.cli(*args, tmp_path / "whole", piped=good).returncode == 0
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


# --- workers that die ------------------------------------------------------


@runs.needs_proc
def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path):
    """Out of memory, mostly; another one does its part again."""
    source = write_kind(tmp_path, "plain", runs.lines(3, 4_000_000))
    wanted = ["pack", source, "--seq-len", 64, "--shard-size", "200kB"]
    assert runs.cli(*wanted, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    with runs.Run(*wanted, "--out", tmp_path / "out", "--workers", 2, "--memory", "2GiB", held="train-") as run:
        runs.wait_until(lambda: not run.goes_on())  # the first record of a shard is written next
        workers = [pid for pid in run.alive() if pid != run.process.pid]
        os.kill(workers[0], signal.SIGKILL)
        run.let_go()
        code, stderr = run.end()
    assert code == 0, stderr  # a slow machine is told of progress there
    assert "worker died" in runs.events(tmp_path / "out")
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")


def test_the_documents_of_a_part_are_told_by_its_lines(tmp_path):
    source = runs.write_plain(tmp_path / "a.jsonl", [b"1234567\n", b"\n", b"01234\n", b"56789"])
    packed = runs.write_gzip(tmp_path / "a.jsonl.gz", [b"1234567\n", b"\n", b"01234\n", b"56789"])
    shards = [sources.InputShard(str(path), path.name, "jsonl") for path in (source, tmp_path / "gone.jsonl")]
    shards.append(sources.InputShard(str(packed), packed.name, "jsonl", "gzip"))

    def told(number, start, stop):
        return named(Part(0, (Range(number, start, stop),)), shards).partition("bytes ")[2]

    assert told(0, 0, None) == "0 to its end"
    assert told(0, 0, 1) == "0 to 1, lines 1 to 1"
    assert told(0, 7, None) == "7 to its end, lines 2 to its end"
    assert told(0, 8, 9) == told(2, 8, 9) == "8 to 9, lines 2 to 2"
    assert told(0, 9, 15) == "9 to 15, lines 3 to 3"
    assert told(0, 10, 15) == "10 to 15, within line 3"
    assert told(0, 10, 99) == "10 to 99, lines 4 to 4"
    assert told(1, 10, 99) == "10 to 99"
    assert told(0, 10, 1 << 40) == "10 to 1,099,511,627,776"


KILLER = """
import os, signal
from millstream.runs.pack.encode import Encode

encode = Encode.__call__


def texts(data):
    return bytes(data) if isinstance(data, bytes | memoryview) else str(data.to_pydict()).encode()


def __call__(self, given):
    if any(b"killer" in texts(piece.data) for piece in given[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, given)


Encode.__call__ = __call__
"""


@runs.needs_proc
@pytest.mark.parametrize("kind", ["plain", "gzip", "parquet"])
def test_a_document_that_kills_whoever_reads_it_is_named(tmp_path, monkeypatch, kind):
    """By the part that it is in, and the lines or rows of that; the same run goes on once it is mended."""
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.syspath_prepend(tmp_path)
    rows = runs.lines(3, 700_000)
    at, sizes = len(rows) // 2, list(itertools.accumulate(map(len, rows)))
    good, rows[at] = rows[at], b'{"text": "a killer"}\n'
    source = write_kind(tmp_path, kind, rows)
    wanted = {"seq_len": 64, "shard_size": 20_000}
    with pytest.raises(WorkerDied) as raised:
        millstream.pack_to(tmp_path / "out", source, **wanted, workers=2, memory=8 << 30)
    told = str(raised.value)
    assert "(killed by signal 9), 3 times at " in told
    if kind == "plain":
        low, high = (sum(size < stop for size in sizes) for stop in (1 << 18, 1 << 19))
        assert low < at < high
        assert f"at {source.name}, bytes 262,144 to 524,288, lines {low + 2:,} to {high + 1:,}; often" in told
    else:
        assert f"at {source.name}, {'bytes' if kind == 'gzip' else 'rows'} " in told
    assert "fewer workers need less. The same command goes on from what is done. If it ends there again" in told
    rows[at] = good
    write_kind(tmp_path, kind, rows)
    millstream.pack_to(tmp_path / "out", source, **wanted, workers=2, memory=8 << 30)
    millstream.pack_to(tmp_path / "whole", source, **wanted)
    assert runs.digests(tmp_path / "out") == runs.digests(tmp_path / "whole")
