"""Decode slices into documents; what cannot be decoded becomes a fault, and the same one wherever the slice was cut."""

import io
import json
import tokenize as python_source
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import numpy as np

from millstream.corpus.limits import too_long
from millstream.corpus.parquet import hint, lengths_of, names_of, values_of
from millstream.errors import Unusable
from millstream.records import DocumentFault, Ids, Slice, TextBatch
from millstream.store import file_at


@dataclass(frozen=True)
class Fields:
    """Where a document's parts are found. With `ids`, the ids themselves are read and `text` is not looked at.

    With `of_row` neither is: it makes something of the whole row, which has a `text`, or raises Unusable.
    """

    text: str = "text"
    id: str = "id"
    ids: str | None = None
    max_id: int = 0xFFFFFFFF
    of_row: Callable[[dict[str, Any]], Any] | None = None

    @property
    def content(self) -> str:
        return self.ids or self.text


def decode(unit: tuple[Slice, ...], fields: Fields, max_document: int, whole_text: bool = True) -> TextBatch:
    """The documents of a unit of slices, in order. `whole_text`: `max_document` holds for plain text too."""
    batch = TextBatch(opened=not unit[0].begins, open=not unit[-1].ends)
    if batch.opened:
        batch.count = -1  # the first row goes on with a document that has its number already
    for piece in unit:
        if piece.fault:
            line = 1 if piece.kind == "jsonl" else 0
            _add_fault(batch, piece, piece.start, line, *piece.fault)
            batch.lines.append((piece.source, line))
        elif piece.kind == "jsonl":
            _decode_lines(batch, piece, fields, max_document)
        elif piece.kind == "rows":
            _decode_rows(batch, piece, fields, max_document)
        else:
            _decode_file(batch, piece, fields)
    return batch


def _add(batch: TextBatch, piece: Slice, offset: int, content: Any, doc_id: str | None) -> None:
    _add_rows(batch, piece, [offset], [content], [doc_id])


def _add_rows(
    batch: TextBatch, piece: Slice, offsets: Sequence[int], contents: list[Any], names: list[str | None]
) -> None:
    """Many documents, all of them text or all of them ids."""
    if contents and isinstance(contents[0], np.ndarray):
        batch.ids += contents
    else:
        batch.texts += contents
    batch.doc_ids += [
        f"{piece.name}#{offset}" if name is None else name for offset, name in zip(offsets, names, strict=True)
    ]
    batch.position += range(batch.count, batch.count + len(contents))
    batch.source += [piece.source] * len(contents)
    batch.offset += offsets
    batch.count += len(contents)


def _add_fault(
    batch: TextBatch,
    piece: Slice,
    offset: int,
    line: int,
    reason: str,
    message: str,
    doc_id: str | None = None,
) -> None:
    if line:
        line += sum(lines for source, lines in batch.lines if source == piece.source)
    batch.faults.append(
        DocumentFault(
            ordinal=batch.count,
            reason=reason,
            message=message,
            source=piece.name,
            offset=offset,
            line=line,
            id=doc_id,
            shard=piece.source,
        )
    )
    batch.count += 1


def leave_out(batch: TextBatch, unit: tuple[Slice, ...], failed: dict[int, str], reason: str) -> None:
    """Turn rows of a decoded `unit` into faults: `failed` has a message for each. Not for rows of cut documents."""
    for row, message in failed.items():
        source, offset = batch.source[row], batch.offset[row]
        line, name = _line_of(batch, unit, source, offset), next(p.name for p in unit if p.source == source)
        doc_id = batch.doc_ids[row]
        batch.faults.append(
            DocumentFault(
                ordinal=batch.position[row],
                reason=reason,
                message=message,
                source=name,
                offset=offset,
                line=line,
                id=doc_id,
                shard=source,
            )
        )
    batch.faults.sort()
    for column in (batch.texts, batch.doc_ids, batch.position, batch.source, batch.offset):
        for row in sorted(failed, reverse=True):
            del column[row]


def _line_of(batch: TextBatch, unit: tuple[Slice, ...], source: int, offset: int) -> int:
    """The line at `offset` of JSONL, counted from the beginning of the unit; 0 for what has no lines."""
    before = 0
    for piece, (_, lines) in zip(unit, batch.lines, strict=True):
        if piece.source == source and piece.kind == "jsonl":
            if piece.start <= offset < piece.start + piece.size:
                return before + slice_bytes(piece)[: offset - piece.start].count(b"\n") + 1
            before += lines
    return 0


def slice_bytes(piece: Slice) -> bytes:
    if piece.data is not None:
        return bytes(piece.data)
    data = file_at(piece.uri).read(piece.start, piece.stop)
    if len(data) != piece.stop - piece.start:
        raise OSError(f"{piece.name} became shorter while it was read")
    return data


# JSON lines ---------------------------------------------------------------------------------------------------------


_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


