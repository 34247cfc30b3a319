"""The prompts of an ask run: files of many shapes become requests, each with its body as it goes over the wire.

No Python object outlives its batch. What has to be known of all rows, whether an equal one came before, takes 8 bytes
for each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from millstream.client.bodies import (
    LIKELY_PARAMS,
    Bodies,
    Recipe,
    encode,
    hash_of_nothing,
    key_again,
    no_model,
    printable,
    text_of,
    words,
)
from millstream.client.requests import Request
from millstream.corpus.sources import InputShard
from millstream.errors import RequestError
from millstream.llm.batch import is_request, parse_line
from millstream.records import Ids
from millstream.runs.ask.lines import TooLong, lines_of, row_groups

_PERHAPS = 22  # bits of a hash


def batches(
    prompts: InputShard,
    recipe: Recipe,
    *,
    limit: int | None = None,
    keep_rows: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> Iterator[list[Request]]:
    """The requests of a file in its order, at most `limit`, in lists that are never empty.

    A list comes from up to 4,096 rows or 256 KiB; on standard input, from the whole lines that are there. A row that
    makes no request (a line of over 32 MiB, too) is among them with a fault of kind ``bad_row``, and one with the
    custom_id of an earlier row with ``duplicate_id``. A key depends on body, path and id, and on how many rows with the
    same came before: an edited row gets another key, a moved one keeps its own, equal ones stay distinct. `keep_rows`
    fills in `Request.row`. `tell` is called, once, if rows have parameters beside their prompt that `Recipe.row_params`
    does not name.

    Raises RequestError for a recipe that does not fit, RunError if the file cannot be read to its end.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".txt") as file:
    ...     _ = file.write(b"one\\n\\none\\n"), file.flush()
    ...     [[first, again]] = batches(InputShard(file.name, "a.txt", "text"), Recipe("m"))
    >>> first.data
    b'{"model":"m","messages":[{"role":"user","content":"one"}]}'
    >>> first.index, again.index, first.key == again.key
    (0, 1, False)
    """
    return _Reader(prompts, recipe, keep_rows, tell).batches(limit)


class _Reader:
    """The rows of one file, read once."""

    def __init__(self, prompts: InputShard, recipe: Recipe, keep_rows: bool, tell: Callable[[str], None]) -> None:
        self._prompts, self._keep_rows, self._tell = prompts, keep_rows, tell
        self._bodies = Bodies(recipe)
        if prompts.kind == "text" and self._bodies.fields - {"prompt"}:
            raise RequestError(f"{prompts.name} is text, a prompt a line: the template can only have {{prompt}}")
        if prompts.kind == "text" and self._bodies.row_params:
            raise RequestError(f"{prompts.name} is text, a prompt a line: its rows bring no parameters")
        # With a template, a field may be called as a parameter is and mean the weather.
        self._watched = LIKELY_PARAMS.difference(self._bodies.row_params) if recipe.template is None else frozenset()
        self._unsent = [name for name in ("system", "template", "row_params") if getattr(recipe, name)]  # of Batch rows
        self._plain = _watched_row
        if recipe.template is not None or self._bodies.row_params:
            self._plain = _no_plain_row
        self._expects_batch = False
        self._count = 0
        self._custom: list[tuple[Request, int]] = []  # in this batch: those with a custom_id, and where they stand
        self._seen, self._seen_ids = _Seen(), _Seen()

    def batches(self, limit: int | None) -> Iterator[list[Request]]:
        if limit is not None and limit <= 0:
            return
        groups: Iterator[tuple[int, list[Any] | TooLong]]
        if self._prompts.kind == "parquet":
            groups = row_groups(self._prompts, self._bodies, self._keep_rows, self._watch)
        else:
            groups = lines_of(self._prompts)
        read: Any = {"parquet": self._of_columns, "text": self._of_texts}.get(self._prompts.kind, self._of_json)
        for number, rows in groups:
            if isinstance(rows, TooLong):
                batch = [self._fault(self._count, number, None, rows.digest, rows)]
            else:
                batch = read(number, rows)
            if limit is not None:
                del batch[limit - self._count :]
            self._count += len(batch)
            if batch:
                self._make_distinct(batch)
                yield batch
            if self._count == limit:
                return

    # Each of these makes the requests of some rows; `first` is the number of the first row in the file, from 1.

    def _of_json(self, first: int, lines: list[bytes]) -> list[Request]:
        batch: list[Request] = []
        plain = self._plain
        around, of_messages, index = self._bodies.frame.around_text, self._bodies.frame.of_messages, self._count
        head, tail, begun, end = around or (b"", b"", hash_of_nothing, b"")
        for number, line in enumerate(lines, first):
            if self._expects_batch and (request := self._of_batch_line(index, number, line)):
                batch.append(request)
                index += 1
                continue
            try:
                row = plain(line)
                if not line.isascii():
                    line.decode()
                if row.messages is not None:
                    data, digest, *_ = of_messages(row.messages)
                elif row.prompt is not None:
                    # As Bodies.of_text does, and below as Body.key: to call them takes a seventh of all time.
                    if around is None:
                        no_model()
                    text = encode(row.prompt)
                    data = head + text + tail
                    digest = begun.copy()
                    digest.update(text + end)
                else:
                    raise ValueError
            except (ValueError, RecursionError):
                if line.strip():
                    batch.append(self._of_line(index, number, line))
                    index += 1
                continue
            name: Any = row.id if row.custom_id is None else row.custom_id
            if name is not None:
                name = str(name)
                digest.update(b"\0" + name.encode())
            request = Request(index, name, digest.digest(), data)
            if row.custom_id is not None:
                self._custom.append((request, number))
            if self._keep_rows:
                request.row = line.strip()
            batch.append(request)
            index += 1
        return batch

    def _of_line(self, index: int, number: int, line: bytes) -> Request:
        try:
            given = parse_line(line)
        except ValueError as error:
            return self._fault(index, number, None, line, error)
        return self._of_fields(index, number, given, line)

    def _of_texts(self, first: int, lines: list[bytes]) -> list[Request]:
        batch: list[Request] = []
        of_text, template, index = self._bodies.frame.of_text, self._bodies.template, self._count
        for number, line in enumerate(lines, first):
            if not line or line.isspace():
                continue
            try:
                prompt = line.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                batch.append(self._fault(index, number, None, line, error))
            else:
                body = of_text(prompt if template is None else template.fill({"prompt": prompt}))
                batch.append(Request(index, None, body.key(None), body.data))
                if self._keep_rows:
                    batch[-1].row = encode({"prompt": prompt})
            index += 1
        return batch

    def _of_batch_line(self, index: int, number: int, line: bytes) -> Request | None:
        """The request of a plain row of OpenAI's Batch format, as of `_of_line` but quickly; None for any other row."""
        try:
            row = _batch_row(line)
            if not line.isascii():
                line.decode()
            if not row.url.startswith("/v1/"):
                return None
            body = self._bodies.of_body(row.url[3:], row.body)
            key = body.key(row.custom_id)
        except (ValueError, RecursionError):
            return None
        request = Request(index, row.custom_id, key, body.data, body.path)
        self._custom.append((request, number))
        if self._keep_rows:
            request.row = line.strip()
        return request

    def _of_columns(self, first: int, rows: list[Any]) -> list[Request]:
        return [
            self._fault(self._count + at, first + at, None, b"", row)
            if isinstance(row, ValueError)
            else self._of_fields(self._count + at, first + at, row, None)
            for at, row in enumerate(rows)
        ]

    def _of_fields(self, index: int, number: int, given: Mapping[str, Any], line: bytes | None) -> Request:
        """A request from any row, slowly; `line` is what the fields were read from."""
        name = None
        self._expects_batch = is_request(given)
        if self._expects_batch and self._unsent:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in self._unsent)
            are = "is" if len(self._unsent) == 1 else "are"
            rows = "rows of the Batch format, whose body is sent as it is"
            self._tell(f"{self._place(number)}: {flags} {are} not for {rows}")
            self._unsent = []
        if self._watched and not self._expects_batch:
            self._watch([name for name, value in given.items() if value is not None], self._place(number))
        try:
            name = name_of(given)
            body = self._bodies.of_row(given)
            request = Request(index, name, body.key(name), body.data, body.path, twin=body.twin)
        except (ValueError, RecursionError) as error:
            request = self._fault(index, number, name, repr(given).encode() if line is None else line, error)
        if given.get("custom_id") is not None:
            self._custom.append((request, number))
        if self._keep_rows:
            request.row = _json_of(given, line)
        return request

    def _watch(self, there: Sequence[str], place: str) -> None:
        """Tell once of parameters that are there and not sent."""
        found = [name for name in there if name in self._watched]
        if found and {"prompt", "messages"} & set(there):
            flag = ",".join([*self._bodies.row_params, *found])
            what = f"{', '.join(found)} beside the prompt {'is' if len(found) == 1 else 'are'} not sent"
            self._tell(f"{place}: {what}; --row-params {flag} sends such fields")
            self._watched = frozenset()
            if self._plain is _watched_row:
                self._plain = _plain_row

    def _fault(self, index: int, number: int, name: str | None, raw: bytes, error: Exception) -> Request:
        message = printable(f"{self._place(number)}: {words(error)}")
        return Request(index, None if name is None else printable(name), _no_body(raw), b"", fault=("bad_row", message))

    def _place(self, number: int) -> str:
        return f"{self._prompts.name}, {'row' if self._prompts.kind == 'parquet' else 'line'} {number:,}"

    def _make_distinct(self, batch: list[Request]) -> None:
        """Another key for each request that equals an earlier one, and a fault where a custom_id comes again."""
        hashes = np.frombuffer(b"".join([request.key for request in batch]), np.uint64)[::2]
        before = self._seen.before(hashes)
        for at in np.flatnonzero(before).tolist():
            batch[at].before = int(before[at])
            batch[at].key = key_again(batch[at].key, batch[at].before)
        if not self._custom:
            return
        custom, self._custom = self._custom, []
        before = self._seen_ids.before(np.array([hash(request.id) for request, _ in custom], np.int64).view(np.uint64))
        for at in np.flatnonzero(before).tolist():
            request, number = custom[at]
            if request.fault is None:
                message = f"{self._place(number)}: an earlier row has the custom_id {request.id!r} too; rename one"
                request.fault, request.data = ("duplicate_id", message), b""
                request.key = _no_body(request.key)  # it may be asked when the other row is gone


