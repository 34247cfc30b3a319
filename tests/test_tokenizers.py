"""Tokenizers by every name, equal to their reference on any text, and BOS and EOS around each document."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import TEXTS, cli, fill_tiktoken_cache, gpt2_ids, pack, rows, stream, whole, without_fsync, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import PATIENCE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import millstream
from millstream.corpus.texts import safe_cut
from millstream.errors import EngineMismatch, RequestError
from millstream.stream.tokenizers import load_tokenizer

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

NAMES = ["gpt2", "cl100k_base", "o200k_base"]


@pytest.fixture(scope="session", autouse=True)
def ranks(tmp_path_factory):
    """tiktoken's cache with both files in it, so that no test needs the network."""
    folder = tmp_path_factory.mktemp("tiktoken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(fill_tiktoken_cache(folder)))
        yield folder


ADVERSARIAL = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\r",
    "\t \t",
    "a" * 3000,
    " " * 1000,
    " " * 1000 + "x",
    "x" + "\n" * 700,
    "\r\n" * 300 + " ",
    "0123456789" * 30,
    "1 22 333 4444 55555 1,234,567.89",
    "\u0661\u0662\u0663 \u00bd \u2162 \U0001d7d9",
    "I'm you're he's we've I'll they'd it's don't 'S 'RE 'Ll",
    "\u2019s \u2019re can\u2019t",
    "''s '''ll",
    "line\r\n  indented\r\n\r\n\tdeeper\r",
    "trailing blanks   \n   leading",
    "\x00",
    "a\x00b\x00\x00c",
    "\x01\x02\x7f\x80\x9f",
    "<|endoftext|>",
    "a<|endoftext|>b <|fim_prefix|><|endofprompt|><|im_start|>user",
    "<|endoftext",
    "|><|",
    "\ufeffbom inside \ufeff",
    "\u200b\u200c\u200d\u2060",
    "\u00a0\u2003\u2028\u2029\u3000\x85\x0b\x0c",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e9\U0001f1ea\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\U0001f44d\U0001f3ff \u2764\ufe0f 1\ufe0f\u20e3",
    "e\u0301 \u00e9 n\u0303 a\u0323\u0302",
    "\u0915\u094d\u0937\u093f \u0ba8\u0bbf \u0e01\u0e33 \u1112\u1161\u11ab \ud55c\uae00",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645 \u05e9\u05c1\u05dc\u05d5\u05dd",
    "\u6c34\u8f66\u8f6c\u52a8\u65e5\u672c\u8a9e\u30c6\u30b9\u30c8",
    "mixed\u6c34script\u0416word\u03b1\u03b2\u03b3123abc\u00df\u1e9e",
    "CamelCaseHTTPServer\u01c5 \u02b0\u02b1 ALLCAPS lowerUPPER",
    "\ud7ff\ue000\uffff\U0010ffff",
    "zalgo h\u0336\u0321\u0322e\u0335\u0327l\u0337l\u0338o\u0334",
    "https://a.b/c?d=e&f=%20#g user@host.tld /usr/lib/x.so",
    "def f(x):\n    return {'a': [1, 2], \"b\": None}\n\n\n# end\n",
    "\n\n \n  \n   \n",
    "a \n b  \n  c",
    "...!!!???---===___***///\\\\\\",
    "$100 \u20ac5 \u00a33 100% #1 @you & <b>x</b>",
    *TEXTS,
]

# Random text of pieces that the split patterns treat in different ways finds more than random letters do.
PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\x00",
        "\u200d",
        "\U0001f642",
        "a",
        "Word",
        "HTTP",
        "\u00e9",
        "e\u0301",
        "\u6c34",
        "\u0416",
        "7",
        "1234",
        "don't",
        "'s",
        "'LL",
        "\u2019ve",
        "'",
        ".",
        "!?",
        "/",
        "<|endoftext|>",
    ]
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join))