@cache
def _row_decoder(fields: Fields) -> msgspec.json.Decoder[Any]:
    content: Any = list[int] if fields.ids else str
    row = msgspec.defstruct(
        "Row",
        [("content", content), ("id", str | int | None, None)],
        rename={"content": fields.content, "id": fields.id},
        gc=False,
    )
    return msgspec.json.Decoder(row)


def _decode_lines(batch: TextBatch, piece: Slice, fields: Fields, max_document: int) -> None:
    data = slice_bytes(piece)
    bytes_ = np.frombuffer(data, np.uint8)
    # Half of what it costs to compare every byte with "\n", which makes as many flags, and to pass over these twice.
    lengths = np.fromiter(map(len, io.BytesIO(data)), np.int64)
    stops = np.cumsum(lengths)
    starts, ends = stops - lengths, stops - 1
    if len(data) and data[-1:] != b"\n":
        ends[-1] += 1
    rows = None if fields.of_row else _all_lines(data, bytes_, starts, ends, fields, max_document)
    if rows is None:
        _line_by_line(batch, piece, data, starts, ends, fields=fields, max_document=max_document)
    else:
        contents = [np.array(row.content, np.int64) if fields.ids else row.content for row in rows]
        names = [row.id if row.id is None else str(row.id) for row in rows]
        _add_rows(batch, piece, (starts + piece.start).tolist(), contents, names)
    batch.lines.append((piece.source, len(ends)))


def _all_lines(data: bytes, bytes_: Ids, starts: Ids, ends: Ids, fields: Fields, max_document: int) -> list[Any] | None:
    """All lines in one call, or None where it cannot be certain that this equals decoding line by line.

    It is certain if every line starts with "{" and ends with "}" and there are as many values as lines: in a JSON
    value a line end cannot stand between "}" and "{", nor raw inside a string, so no value spans two lines.
    """
    if not len(ends):
        return []
    lengths = ends - starts
    if lengths.min() < 2 or lengths.max() > max_document:
        return None
    last = bytes_[ends - 1]
    if (last == ord("\r")).any():
        last = np.where(last == ord("\r"), bytes_[ends - 2], last)
    if (bytes_[starts] != ord("{")).any() or (last != ord("}")).any():
        return None
    try:
        rows: list[Any] = _row_decoder(fields).decode_lines(data)
    except _UNREADABLE:
        return None
    if len(rows) != len(ends) or (fields.ids and not all(_fit(row.content, fields.max_id) for row in rows)):
        return None
    return rows


def _line_by_line(
    batch: TextBatch, piece: Slice, data: bytes, starts: Ids, ends: Ids, fields: Fields, max_document: int
) -> None:
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True), 1):
        offset = piece.start + start
        line = data[start:end]
        if offset == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > max_document:
            _add_fault(batch, piece, offset, number, *too_long(len(line), max_document))
        elif line.strip():
            content, doc_id, fault = _one_line(line, fields)
            if fault:
                _add_fault(batch, piece, offset, number, *fault, doc_id)
            else:
                _add(batch, piece, offset, content, doc_id)


def _one_line(line: bytes, fields: Fields) -> tuple[Any, str | None, tuple[str, str] | None]:
    """(content, id, fault) of one line; the fault names what is wrong for a person."""
    try:
        found = _decoded(line, fields)
    except _UNREADABLE:
        # The standard library's reader is slower but takes NaN, and its message says where the error is.
        try:
            found = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            message = f"not valid UTF-8: {error.reason} at byte {error.start} of the line"
            return None, None, ("invalid_utf8", message)
        except json.JSONDecodeError as error:
            return (
                None,
                None,
                ("invalid_json", f"not valid JSON: {error.msg}, at character {error.pos + 1} of the line"),
            )
        except (ValueError, RecursionError) as error:  # integers of over 4,300 digits, values nested too deep
            return None, None, ("invalid_json", f"not valid JSON: {error}")
        if not isinstance(found, dict):
            return None, None, ("invalid_json", f"not a JSON object but {type(found).__name__}")
    return _content(found, fields)


def _decoded(line: bytes, fields: Fields) -> dict[str, Any]:
    if fields.of_row:
        return msgspec.json.decode(line, type=dict[str, Any])
    row = _row_decoder(fields).decode(line)
    return {fields.content: row.content, fields.id: row.id}


def _content(found: dict[str, Any], fields: Fields) -> tuple[Any, str | None, tuple[str, str] | None]:
    doc_id = found.get(fields.id)
    if doc_id is not None and not isinstance(doc_id, str):
        doc_id = str(doc_id)
    if doc_id is not None:
        doc_id = _plain(doc_id)
    if fields.of_row:
        try:
            return fields.of_row(found), doc_id, None
        except Unusable as unusable:
            return None, doc_id, (unusable.reason, _plain(unusable.message))
    content = found.get(fields.content)
    name = fields.content
    if content is None:
        names = _plain(", ".join(map(str, found)))
        problem = "is null" if name in found else f"is missing; there are {names or 'none'}{hint(found)}"
        return None, doc_id, ("missing_field", f"field {name!r} {problem}")
    if fields.ids:
        if not isinstance(content, list | np.ndarray) or not all(type(i) is int for i in content):
            return None, doc_id, ("not_ids", f"field {name!r} is not a list of integers")
        if not _fit(list(content), fields.max_id):
            return None, doc_id, ("id_range", f"field {name!r} has ids below 0 or above {fields.max_id:,}")
        return np.array(content, np.int64), doc_id, None
    if not isinstance(content, str):
        return None, doc_id, ("not_text", f"field {name!r} is not text but {type(content).__name__}")
    if _lone_surrogate(content):
        message = f"field {name!r} has half of a surrogate pair, which no tokenizer accepts"
        return None, doc_id, ("lone_surrogate", message)
    return content, doc_id, None


