"""What a pack run is asked for: checked, and split into what decides the bytes and what does not."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from millstream.errors import RequestError, setting, sized
from millstream.formats.exports import FORMATS, check_formats
from millstream.stream.bestfit import WINDOW
from millstream.stream.chat import FIELDS, LOSSES, Chat
from millstream.stream.line import STRATEGIES
from millstream.stream.overlong import OVERLONG
from millstream.stream.tokenizers import Tokenizer

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. The first group decides the bytes and may not change on resume.

    `tokenizer` None is gpt2, or none at all if `ids_field` says that the text is tokenized already. Windows are in ids:
    `window` is best-fit's; `shuffle_window`, by default as large, is for `shuffle`, which is a seed. `overlong` says
    what becomes of documents of more than `seq_len` ids: cut, truncate, drop or fault. `format` is npy or parquet, and
    with commas any other in which samples are written as well. With `chat` rows are conversations, and
    `loss` says what of them is to be learned; `chat_template` is the path of a template to take instead of the
    tokenizer's; with `allow_specials`, a text in them that spells a special token is that token.
    """

    tokenizer: str | None = None
    seq_len: int = 2048
    strategy: str = "concat"
    window: int | None = None
    max_segments: int | None = None
    shuffle: int | None = None
    shuffle_window: int | None = None
    overlong: str = "cut"
    bos: bool = False
    eos: bool = False
    bos_token: str | None = None
    eos_token: str | None = None
    remainder: str = "keep"
    pad_id: int | None = None
    pad_side: str = "right"
    text_field: str = "text"
    id_field: str = "id"
    ids_field: str | None = None
    chat: bool = False
    loss: str = "replies"
    chat_template: str | None = None
    allow_specials: bool = False
    limit: int | None = None
    validation: float = 0.0
    format: str = "npy"
    shard_size: int = 256 * MIB
    max_document: int | None = None

    workers: int | None = None
    memory: int | None = None
    on_error: str = "stop"
    engine: str = "fast"
    overwrite: bool = False
    block: int = MIB

    @property
    def tokenizer_name(self) -> str | None:
        return self.tokenizer or (None if self.ids_field else "gpt2")

    @property
    def masked(self) -> bool:
        """Whether ids carry whether they are to be learned."""
        return self.chat and self.loss != "all"


