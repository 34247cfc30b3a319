"""Documents of more than N ids: cut, truncated, left out or a fault, for every strategy, and each of them counted."""

import itertools
import json

import chats
import numpy as np
import pytest
import runs
from helpers import document_rows, faults, whole, without_fsync, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import marks_of
from test_lecture import in_hops

import millstream
from millstream.errors import DataError, RequestError, RunError
from millstream.records import LEARNED, TokenBatch
from millstream.runs.pack.provenance import provenance
from millstream.runs.plan.plan import make_plan
from millstream.stream.line import STRATEGIES
from millstream.stream.overlong import Overlong
from millstream.stream.tokenize import encode_rendered
from millstream.stream.tokenizers import load_tokenizer

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EOS, BOS = 50_256, 50_255
WAYS = ("truncate", "drop", "fault")


def wanted(ids, n, how, eos):
    """By hand: (the ids that are kept, how many are not, whether the document is a fault)."""
    if len(ids) <= n or how == "cut":
        return ids, 0, False
    if how == "fault":
        return [], 0, True
    if how == "drop":
        return [], len(ids), False
    kept = ids[:n]
    if eos:
        kept[-1] = EOS
    return kept, len(ids) - n, False


@st.composite
def corpora(draw):
    n = draw(st.sampled_from([1, 2, 3, 7, 16]))
    size = st.one_of(st.sampled_from([0, 1, n - 2, n - 1, n, n + 1, 2 * n, 9 * n]), st.integers(0, 3 * n))
    sizes = [max(0, each) for each in draw(st.lists(size, max_size=25))]
    ids = itertools.count()
    return n, [[k % 50_000 for k in itertools.islice(ids, size)] for size in sizes]


ORDERS = [
    {"strategy": "concat"},
    {"strategy": "concat", "shuffle": 3, "shuffle_window": 600},
    {"strategy": "split"},
    {"strategy": "split", "shuffle": 1, "pad_side": "left"},
    {"strategy": "best-fit", "window": 300},
    {"strategy": "best-fit", "max_segments": 2, "shuffle": 2, "shuffle_window": 500},
]


def read_back(folder):
    """document -> the ids that the samples and the remainder of all subsets have of it."""
    found = {}
    for subset in millstream.open(folder).manifest.subsets:
        dataset = millstream.open(folder, subset)
        rest = dataset.remainder
        for sample in [*dataset, *([] if rest is None else [rest])]:
            own = sample.token_ids[sample.segment_ids > 0].tolist()
            for segment in sample.segments:
                mine, own = own[: segment.length], own[segment.length :]
                found.setdefault(segment.document, {})[segment.start] = mine
    return {
        k: list(itertools.chain.from_iterable(parts[start] for start in sorted(parts))) for k, parts in found.items()
    }


