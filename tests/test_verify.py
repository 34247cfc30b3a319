"""`verify` finds whatever is wrong with a finished run."""

import json
import re
import shutil

import numpy as np
import pytest
import runs
from helpers import read_manifest, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import MillstreamError
from millstream.folder.manifest import JOURNAL, MANIFEST, RECORDS, RUN

VOCABULARY = 50257
FORMATS = ("npy", "parquet", "npy,mds,megatron")


@pytest.fixture(scope="module", params=FORMATS)
def whole(request, tmp_path_factory):
    """A run with faults, a validation subset, a remainder in both subsets, and several shards."""
    folder = tmp_path_factory.mktemp("verify")
    source = runs.write_plain(folder / "corpus.jsonl", runs.lines(5, 60_000, 0.1))
    out = folder / "out"
    millstream.pack_to(
        out,
        source,
        seq_len=64,
        shard_size=8192,
        validation=0.3,
        on_error="skip",
        format=request.param,
        eos=True,
        workers=1,
    )
    assert len(runs.digests(out)) > 10
    assert millstream.verify(out).ok
    return out


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def found(folder):
    """What is wrong with a folder, as `verify` says it."""
    try:
        return "\n".join(millstream.verify(folder).problems)
    except MillstreamError as error:
        return str(error)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != JOURNAL)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_flipped_bit_is_found(whole, data):
    path = data.draw(st.sampled_from(files(whole)))
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1))
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    path.write_bytes(after)
    try:
        assert path.name in found(whole)
    finally:
        path.write_bytes(before)


def test_any_flipped_bit_of_the_manifest_is_found(whole):
    path = whole / MANIFEST
    before = path.read_bytes()
    missed = []
    try:
        for byte in range(0, len(before), 23):
            after = bytearray(before)
            after[byte] ^= 1 << byte % 8
            path.write_bytes(after)
            if MANIFEST not in found(whole):
                missed.append(byte)
    finally:
        path.write_bytes(before)
    assert missed == []
    assert millstream.verify(whole).ok


def test_a_missing_file_is_found(whole, tmp_path):
    for path in files(whole):
        moved = path.rename(tmp_path / path.name)
        assert path.name in found(whole)
        shutil.move(moved, path)
    assert millstream.verify(whole).ok


