"""The file that prompts come from: its lines, or its rows in columns, some for a batch each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from millstream.client.bodies import Bodies
from millstream.corpus.blocks import LongLine, digest_of, whole_lines
from millstream.corpus.parquet import batches_of, names_of, opened, said, values_of
from millstream.corpus.sources import InputShard
from millstream.errors import RequestError, RunError, Unusable

LONGEST_LINE = 32 << 20
_ROWS = 4096
_FIRST_BLOCK, _BLOCK = 4 << 10, 256 << 10  # bytes of lines in a batch: few at first, so that asking starts at once
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TooLong(ValueError):
    """A line of over 32 MiB, which is not kept; `digest` is its hash."""

    def __init__(self, digest: bytes) -> None:
        super().__init__(f"over {LONGEST_LINE >> 20} MiB, which is no prompt")
        self.digest = digest


def lines_of(prompts: InputShard) -> Iterator[tuple[int, list[Any] | TooLong]]:
    """Lines without their ends, in lists for a batch each, with the number of the first, from 1.

    On standard input a list has what is there. Raises RunError if the file cannot be read to its end.
    """
    number = 1
    for block in _blocks(prompts):
        if isinstance(block, TooLong):
            yield number, block
            number += 1
            continue
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for at in range(0, len(lines), _ROWS):
            yield number, lines[at : at + _ROWS]
            number += len(lines[at : at + _ROWS])


def _blocks(prompts: InputShard) -> Iterator[bytes | TooLong]:
    """The bytes of a file in whole lines, as soon as these have come."""
    size, first = _FIRST_BLOCK, True
    try:
        for data in whole_lines(prompts, LONGEST_LINE):
            if isinstance(data, LongLine):
                yield TooLong(data.digest)
                first = False
                continue
            at = len(_BYTE_ORDER_MARK) if first and data.startswith(_BYTE_ORDER_MARK) else 0
            first = False
            while at < len(data):
                stop = (data.rfind(b"\n", at, at + size) + 1) or (data.find(b"\n", at) + 1) or len(data)
                short = stop - at <= LONGEST_LINE
                yield data[at:stop] if short else TooLong(digest_of(data[at:stop].rstrip(b"\n")))
                at, size = stop, min(2 * size, _BLOCK)
    except (Unusable, OSError) as error:
        raise _unreadable(prompts, getattr(error, "strerror", None) or error) from error


def row_groups(
    prompts: InputShard, bodies: Bodies, whole: bool, watch: Callable[[Sequence[str], str], None]
) -> Iterator[tuple[int, list[Any] | TooLong]]:
    """Rows of a Parquet file as mappings, in lists for a batch each, with the number of the first, from 1."""
    import pyarrow as pa

    number = 1
    try:
        with opened(prompts, buffer_size=_BLOCK) as file:
            columns = _columns(prompts, file.schema_arrow.names, bodies)
            watch(file.schema_arrow.names, prompts.name)
            for group in range(file.num_row_groups):
                wanted = file.schema_arrow.names if whole else columns
                for batch in batches_of(prompts, file, group, wanted, _BLOCK):
                    for at in range(0, batch.num_rows, _ROWS):
                        rows = batch.slice(at, _ROWS)
                        yield number, _values(rows, bodies.row_params)
                        number += rows.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(prompts, f"damaged or no Parquet: {said(error)}") from error
    except OSError as error:
        raise _unreadable(prompts, error.strerror or f"damaged Parquet: {said(error)}") from error


def _columns(prompts: InputShard, there: list[str], bodies: Bodies) -> list[str]:
    fields, own = bodies.fields, bodies.row_params
    for wanted, purpose in ((sorted(fields), "for the template"), (own, "for --row-params")):
        if missing := [name for name in wanted if name not in there]:
            raise RequestError(f"{prompts.name} has no column {missing[0]!r} {purpose}; it has {', '.join(there)}")
    if not fields and not {"prompt", "messages"} & set(there):
        raise RequestError(
            f"{prompts.name} has no column 'prompt' or 'messages'; it has {', '.join(there)}: give --template"
        )
    return [name for name in there if name in {*fields, *own, "prompt", "messages", "custom_id", "id"}]


def _values(batch: Any, own: Sequence[str]) -> list[Any]:
    """A batch's rows as mappings; one that cannot be had as its ValueError. `own` are its parameters."""
    names = batch.schema.names
    sent = [name for name in ("messages", *own) if name in names]
    columns = [
        (names_of if name in ("custom_id", "id") else values_of)(column)
        for name, column in zip(names, batch.columns, strict=True)
    ]
    rows: list[Any] = []
    for values in zip(*columns, strict=True):
        row = dict(zip(names, values, strict=True))
        wrong = next((value for value in values if isinstance(value, ValueError | OverflowError)), None)
        for name in sent if wrong is None else ():
            row[name] = _without_nulls(row[name])
        rows.append(row if wrong is None else wrong if isinstance(wrong, ValueError) else ValueError(str(wrong)))
    return rows


def _without_nulls(value: Any) -> Any:
    """Structs have all the fields that any row has: what a row did not give is null there."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _unreadable(prompts: InputShard, reason: object) -> RunError:
    return RunError(f"{prompts.name}: {reason}. What was asked before is kept")