@QUICK
@given(
    corpora(),
    st.sampled_from(ORDERS),
    st.sampled_from(["cut", *WAYS]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([{}, {"validation": 0.4}, {"limit": 7}, {"format": "parquet"}, {"remainder": "drop"}]),
)
def test_every_document_becomes_what_was_asked_for(tmp_path_factory, corpus, order, how, bos, eos, more):
    n, documents = corpus
    folder = tmp_path_factory.mktemp("run")
    rows = [{"id": f"d{k}", "ids": ids} for k, ids in enumerate(documents)]
    source = write_jsonl(folder / "corpus.jsonl", rows)
    report = millstream.pack_to(
        folder / "out",
        source,
        tokenizer="gpt2",
        ids_field="ids",
        seq_len=n,
        workers=1,
        block=300,
        shard_size=8 * n,
        on_error="skip",
        overlong=how,
        bos_token="<|endoftext|>" if bos else None,
        eos=eos,
        **order,
        **more,
    )
    assert whole(folder / "out")
    read = documents[: more.get("limit")]
    surrounded = [[EOS] * bos + ids + [EOS] * eos if ids else [] for ids in read]
    expected = [wanted(list(ids), n, how, eos) for ids in surrounded]
    table = {row["ordinal"]: row for subset in ("train", "validation") for row in document_rows(folder / "out", subset)}
    assert {k: (row["length"], row["cut_off"]) for k, row in table.items()} == {
        k: (len(kept), cut_off) for k, (kept, cut_off, bad) in enumerate(expected) if not bad
    }
    assert [(f["ordinal"], f["reason"], f["id"]) for f in faults(folder / "out")] == [
        (k, "overlong", f"d{k}") for k, (_, _, bad) in enumerate(expected) if bad
    ]
    found = read_back(folder / "out")
    dropped = report.ledger["ids"]["dropped"]
    for k, (kept, _, _) in enumerate(expected):
        assert found.get(k, []) == kept[: len(found.get(k, []))]
    assert sum(map(len, found.values())) + dropped == sum(len(kept) for kept, _, _ in expected)
    check_ledger(report.ledger, expected, table)


def check_ledger(ledger, expected, table):
    told, ids = ledger["documents"], ledger["ids"]
    good = [(kept, cut_off) for kept, cut_off, bad in expected if not bad]
    split = sum(row["split"] and not row["cut_off"] for row in table.values())
    assert told == {
        "in": len(expected),
        "whole": sum(bool(kept) and not cut_off for kept, cut_off in good) - split,
        "split": split,
        "truncated": sum(bool(kept and cut_off) for kept, cut_off in good),
        "left_out": sum(bool(cut_off and not kept) for kept, cut_off in good),
        "empty": sum(not kept and not cut_off for kept, cut_off in good),
        "faulty": len(expected) - len(good),
    }
    assert ids["in"] == sum(len(kept) + cut_off for kept, cut_off in good)
    assert ids["cut_off"] == sum(cut_off for _, cut_off in good)
    assert ids["in"] == ids["in_samples"] + ids["remainder"] + ids["dropped"] + ids["cut_off"]


@QUICK
@given(corpora(), st.sampled_from(ORDERS), st.sampled_from(["cut", "truncate", "drop"]), st.integers(0, 20))
def test_the_python_stream_does_the_same_and_goes_on(corpus, order, how, hop):
    n, documents = corpus
    kept = [wanted(list(ids), n, how, eos=False)[0] for ids in documents]

    def listed(samples):
        return [(s.token_ids.tolist(), s.segments, s.complete) for s in samples]

    def build(state):
        return millstream.pack(documents, n, pad_id=9, overlong=how, **order, state=state)

    # What is left out is as an empty document to the packers.
    expected = listed(millstream.pack(kept, n, pad_id=9, **order))
    assert listed(build(None)) == expected
    assert in_hops(build, [hop, 1], listed) == expected
    pieces = [piece.tolist() for piece in millstream.split(documents, n, overlong=how)]
    assert pieces == [ids[at : at + n] for ids in kept for at in range(0, len(ids), n)]


def test_in_python_a_long_document_is_an_error_after_what_comes_before_it():
    stream = millstream.pack([[1, 2], [3], [4, 5, 6, 7], [8]], 3, overlong="fault")
    assert next(stream).token_ids.tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="document 2: it has 4 ids, more than the 3 of a sample"):
        next(stream)
    with pytest.raises(RequestError, match="overlong 'trim' does not work: give cut or truncate"):
        millstream.pack([[1]], 3, overlong="trim")


def test_in_python_a_truncated_document_ends_with_its_eos():
    texts = ["Hello world, hello world", "Hello"]
    for options in ({}, {"strategy": "split", "pad_id": 1}):
        [sample, *_] = millstream.pack(millstream.tokenize(texts, eos=True), 3, overlong="truncate", **options)
        assert sample.token_ids.tolist() == [15496, 995, EOS]
    [sample, *_] = millstream.pack(millstream.tokenize(texts), 3, overlong="truncate")
    assert sample.token_ids.tolist() == [15496, 995, 11]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.lists(st.integers(0, 12), max_size=30),
    st.sampled_from(WAYS),
    st.sampled_from([None, 99]),
)
def test_a_document_in_pieces_is_judged_as_a_whole(sizes, cuts, how, eos):
    ids = [list(range(size)) for size in sizes]
    flat = [(k, at, value) for k, mine in enumerate(ids) for at, value in enumerate(mine)]
    bounds = sorted({cut for cut in cuts if cut <= len(flat)} | {0, len(flat)})
    stage, got = Overlong(how, 4, eos), {}
    given_up = 0
    for low, high in itertools.pairwise(bounds):
        rows = [k for k, size in enumerate(sizes) if size and any(k == d for d, _, _ in flat[low:high])]
        length = np.array([sum(k == d for d, _, _ in flat[low:high]) for k in rows], np.int64)
        start = np.array([next(at for d, at, _ in flat[low:high] if d == k) for k in rows], np.int64)
        goes_on = bool(rows) and int(start[-1] + length[-1]) < sizes[rows[-1]]
        row = np.array(rows, np.int64)
        values = np.array([value for _, _, value in flat[low:high]], np.int64)
        batch = TokenBatch(values, length, row, start, [f"d{k}" for k in rows], row, row, goes_on)
        done = stage.feed(batch)
        assert not done.open
        assert (done.start == 0).all()
        parts = np.split(done.ids, np.cumsum(done.length)[:-1]) if len(done) else []
        for k, name, part, cut_off in zip(done.ordinal.tolist(), done.doc_ids, parts, done.cut_off, strict=True):
            assert k not in got
            assert name == f"d{k}"
            got[k] = part.tolist()
            given_up += int(cut_off)
    kept = {k: mine if len(mine) <= 4 else mine[:4] if how == "truncate" else [] for k, mine in enumerate(ids) if mine}
    if eos:
        kept = {k: [*mine[:3], eos] if len(ids[k]) > 4 and mine else mine for k, mine in kept.items()}
    assert got == kept
    assert given_up == sum(map(len, ids)) - sum(map(len, kept.values()))


