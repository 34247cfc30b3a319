"""Tokenizer engines: texts in, ids out. One is fast, the others are what it is compared with."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from millstream.errors import Unusable
from millstream.records import Ids

# One thread an engine: workers are processes, and two of them at one thread each beat one with two threads. It is read
# when the engine is first used; the usual RAYON_NUM_THREADS has no effect on it.
os.environ["FASTOKENS_BPE_THREADS"] = "1"


class TokenizerEngine(Protocol):
    name: str

    def encode(self, texts: Sequence[str], specials: bool = False) -> tuple[Ids, Ids]:
        """(ids u32 of all texts, back to back; length i64 of each).

        What spells a special token in a text is ordinary text, or with `specials` that token. Raises Unusable if one of
        them cannot be encoded; the engine is as good as before.
        """

    def decode(self, ids: Sequence[int]) -> str: ...


@contextmanager
def refusals(engine: str, what: str = "encode") -> Iterator[None]:
    """What a library raises, as Unusable: a panic in Rust is no Exception, and its class can be sent to no process."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not (panic or isinstance(error, Exception)) or isinstance(error, MemoryError):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unusable("tokenizer", f"{engine} cannot {what} it: {said[:300]}") from error


class Fastokens:
    """The fast engine: its ids and offsets come back as two buffers, without an object per token."""

    name = "fastokens"

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str], specials: bool = False) -> tuple[Ids, Ids]:
        with refusals(self.name):
            ids, offsets = self.tokenizer.encode_batch_flat(texts, split_special_tokens=not specials)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


class HuggingFace:
    """`tokenizers`: the reference for every tokenizer.json, and the engine for those that the fast one cannot load."""

    name = "tokenizers"

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer as Definition

        with refusals(self.name, "load"):
            self.tokenizer = Definition.from_str(definition)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts: Sequence[str], specials: bool = False) -> tuple[Ids, Ids]:
        self.tokenizer.encode_special_tokens = not specials
        with refusals(self.name):
            found = [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return np.fromiter((i for ids in found for i in ids), np.uint32, int(lengths.sum())), lengths

    def offsets(self, text: str, specials: bool) -> tuple[Ids, Ids]:
        """(ids u32, the letters that each stands for: i64 (ids, 2), from and to before)."""
        self.tokenizer.encode_special_tokens = not specials
        with refusals(self.name):
            found = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.uint32), np.array(found.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class Tiktoken:
    """tiktoken: the reference where the merges are OpenAI's."""

    name = "tiktoken"

    def __init__(self, name: str, pat_str: str, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        import tiktoken

        self.encoding = tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=specials)

    def encode(self, texts: Sequence[str], specials: bool = False) -> tuple[Ids, Ids]:
        allowed: Any = "all" if specials else set()
        given: Any = {"allowed_special": allowed, "disallowed_special": ()}
        with refusals(self.name):
            found = [self.encoding.encode_to_numpy(text, **given) for text in texts]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return np.concatenate(found) if found else np.zeros(0, np.uint32), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids))


def fastokens_of(definition: str) -> TokenizerEngine | None:
    """The fast engine for a tokenizer.json; None if it cannot load it."""
    import fastokens

    try:
        with refusals(Fastokens.name, "load"):
            return Fastokens(fastokens.Tokenizer.from_json_str(definition))
    except Unusable:
        return None
