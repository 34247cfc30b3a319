"""What a pack run is asked for: checked, and split into what decides the bytes and what does not."""

import hashlib
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from millstream.errors import RequestError, setting, sized
from millstream.exports import FORMATS, check_formats
from millstream.folder.entries import ChatEntry, Identity, MaxDocument, TokenizerEntry
from millstream.options import Kind, is_count, is_number, misfits, one_of, or_none
from millstream.store import file_at
from millstream.stream.bestfit import WINDOW
from millstream.stream.chat import FIELDS, LOSSES, Chat
from millstream.stream.line import KINDS as PACKING_KINDS
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
    tokenizer's; with `allow_specials`, a text in them that spells a special token is that token. `spill` is the folder
    for what several workers leave for one another (None: within
    the run folder, or in Ray's object store). `on` says where the workers are: local, ray, or the address of a Ray
    cluster. With `join` others may run the same at once, in the same folder; one of them that is not heard of
    for `lease` seconds is taken for dead.
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
    spill: str | None = None
    on: str = "local"
    on_error: str = "stop"
    engine: str = "fast"
    overwrite: bool = False
    join: bool = False
    lease: float = 30.0
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


_ADDRESS = re.compile(r"(ray://)?[^/\s]+:\d+")
SIZES = ("memory", "shard_size", "max_document")
KINDS = {
    **PACKING_KINDS,
    "on": Kind(
        lambda on: isinstance(on, str) and (on in ("local", "ray") or bool(_ADDRESS.fullmatch(on))),
        "give local, ray, HOST:PORT or ray://HOST:PORT",
    ),
    "on_error": one_of(("stop", "skip")),
    "engine": one_of(("fast", "reference")),
    "loss": one_of(LOSSES),
    "workers": or_none(Kind(is_count, "give at least 1")),
    **dict.fromkeys(SIZES, or_none(Kind(is_count, "give a size such as 64MiB"))),
    "validation": Kind(
        lambda fraction: is_number(fraction) and 0 <= fraction < 1, "give a fraction from 0 to below 1, such as 0.01"
    ),
    "lease": Kind(lambda lease: is_number(lease) and lease >= 1, "give at least 1, in seconds, such as 30"),
    "limit": or_none(Kind(lambda limit: is_count(limit, 0), "give a number of documents")),
}
"""What each may be; the rest is looked at where it is read."""


def check_settings(settings: Settings) -> None:
    """Raises RequestError that says what to give instead."""
    formats(settings)
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    for name, _, want in misfits(KINDS, values):
        raise _wrong(settings, name, want)
    memory = DEFAULT_MEMORY if settings.memory is None else settings.memory
    if settings.seq_len * 32 > memory:
        raise _wrong(settings, "seq_len", f"such samples do not fit into {sized('memory', memory)}")
    _check_owners(settings)
    _check_fields(settings)


def _wrong(settings: Settings, name: str, want: str) -> RequestError:
    value = getattr(settings, name)
    shown = sized(name, value) if name in SIZES and isinstance(value, int) else setting(name, value)
    return RequestError(f"{shown} does not work: {want}")


def _check_owners(settings: Settings) -> None:
    """Settings that say how something is done that is not wanted."""
    if settings.join and settings.on != "local":
        raise _wrong(settings, "on", f"with {setting('join', True)} each machine has its own workers; give one of them")
    best_fit, shuffled = settings.strategy == "best-fit", settings.shuffle is not None
    for name, useful, owner in (
        ("window", best_fit, setting("strategy", "best-fit")),
        ("max_segments", best_fit, setting("strategy", "best-fit")),
        ("shuffle_window", shuffled, setting("shuffle")),
    ):
        if getattr(settings, name) is not None and not useful:
            raise _wrong(settings, name, f"it belongs to {owner}")
    if settings.lease != Settings.lease and not settings.join:
        raise _wrong(settings, "lease", f"it belongs to {setting('join', True)}")


def _check_fields(settings: Settings) -> None:
    chat = setting("chat")
    if settings.chat and settings.ids_field:
        raise RequestError(f"{chat} renders text, and with {setting('ids_field')} there is none; give one of them")
    if not settings.chat and (settings.loss != "replies" or settings.chat_template or settings.allow_specials):
        names = f"{setting('loss')}, {setting('chat_template')} and {setting('allow_specials')}"
        raise RequestError(f"{names} belong to {chat}")
    if settings.chat and settings.id_field in FIELDS:
        raise _wrong(settings, "id_field", f"with {chat} that is a part of the conversation")
    if not settings.chat and (settings.ids_field or settings.text_field) == settings.id_field:
        raise _wrong(settings, "id_field", "a document's id cannot be its text as well")


DEFAULT_MAX_DOCUMENT = 32 * MIB
DEFAULT_MEMORY = 1024 * MIB  # and what the tokenizer needs, see memory.py


def identity(settings: Settings, tokenizer: Tokenizer | None) -> Identity:
    """What decides the bytes, as the manifest keeps it."""
    bos = _special(tokenizer, "bos", wanted=settings.bos, named=settings.bos_token)
    eos = _special(tokenizer, "eos", wanted=settings.eos, named=settings.eos_token)
    pad = _padding(settings, tokenizer, eos)
    window, shuffle_window = windows(settings)
    base, exports = formats(settings)
    check_formats([base, *exports], tokenizer.vocab_size if tokenizer else None, settings.masked)
    chat = chat_of(settings, tokenizer)
    explicit = settings.max_document is not None
    entry = TokenizerEntry(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size) if tokenizer else None
    engine = f"{tokenizer.engine_name} {version(tokenizer.engine_name)}" if tokenizer else None
    return Identity(
        tokenizer=entry,
        engine=engine,
        writer=f"pyarrow {version('pyarrow')}",
        seq_len=settings.seq_len,
        strategy=settings.strategy,
        window=window,
        max_segments=settings.max_segments,
        shuffle=settings.shuffle,
        shuffle_window=shuffle_window,
        overlong=None if settings.overlong == "cut" else settings.overlong,
        bos_id=bos,
        eos_id=eos,
        remainder=settings.remainder,
        pad_id=pad,
        pad_side=settings.pad_side,
        text_field=settings.text_field,
        id_field=settings.id_field,
        ids_field=settings.ids_field,
        chat=ChatEntry(chat.loss, chat_sha256(chat)) if chat else None,
        limit=settings.limit,
        validation=settings.validation,
        format=base,
        exports=exports or None,
        shard_size=settings.shard_size,
        max_document=MaxDocument(settings.max_document or DEFAULT_MAX_DOCUMENT, explicit),
    )


def _special(tokenizer: Tokenizer | None, what: str, *, wanted: bool, named: str | None) -> int | None:
    """The id of BOS or EOS, which a run wants or names. Raises RequestError if there is none."""
    if not wanted and named is None:
        return None
    if tokenizer is None:
        raise RequestError(f"{setting(what)} needs a tokenizer that names the token; give {setting('tokenizer')}")
    own = tokenizer.eos_token if what == "eos" else tokenizer.bos_token
    return tokenizer.special_id(named or own, what)


def _padding(settings: Settings, tokenizer: Tokenizer | None, eos: int | None) -> int | None:
    """The id that pads, if samples can have padding. Raises RequestError if there is none, or it is no id."""
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
    return pad


def chat_of(settings: Settings, tokenizer: Tokenizer | None) -> Chat | None:
    """How rows become text, if they are conversations. Raises RequestError for a template that cannot be read."""
    if not settings.chat or tokenizer is None:
        return None
    chat = replace(tokenizer.chat, loss=settings.loss, allow=settings.allow_specials)
    if settings.chat_template:
        try:
            chat = replace(chat, templates=(("default", file_at(settings.chat_template).text()),))
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