def _no_body(raw: bytes) -> bytes:
    """The key of what makes no request: no body starts like this."""
    digest = hash_of_nothing.copy()
    digest.update(b"!" + raw)
    return digest.digest()


class _Seen:
    """How often each of many 64-bit hashes came before, at 8 bytes for each: sorted runs, merged as they come."""

    def __init__(self) -> None:
        self._runs: list[Ids] = []  # each over 8 times as long as the next: few to search, and merged seldom
        self._perhaps = np.zeros(1 << _PERHAPS, bool)  # whether any hash that starts like this came: mostly none did

    def before(self, hashes: Ids) -> Ids:
        """How often each came before, in earlier calls or in this one; this one counts from now on.

        >>> seen, hashes = _Seen(), np.array([7, 8, 7, 7], np.uint64)
        >>> seen.before(hashes).tolist(), seen.before(hashes).tolist()
        ([0, 0, 1, 2], [3, 1, 4, 5])
        """
        order = np.argsort(hashes, kind="stable")
        run = hashes[order]
        counts = np.arange(len(run)) - run.searchsorted(run)
        start = run >> (64 - _PERHAPS)
        which = np.flatnonzero(self._perhaps[start])
        self._perhaps[start] = True
        found = run[which]
        for earlier in self._runs:
            counts[which] += earlier.searchsorted(found, "right") - earlier.searchsorted(found)
        result = np.empty_like(counts)
        result[order] = counts
        while self._runs and len(self._runs[-1]) <= 8 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")
        self._runs.append(run)
        return result


