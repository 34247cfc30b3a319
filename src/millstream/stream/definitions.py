"""What a tokenizer.json says of itself, read before an engine has it."""

from typing import Any

import numpy as np

from millstream.errors import RequestError
from millstream.records import Ids
from millstream.stream.gpt2 import byte_letters

Definition = dict[str, Any]


def refuse_chance(name: str, content: Definition) -> None:
    """Raises RequestError for a tokenizer that draws lots: a text would have other ids every time."""
    dropout = content["model"].get("dropout")
    if dropout:
        raise RequestError(
            f"tokenizer {name} has BPE dropout {dropout}: the same text gets other ids every time, so no run could be "
            'repeated or go on; set "dropout" to null in its tokenizer.json'
        )


def knows_all_text(content: Definition) -> bool:
    """Whether a BPE model has ids for every text, as it has a token for each byte.

    What becomes of unknown letters, left out or `unk_token`, is where engines differ: on "azb" the fast one gives
    [0, 1] for the vocabulary below and the reference [2].

    >>> vocabulary = {"a": 0, "b": 1, "ab": 2}
    >>> knows_all_text({"model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]}})
    False
    >>> every = {f"<0x{byte:02X}>": byte for byte in range(256)}
    >>> knows_all_text({"model": {"type": "BPE", "vocab": every, "merges": [], "byte_fallback": True}})
    True
    """
    model = content["model"]
    vocabulary = model["vocab"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False  # letters are looked up with them
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    byte_level = any(step.get("type") == "ByteLevel" for step in _steps(content.get("pre_tokenizer")))
    return byte_level and all(letter in vocabulary for letter in byte_letters().values())


def _steps(part: Definition | None) -> list[Definition]:
    """The steps of a normalizer or pre-tokenizer, those of sequences in it too."""
    if not part:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [step for each in inner for step in _steps(each)] if inner else [part]


def lengths_of(plain: dict[int, int], added: dict[str, int]) -> Ids:
    """`Tokenizer.bytes_of` from the bytes of plain tokens and the texts of added ones."""
    lengths = plain | {number: len(token.encode()) for token, number in added.items()}
    found = np.zeros(max(lengths, default=-1) + 1, np.int64)
    found[list(lengths)] = list(lengths.values())
    return found


def byte_level_lengths(content: Definition, vocabulary: dict[str, int], added: dict[str, int]) -> Ids | None:
    """Bytes of text for each id of a byte-level vocabulary, which has one letter for each byte; else None."""
    if (content.get("normalizer") or {}).get("type") not in (None, "NFC"):
        return None
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    if any(step.get("add_prefix_space") for step in _steps(content.get("pre_tokenizer"))):
        return None
    if any(token.get("lstrip") or token.get("rstrip") for token in content.get("added_tokens") or []):
        return None  # they stand for the blanks beside them too
    return lengths_of({number: len(token) for token, number in vocabulary.items() if token not in added}, added)


_KNOWN_SPLITS = (
    # cl100k and Llama 3; Qwen; o200k: none matches across the end of a word that a blank follows.
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*",
)


def cuts_safely(content: Definition) -> bool:
    """Whether text may be cut between an ASCII letter and a blank: byte-level BPE with a known split pattern only."""
    if content["model"].get("type") != "BPE" or not knows_all_text(content):
        return False
    if (content.get("normalizer") or {}).get("type") not in (None, "NFC"):
        return False
    for token in content.get("added_tokens") or []:
        spaced = any(letter.isspace() for letter in token["content"])
        if not token.get("special") and (spaced or token.get("lstrip") or token.get("rstrip")):
            return False
    steps = _steps(content.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        return False
    if kinds == ["ByteLevel"]:
        return bool(steps[0].get("use_regex", True))
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex", "")
        return steps[0].get("behavior") == "Isolated" and any(known in pattern for known in _KNOWN_SPLITS)
    return False
