"""The formats that trainers read, one file each, and the one table of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from millstream.errors import LedgerError, RequestError, setting
from millstream.formats.exports import datatrove, litdata, llmc, mds, megatron, nanogpt, npy, parquet
from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples


@dataclass(frozen=True)
class Format:
    """`write` writes the samples of a subset and counts the ids; `bits`: how large they may be.

    `flat`: ids back to back, so that the kept remainder has a place at the end. `masked`: it can say which ids are to
    be learned.
    """

    write: Callable[[Samples, Out], int]
    bits: int
    flat: bool = False
    masked: bool = False


FORMATS = {
    "npy": Format(npy.write, 32, masked=True),
    "parquet": Format(parquet.write, 31, masked=True),
    "megatron": Format(megatron.write, 31, flat=True),
    "mds": Format(mds.write, 31, masked=True),
    "datatrove": Format(datatrove.write, 32, flat=True, masked=True),
    "litdata": Format(litdata.write, 31),
    "nanogpt": Format(nanogpt.write, 16, flat=True),
    "llm.c": Format(llmc.write, 32, flat=True),
}


@dataclass(frozen=True)
class Export:
    """What one format was given and what became of it, in ids; `files` are named from the folder it is in.

    `ids` = `written` + `left_out`; `padding` are those that are none, `left_out` the kept remainder.
    """

    format: str
    ids: int
    written: int
    left_out: int
    padding: int
    files: list[dict[str, Any]]


def check_formats(names: Sequence[str], vocab_size: int | None, masked: bool = False) -> None:
    """Raises RequestError for a format that is unknown, or that cannot hold the ids of such a vocabulary or, if the run
    is `masked`, which of them are to be learned.

    Without a vocabulary ids have 32 bits; those that are too large for a format are found when they are read.
    """
    for name in names:
        if name not in FORMATS:
            raise RequestError(f"{setting('format', name)} is unknown: give one or more of {', '.join(FORMATS)}")
        bits = FORMATS[name].bits
        if masked and not FORMATS[name].masked:
            able = ", ".join(name for name, format in FORMATS.items() if format.masked)
            raise RequestError(
                f"{name} has no place for which ids are to be learned; {able} have. "
                f"{setting('loss', 'all')} learns every id"
            )
        if vocab_size is None and bits <= 16:
            raise RequestError(f"{name} holds ids of {bits} bits; without a tokenizer they have 32")
        if vocab_size is not None and vocab_size > 1 << bits:
            raise RequestError(f"{name} holds ids of {bits} bits; the vocabulary has {vocab_size:,}")


def largest_id(names: Sequence[str]) -> int:
    """The largest id that all of these formats can hold.

    >>> largest_id(["npy"]), largest_id(["npy", "mds"])
    (4294967295, 2147483647)
    """
    return (1 << min(FORMATS[name].bits for name in names)) - 1


def export(name: str, subsets: Sequence[Samples], folder: str) -> tuple[Export, Out]:
    """Write the format `name` of a run, for the caller to publish in `folder`.

    Raises LedgerError if not every id is written or left out with the remainder.
    """
    chosen, out = FORMATS[name], Out(folder, name)
    written = sum(chosen.write(samples, out) for samples in subsets)
    left_out = 0 if chosen.flat else sum(samples.kept for samples in subsets)
    ids = sum(samples.ids for samples in subsets)
    if ids != written + left_out:
        raise LedgerError(f"{name}: {ids:,} ids came in, {written:,} were written and {left_out:,} left out")
    return Export(name, ids, written, left_out, sum(samples.padding for samples in subsets), out.files), out