# Rows ---------------------------------------------------------------------------------------------------------------


class _PlainRow(msgspec.Struct, gc=False):
    """What most rows are; one that has anything else of what is looked at is read with more care."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    id: str | int | None = None
    custom_id: str | int | None = None
    body: None = None


class _BatchRow(msgspec.Struct, gc=False):
    """A row of OpenAI's Batch format without anything unusual."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


_batch_row = msgspec.json.Decoder(_BatchRow).decode
_plain_row: Callable[[bytes], Any] = msgspec.json.Decoder(_PlainRow).decode
_watched_row: Callable[[bytes], Any] = msgspec.json.Decoder(
    msgspec.defstruct("_WatchedRow", [(name, None, None) for name in sorted(LIKELY_PARAMS)], bases=(_PlainRow,))
).decode
"""As `_plain_row`, but a row that has parameters of its own is read with more care, too."""
_any_json = msgspec.json.Decoder(msgspec.Raw).decode


def _no_plain_row(line: bytes) -> _PlainRow:
    raise ValueError


def name_of(given: Mapping[str, Any]) -> str | None:
    name = given.get("custom_id")
    if name is None:
        name = given.get("id")
    return None if name is None else text_of(name)


def _json_of(given: Mapping[str, Any], line: bytes | None) -> bytes | None:
    """A row in JSON, as it was read where it was; None for what only a lenient reader takes."""
    try:
        if line is None:
            return encode(given)
        line.decode()
        return bytes(_any_json(line))
    except (ValueError, TypeError, RecursionError):
        return None
