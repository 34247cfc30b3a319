"""Tokenizers by name: a fast engine, a reference engine that checks it, and what packing has to know of them."""

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import msgspec
import numpy as np

from millstream.errors import RequestError, setting
from millstream.records import Ids
from millstream.store import as_path, file_at, kind_at
from millstream.stream import gpt2
from millstream.stream.chat import Chat, templates_of
from millstream.stream.definitions import byte_level_lengths, cuts_safely, knows_all_text, lengths_of, refuse_chance
from millstream.stream.encoders import Fastokens, HuggingFace, Tiktoken, TokenizerEngine, fastokens_of

TIKTOKEN_NAMES = ("cl100k_base", "o200k_base")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as packing sees it; `load_tokenizer` makes one.

    `vocab_size` is the largest id + 1, `sha256` identifies what decides the ids, `safe_cuts` tells whether long plain
    text may be cut between a letter and a blank, `reference` builds the engine that checks `engine` (None: it is the
    reference itself), `definition` is the tokenizer.json to keep with a run so that it can be decoded anywhere.
    `again` makes the same one anywhere, whatever is there; it can be sent.
    `chat` is how it renders conversations, `token_bytes` makes `bytes_of`, and `normalized` is the Unicode form that
    text is brought into first, if any; with `leaves_out`, letters may have no id at all, and `unknown` is the id that
    stands for any unknown text.
    """

    name: str
    engine_name: str
    make_engine: Callable[[], TokenizerEngine]
    reference: Callable[[], TokenizerEngine] | None
    vocab_size: int
    sha256: str
    specials: dict[str, int]
    bos_token: str | None = None
    eos_token: str | None = None
    safe_cuts: bool = False
    definition: str | None = None
    chat: Chat = field(default_factory=Chat)
    token_bytes: Callable[[], Ids | None] = lambda: None
    normalized: str | None = None
    leaves_out: bool = False
    unknown: int | None = None
    again: "Callable[[], Tokenizer] | None" = None

    @cached_property
    def bytes_of(self) -> Ids | None:
        """How many bytes of text each id stands for, i64 (ids,); None where that cannot be told from an id."""
        return self.token_bytes()

    @cached_property
    def engine(self) -> TokenizerEngine:
        """The engine, made on first use: loading one takes longer than all else, and not every process encodes."""
        return self.make_engine()

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """uint16 if every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def reference_name(self) -> str | None:
        """The name of the engine that checks `engine`; None where there is no other."""
        if self.reference is None:
            return None
        return Tiktoken.name if self.definition is None else HuggingFace.name

    @cached_property
    def reference_engine(self) -> TokenizerEngine:
        """The engine that checks `engine`, made on first use; `engine` itself where there is no other."""
        return self.reference() if self.reference else self.engine

    def special_id(self, token: str | None, what: str) -> int:
        """The id of a special token (or of any token spelled like that)."""
        if token is None:
            raise RequestError(f"tokenizer {self.name} names no {what} token; name one with {setting(f'{what}_token')}")
        found = self.specials.get(token)
        if found is None:
            known = ", ".join(sorted(self.specials)[:8]) or "none"
            raise RequestError(f"tokenizer {self.name} has no token {token!r}; its special tokens: {known}")
        return found


# By name ------------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Tokenizer:
    """`gpt2`, a tiktoken name, the path of a tokenizer.json or of a folder with one, or a hub id ("org/name").

    Raises RequestError if there is none.

    >>> load_tokenizer("gpt2").engine.encode(["Hello world"])[0].tolist()
    [15496, 995]
    """
    if not isinstance(name, str | os.PathLike):
        raise RequestError(f"{setting('tokenizer')} {name!r:.60} does not work: give a name or a path")
    name = os.fspath(name)
    if name == "gpt2":
        return _gpt2()
    if name in TIKTOKEN_NAMES:
        return _tiktoken(name)
    path = os.path.join(name, "tokenizer.json") if kind_at(name) == "folder" else name
    if kind_at(path) == "file":
        return _from_files(os.path.basename(os.path.abspath(name)), path)
    if kind_at(name) == "folder":
        raise RequestError(f"the folder {name} has no tokenizer.json; save one there with save_pretrained()")
    if name.count("/") == 1 and not name.startswith((".", "/")) and not name.endswith(".json"):
        return _from_hub(name)
    raise RequestError(
        f"unknown tokenizer {name!r}: give gpt2, {', '.join(TIKTOKEN_NAMES)}, a tokenizer.json, a folder with one, "
        "or a hub id such as org/name"
    )


@cache
def _gpt2() -> Tokenizer:
    merges = gpt2.read_merges()
    tokens = gpt2.tokens_of(merges)
    data = msgspec.json.encode(gpt2.definition_of(merges, tokens))
    definition = data.decode()
    specials = {"<|endoftext|>": 50256}

    def engine() -> TokenizerEngine:
        fast = fastokens_of(definition)
        assert fast is not None, "the pinned engine loads GPT-2"
        return fast

    def reference() -> TokenizerEngine:
        return Tiktoken("gpt2", gpt2.PATTERN, gpt2.ranks_of(tokens), specials)

    return Tokenizer(
        "gpt2",
        Fastokens.name,
        engine,
        reference,
        vocab_size=50257,
        sha256=hashlib.sha256(data).hexdigest(),
        specials=specials,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        safe_cuts=True,
        chat=_chat(_OPENAI, specials),
        token_bytes=lambda: lengths_of({n: len(token) for n, token in enumerate(tokens)}, specials),
        again=_gpt2,
    )


