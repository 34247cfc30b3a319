"""Conversations: what a template makes of them, which ids are to be learned, and that this goes wherever an id goes."""

import json
import random
import struct
import sys
from dataclasses import replace
from pathlib import Path

import chats
import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import cli, faults, read_manifest, whole, write_jsonl, write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import millstream
from millstream.errors import DataError, RequestError, Unusable
from millstream.exports import FORMATS
from millstream.records import LEARNED
from millstream.runs.pack.convert import convert_to
from millstream.stream.chat import Chat, Letters, Rendered
from millstream.stream.encoders import HuggingFace
from millstream.stream.tokenize import encode_rendered
from millstream.stream.tokenizers import load_tokenizer

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
quick = pytest.fixture(autouse=True, scope="module")(helpers.without_fsync)

USER = {"role": "user", "content": "How much?"}
REPLY = {"role": "assistant", "content": "Two."}
AGAIN = {"role": "user", "content": "Sure?"}
YES = {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer's folder for every template, and for every kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: chats.write_tokenizer(root / name, name) for name in chats.TEMPLATES}
    return made | {
        kind: chats.write_tokenizer(root / kind, "turns", kind) for kind in ("trimmed", "wordpiece", "sentence")
    }


def chat(template, **options):
    source = chats.TEMPLATES.get(template, template)
    variables = (("bos_token", "<s>"), ("eos_token", "</s>"))
    return Chat((("default", source),), variables, tuple(chats.CONTROL), **options)


def learned(found):
    return [found.text[start:stop] for start, stop in found.learned]


# --- what a template makes of a row ----------------------------------------


@pytest.mark.parametrize("template", ["turns", "silent"])
def test_replies_and_their_ends_are_learned(template):
    found = chat(template).render({"messages": [USER, REPLY, AGAIN, YES]})
    assert found.text == (
        "<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    ends = {"turns": "", "silent": "\n"}[template]  # the block ends before the line does
    assert learned(found) == [f"Two.<|im_end|>{ends}", f"Yes.<|im_end|>{ends}"]


def test_the_other_templates():
    found = chat("brackets").render({"messages": [USER, REPLY, AGAIN, YES]})
    assert found.text == "<s>[INST] How much? [/INST] Two.</s>[INST] Sure? [/INST] Yes.</s>"
    assert learned(found) == [" Two.</s>", " Yes.</s>"]
    found = chat("words").render({"messages": [USER, REPLY]})
    assert found.text == "User: How much?\nAssistant: Two.\n"
    assert learned(found) == ["Two.\n"]


def test_prompts_and_completions():
    assert Chat().render({"prompt": "2 + 2 =", "completion": " 4"}) == Rendered(
        "2 + 2 = 4", (Letters(7, 9),), (Letters(0, 9),)
    )
    found = chat("turns").render({"prompt": [USER, REPLY, AGAIN], "completion": [YES]})
    assert found.text == chat("turns").render({"messages": [USER, REPLY, AGAIN, YES]}).text
    assert learned(found) == ["Yes.<|im_end|>\n"]
    assert Chat().render({"prompt": "", "completion": ""}) == Rendered("")


def test_all_is_learned_if_asked_for():
    for row in ({"messages": [USER, REPLY]}, {"prompt": "a", "completion": "b"}):
        found = chat("forgetful", loss="all").render(row)
        assert found.learned == (Letters(0, len(found.text)),)


def test_tools_and_what_else_a_row_gives_a_template():
    tool = {"type": "function", "function": {"name": "add", "description": 'a "sum" <b> ü'}}
    found = chat("turns").render({"messages": [USER, REPLY], "tools": [tool]})
    assert json.loads(found.text.split("\n")[1]) == tool
    assert "ü" in found.text  # as transformers writes JSON: no escapes, none of HTML's either
    template = "{{ messages[0].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    row = {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}
    assert chat(template).render(row).text == "How much?False"
    both = Chat((("default", "plain"), ("tool_use", "tools")))
    assert both.render({"messages": [USER]}).text == "plain"
    assert both.render({"messages": [USER], "tools": [tool]}).text == "tools"


def test_what_is_null_is_not_there():
    template = "{% for m in messages %}{{ 'called' if m.tool_calls is defined else m.content }}{% endfor %}"
    messages = [{**USER, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert chat(template).render({"messages": messages, "tools": None}).text == "How much?called"


def test_what_a_template_is_given_cannot_be_replaced():
    row = {"messages": [USER], "chat_template_kwargs": {"messages": [REPLY], "tools": 3, "documents": ["d"], "x": None}}
    template = "{{ messages[0].content }}{{ tools }}{{ documents[0] }}{{ x is defined }}{{ add_generation_prompt }}"
    assert chat(template).render(row).text == "How much?NonedFalseFalse"


def test_tools_may_be_json_in_a_text_and_content_bytes():
    tools = [{"name": "f"}]
    assert chat("{{ tools[0].name }}").render({"messages": [USER], "tools": json.dumps(tools)}).text == "f"
    assert chat("{{ messages[0].content }}").render({"messages": [{**USER, "content": "é".encode()}]}).text == "é"


def test_marks_that_a_template_tears_apart_are_a_fault():
    """It would be unclear what is ordinary text, or learned."""
    row = {"messages": [{"role": "user", "content": "x <|im_end|> y"}]}
    for template in ("{{ messages[0].content.split('<|im_end|>')[-1] }}", "{{ messages[0].content[:4] }}"):
        with pytest.raises(Unusable, match="cuts a reply, or a text that spells a special token, in two"):
            chat(template).render(row)
    assert chat("{{ messages[0].content.split('<|im_end|>')[-1] }}", allow=True).render(row).text == " y"


def test_special_tokens_in_keys_and_escapes_are_found_too():
    row = {"messages": [{"role": "user", "content": "<|im_end|>\\ufdd2", "arguments": {"<|im_end|>": 1}}]}
    for ascii in ("true", "false"):
        template = (
            "{{ messages[0].arguments | tojson(ensure_ascii=A) }}{{ messages[0].content | tojson(ensure_ascii=A) }}"
        )
        found = chat(template.replace("A", ascii)).render(row)
        assert found.text == '{"<|im_end|>": 1}"<|im_end|>\\\\ufdd2"'
        assert [found.text[start:stop] for start, stop in found.plain] == ["<|im_end|>"] * 2


def test_blocks_that_are_only_written_about_are_none():
    template = "{# {% generation %} #}" + chats.TEMPLATES["silent"]
    assert learned(chat(template).render({"messages": [USER, REPLY]})) == ["Two.<|im_end|>\n"]


def test_a_completion_that_begins_in_a_block_with_its_header():
    template = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- generation %}{{ '<|im_start|>a ' + m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>a ' }}{% endif %}"""
    assert learned(chat(template).render({"prompt": [USER], "completion": [REPLY]})) == ["Two."]
    assert learned(chat(template).render({"messages": [USER, REPLY]})) == ["<|im_start|>a Two."]


def test_very_many_replies_need_a_template_with_blocks():
    row = {"messages": [USER, REPLY] * 501}
    with pytest.raises(Unusable, match="501 replies; of more than 500 only"):
        chat("silent").render(row)
    assert len(chat("turns").render(row).learned) == 501


def test_what_would_be_different_every_time_is_not_there():
    for template in ("{{ [1, 2] | random }}", "{{ lipsum() }}"):
        with pytest.raises((Unusable, RequestError)):
            chat(template).render({"messages": [USER]})


def test_special_tokens_in_texts_can_be_allowed(folders):
    tokenizer = load_tokenizer(str(folders["turns"]))
    end = tokenizer.specials["<|im_end|>"]
    for row in (
        {"messages": [{"role": "user", "content": "x<|im_end|>"}]},
        {"prompt": "x<|im_end|>", "completion": "y"},
    ):
        counts = []
        for allow in (False, True):
            ids, _ = encode_rendered(tokenizer, [replace(tokenizer.chat, allow=allow).render(row)])
            counts.append((ids & (LEARNED - 1)).tolist().count(end))
        assert counts[1] == counts[0] + 1


def test_openai_tokenizers_give_a_template_their_end_of_text():
    found = replace(load_tokenizer("gpt2").chat, templates=(("default", "{{ messages[0].content + eos_token }}"),))
    assert found.render({"messages": [USER]}).text == "How much?<|endoftext|>"


def test_reasoning_has_the_names_in_use():
    template = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}{% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert chat(template).render({"messages": [{"role": "assistant", name: "so"}]}).text == "so/so"


def test_a_text_that_spells_a_special_token_is_ordinary_text(folders):
    tokenizer = load_tokenizer(str(folders["turns"]))
    row = {"messages": [{"role": "user", "content": "x<|im_end|><|im_start|>assistant"}, REPLY]}
    found = tokenizer.chat.render(row)
    assert [found.text[start:stop] for start, stop in found.plain] == ["<|im_end|>", "<|im_start|>"]
    ids, _ = encode_rendered(tokenizer, [found])
    ids = (ids & (LEARNED - 1)).tolist()
    assert tokenizer.engine.decode(ids) == found.text
    start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
    assert (ids.count(start), ids.count(end)) == (2, 2)  # the template's own, and nobody else's
    # A plain prompt has no template, so nothing in it is a token.
    ids, _ = encode_rendered(tokenizer, [tokenizer.chat.render({"prompt": "</s>", "completion": "<s>"})])
    assert not set(chats.CONTROL) & {tokenizer.engine.decode([i]) for i in (ids & (LEARNED - 1)).tolist()}


UNUSABLE = [
    ({}, "missing_field", "there are none"),
    ({"text": "a"}, "missing_field", "there are text"),
    ({"prompt": "a"}, "missing_field", "there are prompt"),
    ({"messages": []}, "not_messages", "is empty"),
    ({"messages": "hello"}, "not_messages", "not a list of messages but str"),
    ({"messages": [1]}, "not_messages", "message 1 of field 'messages' has no role"),
    ({"messages": [USER, {"content": "x"}]}, "not_messages", "message 2"),
    ({"messages": [USER, {"role": 7}]}, "not_messages", "message 2"),
    ({"prompt": "a", "completion": [REPLY]}, "not_messages", "field 'prompt' is not a list"),
    ({"prompt": [USER], "completion": "b"}, "not_messages", "field 'completion' is not a list"),
    ({"messages": [USER], "chat_template_kwargs": 3}, "not_messages", "no object"),
    ({"messages": [{**USER, "content": "a\ufdd0b"}]}, "not_text", r"U\+FDD0"),
    ({"messages": [{**USER, "arguments": {"\ufdd1": 1}}]}, "not_text", r"U\+FDD1"),
    ({"messages": [{**USER, "content": "\ud800"}]}, "lone_surrogate", "surrogate"),
    ({"messages": [{**USER, "content": b"\xff"}]}, "invalid_utf8", "not valid UTF-8"),
    ({"messages": [USER], "tools": "{"}, "not_messages", "'tools' is no JSON"),
    ({"messages": [USER], "tools": '{"name": "f"}'}, "not_messages", "'tools' is not a list but dict"),
    ("a text", "not_messages", "not str"),
]


@pytest.mark.parametrize(("row", "reason", "message"), UNUSABLE, ids=str)
def test_rows_that_cannot_be_used(row, reason, message):
    with pytest.raises(Unusable, match=message) as caught:
        chat("turns").render(row)
    assert caught.value.reason == reason


def test_templates_that_cannot_be_used():
    with pytest.raises(RequestError, match="no chat template for messages; give one with chat_template"):
        Chat().render({"messages": [USER]})
    with pytest.raises(Unusable, match="refuses it: roles must take turns"):
        chat("brackets").render({"messages": [USER, USER]})
    with pytest.raises(Unusable, match=r"failed: .*strftime_now.* is undefined"):
        chat("{{ strftime_now('%Y') }}").render({"messages": [USER]})
    with pytest.raises(Unusable, match="message 2 differently"):
        chat("forgetful").render({"messages": [USER, {**REPLY, "reasoning": "one and one"}, AGAIN, YES]})
    assert learned(chat("forgetful").render({"messages": [USER, {**REPLY, "reasoning": "1 + 1"}]})) == [
        "(1 + 1) Two.<|im_end|>\n"
    ]
    for broken in ("{% for m in messages %}", "{% generation %}", "{{ 1 +", "{% nonsense %}"):
        with pytest.raises(RequestError, match="chat template cannot be used"):
            chat(broken).check()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    row = {"messages": [dict(USER)]}
    with pytest.raises(Unusable, match="failed"):
        chat(template).render(row)
    assert row == {"messages": [USER]}


def test_without_jinja_the_command_says_what_to_install(monkeypatch, folders):
    from millstream.stream import chat as module

    monkeypatch.setitem(sys.modules, "jinja2", None)
    module._environment.cache_clear()
    module._compiled.cache_clear()
    with pytest.raises(RequestError, match=r"pip install 'millstream\[chat\]'"):
        chat("{{ 'not seen before' }}").check()


# --- which ids are to be learned -------------------------------------------


@QUICK
@given(st.integers(0, 10**9), st.sampled_from(["turns", "silent", "brackets", "words", "trimmed"]))
def test_ids_and_mask_are_those_of_the_reference(folders, seed, name):
    """The fast way counts bytes; the slow way asks the other engine for the letters of every id."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer(str(folders[name]))
    reference = tokenizer.reference()
    assert isinstance(reference, HuggingFace)
    found = [tokenizer.chat.render({"messages": chats.conversation(rng)}) for _ in range(4)]
    ids, length = encode_rendered(tokenizer, found)
    for one, mine in zip(found, np.split(ids, np.cumsum(length)[:-1]), strict=True):
        theirs, letters = reference.offsets(one.text, specials=True)
        assert (mine & np.uint32(LEARNED - 1)).tolist() == theirs.tolist()
        inside = [any(low < stop and start < high for start, stop in one.learned) for low, high in letters]
        # An id whose letters are all trimmed away stands for blanks; it is learned with its neighbours.
        empty = letters[:, 0] == letters[:, 1]
        assert ((mine >= LEARNED) == inside)[~empty].all()
        assert (mine >= LEARNED).any()


@QUICK
@given(st.integers(0, 10**9), st.sampled_from(["wordpiece", "sentence"]))
def test_tokenizers_whose_ids_do_not_tell_their_bytes(folders, seed, kind):
    rng = random.Random(seed)
    tokenizer = load_tokenizer(str(folders[kind]))
    found = tokenizer.chat.render({"messages": chats.conversation(rng)})
    ids, _ = encode_rendered(tokenizer, [found])
    theirs, letters = tokenizer.reference_engine.offsets(found.text, specials=True)
    inside = [any(low < stop and start < high for start, stop in found.learned) for low, high in letters]
    assert (ids & np.uint32(LEARNED - 1)).tolist() == theirs.tolist()
    assert (ids >= LEARNED).tolist() == inside


def test_prefixed_blanks_are_not_taken_for_bytes_of_the_text(tmp_path):
    """One blank is put before the text, and one is swallowed by a token: the sum is right, and no place is."""
    definition = json.loads(chats.train())
    definition["pre_tokenizer"]["add_prefix_space"] = True
    for token in definition["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(tmp_path))
    found = Rendered("so</s> mill so", (Letters(7, 11),))
    ids, _ = encode_rendered(tokenizer, [found])
    assert tokenizer.engine.decode((ids[ids >= LEARNED] & np.uint32(LEARNED - 1)).tolist()).strip() == "mill"


def test_text_that_is_normalized_first(folders):
    """NFC makes one letter of two, so bytes cannot be counted; the mask is right all the same."""
    tokenizer = load_tokenizer(str(folders["turns"]))
    messages = [{"role": "user", "content": "cafe\u0301 " * 5}, {"role": "assistant", "content": "re\u0301sume\u0301"}]
    found = tokenizer.chat.render({"messages": messages})
    ids, _ = encode_rendered(tokenizer, [found])
    mine = tokenizer.engine.decode((ids[ids >= LEARNED] & np.uint32(LEARNED - 1)).tolist())
    assert mine == "résumé<|im_end|>"


def test_an_id_is_learned_if_some_of_its_letters_are():
    tokenizer = load_tokenizer("gpt2")
    ids, _ = encode_rendered(tokenizer, [Rendered("Hello world", (Letters(8, 9),)), Rendered("a🙂b", (Letters(1, 2),))])
    marks = [(tokenizer.engine.decode([i & (LEARNED - 1)]), i >= LEARNED) for i in ids.tolist()]
    assert marks[:2] == [("Hello", False), (" world", True)]
    assert [mark for _, mark in marks[2:]] == [False, *[True] * (len(marks) - 4), False]  # every byte of the letter
    assert len(marks) > 5


# --- the mask goes wherever an id goes -------------------------------------

OPTIONS = [
    {},
    {"remainder": "drop"},
    {"remainder": "pad", "pad_side": "left"},
    {"strategy": "split"},
    {"strategy": "split", "pad_side": "left", "validation": 0.3},
    {"strategy": "best-fit", "window": 3000},
    {"strategy": "best-fit", "max_segments": 2, "shuffle": 1, "shuffle_window": 2000},
    {"shuffle": 3, "validation": 0.3, "bos": True},
]


def marks_of(folder, subset):
    """document -> its ids with LEARNED where they are to be learned, gathered from the samples and the remainder."""
    dataset = millstream.open(folder, subset)
    rest = dataset.remainder
    found = {}
    for sample in [*dataset, *([rest] if rest is not None else [])]:
        marked = sample.token_ids.astype(np.uint32) | (sample.loss.astype(np.uint32) << np.uint32(31))
        at = sample.pad_left
        inside = 0
        for segment in sample.segments:
            found.setdefault(segment.document, {})[segment.start] = marked[at : at + segment.length]
            at += segment.length
            inside += segment.length
        assert not np.delete(sample.loss, np.arange(sample.pad_left, sample.pad_left + inside)).any()  # padding
    return {document: np.concatenate([parts[start] for start in sorted(parts)]) for document, parts in found.items()}


@QUICK
@given(
    st.integers(0, 10**9),
    st.sampled_from(OPTIONS),
    st.sampled_from(["npy", "parquet"]),
    st.sampled_from([1, 16, 100]),
    st.booleans(),
)
def test_every_id_keeps_its_mark(tmp_path_factory, folders, seed, options, base, seq_len, eos):
    folder = tmp_path_factory.mktemp("run")
    rows = chats.rows(seed, 25)
    corpus = write_jsonl(folder / "c.jsonl", rows)
    name = str(folders["turns"])
    report = helpers.pack(
        folder / "out",
        corpus,
        tokenizer=name,
        chat=True,
        seq_len=seq_len,
        eos=eos,
        format=base,
        shard_size=4000,
        **options,
    )
    assert whole(folder / "out")
    tokenizer = load_tokenizer(name)
    ids, length = encode_rendered(tokenizer, [tokenizer.chat.render(row) for row in rows])
    expected = {}
    for number, mine in enumerate(np.split(ids, np.cumsum(length)[:-1])):
        if len(mine):
            bos = [tokenizer.specials["<s>"]] if options.get("bos") else []
            end = [tokenizer.specials["</s>"] | (int(mine[-1]) & LEARNED)] if eos else []
            expected[number] = np.array([*bos, *mine, *end], np.uint32)
    found = {}
    for subset in millstream.open(folder / "out").manifest.subsets:
        found |= marks_of(folder / "out", subset)
    if options.get("remainder") == "drop":
        for document, mine in found.items():
            assert mine.tolist() == expected[document][: len(mine)].tolist()
    else:
        assert {document: mine.tolist() for document, mine in found.items()} == {
            document: mine.tolist() for document, mine in expected.items()
        }
    told = report.ledger["learned"]
    assert told["in"] == sum(int((mine >= LEARNED).sum()) for mine in expected.values())
    assert told["in"] == told["in_samples"] + told["remainder"] + told["dropped"]


def test_a_loss_mask_that_does_not_fit_is_found(tmp_path, folders):
    """`verify` counts again, even if every hash is right."""
    corpus = write_jsonl(tmp_path / "c.jsonl", chats.rows(1, 40))
    for base in ("npy", "parquet"):
        out = tmp_path / base
        helpers.pack(out, corpus, tokenizer=str(folders["turns"]), chat=True, seq_len=32, format=base)

        manifest = read_manifest(str(out))
        manifest["subsets"]["train"]["shards"][0]["learned"] += 1
        write_manifest(str(out), manifest)
        assert "to be learned" in "\n".join(millstream.verify(out).problems)


# --- exports ---------------------------------------------------------------


@pytest.fixture(scope="module", params=OPTIONS[:7:2], ids=str)
def converted(request, tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("exports")
    corpus = write_jsonl(folder / "c.jsonl", chats.rows(7, 60))
    options = {"tokenizer": str(folders["turns"]), "chat": True, "seq_len": 24, "shard_size": 2000, **request.param}
    helpers.pack(folder / "run", corpus, **options)
    convert_to(folder / "out", folder / "run", [name for name, format in FORMATS.items() if format.masked])
    return folder


def test_every_format_that_can_carries_the_mask(converted):
    dataset = millstream.open(converted / "run")
    samples = list(dataset)
    loss = np.array([sample.loss for sample in samples])
    ids = np.array([sample.token_ids for sample in samples])
    out = converted / "out"
    assert len(samples) > 20
    assert loss.any()
    assert not loss.all()
    stored = [np.load(path) for path in sorted(out.glob("npy/train/loss-*.npy"))]
    assert np.array_equal(np.concatenate(stored), loss)
    labels = np.where(loss, ids.astype(np.int64), -100)
    table = [row for path in sorted(out.glob("parquet/train/*")) for row in pq.read_table(path).to_pylist()]
    assert [row["labels"] for row in table] == labels.tolist()
    assert [row["input_ids"] for row in table] == ids.tolist()
    assert mds_column(out / "mds/train", 0) == labels.tolist()
    assert mds_column(out / "mds/train", 2) == ids.tolist()
    rest = dataset.remainder.loss if dataset.remainder is not None else np.zeros(0, bool)
    counted = b"".join(path.read_bytes() for path in sorted(out.glob("datatrove/train/*.loss")))
    assert counted == loss.tobytes() + rest.tobytes()


def mds_column(folder, column):
    rows = []
    for shard in json.loads((folder / "index.json").read_bytes())["shards"]:
        assert shard["column_names"] == ["labels", "seq_lengths", "tokens"]
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        (count,) = struct.unpack_from("<I", data)
        offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
        for low in offsets[:-1]:
            sizes = struct.unpack_from("<III", data, low)
            at = low + 12 + sum(sizes[:column])
            values = data[at : at + sizes[column]]
            head = 1 + (1 << (values[0] & 3))
            rows.append(list(struct.unpack(f"<{(len(values) - head) // 4}i", values[head:])))
    return rows


def test_formats_without_a_place_for_it_are_refused(tmp_path, folders):
    corpus = write_jsonl(tmp_path / "c.jsonl", chats.rows(2, 20))
    options = {"tokenizer": str(folders["turns"]), "chat": True, "seq_len": 16}
    for name in ("megatron", "litdata", "nanogpt", "llm.c"):
        with pytest.raises(RequestError, match=f"{name} has no place .* npy, parquet, mds, datatrove have"):
            helpers.pack(tmp_path / "no", corpus, format=f"npy,{name}", **options)
    helpers.pack(tmp_path / "run", corpus, **options)
    with pytest.raises(RequestError, match="litdata has no place"):
        convert_to(tmp_path / "out", tmp_path / "run", ["npy", "litdata"])
    report = helpers.pack(tmp_path / "all", corpus, loss="all", format=",".join(FORMATS), **options)
    assert "learned" not in report.ledger
    assert not list(Path(tmp_path / "all").rglob("loss-*"))
    assert millstream.open(tmp_path / "all")[0].loss is None


# --- sources, faults, the command line -------------------------------------


def test_parquet_and_packed_sources_give_the_same(tmp_path, folders):
    rows = chats.rows(3, 50)
    table = pa.Table.from_pylist([{"messages": None, "prompt": None, **row} for row in rows if "messages" in row])
    pq.write_table(table, tmp_path / "c.parquet")
    lines = write_jsonl(tmp_path / "c.jsonl.gz", [row for row in rows if "messages" in row])
    options = {"tokenizer": str(folders["turns"]), "chat": True, "seq_len": 32}
    seen = []
    for number, source in enumerate((tmp_path / "c.parquet", lines)):
        helpers.pack(tmp_path / str(number), source, **options)
        seen.append([(s.token_ids.tolist(), s.loss.tolist()) for s in millstream.open(tmp_path / str(number))])
    assert seen[0] == seen[1]
    assert seen[0]


def test_what_is_absent_in_some_rows_is_absent_in_parquet_too(tmp_path, folders):
    """A table has every key in every row; a template must not see those that a row has not."""
    rows = [
        {"id": "a", "messages": [USER, {**REPLY, "parts": {"image": "x"}}], "chat_template_kwargs": {"think": True}},
        {"id": "b", "messages": [USER, {**REPLY, "parts": {"text": "y"}}], "chat_template_kwargs": {"other": 1}},
    ]
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ think is defined }}{% for m in messages %}{{ m.content }}{{ 'image' in (m.parts or {}) }}{% endfor %}"
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    options = {"tokenizer": str(folders["turns"]), "chat": True, "loss": "all", "chat_template": str(template)}
    seen = []
    for source in (tmp_path / "c.parquet", write_jsonl(tmp_path / "c.jsonl", rows)):
        helpers.pack(tmp_path / source.suffix, source, seq_len=8, **options)
        seen.append(helpers.stream(tmp_path / source.suffix))
    assert seen[0] == seen[1]
    text = load_tokenizer(str(folders["turns"])).engine.decode(seen[0])
    assert text == "TrueHow much?FalseTwo.TrueFalseHow much?FalseTwo.False"


def test_parquet_with_values_that_python_cannot_have(tmp_path, folders):
    when = pa.array([1_500_000_001, 2_000_000_000], pa.timestamp("ns"))
    roles, texts = pa.array(["user", "user"]), pa.array(["good", "also good"])
    message = pa.StructArray.from_arrays([roles, texts, when], ["role", "content", "at"])
    messages = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), message)
    pq.write_table(pa.table({"messages": messages}), tmp_path / "c.parquet")
    report = helpers.pack(
        tmp_path / "out",
        tmp_path / "c.parquet",
        tokenizer=str(folders["turns"]),
        chat=True,
        loss="all",
        seq_len=4,
        on_error="skip",
    )
    assert report.ledger["faults"] == {"not_text": 1}  # nanoseconds, which Python's own times have not
    assert report.ledger["documents"]["in"] == 2


def test_faulty_conversations(tmp_path, folders):
    good = {"id": "good", "messages": [USER, REPLY]}
    bad = [
        {"id": "a", "messages": []},
        b'{"id": "b", "messages": [',
        b'{"id": "f", "messages": [{"role": "user", "content": ' + b"[" * 700 + b"]" * 700 + b"}]}",
        {"id": "c", "text": "x"},
        {"id": "d", "messages": [{"role": "user", "content": "\ud800"}]},
        [1],
        {"id": "e", "prompt": "p", "completion": [REPLY]},
    ]
    corpus = write_jsonl(tmp_path / "c.jsonl", [good, *bad, good])
    flags = ("--chat", "--tokenizer", folders["turns"], "--seq-len", "8")
    done = cli("pack", corpus, "--out", tmp_path / "stop", *flags)
    assert (done.returncode, "c.jsonl, line 2 (id 'a')" in done.stderr) == (1, True)
    done = cli("pack", corpus, "--out", tmp_path / "out", *flags, "--on-error", "skip")
    assert done.returncode == 3
    assert [(fault["line"], fault["reason"]) for fault in faults(tmp_path / "out")] == [
        (2, "not_messages"),
        (3, "invalid_json"),
        (4, "not_messages"),
        (5, "missing_field"),
        (6, "lone_surrogate"),
        (7, "invalid_json"),
        (8, "not_messages"),
    ]
    assert "learned" in done.stdout
    text = tmp_path / "plain.txt"
    text.write_text("no rows")
    done = cli("pack", text, "--out", tmp_path / "text", *flags)
    assert (done.returncode, "conversations need JSONL or Parquet" in done.stderr) == (1, True)


WRONG = [
    (("--loss", "all"), "--loss, --chat-template and --allow-specials belong to --chat"),
    (("--allow-specials",), "belong to --chat"),
    (("--chat", "--id-field", "prompt"), "a part of the conversation"),
    (("--chat-template", "x.jinja"), "belong to --chat"),
    (("--chat", "--ids-field", "ids"), "give one of them"),
    (("--chat", "--chat-template", "nowhere.jinja"), "nowhere.jinja: No such file"),
    (("--chat", "--loss", "some"), "replies"),
    (("--chat", "--chat-template", "broken.jinja"), "chat template cannot be used"),
    (("--chat", "--chat-template", "latin.jinja"), "is not UTF-8"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=str)
def test_wrong_settings(tmp_path, flags, message):
    write_jsonl(tmp_path / "c.jsonl", [{"messages": [USER, REPLY]}])
    (tmp_path / "broken.jinja").write_text("{% if %}")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    done = cli("pack", "c.jsonl", "--out", "out", *flags, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_a_template_from_a_file_decides_the_bytes(tmp_path, folders):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"messages": [USER, REPLY]}] * 9)
    template = tmp_path / "own.jinja"
    template.write_text(chats.TEMPLATES["words"])
    flags = ("pack", corpus, "--out", tmp_path / "out", "--chat", "--tokenizer", "gpt2", "--seq-len", "8")
    done = cli(*flags)
    assert (done.returncode, "give one with --chat-template" in done.stderr) == (2, True)
    assert cli(*flags, "--chat-template", template).returncode == 0
    tokenizer = load_tokenizer("gpt2")
    sample = millstream.open(tmp_path / "out")[0]
    assert tokenizer.engine.decode(sample.token_ids.tolist()).startswith("User: How much?\n")
    template.write_text(chats.TEMPLATES["words"] + "!")
    done = cli(*flags, "--chat-template", template)
    assert (done.returncode, "--chat was" in done.stderr) == (2, True), done.stderr


def test_a_template_beside_the_tokenizer(tmp_path, folders):
    folder = chats.write_tokenizer(tmp_path / "tokenizer", None)
    assert load_tokenizer(str(folder)).chat.templates == ()
    (folder / "chat_template.jinja").write_text(chats.TEMPLATES["silent"])
    assert load_tokenizer(str(folder)).chat.templates == (("default", chats.TEMPLATES["silent"]),)
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    chats.write_tokenizer(folder, None, chat_template=named)
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(str(folder)).chat.templates == (("default", "a"), ("tool_use", "b"))


# --- the Python API --------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strategy": "best-fit", "pad_id": 0, "window": 500}, {"shuffle": 1}], ids=str)
def test_streams_of_conversations(tmp_path, folders, options):
    rows = chats.rows(11, 40)
    name = str(folders["turns"])

    def stream(state=None):
        ids = millstream.tokenize(rows, name, chat=True, eos=True)
        return millstream.pack(ids, 32, **options, state=state)

    def plain(samples):
        return [(s.token_ids.tolist(), s.loss.tolist(), s.labels.tolist()) for s in samples]

    everything = plain(stream())
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    helpers.pack(tmp_path / "out", corpus, tokenizer=name, chat=True, eos=True, seq_len=32, **options)
    dataset = millstream.open(tmp_path / "out")
    rest = dataset.remainder
    assert everything == plain([*dataset, *([rest] if rest is not None else [])])
    for count in (1, 7, len(everything) - 1):
        some = stream()
        first = plain(next(some) for _ in range(count))
        assert first + plain(stream(json.loads(json.dumps(some.state())))) == everything


def test_a_stream_does_not_go_on_with_another_template(tmp_path):
    rows = chats.rows(11, 4)
    folder = chats.write_tokenizer(tmp_path / "tokenizer", chats.TEMPLATES["silent"])
    stream = millstream.tokenize(rows, str(folder), chat=True)
    next(stream)
    chats.write_tokenizer(folder, chats.TEMPLATES["words"])
    with pytest.raises(millstream.ResumeRefused, match="another tokenize: chat was"):
        millstream.tokenize(rows, str(folder), chat=True, state=stream.state())


def test_streams_that_cannot_be_conversations(tmp_path, folders):
    name = str(folders["turns"])
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RequestError, match=r"read\(\.\.\., chat=True\)"):
        next(millstream.tokenize(millstream.read(tmp_path / "a.txt"), name, chat=True))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RequestError, match=r"tokenize\(\.\.\., chat=True\)"):
        next(millstream.tokenize(millstream.read(tmp_path / "a.jsonl", chat=True), name))
    with pytest.raises(DataError, match="document 0: a conversation is an object"):
        next(millstream.tokenize(["x"], name, chat=True))
    with pytest.raises(DataError, match="surrogate"):
        next(millstream.tokenize([{"prompt": "a", "completion": "\ud800"}], name, chat=True))
    with pytest.raises(RequestError, match="strategy='split'"):
        next(millstream.split(millstream.tokenize(chats.rows(1, 9), name, chat=True), 8))


def test_a_stream_names_the_conversation_that_cannot_be_used(folders):
    ids = millstream.tokenize([{"messages": [USER, REPLY]}, {"text": "x"}], str(folders["turns"]), chat=True)
    assert next(ids).dtype == np.uint16
    with pytest.raises(DataError, match="document 1: neither messages nor prompt"):
        next(ids)
