"""Messages speak the language of who reads them: Python to Python, flags on the command line, any terminal."""

import ast
import json
import pickle
import re
from pathlib import Path

import pytest
from helpers import TEXTS, cli, pack, rows, run_here, without_fsync, write_jsonl

import millstream
from millstream.errors import MillstreamError, RequestError, setting, sized
from millstream.runs.plan.plan import make_plan

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)
call = pytest.fixture(run_here)

WRONG = [
    ({"seq_len": 0}, "seq_len=0 does not work", "--seq-len 0 does not work"),
    ({"strategy": "best"}, "strategy='best' does not work", None),
    ({"window": 5}, "it belongs to strategy='best-fit'", "--window 5 does not work: it belongs to --strategy best-fit"),
    ({"lease": 5.0}, "lease=5.0 does not work: it belongs to join=True", "it belongs to --join"),
    ({"shuffle_window": 5}, "shuffle_window=5 does not work: it belongs to shuffle", "it belongs to --shuffle"),
    ({"shuffle": -1}, "shuffle=-1 does not work", "--shuffle -1 does not work"),
    ({"workers": 0}, "workers=0 does not work", "--workers 0 does not work"),
    ({"memory": 100}, "do not fit into memory=100", "do not fit into --memory 100"),
    ({"memory": 100 << 20}, "memory=100 << 20 is too little", "--memory 100MiB is too little"),
    ({"shard_size": 0}, "shard_size=0 does not work", "--shard-size 0 does not work"),
    ({"validation": 1.5}, "validation=1.5 does not work", "--validation 1.5 does not work"),
    ({"id_field": "text"}, "id_field='text' does not work", "--id-field text does not work"),
    ({"loss": "all"}, "loss, chat_template and allow_specials belong to chat", "--loss, --chat-template and"),
    ({"format": "mdx"}, "format='mdx' does not work", "--format mdx does not work"),
    ({"eos_token": "<x>"}, "has no token '<x>'", "has no token '<x>'"),
    ({"pad_id": 60_000}, "pad_id=60000 is no id", "--pad-id 60000 is no id"),
    ({"bos": True, "ids_field": "ids"}, "bos needs a tokenizer", "--bos needs a tokenizer"),
    (
        {"chat": True, "ids_field": "ids"},
        "chat renders text, and with ids_field",
        "--chat renders text, and with --ids",
    ),
    ({"chat": True, "chat_template": "no.jinja"}, "chat_template='no.jinja': No such", "--chat-template no.jinja: No"),
]


@pytest.mark.parametrize(("wrong", "python", "flags"), WRONG, ids=[str(wrong) for wrong, *_ in WRONG])
def test_a_wrong_setting_is_told_in_the_language_of_the_caller(tmp_path, call, wrong, python, flags):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    with pytest.raises(RequestError, match=re.escape(python)) as refused:
        millstream.pack_to(tmp_path / "out", corpus, **wrong)
    assert "--" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    arguments = [part for name, value in wrong.items() for part in as_flags(name, value)]
    code, out, err = call("pack", corpus, "--out", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert flags is None or flags in err


def as_flags(name, value):
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, value]


def test_no_message_but_the_command_line_s_writes_flags():
    """All of the pack half; docstrings, and what is no message, aside."""
    root = Path(millstream.__file__).parent
    folders = [root / name for name in ("runs/pack", "stream", "formats", "engines")]
    own = set(root.glob("*.py")) - {root / "report.py"}  # which the command line alone prints
    files = [*own, *(path for folder in folders for path in folder.rglob("*.py"))]
    found = {
        (path.name, text)
        for path in files
        for text in texts_in(path)
        if re.search(r"--[a-z]", text) and "zstd" not in text
    }
    assert found - ALLOWED == set()