def listed(engine, texts):
    ids, lengths = engine.encode(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []


def joined(parts):
    return [i for part in parts for i in part]


# --- the engine is the reference -------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_reference_on_hard_texts(name):
    tokenizer = load_tokenizer(name)
    assert tokenizer.reference is not None, "there is something to compare with"
    for text, ours, theirs in zip(
        ADVERSARIAL,
        listed(tokenizer.engine, ADVERSARIAL),
        listed(tokenizer.reference(), ADVERSARIAL),
        strict=True,
    ):
        assert ours == theirs, text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_engine_equals_reference_on_any_text(name, texts):
    tokenizer = load_tokenizer(name)
    assert listed(tokenizer.engine, texts) == listed(reference(name), texts)


REFERENCES = {}


def reference(name):
    if name not in REFERENCES:
        REFERENCES[name] = load_tokenizer(name).reference()
    return REFERENCES[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_in_comes_out_again(name):
    tokenizer = load_tokenizer(name)
    for text, ids in zip(ADVERSARIAL, listed(tokenizer.engine, ADVERSARIAL), strict=True):
        assert reference(name).decode(ids) == text
        assert tokenizer.engine.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_text_that_spells_a_special_token_is_ordinary_text(name):
    tokenizer = load_tokenizer(name)
    assert tokenizer.specials
    for special, number in tokenizer.specials.items():
        [ids] = listed(tokenizer.engine, [f"a {special} b"])
        assert number not in ids
        assert reference(name).decode(ids) == f"a {special} b"


@pytest.mark.parametrize(
    ("name", "vocabulary", "dtype"),
    [("gpt2", 50257, np.uint16), ("cl100k_base", 100277, np.uint32), ("o200k_base", 200019, np.uint32)],
)
def test_vocabulary_and_dtype(name, vocabulary, dtype):
    tokenizer = load_tokenizer(name)
    assert tokenizer.vocab_size == vocabulary
    assert tokenizer.dtype == dtype


def test_known_ids():
    """Ids that OpenAI's own documentation and everybody's notebooks show."""
    assert listed(load_tokenizer("gpt2").engine, ["Hello world", "tiktoken is great!"]) == [
        [15496, 995],
        [83, 1134, 30001, 318, 1049, 0],
    ]
    assert listed(load_tokenizer("cl100k_base").engine, ["tiktoken is great!"]) == [[83, 1609, 5963, 374, 2294, 0]]
    assert listed(load_tokenizer("o200k_base").engine, ["tiktoken is great!"]) == [[83, 8251, 2488, 382, 2212, 0]]


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_run_with_either_engine_gives_the_same_ids(tmp_path, engine):
    write_jsonl(tmp_path / "a.jsonl", rows(ADVERSARIAL))
    pack(tmp_path / "out", tmp_path / "a.jsonl", seq_len=64, engine=engine, eos=True)
    wanted = [i for ids in listed(reference("gpt2"), ADVERSARIAL) if ids for i in (*ids, 50256)]
    assert stream(tmp_path / "out") == wanted
    assert whole(tmp_path / "out")


class Wrong:
    """A reference that differs in the last id of one text."""

    name = "wrong"

    def __init__(self, text):
        self.text = text

    def encode(self, texts):
        ids, lengths = reference("gpt2").encode(texts)
        ids = ids.copy()
        if self.text in texts:
            ids[lengths[: texts.index(self.text) + 1].sum() - 1] += 1
        return ids, lengths


@pytest.mark.parametrize("which", [0, 3, len(TEXTS) - 1])
def test_a_run_stops_at_a_document_the_engines_disagree_on(tmp_path, monkeypatch, which):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    monkeypatch.setattr("millstream.runs.pack.encode._reference", lambda name: Wrong(TEXTS[which]))
    with pytest.raises(EngineMismatch, match=f"document 'd{which}'.*fastokens.*wrong.*gpt2.*engine='reference'"):
        pack(tmp_path / "out", corpus, seq_len=8)
    monkeypatch.undo()
    report = pack(tmp_path / "out", corpus, seq_len=8)
    assert report.compared > 0
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)


def test_a_run_compares_with_the_reference(tmp_path):
    """All of a small corpus is compared, and the report says how much."""
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    report = pack(tmp_path / "out", corpus, seq_len=8)
    assert report.compared >= sum(map(len, TEXTS))


# --- cutting plain text ----------------------------------------------------

CUTTABLE = st.lists(
    st.one_of(
        st.sampled_from(
            ["a", "word", "Don't", "I'll", "x's", "'s", "HTTPServer", "e\u0301", "caf\u00e9", "stra\u00dfe"]
        ),
        st.sampled_from(
            [" ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\r\n", " \r\n ", "\t", " \t", "\u00a0", "\u2028"]
        ),
        st.sampled_from(
            ["1", "1234", "3rd", ".", ", ", "...", "-", "/", "\u6c34", "\U0001f642", "\u200d", "<|endoftext|>"]
        ),
        st.text(max_size=4),
    ),
    max_size=40,
).map("".join)


def pieces(text, size):
    """The text cut at safe cuts, as near to every `size` bytes as there are any."""
    data, found, start = text.encode(), [], 0
    stop = size
    while stop < len(data):
        cut = safe_cut(data[start:stop])
        if cut:
            found.append(data[start : start + cut].decode())
            start += cut
        stop += size
    return [*found, data[start:].decode()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(text=CUTTABLE, size=st.integers(2, 40))
@example("don't  stop I'll \n\n go  \r\n x's   \t y 's ", 3)
@example("a \u0301b a\n\u0301 a  'll", 2)
def test_cut_text_has_the_ids_of_the_whole(name, text, size):
    parts = pieces(text, size)
    assert "".join(parts) == text
    assert joined(listed(reference(name), parts)) == listed(reference(name), [text])[0]


def test_there_are_safe_cuts_in_ordinary_text():
    assert len(pieces("one two three, four five\nsix seven 8 nine ten", 6)) > 4
    assert pieces("1 2 3 4 5 6 7, \u6c34 \u6c34", 3) == ["1 2 3 4 5 6 7, \u6c34 \u6c34"]


# --- tokenizers from files -------------------------------------------------


def byte_level(**settings):
    """A small byte-level BPE tokenizer, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def saved(folder, tokenizer, **config):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def own_ids(tokenizer, texts):
    """What the library itself gives, without specials; special spellings are text."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@pytest.mark.parametrize("make", [byte_level, word_piece, unigram])
@pytest.mark.parametrize("by", ["file", "folder", "other name"])
def test_a_tokenizer_from_files(tmp_path, make, by):
    tokenizer = make()
    folder = saved(tmp_path / "tok", tokenizer)
    path = folder if by == "folder" else folder / "tokenizer.json"
    if by == "other name":
        path = path.rename(folder / "mine.json")
    texts = [*TEXTS, "a </s> b <unk>", ""]
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(texts))
    report = pack(tmp_path / "out", corpus, tokenizer=str(path), seq_len=16)
    assert report.ledger["documents"]["empty"] == 1
    assert stream(tmp_path / "out") == joined(own_ids(tokenizer, texts))
    assert whole(tmp_path / "out")

    # The run keeps its tokenizer, so that it can be shown anywhere.
    (folder / path.name if by == "other name" else folder / "tokenizer.json").unlink()
    assert millstream.open(tmp_path / "out").settings["tokenizer"]["vocab_size"] == tokenizer.get_vocab_size()
    shown = cli("show", tmp_path / "out", 0)
    assert shown.returncode == 0
    assert "mill" in shown.stdout


def test_what_a_tokenizer_file_adds_cuts_or_pads_is_not_done(tmp_path):
    plain = byte_level()
    wanted = own_ids(plain, TEXTS)
    adding = byte_level()
    assert own_ids(adding, TEXTS) == wanted
    adding.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    adding.enable_truncation(max_length=4)
    adding.enable_padding(length=100, pad_id=2, pad_token="<pad>")
    saved(tmp_path / "tok", adding)
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    for engine in ("fast", "reference"):
        out = tmp_path / engine
        pack(out, corpus, tokenizer=str(tmp_path / "tok"), seq_len=16, engine=engine)
        assert stream(out) == joined(wanted)


def test_added_tokens_that_are_not_special(tmp_path):
    """They are part of the vocabulary: text that spells one becomes it, in both engines; long text too."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["millstone", AddedToken("two  blanks", normalized=False)])
    tokenizer.add_special_tokens(["<|extra|>"])
    saved(tmp_path / "tok", tokenizer)
    texts = ["a millstone or two  blanks", "<|extra|> millstones", *TEXTS]
    assert max(joined(own_ids(tokenizer, texts))) >= tokenizer.get_vocab_size() - 3
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(texts))
    for engine in ("fast", "reference"):
        out = tmp_path / engine
        pack(out, corpus, tokenizer=str(tmp_path / "tok"), seq_len=16, engine=engine)
        assert stream(out) == joined(own_ids(tokenizer, texts))


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5))
def test_a_trained_tokenizer_equals_the_library(texts, tmp_path_factory):
    if "trained" not in REFERENCES:
        tokenizer = byte_level()
        REFERENCES["trained"] = tokenizer, load_tokenizer(str(saved(tmp_path_factory.mktemp("tok"), tokenizer)))
    tokenizer, ours = REFERENCES["trained"]
    assert listed(ours.engine, texts) == own_ids(tokenizer, texts)


@pytest.mark.parametrize(
    ("make", "cuts"),
    [
        (byte_level, True),
        (lambda: byte_level(add_prefix_space=True), False),
        (lambda: byte_level(use_regex=False), False),
        (word_piece, False),
        (unigram, False),
    ],
    ids=["bytes", "prefix", "whole text", "wordpiece", "unigram"],
)
def test_only_tokenizers_known_to_split_at_words_have_long_text_cut(tmp_path, monkeypatch, make, cuts):
    tokenizer = make()
    folder = saved(tmp_path / "tok", tokenizer)
    assert load_tokenizer(str(folder)).safe_cuts == cuts
    monkeypatch.setattr("millstream.corpus.texts.LONG_TEXT", 500)
    monkeypatch.setattr("millstream.corpus.sources.READ", 200)
    text = "\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    pack(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(folder), seq_len=16, block=200)
    assert stream(tmp_path / "out") == own_ids(tokenizer, [text])[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "no tokenizer.json that can be read"),
        ("tokenizer.json", b"not json", "no tokenizer.json that can be read"),
        ("tokenizer.json", b"\xff\xfe\x00binary", "no tokenizer.json that can be read"),
        ("tokenizer.json", b"[]", "no tokenizer.json that can be read"),
        ("tokenizer.json", b"", "no tokenizer.json that can be read"),
        ("other.txt", b"x", "has no tokenizer.json"),
    ],
)
def test_a_folder_or_file_that_is_no_tokenizer(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("config", [b"not json", b"\xff\xfe", b"[]", b'{"eos_token": 7}'])
def test_a_damaged_tokenizer_config_is_said_to_be_one(tmp_path, config):
    folder = saved(tmp_path / "tok", byte_level())
    (folder / "tokenizer_config.json").write_bytes(config)
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    with pytest.raises(RequestError, match=r"tokenizer_config\.json|eos_token|no token 7"):
        pack(tmp_path / "out", corpus, tokenizer=str(folder), seq_len=16, eos=True)


@pytest.mark.parametrize("name", ["gpt5", "nowhere/tokenizer.json", "./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_unknown_names(name):
    with pytest.raises(RequestError, match=r"unknown tokenizer.*gpt2, cl100k_base, o200k_base, a tokenizer\.json"):
        load_tokenizer(name)


# --- tiktoken and the hub --------------------------------------------------


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_pack_with_a_tiktoken_name(tmp_path, name):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    pack(tmp_path / "out", corpus, tokenizer=name, seq_len=16, eos=True)
    eos = {"cl100k_base": 100257, "o200k_base": 199999}[name]
    assert stream(tmp_path / "out") == [i for ids in listed(reference(name), TEXTS) for i in (*ids, eos)]
    assert millstream.open(tmp_path / "out")[0].token_ids.dtype == np.uint32
    assert whole(tmp_path / "out")


# A process of its own has to do without the network, whether there is one or not.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = "millstream"
from millstream.cli import main
main()
"""


def offline(*arguments, **environment):
    command = [sys.executable, "-c", OFFLINE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=PATIENCE)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def hub_cache(folder, name, tokenizer, **config):
    """The folders that the hub's client makes for a downloaded tokenizer."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = folder / f"models--{name.replace('/', '--')}"
    saved(repo / "snapshots" / revision, tokenizer, **config)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    return {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}


def test_gpt2_needs_no_network_and_no_cache(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    done = offline(
        "pack", corpus, "--out", tmp_path / "out", "--seq-len", 16, TIKTOKEN_CACHE_DIR=str(tmp_path / "none")
    )
    assert done.returncode == 0, done.stderr
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)


def test_a_tiktoken_name_that_is_not_here(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    given = ("--tokenizer", "cl100k_base", "--out", tmp_path / "out")
    done = offline("pack", corpus, *given, TIKTOKEN_CACHE_DIR=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "cl100k_base" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_id_from_the_local_cache(tmp_path):
    tokenizer = byte_level()
    cache = hub_cache(tmp_path / "hub", "acme/mill", tokenizer, eos_token={"content": "</s>"}, bos_token="<s>")
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    done = offline(
        *("pack", corpus, "--out", tmp_path / "out", "--seq-len", 16, "--tokenizer", "acme/mill", "--bos", "--eos"),
        **cache,
    )
    assert done.returncode == 0, done.stderr
    assert stream(tmp_path / "out") == [i for ids in own_ids(tokenizer, TEXTS) for i in (0, *ids, 1)]
    assert whole(tmp_path / "out")

    listing = offline("tokenizers", **cache)
    assert listing.returncode == 0
    assert [line.split()[0] for line in listing.stdout.splitlines()][:4] == [*NAMES, "acme/mill"]
    assert listing.stdout.count("in tiktoken's cache") == 2


def test_a_hub_id_that_is_not_here(tmp_path):
    cache = hub_cache(tmp_path / "hub", "acme/mill", byte_level())
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    done = offline("pack", corpus, "--out", tmp_path / "out", "--tokenizer", "acme/other", **cache)
    assert done.returncode == 2
    assert "'acme/other'" in done.stderr
    assert not (tmp_path / "out").exists()
    done = offline("pack", corpus, "--out", tmp_path / "out", "--tokenizer", "acme/mill", "--eos", **cache)
    assert done.returncode == 2
    assert "--eos-token" in done.stderr


def test_tokenizers_says_which_are_here(tmp_path):
    done = offline("tokenizers", TIKTOKEN_CACHE_DIR=str(tmp_path / "none"), HF_HUB_CACHE=str(tmp_path / "none as well"))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*NAMES, "PATH", "ORG/NAME"]
    assert "offline" in done.stdout.splitlines()[0]
    assert done.stdout.count("downloads it") == 2


# --- BOS and EOS -----------------------------------------------------------

WITH_EMPTY = ["one", "", "two words", "", "<s> three </s>"]


def surrounded(ids, bos=None, eos=None):
    before, after = ([] if token is None else [token] for token in (bos, eos))
    return joined(before + own + after for own in ids if own)


@pytest.mark.parametrize("config", ["<x>", {"content": "<x>", "special": True}], ids=["text", "object"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_are_those_of_the_config(tmp_path, config, bos, eos):
    def written(token):
        return token if isinstance(config, str) else {**config, "content": token}

    tokenizer = byte_level()
    folder = saved(tmp_path / "tok", tokenizer, bos_token=written("<s>"), eos_token=written("</s>"))
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(WITH_EMPTY))
    report = pack(tmp_path / "out", corpus, tokenizer=str(folder), seq_len=4, bos=bos, eos=eos)
    ids = own_ids(tokenizer, WITH_EMPTY)
    assert stream(tmp_path / "out") == surrounded(ids, 0 if bos else None, 1 if eos else None)
    assert report.ledger["ids"]["special"] == 3 * (bos + eos)
    assert report.ledger["ids"]["text"] == sum(map(len, ids))
    assert report.ledger["documents"]["empty"] == 2


def test_bos_and_eos_by_their_text(tmp_path):
    tokenizer = byte_level()
    folder = saved(tmp_path / "tok", tokenizer, eos_token="</s>")
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(WITH_EMPTY))
    given = {"tokenizer": str(folder), "seq_len": 4}
    pack(tmp_path / "out", corpus, **given, bos_token="</s>", eos_token="<pad>")
    assert stream(tmp_path / "out") == surrounded(own_ids(tokenizer, WITH_EMPTY), 1, 2)


@pytest.mark.parametrize("strategy", ["concat", "split"])
def test_eos_once_a_document_even_if_it_fills_many_samples(tmp_path, strategy):
    texts = ["word " * 50, "x", "end " * 30]
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(texts))
    given = {"seq_len": 8, "bos": True, "eos": True, "strategy": strategy, "pad_id": 0}
    report = pack(tmp_path / "out", corpus, **given)
    assert report.ledger["ids"]["special"] == 6
    ids = [i for sample in millstream.open(tmp_path / "out") for i in sample.token_ids[sample.segment_ids > 0].tolist()]
    rest = millstream.open(tmp_path / "out").remainder
    ids += [] if rest is None else rest.token_ids.tolist()
    assert ids == surrounded(listed(reference("gpt2"), texts), 50256, 50256)


def test_asked_for_and_unknown(tmp_path):
    folder = saved(tmp_path / "tok", byte_level(), bos_token="<s>")
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    for flags, message in (
        (["--eos"], "--eos-token"),
        (["--bos", "--eos"], "--eos-token"),
        (["--eos-token", "<eot>"], "'<eot>'"),
        (["--bos-token", "</S>"], "'</S>'"),
        (["--remainder", "pad"], "--pad-id"),
    ):
        done = cli("pack", corpus, "--out", tmp_path / "out", "--tokenizer", folder, *flags)
        assert done.returncode == 2, flags
        assert message in done.stderr
        assert not (tmp_path / "out").exists()
