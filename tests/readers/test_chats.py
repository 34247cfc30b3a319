"""Conversations come out as transformers' apply_chat_template makes them: the ids, and the mask of what is learned."""

import random
import subprocess
from pathlib import Path

import chats
import helpers
import numpy as np
import pytest
from runs import PATIENCE

import millstream

HERE = Path(__file__).parent
TEMPLATES = {"turns": "byte-level", "brackets": "byte-level", "words": "byte-level", "trimmed": "trimmed"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def conversations(name, seed):
    rng = random.Random(seed)
    rows = [{"messages": chats.conversation(rng)} for _ in range(150)]
    if name == "turns":
        rows += [{"messages": chats.conversation(rng), "tools": [TOOL] * n} for n in (1, 3)]
        rows.append({"messages": [{"role": "user", "content": "only a question"}]})
        rows.append({"messages": [{**row, "name": None} for row in chats.conversation(rng)]})
    return rows


def hostile(rng):
    """Texts that spell special tokens."""
    messages = chats.conversation(rng)
    for message in messages:
        words = message["content"].split(" ")
        words.insert(rng.randrange(len(words)), rng.choice(chats.CONTROL))
        message["content"] = " ".join(words)
    return {"messages": messages}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, what transformers makes of NAME/plain and NAME/hostile), of which folder has our runs."""
    root = tmp_path_factory.mktemp("chats")
    places = []
    for name, kind in TEMPLATES.items():
        for front, rows in (
            ("plain", conversations(name, 1)),
            ("hostile", [hostile(random.Random(n)) for n in range(40)]),
        ):
            folder = chats.write_tokenizer(root / name / front, "turns" if name == "trimmed" else name, kind)
            helpers.write_jsonl(folder / "rows.jsonl", rows)
            helpers.pack(
                folder / "run", folder / "rows.jsonl", tokenizer=str(folder), chat=True, seq_len=64, strategy="best-fit"
            )
            places.append(f"{name}/{front}:{folder}:64")
    return root, read("chat", root / "found.npz", *places)


def read(what, result, *places):
    python = HERE.parent.parent / ".venv-readers" / "bin" / "python"
    subprocess.run([python, HERE / "read.py", what, result, *places], check=True, timeout=PATIENCE)
    with np.load(result) as values:
        return dict(values)


def ours(folder):
    """(ids, mask) of every document of a run, in order."""
    dataset = millstream.open(folder / "run")
    parts = {}
    for sample in dataset:
        at = sample.pad_left
        for segment in sample.segments:
            here = slice(at, at + segment.length)
            parts.setdefault(segment.document, {})[segment.start] = (sample.token_ids[here], sample.loss[here])
            at += segment.length
    for number in sorted(parts):
        pieces = [parts[number][start] for start in sorted(parts[number])]
        yield tuple(np.concatenate(columns).tolist() for columns in zip(*pieces, strict=True))


def theirs(found, front, what="ids", lengths="lengths"):
    return [part.tolist() for part in np.split(found[f"{front}/{what}"], np.cumsum(found[f"{front}/{lengths}"])[:-1])]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_theirs(made, name):
    root, found = made
    mine = list(ours(root / name / "plain"))
    ids, masks = theirs(found, f"{name}/plain"), theirs(found, f"{name}/plain", "masks")
    assert len(mine) == len(ids) > 100
    assert [one[0] for one in mine] == ids
    assert [[int(mark) for mark in one[1]] for one in mine] == masks
    assert any(map(any, masks))


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_that_spell_special_tokens_are_as_with_their_sanitizing(made, name):
    root, found = made
    mine = [one[0] for one in ours(root / name / "hostile")]
    assert mine == theirs(found, f"{name}/hostile", "clean", "clean_lengths")
    assert mine != theirs(found, f"{name}/hostile")  # which it does not do unless asked


def test_trl_trains_on_it(tmp_path):
    folder = chats.write_tokenizer(tmp_path / "chats")
    rows = helpers.write_jsonl(folder / "rows.jsonl", conversations("turns", 3))
    options = {"chat": True, "strategy": "best-fit", "format": "parquet"}
    helpers.pack(folder / "run", rows, tokenizer=str(folder), seq_len=256, **options)
    found = read("train", tmp_path / "found.npz", f"trained:{folder}:256")
    samples = {tuple(sample.token_ids.tolist()): sample for sample in millstream.open(folder / "run")}
    first = found["trained/input_ids"].reshape(2, 256).tolist()
    batch = millstream.collate(samples[tuple(row)] for row in first)
    assert found["trained/labels"].tolist() == batch.labels.reshape(-1).tolist()
    assert found["trained/cu_seq_lens_q"].tolist() == batch.cu_seqlens.tolist()
    losses = found["trained/losses"]
    assert losses[-1] < 0.8 * losses[0]  # 20 steps of a model that began at chance


def test_where_theirs_leaves_some_of_a_reply_out(tmp_path):
    """A block that ends with a letter of several ids, and one that begins with a blank which offsets leave out."""
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content + '|' }}{% endif %}{% endfor %}"
    folder = chats.write_tokenizer(tmp_path / "chats", template, "trimmed")
    rows = [
        [{"role": "user", "content": "so"}, {"role": "assistant", "content": reply}] for reply in ("so 🙂", " so", "so")
    ]
    source = helpers.write_jsonl(folder / "rows.jsonl", [{"messages": messages} for messages in rows])
    helpers.pack(folder / "run", source, tokenizer=str(folder), chat=True, seq_len=64, strategy="split")
    found = read("chat", tmp_path / "found.npz", f"x:{folder}:64")
    mine, masks = list(ours(folder)), theirs(found, "x", "masks")
    assert [one[0] for one in mine] == theirs(found, "x")
    mine = [[int(mark) for mark in one[1]] for one in mine]
    assert mine[2] == masks[2]
    for number in (0, 1):
        assert sum(mine[number]) > sum(masks[number])
        assert mine[number] == [0] * 3 + [1] * (len(mine[number]) - 3)  # s, o and | are not the reply's
