"""Conversations that teach nothing, and BOS and EOS that would be there twice."""

import chats
import pytest
from helpers import pack, stream, without_fsync, write_jsonl

import millstream
from millstream.errors import DataError, RequestError

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

ENDED = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
ENDED += "{{ eos_token }}{{ 'NEWLINE' }}"


def said(role):
    return {"messages": [{"role": "user", "content": "two?"}, {"role": role, "content": "four"}]}


@pytest.mark.parametrize("template", ["turns", "silent"])
@pytest.mark.parametrize("role", ["model", "gpt", "Assistant"])
def test_a_run_that_teaches_nothing_fails(tmp_path, template, role):
    tokenizer = str(chats.write_tokenizer(tmp_path / "tok", template))
    corpus = write_jsonl(tmp_path / "a.jsonl", [said(role)] * 3)
    with pytest.raises(DataError, match=r"nothing in 3 documents is to be learned: .*role assistant.*loss='all'"):
        pack(tmp_path / "out", corpus, tokenizer=tokenizer, chat=True, seq_len=8)
    pack(tmp_path / "all", corpus, tokenizer=tokenizer, chat=True, seq_len=8, loss="all")


def test_conversations_that_teach_nothing_are_counted(tmp_path):
    tokenizer = str(chats.write_tokenizer(tmp_path / "tok"))
    corpus = write_jsonl(tmp_path / "a.jsonl", [said("assistant"), said("model"), said("gpt")])
    report = pack(tmp_path / "out", corpus, tokenizer=tokenizer, chat=True, seq_len=8)
    assert report.unlearned == 2
    assert any("2 conversations have nothing that is to be learned" in hint for hint in report.hints)


@pytest.mark.parametrize("name", ["bos", "eos"])
@pytest.mark.parametrize("newline", ["", "\n"])
def test_what_a_template_writes_is_not_added_again(tmp_path, name, newline):
    template = ENDED.replace("NEWLINE", newline.replace("\n", "\\n"))
    tokenizer = str(chats.write_tokenizer(tmp_path / "tok", template))
    corpus = write_jsonl(tmp_path / "a.jsonl", [said("assistant")])
    with pytest.raises(RequestError, match=rf"writes {name.upper()} itself, and {name}=True would add a second one"):
        pack(tmp_path / "out", corpus, tokenizer=tokenizer, chat=True, loss="all", seq_len=8, **{name: True})
    if not newline:
        with pytest.raises(RequestError, match="writes"):
            next(millstream.tokenize([said("assistant")], tokenizer, chat=True, **{name: True}))


def test_ready_ids_with_their_own_eos(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"ids": [5, 50256]}, {"ids": [6]}])
    report = pack(tmp_path / "out", corpus, ids_field="ids", tokenizer="gpt2", eos=True, seq_len=2)
    assert any("ready ids had BOS or EOS already where one was added, 1 times" in hint for hint in report.hints)
    assert stream(tmp_path / "out") == [5, 50256, 50256, 6, 50256]
