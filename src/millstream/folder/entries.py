"""What a run folder's manifest and records say, as types: a file, an output shard, a remainder, an input."""

import json
from collections.abc import Iterator

import msgspec


def _earlier() -> int:
    """The default of a count that folders of millstream/1 have not: 0, and written all the same."""
    return 0


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the folder, named from it."""

    name: str
    bytes: int
    sha256: str


class Files(msgspec.Struct, frozen=True, omit_defaults=True):
    """The files of an output shard; `loss`, its loss mask, if it is one of its own."""

    samples: FileEntry
    segments: FileEntry
    documents: FileEntry
    loss: FileEntry | None = None

    def __iter__(self) -> Iterator[FileEntry]:
        found = (self.samples, self.segments, self.documents, self.loss)
        return (file for file in found if file)


class ShardEntry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An output shard: what is in it, counted while it was written. `learned` only with a loss mask."""

    number: int
    samples: int
    padding: int
    segments: int
    documents: int
    empty: int
    split: int
    truncated: int = msgspec.field(default_factory=_earlier)
    left_out: int = msgspec.field(default_factory=_earlier)
    cut_off: int = msgspec.field(default_factory=_earlier)
    learned: int | None = None
    files: Files


class RemainderEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ids that filled no sample: `policy` says what became of them, and they have a file where they were kept."""

    policy: str
    ids: int
    learned: int | None = None
    name: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    loss: FileEntry | None = None

    @property
    def file(self) -> FileEntry | None:
        """The file that they are in."""
        if self.name is None or self.bytes is None or self.sha256 is None:
            return None
        return FileEntry(self.name, self.bytes, self.sha256)

    def __iter__(self) -> Iterator[FileEntry]:
        return (file for file in (self.file, self.loss) if file)


class InputEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input shard: its name and kind and, once it was read, what identifies it (`corpus.sources.fingerprint`).

    millstream/1 had no kind, and a `sha256` of the whole file.
    """

    name: str
    kind: str | None = None
    bytes: int | None = None
    ends_sha256: str | None = None
    sha256: str | None = None
    unreadable: bool = False


class SubsetEntry(msgspec.Struct, frozen=True):
    """The output shards of a subset, in order, and what became of the ids that fill no sample."""

    shards: list[ShardEntry]
    remainder: RemainderEntry

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def files(self) -> Iterator[FileEntry]:
        for shard in self.shards:
            yield from shard.files
        yield from self.remainder


class TokenizerEntry(msgspec.Struct, frozen=True):
    """A tokenizer: what it was called, and the SHA-256 of its definition."""

    name: str
    sha256: str
    vocab_size: int


class ChatEntry(msgspec.Struct, frozen=True):
    """How conversations became text: which part of them is to be learned, and the SHA-256 of all that decides it."""

    loss: str
    sha256: str | None = None


class MaxDocument(msgspec.Struct, frozen=True):
    """How long a document may be; of plain text too, if that was asked for."""

    bytes: int
    plain_text_too: bool


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """All that decided a run's bytes, as given and as found out. millstream/1 had less.

    `writer`: what wrote the Parquet files, which name it.
    """

    tokenizer: TokenizerEntry | None
    engine: str | None
    writer: str | msgspec.UnsetType = msgspec.UNSET
    seq_len: int
    strategy: str
    window: int | None = None
    max_segments: int | None = None
    shuffle: int | None = None
    shuffle_window: int | None = None
    overlong: str | None = None
    bos_id: int | None
    eos_id: int | None
    remainder: str
    pad_id: int | None
    pad_side: str
    text_field: str
    id_field: str
    ids_field: str | None
    chat: ChatEntry | None = None
    limit: int | None = None
    validation: int | float
    format: str
    exports: list[str] | None = None
    shard_size: int
    max_document: MaxDocument

    @property
    def in_parquet(self) -> dict[str, str]:
        """As Parquet files of samples have it: without what wrote them, which they name themselves."""
        told = msgspec.to_builtins(msgspec.structs.replace(self, writer=msgspec.UNSET))
        return {"millstream": json.dumps(told)}

    @property
    def padded(self) -> bool:
        """Whether samples can have padding."""
        return self.strategy != "concat" or self.remainder == "pad"

    @property
    def masked(self) -> bool:
        """Whether the run stores which ids are to be learned."""
        return self.chat is not None and self.chat.loss != "all"

    @property
    def vocab_size(self) -> int | None:
        return self.tokenizer.vocab_size if self.tokenizer else None

    @property
    def dtype(self) -> str:
        """The type of ids in files."""
        return "<u2" if self.vocab_size is not None and self.vocab_size <= 1 << 16 else "<u4"


class Ledger(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came in and where each of it went, by name; `learned` with a loss mask."""

    documents: dict[str, int]
    ids: dict[str, int]
    samples: int
    faults: dict[str, int]
    learned: dict[str, int] | None = None


class ExportEntry(msgspec.Struct, frozen=True):
    """What one format was given and what became of it, in ids; and its files."""

    format: str
    ids: int
    written: int
    left_out: int
    padding: int
    files: list[FileEntry]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json` of a finished run, but for its own SHA-256."""

    format: str
    complete: bool
    settings: Identity
    tokenizer_file: FileEntry | None
    inputs: list[InputEntry]
    subsets: dict[str, SubsetEntry]
    faults: FileEntry | None
    ledger: Ledger
    exports: list[ExportEntry] = []

    @property
    def samples(self) -> int:
        return sum(subset.samples for subset in self.subsets.values())

    @property
    def files(self) -> Iterator[FileEntry]:
        """All files that it names."""
        for subset in self.subsets.values():
            yield from subset.files
        for export in self.exports:
            yield from export.files
        yield from (file for file in (self.faults, self.tokenizer_file) if file)
