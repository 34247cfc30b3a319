"""What a bug in the writer would leave: every SHA-256 is right, and what they are of is not."""

import itertools
import json
import shutil

import chats
import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from helpers import read_manifest, write_jsonl
from test_verify import craft

import millstream
from millstream.runs.pack.encode import in_validation

quick = pytest.fixture(autouse=True, scope="module")(helpers.without_fsync)

ORDERS = {
    "concat": {},
    "concat-shuffled": {"shuffle": 1, "remainder": "drop"},
    "split-left": {"strategy": "split", "pad_side": "left", "overlong": "truncate"},
    "best-fit": {"strategy": "best-fit", "window": 3000},
    "best-fit-shuffled": {"strategy": "best-fit", "shuffle": 2, "shuffle_window": 2000, "overlong": "drop"},
    "chats": {"chat": True, "strategy": "best-fit", "window": 3000},
    "parquet": {"format": "parquet", "remainder": "pad"},
    "parquet-chats": {"format": "parquet", "chat": True, "strategy": "best-fit", "window": 3000},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of texts, one of conversations, and a run of every order, with several shards and faults."""
    root = tmp_path_factory.mktemp("tampering")
    turns = str(chats.write_tokenizer(root / "turns", "turns"))
    runs.write_plain(root / "corpus.jsonl", runs.lines(5, 60_000, 0.05))
    rows = chats.rows(3, 150)
    write_jsonl(root / "chats.jsonl", [*rows[:40], {"id": "bad"}, *rows[40:]])
    for name, order in ORDERS.items():
        source = root / ("chats.jsonl" if order.get("chat") else "corpus.jsonl")
        tokenizer = turns if order.get("chat") else "gpt2"
        common = {"seq_len": 64, "shard_size": 8192, "on_error": "skip", "validation": 0.2, "tokenizer": tokenizer}
        ends = {} if order.get("chat") else {"eos": True, "bos_token": "<|endoftext|>"}
        helpers.pack(root / name, source, **common, **ends, **order)
        assert helpers.whole(root / name)
    return root


# --- kinds of tampering: what is changed in a folder, in its first shard unless it says so -------------------------


def npy(change):
    """Changes an array in place, or returns another one."""

    def tamper(folder, name):
        path = folder / name
        values = np.load(path)
        changed = change(values)
        np.save(path, values if changed is None else changed)

    return tamper


def samples(change):
    """Changes the ids of a shard, (samples, N)."""

    def tamper(folder):
        path = folder / "samples-00000.npy"
        if path.exists():
            npy(change)(folder, path.name)
            return
        columns("samples-00000.parquet", input_ids=lambda column: change_lists(column, change))(folder)

    return tamper


def change_lists(column, change):
    values = np.array(column.to_pylist())
    changed = change(values)
    return pa.array((values if changed is None else changed).tolist(), column.type)


def segments(change):
    return lambda folder: npy(change)(folder, "segments-00000.npy")


def columns(name, **changes):
    """Changes columns of a Parquet file: each from a column to a column, or to a list."""

    def tamper(folder):
        table = pq.read_table(folder / name)
        for column, change in changes.items():
            field = table.schema.field(column)
            found = change(table[column].combine_chunks())
            values = found if isinstance(found, pa.Array) else pa.array(found, field.type)
            table = table.set_column(table.schema.get_field_index(column), field, values)
        pq.write_table(table, folder / name, row_group_size=1024)

    return tamper


def documents(**changes):
    return columns("documents-00000.parquet", **changes)


def zeros(ids):
    ids[:] = 0


def rotated(ids):
    return np.roll(ids, 1, axis=0)


def reverse(ids):
    return ids[:, ::-1].copy()


def no_ends(ids):
    ids[ids == 50256] = 11


def zero_starts(found):
    assert found["start"].any()
    found["start"] = 0


def reversed_documents(found):
    found["document"] = found["document"][::-1].copy()


def unknown_documents(found):
    found["document"][7:9] += 10**6


def moved_lengths(found):
    """Of two segments in one sample, one has an id more and the other one less."""
    same = np.flatnonzero((np.diff(found["sample"].astype(int)) == 0) & (found["length"][:-1] > 1))
    found["length"][same[0]] -= 1
    found["length"][same[0] + 1] += 1


def moved_sample(found):
    found["sample"][5] += 1


def zero(column):
    return [0] * len(column)


def turned(column):
    return column.take(pa.array(range(len(column))[::-1]))


def beyond(column):
    return [*column.to_pylist()[:-1], 7]


def two_swapped(column):
    values = column.to_pylist()
    filled = [k for k, value in enumerate(values) if value and value != values[0]]
    values[0], values[filled[0]] = values[filled[0]], values[0]
    return values


def of_validation(column):
    names = [name for name in map(str, range(5000)) if in_validation([name], 0.2)[0]]
    return names[: len(column)]


def flipped_split(column):
    """As many are split, but others."""
    values = column.to_pylist()
    one, other = values.index(True), values.index(False)
    values[one], values[other] = False, True
    return values


def flipped_mask(loss):
    """In the first sample that has both, a learned id is not and one that is not is."""
    row = int(np.flatnonzero(loss.any(axis=1) & ~loss.all(axis=1))[0])
    one, other = np.flatnonzero(loss[row])[0], np.flatnonzero(~loss[row])[0]
    loss[row, [one, other]] = loss[row, [other, one]]


def learned_padding(loss):
    loss[:, -1] = True


KINDS = {
    "ids-zeroed": samples(zeros),
    "samples-swapped": samples(rotated),
    "samples-reversed": samples(reverse),
    "ends-overwritten": samples(no_ends),
    "starts-zero": segments(zero_starts),
    "segments-of-others": segments(reversed_documents),
    "segments-of-nobody": segments(unknown_documents),
    "segments-reversed": segments(lambda found: found[::-1].copy()),
    "segment-lengths-moved": segments(moved_lengths),
    "segment-in-another-sample": segments(moved_sample),
    "ordinals-zero": documents(ordinal=zero),
    "ordinals-swapped": documents(ordinal=two_swapped),
    "documents-reversed": documents(**dict.fromkeys(("ordinal", "id", "source", "offset", "length", "split"), turned)),
    "lengths-swapped": documents(length=two_swapped),
    "splits-swapped": documents(split=flipped_split),
    "sources-out-of-range": documents(source=beyond),
    "offsets-swapped": documents(offset=turned),
    "ids-of-the-other-subset": documents(id=of_validation),
}


SAMPLES = {"ids-zeroed", "samples-swapped", "samples-reversed", "ends-overwritten"}


def reseal(folder):
    """The manifest with the counts and hashes of the files as they are now, as their writer would have made it."""

    def counted(manifest):
        for front, subset in (("", "train"), ("validation-", "validation")):
            for shard in manifest["subsets"][subset]["shards"]:
                table = pq.read_table(folder / f"{front}documents-{shard['number']:05d}.parquet").to_pydict()
                found = zip(table["length"], table["split"], table["cut_off"], strict=True)
                rows = [(length > 0, split, cut_off > 0) for length, split, cut_off in found]
                shard["empty"] = sum(not filled and not cut for filled, _, cut in rows)
                shard["split"] = sum(split and not cut for _, split, cut in rows)
                if "loss" in shard["files"]:
                    shard["learned"] = int(np.load(folder / shard["files"]["loss"]["name"]).sum())

    craft(folder, counted)


def found_in(folder):
    return "\n".join(millstream.verify(folder).problems)


NOTHING_OF_THE_KIND = {
    *itertools.product(["starts-zero", "splits-swapped"], ["split-left", "best-fit-shuffled"]),
    ("segment-lengths-moved", "split-left"),
    ("splits-swapped", "parquet-chats"),
    # What a template writes at the ends is not known: `--against` tells.
    *itertools.product(SAMPLES, ["chats", "parquet-chats"]),
}
SHOWN = [pair for pair in itertools.product(KINDS, ORDERS) if pair not in NOTHING_OF_THE_KIND]


@pytest.mark.parametrize(("kind", "order"), SHOWN)
def test_what_a_folder_alone_shows(made, tmp_path, kind, order):
    folder = shutil.copytree(made / order, tmp_path / "out")
    before = runs.digests(folder)
    KINDS[kind](folder)
    reseal(folder)
    changed = [name for name, digest in runs.digests(folder).items() if digest != before[name] and "man" not in name]
    assert len(changed) == 1
    assert found_in(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flipped_mask, None),
        (learned_padding, "padding that is to be learned"),
    ],
)
def test_a_mask(made, tmp_path, change, words):
    folder = shutil.copytree(made / "chats", tmp_path / "out")
    npy(change)(folder, "loss-00000.npy")
    reseal(folder)
    problems = found_in(folder)
    assert (words in problems) if words else not problems


def test_labels_of_parquet(made, tmp_path):
    folder = shutil.copytree(made / "parquet-chats", tmp_path / "out")
    columns("samples-00000.parquet", labels=lambda c: change_lists(c, lambda v: np.where(v >= 0, v + 1, v)))(folder)
    reseal(folder)
    assert "column labels does not fit its ids and segments" in found_in(folder)


@pytest.mark.parametrize("column", ["seq_lengths", "documents"])
def test_the_other_columns_of_parquet(made, tmp_path, column):
    folder = shutil.copytree(made / "parquet", tmp_path / "out")
    columns("samples-00000.parquet", **{column: lambda c: [list(reversed(row)) for row in c.to_pylist()]})(folder)
    reseal(folder)
    assert f"column {column} does not fit its ids and segments" in found_in(folder)


@pytest.mark.parametrize("order", ["split-left", "best-fit", "chats"])
def test_padding_is_the_padding_id(made, tmp_path, order):
    folder = shutil.copytree(made / order, tmp_path / "out")
    pad = read_manifest(str(folder))["settings"]["pad_id"]
    at = 0 if order == "split-left" else -1

    def change(ids):
        padded = np.flatnonzero(ids[:, at] == pad)
        ids[padded, at] = pad - 1

    samples(change)(folder)
    reseal(folder)
    problems = found_in(folder)
    assert f"padding that is not id {pad}" in problems or "does not end with EOS" in problems


def test_faults_and_a_remainder(made, tmp_path):
    folder = shutil.copytree(made / "concat", tmp_path / "out")
    lines = (folder / "faults.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 2
    (folder / "faults.jsonl").write_text("".join(reversed(lines)))
    reseal(folder)
    assert "does not come behind" in found_in(folder)
    other = json.loads(lines[0]) | {"ordinal": json.loads(lines[0])["ordinal"] + 1}
    (folder / "faults.jsonl").write_text("".join([json.dumps(other) + "\n", *lines[1:]]))
    reseal(folder)
    assert "documents are not numbered from 0 on" in found_in(folder)
    (folder / "faults.jsonl").write_text("".join(lines))
    npy(lambda ids: ids[::-1].copy())(folder, "remainder.npy")
    reseal(folder)
    assert "does not begin with BOS" in found_in(folder)
