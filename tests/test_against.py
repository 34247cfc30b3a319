"""`verify --against`: the sources are tokenized again, and whatever is not as they are is found."""

import json
import shutil

import chats
import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
import runs
from helpers import write_jsonl
from test_tampering import KINDS, ORDERS, columns, documents, flipped_mask, npy, reseal, samples

import millstream
from millstream.errors import RequestError
from millstream.records import Slice
from millstream.runs.pack import fingerprint
from millstream.runs.pack.against import _Chosen, compare_with

quick = pytest.fixture(autouse=True, scope="module")(helpers.without_fsync)

OPTIONS = {
    **ORDERS,
    "dropped": {"remainder": "drop", "eos": True},
    "dropped-shuffled": {"remainder": "drop", "shuffle": 3, "shuffle_window": 1000, "seq_len": 300},
    "left": {"strategy": "split", "pad_side": "left", "eos": True, "validation": 0.0},
    "truncated": {"overlong": "truncate", "eos": True, "bos_token": "<|endoftext|>", "strategy": "best-fit"},
    "left-out": {"overlong": "drop", "shuffle": 1},
    "overlong-faults": {"overlong": "fault", "remainder": "pad"},
    "limited": {"limit": 77, "eos": True},
}
CORPORA = {
    "jsonl": lambda folder, rows: runs.write_plain(folder / "c.jsonl", rows),
    "gzip": lambda folder, rows: runs.write_gzip(folder / "c.jsonl.gz", rows),
    "zstd": lambda folder, rows: runs.write_zstd(folder / "c.jsonl.zst", rows),
    "parquet": lambda folder, rows: runs.write_parquet(folder / "c.parquet", rows),
    "texts": lambda folder, rows: runs.write_texts(folder / "c", rows),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("against")
    chats.write_tokenizer(folder / "turns", "turns")
    for name, write in CORPORA.items():
        (folder / name).mkdir()
        write(folder / name, runs.lines(5, 60_000, 0.05))
    write_jsonl(folder / "chats.jsonl", [*chats.rows(3, 100), {"id": "bad"}, *chats.rows(4, 50)])
    return folder


def packed(root, options, kind="jsonl"):
    """(a run folder that is made once, its source)."""
    chat = options.get("chat")
    source = root / "chats.jsonl" if chat else next((root / kind).iterdir())
    name = root / f"out-{hash(json.dumps([options, kind]))}"
    if not name.exists():
        tokenizer = str(root / "turns") if chat else "gpt2"
        common = {"seq_len": 64, "shard_size": 8192, "on_error": "skip", "validation": 0.2, "tokenizer": tokenizer}
        helpers.pack(name, source, **{**common, **options})
        assert helpers.whole(name)
    return name, source


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_is_what_its_sources_give(root, options):
    folder, source = packed(root, options)
    found = compare_with(folder, source, tokenizer=str(root / "turns") if options.get("chat") else None, workers=1)
    assert found.problems == []
    assert found.documents == found.of == millstream.open(folder).ledger["documents"]["in"]


@pytest.mark.parametrize("kind", list(CORPORA)[1:])
def test_whatever_the_sources_are(root, kind):
    folder, source = packed(root, OPTIONS["dropped"], kind)
    assert compare_with(folder, source, workers=2).problems == []


def test_ids_that_exist_already(tmp_path):
    source = runs.write_id_lists(tmp_path / "c.jsonl", 1, 300, faulty=True)
    options = {"tokenizer": None, "ids_field": "ids", "seq_len": 16, "on_error": "skip", "pad_id": 0}
    for name in ("concat", "best-fit"):
        helpers.pack(tmp_path / name, source, **options, strategy=name)
        assert compare_with(tmp_path / name, source, workers=1).problems == []
    samples(lambda ids: ids.__setitem__((0, 1), 299))(tmp_path / "concat")
    reseal_one(tmp_path / "concat")
    assert helpers.whole(tmp_path / "concat")
    assert "has other ids" in compare_with(tmp_path / "concat", source, workers=1).problems[0]


def reseal_one(folder):
    from helpers import read_manifest, write_manifest

    manifest = read_manifest(str(folder))
    for shard in manifest["subsets"]["train"]["shards"]:
        for entry in shard["files"].values():
            path = folder / entry["name"]
            entry |= {"bytes": path.stat().st_size, "sha256": runs.sha256(path)}
    write_manifest(str(folder), manifest)


def one_id(ids):
    ids[2, 30] = 7 if ids[2, 30] != 7 else 8


def two_ids(ids):
    row = ids[2]
    at = next(k for k in range(20, 60) if row[k] != row[k + 1] and 50256 not in row[k - 1 : k + 3])
    row[[at, at + 1]] = row[[at + 1, at]]


def renamed(column):
    return [*column.to_pylist()[:-1], "another"]


def fault_elsewhere(folder):
    lines = (folder / "faults.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    (folder / "faults.jsonl").write_text(
        "".join([json.dumps(first | {"offset": first["offset"] + 1}) + "\n", *lines[1:]])
    )


UNSEEN = {
    "one id": (samples(one_id), OPTIONS["dropped"]),
    "two ids exchanged": (samples(two_ids), OPTIONS["dropped"]),
    "an id in Parquet": (samples(one_id), {"format": "parquet"}),
    "ids zeroed": (samples(lambda ids: np.zeros_like(ids)), {}),
    "samples exchanged": (samples(lambda ids: np.roll(ids, 1, axis=0)), {"shuffle": 2}),
    "samples reversed": (samples(lambda ids: ids[:, ::-1].copy()), {}),
    "the remainder": (lambda folder: npy(lambda ids: ids[::-1].copy())(folder, "remainder.npy"), {}),
    "a mask": (lambda folder: npy(flipped_mask)(folder, "loss-00000.npy"), OPTIONS["chats"]),
    "a fault's place": (fault_elsewhere, {}),
    "a document's id": (documents(id=renamed), {"validation": 0.0}),
    "a document's place": (documents(offset=lambda c: [*c.to_pylist()[:-1], c[-1].as_py() + 1]), {}),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_a_folder_alone_does_not_show(root, tmp_path, kind):
    tamper, options = UNSEEN[kind]
    made, source = packed(root, options)
    folder = shutil.copytree(made, tmp_path / "out")
    tamper(folder)
    seal(folder)
    assert helpers.whole(folder)
    tokenizer = str(root / "turns") if options.get("chat") else None
    problems = compare_with(folder, source, tokenizer=tokenizer, workers=1).problems
    assert problems
    assert all(problem.startswith(("document ", "1", "2", "3", "4", "5", "6", "7", "8", "9")) for problem in problems)


def seal(folder):
    reseal(folder) if (folder / "validation-samples-00000.npy").exists() or list(
        folder.glob("validation-*")
    ) else reseal_one(folder)


@pytest.mark.parametrize("kind", ["ids-zeroed", "samples-swapped", "samples-reversed"])
def test_what_a_template_writes_is_known_to_the_sources(root, tmp_path, kind):
    made, source = packed(root, {**OPTIONS["chats"], "loss": "all"})
    folder = shutil.copytree(made, tmp_path / "out")
    KINDS[kind](folder)
    reseal(folder)
    if millstream.verify(folder).ok:
        assert compare_with(folder, source, tokenizer=str(root / "turns"), workers=1).problems


def test_a_source_that_has_changed_is_named(root, tmp_path):
    made, _ = packed(root, OPTIONS["dropped"])
    rows = runs.lines(5, 60_000, 0.05)
    good = next(k for k, row in enumerate(rows) if k > 20 and b" " in row[20:] and b'"id"' in row)
    rows[good] = rows[good].replace(b'{"text": "', b'{"text": "X', 1)
    changed = runs.write_plain(tmp_path / "c.jsonl", rows)
    named = json.loads(rows[good])["id"]
    problems = compare_with(made, changed, workers=1).problems
    assert any(f"({named}, c.jsonl at byte" in problem and "other ids" in problem for problem in problems)
    shorter = runs.write_plain(tmp_path / "c.jsonl", rows[:-3])
    problems = compare_with(made, shorter, workers=1).problems
    assert problems[0].startswith("the sources have")


def test_other_sources_tokenizers_and_templates_are_refused(root, tmp_path):
    made, source = packed(root, {})
    with pytest.raises(RequestError, match=r"these are not the sources of the run: input 1 was c.jsonl, is d.jsonl"):
        compare_with(made, shutil.copy(source, tmp_path / "d.jsonl"))
    with pytest.raises(RequestError, match=r"input 2 was not given, is c.jsonl"):
        compare_with(made, [source, source])
    with pytest.raises(RequestError, match="is not the one of the run: give tokenizer"):
        compare_with(made, source, tokenizer=str(root / "turns"))
    with pytest.raises(RequestError, match="sample=0 does not work"):
        compare_with(made, source, sample=0)
    chat, rows = packed(root, OPTIONS["chats"])
    (tmp_path / "other.jinja").write_text("{{ messages[0]['content'] }}{% generation %}{% endgeneration %}")
    for options in ({}, {"chat_template": str(tmp_path / "other.jinja")}):
        with pytest.raises(RequestError, match="does not keep the chat template"):
            compare_with(chat, rows, **options)


def test_a_template_and_a_tokenizer_from_elsewhere(root, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(chats.TEMPLATES["turns"])
    options = {"chat": True, "chat_template": str(template), "allow_specials": True, "seq_len": 64}
    helpers.pack(tmp_path / "out", root / "chats.jsonl", tokenizer=str(root / "turns"), on_error="skip", **options)
    moved = shutil.copytree(root / "turns", tmp_path / "moved")
    found = compare_with(
        tmp_path / "out", root / "chats.jsonl", tokenizer=str(moved), chat_template=str(template), workers=1
    )
    assert found.problems == []


def test_of_many_documents_the_few_that_share_a_sum_are_named(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "MOST", 16)
    made, source = packed(root, OPTIONS["dropped"])
    assert compare_with(made, source, workers=1).problems == []
    folder = shutil.copytree(made, tmp_path / "out")
    samples(one_id)(folder)
    reseal(folder)
    [problem] = compare_with(folder, source, workers=1).problems
    count = millstream.open(folder).ledger["documents"]["in"]
    low, high = (int(word) for word in problem.split() if word.isdigit())
    assert problem.startswith("one of the documents ")
    assert high - low + 1 == -(-count // 16)
    ordinals = {part.ordinal for part in millstream.open(folder).documents(2)}
    assert any(low <= ordinal <= high for ordinal in ordinals)


def test_what_only_the_fast_engine_can_encode(tmp_path):
    source = write_jsonl(
        tmp_path / "c.jsonl", [{"text": "Hello"}, {"text": "a" + " " * 999_999 + "b"}, {"text": "world"}]
    )
    helpers.pack(tmp_path / "out", source, seq_len=8)
    found = millstream.verify(tmp_path / "out", against=source, workers=1)
    assert (found.problems, found.compared, found.documents, found.not_compared) == ([], 3, 3, 1)


def unit(begins=True):
    return (Slice(0, "", "", "text", 0, 1, begins=begins),)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_fraction_is_chosen_evenly_and_never_nothing(fraction):
    chosen = _Chosen(fraction)
    taken = [chosen.unit(unit()) for _ in range(1000)]
    assert taken[0]
    assert abs(sum(taken) - 1000 * fraction) <= 1
    tenths = [sum(taken[low : low + 100]) for low in range(0, 1000, 100)]
    assert max(tenths) - min(tenths) <= 2


def test_units_within_a_document_are_chosen_together():
    chosen = _Chosen(0.5)
    taken = [chosen.unit(unit(begins)) for begins in (True, False, False, True, False, True, False)]
    assert taken[0] == taken[1] == taken[2]
    assert taken[3] == taken[4]
    assert taken[5] == taken[6]
    for low, high in ((0, 3), (3, 3), (3, 5), (9, 10)):
        chosen.add(low, high)
    assert chosen.has(np.arange(12)).tolist() == [k < 5 or k == 9 for k in range(12)]
    assert chosen.documents == 6


def test_a_sample_of_a_corpus_on_the_command_line(tmp_path):
    source = runs.write_plain(tmp_path / "c.jsonl", runs.lines(2, 5_000_000, 0.01))
    done = runs.cli("pack", source, "--on-error", "skip", "--eos", "--seq-len", 512, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    done = runs.cli("verify", tmp_path / "out", "--sample", 0.3, "--workers", 2, "--against", source)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()[-1]
    compared, of = (int(word.replace(",", "")) for word in (words.split()[0], words.split()[2]))
    assert 0 < compared < of == millstream.open(tmp_path / "out").ledger["documents"]["in"]
    assert words.endswith("all equal.")
    samples(lambda ids: np.where(ids == ids[0, 0], ids[0, 0] + 1, ids))(tmp_path / "out")
    reseal_one(tmp_path / "out")
    done = runs.cli("verify", tmp_path / "out", "--against", source, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert told["compared"] == of
    assert len(told["problems"]) <= 12
    refused = runs.cli("verify", tmp_path / "out", source)
    assert refused.returncode == 2
    assert "--against" in refused.stderr


def test_columns_is_what_documents_is_made_of(root, tmp_path):
    made, _ = packed(root, {})
    folder = shutil.copytree(made, tmp_path / "out")
    before = pq.read_table(folder / "documents-00000.parquet")
    columns("documents-00000.parquet", id=lambda column: column.to_pylist())(folder)
    assert pq.read_table(folder / "documents-00000.parquet").equals(before)
