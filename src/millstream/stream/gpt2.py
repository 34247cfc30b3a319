"""GPT-2's tokenizer from the package data: OpenAI's list of merges, from which all else follows."""

import hashlib
from typing import Any

from millstream.errors import RequestError
from millstream.store import packaged

MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def read_merges() -> list[str]:
    """GPT-2's merges in order, each "left right", from the package data, whose SHA-256 is checked."""
    data = packaged("data/gpt2/vocab.bpe")
    if hashlib.sha256(data).hexdigest() != MERGES_SHA256:
        raise RequestError("the package's GPT-2 merges are damaged; install millstream again")
    return data.decode().split("\n")[1:-1]


def tokens_of(merges: list[str]) -> list[str]:
    """The tokens in order of their ids, in the letters that GPT-2's files write for bytes."""
    return [*byte_letters().values(), *"\n".join(merges).replace(" ", "").split("\n")]


def byte_letters() -> dict[int, str]:
    """The printable letter for each byte, in the order of the first 256 ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def definition_of(merges: list[str], tokens: list[str]) -> dict[str, Any]:
    """The tokenizer.json of these merges and the tokens that follow from them."""
    tokens = [*tokens, "<|endoftext|>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 50256, "content": "<|endoftext|>", **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(zip(tokens, range(len(tokens)), strict=True)),
            "merges": merges,  # as "left right" they load a fifth faster than as pairs
        },
    }


def ranks_of(tokens: list[str]) -> dict[bytes, int]:
    bytes_of = str.maketrans({letter: chr(byte) for byte, letter in byte_letters().items()})
    return {token.translate(bytes_of).encode("latin-1"): rank for rank, token in enumerate(tokens)}