def texts_in(path):
    """The literals of a module that are no docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in texts if id(node) not in prose]


ALLOWED = {
    ("against.py", "--sample "),
    ("ray.py", " has a CPU: start some with --num-cpus"),  # a flag of Ray's
    ("plan.py", "--seq-len"),  # what a plan calls otherwise
    ("parquet.py", ": did you mean --chat?"),  # of a fault, which is data
}


def test_a_name_that_is_no_setting(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    with pytest.raises(TypeError, match=r"pack_to\(\) has no setting 'seqlen'; did you mean 'seq_len'\?"):
        millstream.pack_to(tmp_path / "out", corpus, seqlen=5)
    with pytest.raises(TypeError, match=r"make_plan\(\) has no setting 'xyzzy'$"):
        make_plan(corpus, xyzzy=5)


def test_going_on_with_other_settings(tmp_path, call):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    pack(tmp_path / "out", corpus, seq_len=8)
    with pytest.raises(RequestError, match=r"(?s)seq_len was 8, is 16.*eos was not given, is 50256.*overwrite=True"):
        pack(tmp_path / "out", corpus, seq_len=16, eos=True)
    code, _, err = call("pack", corpus, "--out", tmp_path / "out", "--seq-len", 16)
    assert code == 2
    assert "--seq-len was 8, is 16" in err
    assert "or --overwrite to start anew" in err


def test_hints_speak_both(tmp_path, call):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    assert "eos=True adds one" in pack(tmp_path / "out", corpus).hints[0]
    _, out, _ = call("pack", corpus, "--out", tmp_path / "other")
    assert "--eos adds one" in out


def test_an_error_keeps_both_wordings_on_its_way_between_processes():
    error = pickle.loads(pickle.dumps(RequestError(f"{setting('eos', True)} or {sized('memory', 3 << 30)} {{x}}")))
    assert str(error) == "eos=True or memory=3 << 30 {x}"
    assert error.words.flags == "--eos or --memory 3GiB {x}"
    assert repr(error) == "RequestError('eos=True or memory=3 << 30 {x}')"


# --- a template that is not there ------------------------------------------

MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize("workers", [1, 2])
def test_chat_without_a_template_is_one_request_error(tmp_path, workers):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 3)
    for on_error in ("stop", "skip"):
        given = ("--chat", "--on-error", on_error, "--workers", workers)
        done = cli("pack", corpus, "--out", tmp_path / "out", *given)
        assert done.returncode == 2
        assert done.stderr == (
            "millstream: the tokenizer has no chat template for messages; give one with --chat-template, or beside its "
            "tokenizer.json\n"
        )
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    done = cli("pack", corpus, "--out", tmp_path / "out", "--chat", "--chat-template", template, "--loss", "all")
    assert done.returncode == 0, "nothing of the failed run is in the way of the mended one"


def test_nor_does_python_call_it_a_fault(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 3)
    with pytest.raises(RequestError, match="give one with chat_template"):
        make_plan(corpus, chat=True)
    with pytest.raises(RequestError, match="no chat template"):
        next(millstream.tokenize([{"messages": MESSAGES}], chat=True))


def test_what_was_packed_before_a_row_without_a_template_stays(tmp_path):
    lines = [{"prompt": "a " * 500, "completion": "b"}] * 2000
    corpus = write_jsonl(tmp_path / "a.jsonl", [*lines, {"messages": MESSAGES}])
    with pytest.raises(RequestError):
        pack(tmp_path / "out", corpus, chat=True, seq_len=64, shard_size=1 << 16)
    assert (tmp_path / "out" / "records" / "train-00000.json").exists()


# --- an input without text -------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'], ids=["empty", "blank lines", "no text"])
def test_a_plan_for_nothing_is_as_good_as_a_run(tmp_path, call, content):
    corpus = tmp_path / "a.jsonl"
    corpus.write_bytes(content)
    code, out, err = call("plan", corpus)
    assert (code, err) == (0, "")
    assert "with 0 ids" in out
    code, out, _ = call("plan", corpus, "--json")
    assert json.loads(out)["documents"]["value"] == content.count(b"{")
    assert [choice["samples"]["value"] for choice in json.loads(out)["choices"]] == [0] * 12
    assert call("pack", corpus, "--out", tmp_path / "out")[0] == 0


# --- terminals that lack letters -------------------------------------------

ASCII = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]


@pytest.mark.parametrize("environment", ASCII, ids=["ascii", "C"])
def test_a_terminal_without_the_letters(tmp_path, environment):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "水", "text": "水车在转动 é 🙂"}, *rows(TEXTS)])
    out = tmp_path / "out"
    for command in (
        ("pack", corpus, "--out", out, "--seq-len", 16, "--eos"),
        ("show", out, 0),
        ("plan", corpus),
        ("verify", out),
        ("find", out, "水".encode()),
        ("tokenizers",),
    ):
        arguments = [part.decode() if isinstance(part, bytes) else part for part in command]
        done = cli(*arguments, **environment)
        assert (done.returncode, done.stderr) == (0, ""), command
        if command[0] == "show":
            assert r"\u6c34" in done.stdout.splitlines()[2]
            assert done.stdout.isascii()
        if command[0] == "plan":
            assert "####" in done.stdout
            assert "<= N" in done.stdout
    assert cli("pack", tmp_path / "ü.jsonl", "--out", tmp_path / "other", **environment).returncode == 2


def test_every_error_of_the_tree_has_words():
    for error in MillstreamError.__subclasses__():
        assert error(f"{setting('out')}").words.flags == "--out"