@cache
def _tiktoken(name: str) -> Tokenizer:
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

    try:
        parts = ENCODING_CONSTRUCTORS[name]()
    except Exception as error:
        raise RequestError(
            f"tokenizer {name} is not on this machine and could not be downloaded "
            f"({type(error).__name__}); put its file into the folder named by TIKTOKEN_CACHE_DIR"
        ) from error
    return _of_ranks(name, parts["pat_str"], parts["mergeable_ranks"], parts["special_tokens"])


def _of_ranks(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> Tokenizer:
    """One of tiktoken's, by what it is made of."""
    import fastokens

    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())

    def engine() -> TokenizerEngine:
        with as_path(lines, ".tiktoken") as path:
            return Fastokens(fastokens.Tokenizer.from_tiktoken(path, encoding=name))

    decider = lines + json.dumps([pattern, specials]).encode()
    return Tokenizer(
        name,
        Fastokens.name,
        engine,
        lambda: Tiktoken(name, pattern, ranks, specials),
        vocab_size=max(*ranks.values(), *specials.values()) + 1,
        sha256=hashlib.sha256(decider).hexdigest(),
        specials=specials,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        safe_cuts=True,
        chat=_chat(_OPENAI, specials),
        token_bytes=lambda: lengths_of({rank: len(token) for token, rank in ranks.items()}, specials),
        again=partial(_of_ranks, name, pattern, ranks, specials),
    )


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(name, "tokenizer.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"no tokenizer {name!r}: no such path here, and the hub did not give its tokenizer.json ({reason})"
        ) from error
    for other in (_CONFIG, _TEMPLATE):
        with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, OSError, ValueError):
            hf_hub_download(name, other)
    return _from_files(name, path)


_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def _from_files(name: str, path: str) -> Tokenizer:
    """From a tokenizer.json and what may stand beside it: tokenizer_config.json, chat_template.jinja."""
    config: Any = {}
    folder = os.path.dirname(path)
    try:
        definition = file_at(path).text()
        path = os.path.join(folder, _CONFIG)
        if kind_at(path) == "file":
            config = json.loads(file_at(path).text())
        if not isinstance(config, dict):
            raise RequestError(f"{path} is no tokenizer_config.json: it holds no object")
        path = os.path.join(folder, _TEMPLATE)
        if kind_at(path) == "file":
            config["chat_template"] = file_at(path).text()
    except ValueError as error:  # neither UTF-8 nor JSON
        raise RequestError(f"{path} is no {os.path.basename(path)} that can be read: {error}") from error
    return _from_texts(name, definition, json.dumps(config))


@cache
def _from_texts(name: str, definition: str, config: str) -> Tokenizer:
    """Kept by content: a file that has changed is another tokenizer."""
    return from_definition(name, definition, json.loads(config))


def from_definition(
    name: str, definition: str, config: dict[str, Any] | None = None, *, decodes_only: bool = False
) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json, and the contents of its tokenizer_config.json.

    Raises RequestError for one that cannot be read, or that draws lots, unless it `decodes_only`.
    """
    try:
        content = json.loads(definition)
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        reference = HuggingFace(definition)
    except Exception as error:
        raise RequestError(f"{name} is no tokenizer.json that can be read: {error}") from error
    if not decodes_only:
        refuse_chance(name, content)
    vocabulary = reference.tokenizer.get_vocab(with_added_tokens=True)
    fast = fastokens_of(definition) if knows_all_text(content) else None
    config = config or {}
    control = {t["content"]: t["id"] for t in content.get("added_tokens") or [] if t.get("special")}
    return Tokenizer(
        name,
        (fast or reference).name,
        lambda: fast or reference,
        (lambda: HuggingFace(definition)) if fast else None,
        vocab_size=max(vocabulary.values(), default=0) + 1,
        sha256=hashlib.sha256(definition.encode()).hexdigest(),
        specials={token: number for token, number in vocabulary.items() if token in added} | added,
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
        safe_cuts=cuts_safely(content),
        definition=definition,
        chat=_chat(config, control),
        token_bytes=lambda: byte_level_lengths(content, vocabulary, added),
        normalized=(content.get("normalizer") or {}).get("type"),
        leaves_out=not knows_all_text(content),
        unknown=vocabulary.get(content["model"].get("unk_token") or ""),
        again=partial(from_definition, name, definition, config),
    )


_OPENAI = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _chat(config: dict[str, Any], control: dict[str, int]) -> Chat:
    """How conversations are rendered, as tokenizer_config.json says it; `control` are the special tokens."""
    named = ((name, _token_text(config.get(name))) for name in _NAMED_TOKENS)
    variables = tuple((name, token) for name, token in named if token)
    return Chat(templates_of(config.get("chat_template")), variables, tuple(control))


def _token_text(entry: Any) -> str | None:
    """tokenizer_config.json writes a token as its text or as an object with it under "content"."""
    return entry.get("content") if isinstance(entry, dict) else entry


def available() -> list[tuple[str, str]]:
    """(name, where it is) of the tokenizers known by name, and of those in the hub's cache on this machine."""
    found = [("gpt2", "in the package, works offline")]
    for name in TIKTOKEN_NAMES:
        here = _in_tiktoken_cache(name)
        found.append((name, "in tiktoken's cache" if here else "tiktoken downloads it on first use"))
    return found + [(name, "in the hub's cache") for name in _in_hub_cache()]


def _in_tiktoken_cache(name: str) -> bool:
    from tiktoken import load
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

    def no_network(blobpath: str) -> bytes:
        raise FileNotFoundError

    read_file, load.read_file = load.read_file, no_network
    try:
        ENCODING_CONSTRUCTORS[name]()
    except FileNotFoundError:
        return False
    finally:
        load.read_file = read_file
    return True


def _in_hub_cache() -> list[str]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(
        repo.repo_id
        for repo in repos
        if any(file.file_name == "tokenizer.json" for revision in repo.revisions for file in revision.files)
    )
