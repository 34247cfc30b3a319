"""GPT-2's tokenizer.json, made from the merges file that lies in the package: no download."""

import json
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The symbol of each byte, in GPT-2's id order: printable bytes stand for themselves and come first.

    >>> byte_symbols()[:3], byte_symbols()[220]
    (['!', '"', '#'], 'Ġ')
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def tokenizer_json(merges_file: Path) -> str:
    """The tokenizer.json text that GPT-2's `vocab.bpe` stands for: 256 bytes, one id a merge, one special."""
    lines = merges_file.read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [line.split(" ") for line in lines]
    names = [*byte_symbols(), *(left + right for left, right in merges), END_OF_TEXT]
    special = {"id": len(names) - 1, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {name: number for number, name in enumerate(names)}, "merges": merges}  # fmt: skip
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    })  # fmt: skip
