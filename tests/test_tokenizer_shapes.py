"""Tokenizers of many shapes, trained here: what is packed has the reference's ids, whatever the text."""

import itertools
import json
import random

import pytest
from helpers import TEXTS, pack, rows, stream, whole, without_fsync, write_jsonl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from millstream.errors import RequestError
from millstream.stream.tokenizers import from_definition, load_tokenizer

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

MODELS = {
    "bpe": {},
    "unk": {"unk_token": "<unk>"},
    "fused unk": {"unk_token": "<unk>", "fuse_unk": True},
    "fallback": {"byte_fallback": True},
    "fallback unk": {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True},
    "suffix": {"unk_token": "<unk>", "end_of_word_suffix": "</w>"},
    "prefix": {"unk_token": "<unk>", "continuing_subword_prefix": "##"},
    "whole words": {"ignore_merges": True, "unk_token": "<unk>"},
}
BEFORE = {
    "none": lambda: None,
    "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes, blank": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "bytes, whole": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "llama 3": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "metaspace": lambda: pre_tokenizers.Metaspace(),
    "metaspace, never": lambda: pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "blanks": lambda: pre_tokenizers.WhitespaceSplit(),
    "split, removed": lambda: pre_tokenizers.Split(Regex(r"\s+"), "removed"),
    "split, next": lambda: pre_tokenizers.Split(" ", "merged_with_next"),
}
FIRST = {
    "none": lambda: None,
    "NFC": normalizers.NFC,
    "NFKC": normalizers.NFKC,
    "lower": normalizers.Lowercase,
    "replace": lambda: normalizers.Replace(" ", "▁"),
    "prepend": lambda: normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
}
SHAPES = [
    *itertools.product(MODELS, BEFORE, ["none"]),
    *itertools.product(["bpe", "fallback unk"], ["none", "bytes"], FIRST),
]


def trained(model, before, first, alphabet=True):
    """A small BPE tokenizer.json; without its `alphabet`, one that has seen few letters only."""
    tokenizer = Tokenizer(models.BPE(**MODELS[model]))
    step, normal = BEFORE[before](), FIRST[first]()
    if step:
        tokenizer.pre_tokenizer = step
    if normal:
        tokenizer.normalizer = normal
    if "bytes" in before or before in ("llama 3", "digits"):
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "</s>", *(BYTE_TOKENS if "fallback" in model and alphabet else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
        **{
            key: MODELS[model][key]
            for key in ("end_of_word_suffix", "continuing_subword_prefix")
            if key in MODELS[model]
        },
    )
    tokenizer.train_from_iterator(TEXTS if alphabet else ["the mill"], trainer)
    tokenizer.add_tokens(["millstone", AddedToken("wheel", single_word=True, lstrip=True)])
    return tokenizer


LETTERS = [
    *"aeimz Q\n\t.",
    *(
        "the mill",
        " water",
        "\u00e9",
        "e\u0301",
        "\u6c34",
        "\U0001f642",
        "\u200d",
        "\x00",
        "\u00a0",
        "1234",
        "'ll",
        "\r\n",
    ),
    *("<unk>", "</s>", "millstone", " wheel ", "<0x41>", "▁", "</w>", "##", "\ufb01", "İ"),
]


def nasty(seed, count=40):
    rng = random.Random(seed)
    return ["", " ", *("".join(rng.choices(LETTERS, k=rng.randrange(1, 25))) for _ in range(count)), *TEXTS]


@pytest.mark.parametrize("alphabet", [True, False], ids=["all letters", "few letters"])
@pytest.mark.parametrize("shape", SHAPES, ids=", ".join)
def test_the_engine_that_packs_gives_the_reference_s_ids(shape, alphabet):
    tokenizer = trained(*shape, alphabet)
    loaded = from_definition("shape", tokenizer.to_str())
    texts = nasty(str(shape))
    tokenizer.encode_special_tokens = True
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    found = [loaded.engine.encode([text])[0].tolist() for text in texts]
    assert found == wanted, loaded.engine.name


def test_the_shapes_meet_both_engines():
    names = {from_definition("shape", trained(*shape).to_str()).engine_name for shape in SHAPES[::7]}
    assert names == {"fastokens", "tokenizers"}


def definition(folder, **model):
    """A tokenizer.json of three tokens: a, b and ab."""
    made = json.loads(Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).to_str())
    made["model"] |= model
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return str(folder)


def test_letters_that_no_id_stands_for_are_left_out_as_the_reference_does(tmp_path):
    """A fast engine once gave [0, 1] for "azb", behind the first megabyte without a word."""
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["azb", "b"]))
    for engine in ("fast", "reference"):
        report = pack(tmp_path / engine, corpus, tokenizer=definition(tmp_path / "tok"), seq_len=1, engine=engine)
        assert stream(tmp_path / engine) == [2, 1]
        assert report.compared == 0, "it is the reference that packs"
        assert whole(tmp_path / engine)


@pytest.mark.parametrize("type_", ["BPE", None], ids=["named", "as older files have it"])
def test_dropout_is_refused_by_name(tmp_path, type_):
    folder = definition(tmp_path / "tok", dropout=0.1, **({} if type_ else {"type": None}))
    if not type_:
        made = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
        del made["model"]["type"]
        (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(RequestError, match=r"tokenizer tok has BPE dropout 0\.1.*dropout.*null"):
        load_tokenizer(folder)
    with pytest.raises(RequestError, match="dropout"):
        pack(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", rows(TEXTS)), tokenizer=folder)
    assert not (tmp_path / "out").exists()
    assert load_tokenizer(definition(tmp_path / "tok", dropout=0.0)).vocab_size == 3


def test_text_that_no_id_stands_for_is_counted(tmp_path):
    made = json.loads(trained("bpe", "bytes", "none", alphabet=False).to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["special"]]
    (tmp_path / "lacking.json").write_text(json.dumps(made))
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(["the mill", "Queue \u6c34 mill"]))
    report = pack(tmp_path / "out", corpus, tokenizer=str(tmp_path / "lacking.json"), seq_len=2)
    known = set("the mill")
    assert report.lost == sum(len(c.encode()) for c in "the millQueue \u6c34 mill" if c not in known) > 3
    assert report.unknown == 0
    (tmp_path / "unk.json").write_text(trained("unk", "blanks", "none", alphabet=False).to_str())
    report = pack(tmp_path / "unk", corpus, tokenizer=str(tmp_path / "unk.json"), seq_len=2)
    assert report.unknown == stream(tmp_path / "unk").count(0) > 0
    assert pack(tmp_path / "gpt2", corpus, seq_len=2).lost == 0