@pytest.mark.parametrize("how", WAYS)
def test_a_text_that_is_read_in_pieces(tmp_path, how):
    text = "words and more words, one after the other. " * 150_000  # over 4 MiB
    for name, content in (("a.txt", "short"), ("b.txt", text), ("c.txt", "also short")):
        (tmp_path / name).write_text(content)
    sources = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    common = {"seq_len": 16, "eos": True, "overlong": how, "on_error": "skip", "workers": 1}
    report = millstream.pack_to(tmp_path / "out", sources, **common, validation=0.4)
    assert whole(tmp_path / "out")
    told = report.ledger["documents"]
    assert (told["in"], told["truncated"], told["left_out"], told["faulty"]) == (3, *(how == each for each in WAYS))
    if how == "fault":
        assert [(f["id"], f["ordinal"], f["reason"]) for f in faults(tmp_path / "out")] == [("b.txt", 1, "overlong")]
        with pytest.raises(
            DataError, match=r"^b\.txt \(id 'b\.txt'\): it has [\d,]+ ids, more than the 16 of a sample"
        ):
            millstream.pack_to(tmp_path / "stop", sources, **{**common, "on_error": "stop"})
    else:
        rows = {r["id"]: r for s in ("train", "validation") for r in document_rows(tmp_path / "out", s)}
        assert rows["b.txt"]["length"] == (16 if how == "truncate" else 0)
        assert rows["b.txt"]["length"] + rows["b.txt"]["cut_off"] > 1_000_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {"turns": chats.write_tokenizer(root / "turns", "turns")}


@QUICK
@given(st.integers(0, 10**9), st.sampled_from(ORDERS), st.sampled_from(WAYS), st.sampled_from(["npy", "parquet"]))
def test_masks_are_cut_as_their_ids_are(tmp_path_factory, folders, seed, order, how, base):
    folder = tmp_path_factory.mktemp("run")
    rows, n, name = chats.rows(seed, 25), 60, str(folders["turns"])
    corpus = write_jsonl(folder / "c.jsonl", rows)
    common = {"tokenizer": name, "chat": True, "seq_len": n, "format": base, "workers": 1, "on_error": "skip"}
    report = millstream.pack_to(folder / "out", corpus, **common, shard_size=4000, overlong=how, **order)
    assert whole(folder / "out")
    tokenizer = load_tokenizer(name)
    ids, length = encode_rendered(tokenizer, [tokenizer.chat.render(row) for row in rows])
    each = dict(enumerate(np.split(ids, np.cumsum(length)[:-1])))
    kept = {k: mine[: n if how == "truncate" else 0] if len(mine) > n else mine for k, mine in each.items()}
    found = marks_of(folder / "out", "train")
    assert {k: mine.tolist() for k, mine in found.items()} == {
        k: mine.tolist() for k, mine in kept.items() if len(mine)
    }
    told = report.ledger["learned"]
    read = [each[k] for k in each if how != "fault" or len(each[k]) <= n]
    assert told["in"] == sum(int((mine >= LEARNED).sum()) for mine in read)
    assert told["in"] == told["in_samples"] + told["remainder"] + told["dropped"] + told["cut_off"]
    assert told["cut_off"] == told["in"] - sum(int((mine >= LEARNED).sum()) for mine in kept.values())


def test_the_eos_of_a_truncated_completion_is_not_learned(tmp_path):
    rows = [{"prompt": "Hello", "completion": " world world world world"}, {"prompt": "Hello", "completion": " world"}]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    options = {"chat": True, "eos": True, "seq_len": 4, "overlong": "truncate", "strategy": "split", "workers": 1}
    millstream.pack_to(tmp_path / "out", corpus, **options)
    first, second = millstream.open(tmp_path / "out")
    assert (first.token_ids.tolist(), first.loss.tolist()) == ([15496, 995, 995, EOS], [False, True, True, False])
    assert second.loss.tolist() == [False, True, True, False]  # its own EOS, and padding
    assert whole(tmp_path / "out")


