"""What a document may be, and how much of the corpus is read at once."""

from dataclasses import dataclass

from millstream.corpus.sources import READ

BLOCK = READ
Buffer = bytes | memoryview


@dataclass(frozen=True)
class Limits:
    """`document`: bytes of the longest document that is held whole. `text`: the same for plain text that can be cut
    (None: no limit). `cut`: whether the tokenizer allows cutting plain text. `endless`: plain text that is
    not cut is held whole, however long it is."""

    document: int
    text: int | None = None
    cut: bool = False
    endless: bool = False


@dataclass(frozen=True)
class Manner:
    """How the corpus is read. `columns` are those to take from Parquet files: of the text, and last of the id. `block`:
    bytes of a slice, about. `hashed`: whether what is read is hashed, so that a later run can tell that it changed."""

    limits: Limits
    columns: tuple[str, ...]
    block: int = BLOCK
    hashed: bool = True


def too_long(size: int, limit: int, what: str = "line") -> tuple[str, str]:
    return "too_long", f"a {what} of {size:,} bytes; max-document is {limit:,}"