def with_named(call: str, settings: Settings | None, named: dict[str, Any]) -> Settings:
    """`settings` with some of them by name, as `call` was given them. Raises TypeError for a name that is none.

    >>> with_named("pack_to", None, {"seqlen": 5})
    Traceback (most recent call last):
    TypeError: pack_to() has no setting 'seqlen'; did you mean 'seq_len'?
    """
    known = [field.name for field in fields(Settings)]
    for name in named:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise TypeError(f"{call}() has no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return replace(settings or Settings(), **named)


def check_settings(settings: Settings) -> None:
    """Raises RequestError that says what to give instead."""
    formats(settings)

    def wrong(name: str, want: str) -> RequestError:
        value = getattr(settings, name)
        shown = sized(name, value) if name in SIZES else setting(name, value)
        return RequestError(f"{shown} does not work: {want}")

    if settings.seq_len < 1:
        raise wrong("seq_len", "a sample needs at least one id")
    memory = DEFAULT_MEMORY if settings.memory is None else settings.memory
    if settings.seq_len * 32 > memory:
        raise wrong("seq_len", f"such samples do not fit into {sized('memory', memory)}")
    for name, known in CHOICES.items():
        if getattr(settings, name) not in known:
            raise wrong(name, f"give {' or '.join(known)}")
    best_fit, shuffled = settings.strategy == "best-fit", settings.shuffle is not None
    for name, useful, what in (
        ("window", best_fit, setting("strategy", "best-fit")),
        ("max_segments", best_fit, setting("strategy", "best-fit")),
        ("shuffle_window", shuffled, setting("shuffle")),
    ):
        if getattr(settings, name) is not None and not useful:
            raise wrong(name, f"it belongs to {what}")
    for name in ("window", "max_segments", "shuffle_window", "workers", *SIZES):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise wrong(name, "give a size such as 64MiB" if name in SIZES else "give at least 1")
    if settings.shuffle is not None and not 0 <= settings.shuffle < 1 << 64:
        raise wrong("shuffle", "give a seed from 0 to 2^64 - 1")
    if not 0 <= settings.validation < 1:
        raise wrong("validation", "give a fraction from 0 to below 1, such as 0.01")
    if settings.limit is not None and settings.limit < 0:
        raise wrong("limit", "give a number of documents")
    _check_fields(settings, wrong)


SIZES = ("memory", "shard_size", "max_document")
CHOICES: dict[str, Sequence[str]] = {
    "strategy": STRATEGIES,
    "remainder": ("keep", "drop", "pad"),
    "overlong": OVERLONG,
    "pad_side": ("right", "left"),
    "on_error": ("stop", "skip"),
    "engine": ("fast", "reference"),
    "loss": LOSSES,
}


def _check_fields(settings: Settings, wrong: Callable[[str, str], RequestError]) -> None:
    chat = setting("chat")
    if settings.chat and settings.ids_field:
        raise RequestError(f"{chat} renders text, and with {setting('ids_field')} there is none; give one of them")
    if not settings.chat and (settings.loss != "replies" or settings.chat_template or settings.allow_specials):
        names = f"{setting('loss')}, {setting('chat_template')} and {setting('allow_specials')}"
        raise RequestError(f"{names} belong to {chat}")
    if settings.chat and settings.id_field in FIELDS:
        raise wrong("id_field", f"with {chat} that is a part of the conversation")
    if not settings.chat and (settings.ids_field or settings.text_field) == settings.id_field:
        raise wrong("id_field", "a document's id cannot be its text as well")


DEFAULT_MAX_DOCUMENT = 32 * MIB
DEFAULT_MEMORY = 1024 * MIB  # and what the tokenizer needs, see memory.py


def identity(settings: Settings, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the bytes, as the manifest keeps it."""

    def special(wanted: bool, what: str, named: str | None, own: str | None) -> int | None:
        if not wanted and named is None:
            return None
        if tokenizer is None:
            raise RequestError(f"{setting(what)} needs a tokenizer that names the token; give {setting('tokenizer')}")
        return tokenizer.special_id(named or own, what)

    eos = special(settings.eos, "eos", settings.eos_token, tokenizer.eos_token if tokenizer else None)
    bos = special(settings.bos, "bos", settings.bos_token, tokenizer.bos_token if tokenizer else None)
    pad = settings.pad_id
    if pad is None and (settings.strategy != "concat" or settings.remainder == "pad"):
        if tokenizer is None or (tokenizer.eos_token is None and eos is None):
            raise RequestError(
                f"samples have to be padded, and no EOS token is known to do it; give {setting('pad_id')}"
            )
        pad = eos if eos is not None else tokenizer.special_id(tokenizer.eos_token, "eos")
    largest = tokenizer.vocab_size - 1 if tokenizer else 0xFFFFFFFF
    if pad is not None and not 0 <= pad <= largest:
        raise RequestError(f"{setting('pad_id', pad)} is no id of the vocabulary: give one from 0 to {largest:,}")
    window, shuffle_window = windows(settings)
    base, exports = formats(settings)
    check_formats([base, *exports], tokenizer.vocab_size if tokenizer else None, settings.masked)
    chat = chat_of(settings, tokenizer)
    explicit = settings.max_document is not None
    engine = tokenizer and f"{tokenizer.engine_name} {version(tokenizer.engine_name)}"
    return {
        "tokenizer": tokenizer
        and {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "engine": engine,
        "seq_len": settings.seq_len,
        "strategy": settings.strategy,
        "window": window,
        "max_segments": settings.max_segments,
        "shuffle": settings.shuffle,
        "shuffle_window": shuffle_window,
        "overlong": None if settings.overlong == "cut" else settings.overlong,
        "bos_id": bos,
        "eos_id": eos,
        "remainder": settings.remainder,
        "pad_id": pad,
        "pad_side": settings.pad_side,
        "text_field": settings.text_field,
        "id_field": settings.id_field,
        "ids_field": settings.ids_field,
        "chat": chat and {"loss": chat.loss, "sha256": chat_sha256(chat)},
        "limit": settings.limit,
        "validation": settings.validation,
        "format": base,
        "exports": exports or None,
        "shard_size": settings.shard_size,
        "max_document": {
            "bytes": settings.max_document or DEFAULT_MAX_DOCUMENT,
            "plain_text_too": explicit,
        },
    }


def chat_of(settings: Settings, tokenizer: Tokenizer | None) -> Chat | None:
    """How rows become text, if they are conversations. Raises RequestError for a template that cannot be read."""
    if not settings.chat or tokenizer is None:
        return None
    chat = replace(tokenizer.chat, loss=settings.loss, allow=settings.allow_specials)
    if settings.chat_template:
        try:
            with open(settings.chat_template, encoding="utf-8") as file:
                chat = replace(chat, templates=(("default", file.read()),))
        except OSError as error:
            raise RequestError(f"{setting('chat_template', settings.chat_template)}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{setting('chat_template', settings.chat_template)} is not UTF-8: {error.reason}"
            ) from error
    chat.check()
    return chat


def chat_sha256(chat: Chat) -> str:
    """What identifies how conversations become text."""
    return hashlib.sha256(repr(chat).encode()).hexdigest()


def columns_of(settings: Settings) -> tuple[str, ...]:
    """The columns that are read of Parquet files, the id's last."""
    content = FIELDS if settings.chat else (settings.ids_field or settings.text_field,)
    return (*content, settings.id_field)


def column_flag(settings: Settings) -> str:
    """What to do if none of these columns is there."""
    if settings.chat:
        return f"{setting('chat')} needs messages, or prompt and completion"
    return f"name the one to read with {setting('ids_field' if settings.ids_field else 'text_field')}"


def formats(settings: Settings) -> tuple[str, list[str]]:
    """(what the run's own shards are, what is written besides) of its `format`, one or several with commas.

    >>> formats(Settings(format="mds,parquet,npy,litdata"))
    ('parquet', ['npy', 'mds', 'litdata'])
    """
    named = [name.strip() for name in settings.format.split(",")]
    for name in named:
        if name not in FORMATS:
            raise RequestError(f"{setting('format', name)} does not work: give one or more of {', '.join(FORMATS)}")
    base = next((name for name in named if name in ("npy", "parquet")), "npy")
    return base, [name for name in FORMATS if name in named and name != base]


def windows(settings: Settings) -> tuple[int | None, int | None]:
    """(ids in best-fit's window, ids in the shuffle's window), None where there is none.

    >>> windows(Settings(strategy="best-fit", window=1000, shuffle=7))
    (1000, 1000)
    """
    window = settings.window or WINDOW
    best_fit = window if settings.strategy == "best-fit" else None
    shuffled = (settings.shuffle_window or window) if settings.shuffle is not None else None
    return best_fit, shuffled


def paces(fraction: float) -> tuple[float, float]:
    """(train, validation): how large a subset's shards and windows are, so that those of both fill at the same pace.

    Neither then keeps the other from going on late after a stop.

    >>> paces(0.2)
    (1.0, 0.25)
    """
    return min(1.0, (1 - fraction) / fraction) if fraction else 1.0, min(1.0, fraction / (1 - fraction))