def test_a_truncated_or_longer_file_is_found(whole):
    for path in files(whole):
        before = path.read_bytes()
        for after in (before[:-1], before[: len(before) // 2], b"", before + b"\0"):
            path.write_bytes(after)
            assert path.name in found(whole)
        path.write_bytes(before)
    assert millstream.verify(whole).ok


def test_foreign_files_among_exports_are_found(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    folders = [path for path in run.rglob("*") if path.is_dir()] + [run]
    for folder in folders:
        (folder / "notes.txt").write_text("mine")
        (folder / "more").mkdir()
        problems = found(run).splitlines()
        assert [str((folder / name).relative_to(run)) for name in ("more", "notes.txt")] == [
            problem.partition(":")[0] for problem in problems
        ]
        (folder / "notes.txt").unlink()
        (folder / "more").rmdir()
    assert millstream.verify(run).ok


@pytest.mark.parametrize("name", ["notes.txt", "samples-00099.npy", "samples-00000.npy.tmp", ".hidden"])
def test_a_foreign_file_is_found(run, name):
    (run / name).write_bytes(b"")
    assert name in found(run)


def test_an_unfinished_run_is_no_whole_run(run):
    (run / MANIFEST).rename(run / RUN)
    assert "not finished; run the same pack command again" in found(run)


def test_the_manifest_of_an_unfinished_run_is_an_earlier_versions(run):
    manifest = read_manifest(str(run))
    write_manifest(str(run), {**manifest, "complete": False})
    assert "not finished, and was begun by an earlier version of millstream: finish it with that version" in found(run)


def test_records_that_a_crash_left_beside_the_manifest_count_no_more(run):
    (run / RUN).write_text("no longer of interest")
    (run / RECORDS).mkdir()
    (run / RECORDS / "train-00000.json").write_text("nor this")
    assert millstream.verify(run).ok


# --- crafted: every SHA-256 is right, the content is not ---------------------


def craft(folder, change):
    """Apply `change` to the manifest, and repair the sizes and SHA-256 of all the files that it names."""
    manifest = read_manifest(str(folder))
    change(manifest)
    entries = [
        file for subset in manifest["subsets"].values() for s in subset["shards"] for file in s["files"].values()
    ]
    entries += [subset["remainder"] for subset in manifest["subsets"].values() if "name" in subset["remainder"]]
    entries += [file for export in manifest["exports"] for file in export["files"]]
    entries += [s["remainder"]["loss"] for s in manifest["subsets"].values() if "loss" in s["remainder"]]
    for entry in [*entries, manifest["faults"]]:
        path = folder / entry["name"]
        entry |= {"bytes": path.stat().st_size, "sha256": runs.sha256(path)}
    write_manifest(str(folder), manifest)


def change_sample(path, value):
    if path.suffix == ".npy":
        ids = np.load(path)
        ids[-1, -1] = value
        np.save(path, ids)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    rows = table["input_ids"].to_pylist()
    rows[-1][-1] = value
    column = pa.array(rows, table.schema.field("input_ids").type)
    pq.write_table(table.set_column(0, table.schema.field("input_ids"), column), path)


@pytest.mark.parametrize("subset", ["", "validation-"])
def test_an_id_beyond_the_vocabulary_is_found(run, subset):
    path = next(path for path in files(run) if path.name.startswith(f"{subset}samples-00000"))
    change_sample(path, VOCABULARY - 1)
    craft(run, lambda manifest: None)
    assert found(run) == ""
    change_sample(path, VOCABULARY)
    craft(run, lambda manifest: None)
    assert f"{path.name}: id {VOCABULARY}" in found(run)


def test_a_negative_id_is_found(run):
    path = next(path for path in files(run) if path.name.startswith("samples-00000"))
    if path.suffix == ".npy":
        pytest.skip("its ids have no sign")
    change_sample(path, -1)
    craft(run, lambda manifest: None)
    assert path.name in found(run)


def test_an_id_beyond_the_vocabulary_in_the_remainder_is_found(run):
    ids = np.load(run / "remainder.npy")
    ids[0] = VOCABULARY
    np.save(run / "remainder.npy", ids)
    craft(run, lambda manifest: None)
    assert f"remainder.npy: id {VOCABULARY}" in found(run)


@pytest.mark.parametrize(
    "where",
    [
        ("documents", "in"),
        ("documents", "whole"),
        ("documents", "split"),
        ("documents", "empty"),
        ("documents", "faulty"),
        ("ids", "in"),
        ("ids", "text"),
        ("ids", "special"),
        ("ids", "in_samples"),
        ("ids", "remainder"),
        ("ids", "dropped"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("by", [1, -1])
def test_a_ledger_that_does_not_balance_is_found(run, where, by):
    def change(manifest):
        manifest["ledger"][where[0]][where[1]] += by

    craft(run, change)
    assert found(run) != ""


@pytest.mark.parametrize(
    "where",
    [
        [("ids", "in"), ("ids", "text"), ("ids", "in_samples")],
        [("ids", "in"), ("ids", "special"), ("ids", "remainder")],
        [("ids", "in"), ("ids", "text"), ("ids", "dropped")],
        [("documents", "in"), ("documents", "faulty")],
        [("documents", "in"), ("documents", "whole")],
        [("ids", "padding")],
    ],
    ids=lambda where: "-".join(name for _, name in where),
)
def test_a_ledger_that_balances_but_is_not_that_of_the_files_is_found(run, where):
    def change(manifest):
        for part, name in where:
            manifest["ledger"][part][name] += 1

    craft(run, change)
    assert found(run) != ""


def test_a_ledger_that_moves_documents_is_found(run):
    def change(manifest):
        manifest["ledger"]["documents"]["whole"] -= 1
        manifest["ledger"]["documents"]["split"] += 1

    craft(run, change)
    assert found(run) != ""


@pytest.mark.parametrize("key", ["samples", "padding", "segments", "documents", "empty", "split"])
def test_counts_of_a_shard_that_do_not_fit_its_files_are_found(run, key):
    def change(manifest):
        manifest["subsets"]["train"]["shards"][0][key] += 1

    craft(run, change)
    assert found(run) != ""


def test_one_of_something_is_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello world"}\n')
    out = tmp_path / "out"
    assert runs.cli("pack", tmp_path / "a.jsonl", "--out", out, "--seq-len", "2", "--remainder", "drop").returncode == 0
    assert re.search(r"is whole: 3 files, \d,\d+ bytes, 1 sample\.$", runs.cli("verify", out).stdout, re.M)
    assert runs.cli("show", out, "0").stdout.startswith("sample 0 of 1: 2 ids, 1 document\n")


def test_the_command_line_says_what_is_wrong(run):
    done = runs.cli("verify", run)
    assert done.returncode == 0
    assert "is whole" in done.stdout
    (run / "notes.txt").write_text("mine")
    done = runs.cli("verify", run, "--json")
    assert done.returncode == 1
    assert "notes.txt" in done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["ok"] is False
    assert len(verdict["problems"]) == 1
    (run / "notes.txt").unlink()
    manifest = bytearray((run / MANIFEST).read_bytes())
    manifest[len(manifest) // 2] ^= 1
    (run / MANIFEST).write_bytes(manifest)
    done = runs.cli("verify", run)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