def _fit(ids: list[int], max_id: int) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) <= max_id)


def _plain(text: str) -> str:
    """Text with halves of surrogate pairs written out, so that it can be stored and printed."""
    return text.encode("utf-8", "backslashreplace").decode()


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# Parquet rows -------------------------------------------------------------------------------------------------------


def _decode_rows(batch: TextBatch, piece: Slice, fields: Fields, max_document: int) -> None:
    table = slice_rows(piece)
    if not _add_texts(batch, piece, table, fields, max_document):
        _row_by_row(batch, piece, table, fields, max_document)
    batch.lines.append((piece.source, 0))


def slice_rows(piece: Slice) -> Any:
    """The rows of a slice in a record batch, or a table."""
    import pyarrow as pa

    if piece.data is not None and not isinstance(piece.data, bytes):
        return piece.data
    with pa.ipc.open_stream(slice_bytes(piece)) as reader:
        return reader.read_all()


def _add_texts(batch: TextBatch, piece: Slice, table: Any, fields: Fields, max_document: int) -> bool:
    """All rows at once, if each certainly has text that is not too long; else none is added."""
    columns = table.schema.names
    if fields.of_row or fields.ids or fields.text not in columns:
        return False
    sizes = lengths_of(table.column(columns.index(fields.text)))
    if sizes is None or (len(sizes) and sizes.max() > max_document):
        return False
    texts = list(values_of(table.column(columns.index(fields.text))))
    if not all(isinstance(text, str) for text in texts):
        return False
    ids = list(names_of(table.column(columns.index(fields.id)))) if fields.id in columns else [None] * len(texts)
    if not all(name is None or isinstance(name, str | int) for name in ids):
        return False
    names = [name if name is None else _plain(str(name)) for name in ids]
    _add_rows(batch, piece, range(piece.start, piece.stop), texts, names)
    return True


def _row_by_row(batch: TextBatch, piece: Slice, table: Any, fields: Fields, max_document: int) -> None:
    columns = [
        (names_of if name == fields.id else values_of)(column)
        for name, column in zip(table.schema.names, table.columns, strict=True)
    ]
    for row, values in enumerate(zip(*columns, strict=True), piece.start):
        found = dict(zip(table.schema.names, values, strict=True))
        if fields.of_row:
            found = _without_nulls(found)
        wrong = next((value for value in found.values() if isinstance(value, ValueError | OverflowError)), None)
        if isinstance(wrong, UnicodeDecodeError):
            _add_fault(batch, piece, row, 0, "invalid_utf8", f"not valid UTF-8: {wrong.reason}")
            continue
        if wrong is not None:
            _add_fault(batch, piece, row, 0, "not_text", f"a value cannot be read: {wrong}")
            continue
        value, name, fault = _content(found, fields)
        size = 0 if fault or fields.ids else len((value.text if fields.of_row else value).encode())
        if size > max_document:
            fault = too_long(size, max_document, "text")
        if fault:
            _add_fault(batch, piece, row, 0, *fault, name)
        else:
            _add(batch, piece, row, value, name)


def _without_nulls(value: Any) -> Any:
    """Without what is null in objects: in a table every row has every key, which JSON lines do not."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# Plain text, one document a file ------------------------------------------------------------------------------------


def _decode_file(batch: TextBatch, piece: Slice, fields: Fields) -> None:
    batch.lines.append((piece.source, 0))
    if fields.ids:
        _add_fault(batch, piece, 0, 0, "not_ids", "plain text has no token ids; these need JSONL or Parquet")
        return
    if fields.of_row:
        _add_fault(batch, piece, 0, 0, "not_messages", "plain text has no rows; conversations need JSONL or Parquet")
        return
    try:
        data = slice_bytes(piece)
        text = _python_text(data) if piece.kind == "python" else data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not valid UTF-8: {error.reason} at byte {error.start:,}"
        _add_fault(batch, piece, 0, 0, "invalid_utf8", message)
    except SyntaxError as error:
        _add_fault(batch, piece, 0, 0, "invalid_utf8", f"its encoding cannot be told: {error.msg}")
    else:
        _add(batch, piece, 0, text.removeprefix("\ufeff") if piece.begins else text, piece.name)


def _python_text(data: bytes) -> str:
    """Source code in the encoding that it declares itself (PEP 263)."""
    encoding, _ = python_source.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding)
