"""What a file is: told from its name, and where that leaves it open, from how it begins."""

import json
import os

from millstream.records import DocumentFault

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
"""Endings that say what a file is. A folder is searched for these alone."""

PACKED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks of encodings that are not read; the longer ones first, as one begins like a shorter one."""

_UNPACK = {
    ".xz": "xz -dc",
    ".lzma": "xz -dc",
    ".bz2": "bzip2 -dc",
    ".lz4": "lz4 -dc",
    ".br": "brotli -dc",
    ".z": "gzip -dc",
    ".sz": "snzip -dc",
}
_NO_TEXT = {
    **dict.fromkeys((".csv", ".tsv", ".psv", ".xls", ".xlsx", ".ods"), "is a table: make it Parquet or JSONL first"),
    **dict.fromkeys(
        (".arrow", ".feather", ".ipc", ".orc", ".avro", ".h5", ".hdf5", ".tfrecord", ".tfrecords", ".sqlite", ".db"),
        "cannot be read: make it Parquet or JSONL first",
    ),
    **dict.fromkeys(
        (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"),
        "is an archive: unpack it and name its folder",
    ),
    **dict.fromkeys(
        (".pdf", ".epub", ".djvu", ".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx"),
        "is laid out in pages: take its text out first, as pdftotext or pandoc do",
    ),
    **dict.fromkeys((".warc", ".wet", ".wat", ".arc"), "is a web archive: take its text out into JSONL first"),
}


def ending_of(name: str) -> tuple[str, str | None]:
    """(ending, how it is packed) of a file's name.

    >>> ending_of("a/b.JSON.gz"), ending_of("c"), ending_of("d.jsonl.xz")
    (('.json', 'gzip'), ('', None), ('.xz', None))
    """
    stem, ending = os.path.splitext(os.path.basename(name.lower()))
    packed = PACKED.get(ending)
    return (os.path.splitext(stem)[1] if packed else ending), packed


def known_kind(name: str) -> str | None:
    """What a file is, if its name says so.

    >>> known_kind("a.jsonl.gz"), known_kind("b.json"), known_kind("c.parquet.gz")
    ('jsonl', None, None)
    """
    ending, packed = ending_of(name)
    kind = KINDS.get(ending)
    return None if kind == "parquet" and packed else kind


def refusal(path: str) -> str | None:
    """Why a file of this name cannot be read, and what to do; None if it may be.

    >>> refusal("x.jsonl.xz")
    'x.jsonl.xz cannot be read: .xz is not unpacked here. Pipe its JSON lines as -, from: xz -dc x.jsonl.xz'
    >>> refusal("x.csv.gz")
    'x.csv.gz is a table: make it Parquet or JSONL first'
    """
    ending, packed = ending_of(path)
    if ending == ".parquet" and packed:
        return f"{path}: a compressed Parquet file cannot be read; Parquet compresses inside, unpack it"
    if ending in _UNPACK:
        pipe = f"Pipe its JSON lines as -, from: {_UNPACK[ending]} {path}"
        inside = known_kind(os.path.splitext(path)[0])
        return (
            f"{path} cannot be read: {ending} is not unpacked here. {pipe if inside != 'text' else 'Unpack it first'}"
        )
    return f"{path} {_NO_TEXT[ending]}" if ending in _NO_TEXT else None


def wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if a file that begins like this says so.

    >>> wide_encoding("é".encode("utf-16")), wide_encoding("é".encode())
    ('UTF-16', None)
    """
    return next((name for mark, name in _WIDE.items() if data.startswith(mark)), None)


def decided(data: bytes) -> bool:
    """Whether the beginning of a file is enough for `looks_like`: two lines that are not blank, or no "{" in front."""
    text = _text(data)
    return bool(text) and (text[:1] != b"{" or len(_lines(text)) > 2)


def looks_like(data: bytes) -> str:
    """What text that begins like this is: nothing, line (one JSON object), lines (of them), object (over several
    lines), array or text.

    >>> [looks_like(text) for text in (b" ", b'{"a": 1}', b'{"a": 1}\\n{"a": 2', b'{\\n "a": 1}', b"[1]", b"a [1]")]
    ['nothing', 'line', 'lines', 'object', 'array', 'text']
    """
    text = _text(data)
    if text[:1] != b"{":
        return "nothing" if not text else "array" if text[:1] == b"[" else "text"
    first, *more = _lines(text)
    if not _is_object(first):
        return "object"
    return "lines" if more and more[0][:1] == b"{" else "line"


def _text(data: bytes) -> bytes:
    return data.removeprefix(BYTE_ORDER_MARK).lstrip()


def _lines(text: bytes) -> list[bytes]:
    """The first two lines that are not blank and, if there are more, what follows them."""
    found: list[bytes] = []
    while text and len(found) < 2:
        line, _, text = text.partition(b"\n")
        text = text.lstrip()
        found.append(line.strip())
    return [*found, text] if text else found


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8", "replace")), dict)
    except (ValueError, RecursionError):
        return False


def place(called: str, offset: int, kind: str | None = None, name: str | None = None) -> str:
    """Where a document stands, in words: what its input shard is called and the offset that a run keeps.

    `kind` is what the input shard was read as; without it, what its name says, if it is not called by that.

    >>> place("a.jsonl.gz", 34), place("b.parquet", 5), place("c.txt", 0), place("-", 7)
    ('a.jsonl.gz at byte 34, unpacked', 'b.parquet, row 5', 'c.txt', 'standard input at byte 7')
    >>> place("part-0 (input 2)", 34, "jsonl", "part-0")
    'part-0 (input 2) at byte 34'
    """
    name = name or called
    kind = kind or ("jsonl" if name == "-" else known_kind(name))
    if kind == "parquet":
        return f"{called}, row {offset:,}"
    if kind == "jsonl":
        named = "standard input" if name == "-" else called
        return f"{named} at byte {offset:,}{', unpacked' if ending_of(name)[1] else ''}"
    return called


def fault_place(fault: DocumentFault, kind: str | None = None, name: str | None = None) -> str:
    """Where a fault's document stands, in words: its line, or where that is not known, as `place` says it.

    >>> some = [DocumentFault(0, "overlong", "", "a.jsonl", 90, line) for line in (3, 0)]
    >>> list(map(fault_place, some))
    ['a.jsonl, line 3', 'a.jsonl at byte 90']
    """
    if fault.line:
        return f"{fault.source}, line {fault.line}"
    if not fault.offset and fault.reason != "overlong":  # the whole file
        return fault.source
    return place(fault.source, fault.offset, kind, name)