def test_a_hint_when_conversations_are_cut(tmp_path):
    rows = [{"prompt": "Hello", "completion": " world" * size} for size in (5, 5, 40)]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)

    def hints(name, **options):
        report = millstream.pack_to(tmp_path / name, corpus, chat=True, seq_len=8, workers=1, eos=True, **options)
        return "\n".join(report.hints)

    assert "2 conversations are cut" in hints("concat")
    assert "strategy='best-fit' cuts" in hints("concat-truncate", overlong="truncate", remainder="drop")
    assert hints("best-fit", strategy="best-fit") == (
        "1 conversation is cut: what is behind a cut is learned without its prompt. "
        "overlong='truncate' keeps the first N ids of longer ones, overlong='drop' leaves them out"
    )
    assert hints("whole", strategy="best-fit", overlong="drop") == ""


def test_a_user_sees_what_became_of_long_documents(tmp_path):
    rows = [{"id": "long", "text": "Hello world, hello world"}, {"id": "short", "text": "Hello"}]
    source = write_jsonl(tmp_path / "corpus.jsonl", rows)
    args = ("pack", source, "--seq-len", 3, "--eos", "--workers", 1)
    done = runs.cli(*args, "--overlong", "truncate", "--out", tmp_path / "truncate")
    assert done.returncode == 0, done.stderr
    assert "2 in = 1 whole + 0 split + 1 truncated + 0 empty + 0 faulty" in done.stdout
    assert "8 in = 3 in samples + 2 remainder + 0 dropped + 3 cut off" in done.stdout
    found = runs.cli("find", tmp_path / "truncate", "long")
    assert "3 ids, and 3 that were cut off" in found.stdout
    assert provenance(str(tmp_path / "truncate"), "long").as_json()["documents"][0]["cut_off"] == 3
    text = runs.cli("find", tmp_path / "truncate", "long", "--text")
    assert (text.returncode, text.stdout) == (1, "")
    assert "only 3 of its 6 ids" in text.stderr
    assert runs.cli("show", tmp_path / "truncate", 0).returncode == 0
    done = runs.cli(*args, "--overlong", "drop", "--out", tmp_path / "drop")
    assert "1 whole + 0 split + 1 left out + 0 empty" in done.stdout
    assert "left out, as its 6 ids are more" in runs.cli("find", tmp_path / "drop", "long").stdout
    done = runs.cli(*args, "--overlong", "fault", "--out", tmp_path / "fault")
    assert done.returncode == 1
    assert "corpus.jsonl at byte 0 (id 'long'): it has 6 ids, more than the 3 of a sample" in done.stderr
    done = runs.cli(*args, "--overlong", "fault", "--on-error", "skip", "--out", tmp_path / "fault")
    assert done.returncode == 3
    assert "1 overlong" in done.stdout
    assert "left out, overlong" in runs.cli("find", tmp_path / "fault", "long").stdout
    assert runs.cli(*args, "--overlong", "trim", "--out", tmp_path / "no").returncode == 2
    with pytest.raises(RunError, match="only 3 of its 6 ids"):
        millstream.text_of(millstream.open(tmp_path / "truncate"), "long")


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("how", WAYS)
def test_a_plan_of_all_is_what_packing_gives(tmp_path, name, how):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(6, 60_000))
    common = {"overlong": how, "eos": True, "workers": 1, "on_error": "skip"}
    report = millstream.pack_to(tmp_path / "out", source, strategy=name, seq_len=32, **common)
    [choice] = make_plan(source, seq_lens=[32], strategies=[name], **common).choices
    ids, told = report.ledger["ids"], report.ledger["documents"]
    assert choice.samples.value == report.samples
    assert choice.padding_ids.value == ids["padding"]
    assert choice.overlong.value == told["truncated"] + told["left_out"] + told["faulty"] > 0
    if how != "fault":
        assert choice.cut_off.value == ids["cut_off"]
    shown = runs.cli("plan", source, "--eos", "--seq-len", 32, "--strategy", name, "--overlong", how)
    assert f"overlong   N = 32: {choice.overlong.value:,} documents lose {choice.cut_off.value:,} ids" in shown.stdout


def test_other_formats_have_what_was_kept(tmp_path):
    source = runs.write_plain(tmp_path / "corpus.jsonl", runs.lines(6, 30_000))
    common = {"seq_len": 32, "eos": True, "strategy": "best-fit", "workers": 1}
    millstream.pack_to(tmp_path / "out", source, **common, overlong="truncate", format="npy,megatron,mds")
    assert whole(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    ids = manifest["ledger"]["ids"]
    assert ids["cut_off"] > 0
    assert {each["ids"] for each in manifest["exports"]} == {ids["in_samples"] + ids["padding"]}
