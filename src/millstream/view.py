"""Show a person a sample, decoded, each document in its colour, with where it comes from; and what became of a
document."""

import itertools

import numpy as np
from rich.console import Console
from rich.text import Text

from millstream.corpus.kinds import fault_place
from millstream.errors import RequestError
from millstream.folder.dataset import Dataset, Located
from millstream.folder.dataset import open as open_run
from millstream.runs.pack.provenance import Provenance, tokenizer_of
from millstream.samples import Sample
from millstream.terminal import counted, printable

_COLOURS = ("green", "cyan", "yellow", "magenta", "bright_blue", "bright_red")


def show_sample(folder: str, index: int | None, subset: str = "train", console: Console | None = None) -> None:
    """Print sample `index` of a run folder, or the kept remainder for None. Raises RequestError if it is not there.

    Ids that are not to be learned are dim, where the run says which are.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    dataset = open_run(folder, subset)
    sample, title = _asked(dataset, index)
    number = len(dataset) if index is None else index % len(dataset)
    parts = dataset.documents(number)
    tokenizer = tokenizer_of(dataset)
    padding = len(sample) - sum(part.length for part in parts)
    padded = f", {padding:,} of them padding" if padding else ""
    learned = "" if sample.loss is None else f", {counted(int(np.count_nonzero(sample.loss)), 'id')} to be learned"
    console.print(
        f"{title}: {counted(len(sample), 'id')}{padded}, {counted(len(parts), 'document')}{learned}", style="bold"
    )
    at = sample.pad_left
    for colour_number, part in enumerate(parts):
        colour = _COLOURS[colour_number % len(_COLOURS)]
        span = f"ids {part.start:,} to {part.start + part.length - 1:,} of {part.document_length:,}"
        console.print(Text(printable(f"── {part.id} ── {span} ── {part.place}"), style=f"bold {colour}"))
        text = Text(style=colour)
        for begin, stop, learn in _stretches(sample, at, at + part.length):
            ids = sample.token_ids[begin:stop].tolist()
            words = tokenizer.engine.decode(ids) if tokenizer else " ".join(map(str, ids))
            apart = " " if begin > at and not tokenizer else ""
            text.append(apart + printable(words), style=None if learn else "dim")
        console.print(text)
        at += part.length
    if padding:
        side = "left" if sample.pad_left else "right"
        console.print(Text(f"── {counted(padding, 'id')} of padding on the {side}", style="dim"))


def _asked(dataset: Dataset, index: int | None) -> tuple[Sample, str]:
    """The sample, or the remainder for None, and what it is called. Raises RequestError if there is none."""
    folder, subset = dataset.folder, dataset.subset
    if index is None:
        rest = dataset.remainder
        if rest is None:
            left = dataset.manifest.subsets[subset].remainder
            became = {"drop": "were dropped", "pad": "are in a padded sample"}.get(left.policy)
            why = f"its {left.ids:,} ids {became}" if left.ids else "there were no ids left over"
            raise RequestError(f"{folder} has no remainder in {subset}: {why}")
        return rest, f"remainder of {subset}"
    if not len(dataset):
        hint = "; show 'remainder'" if dataset.remainder else ""
        raise RequestError(f"{folder} has no samples in {subset}: the corpus has fewer ids than one sample holds{hint}")
    try:
        return dataset[index], f"sample {index % len(dataset):,} of {len(dataset):,}"
    except IndexError:
        raise RequestError(f"there is no sample {index}: {folder} has {len(dataset):,}, from 0") from None


def _stretches(sample: Sample, begin: int, stop: int) -> list[tuple[int, int, bool]]:
    """(from, to before, whether to be learned) of the ids from `begin` to `stop`, in order."""
    if sample.loss is None:
        return [(begin, stop, True)]
    marks = np.asarray(sample.loss[begin:stop])
    bounds = [begin, *(begin + 1 + np.flatnonzero(marks[1:] != marks[:-1])).tolist(), stop]
    return [(low, high, bool(marks[low - begin])) for low, high in itertools.pairwise(bounds)]


def show_provenance(found: Provenance) -> str:
    """What became of the documents of one id, in lines."""
    lines = []
    for dataset, document in found.documents:
        size = _size(document)
        lines.append(f"document {document.id} (number {document.ordinal:,}, {document.place}): {size}")
        for part in document.placements if document.length else ():
            span = f"ids {part.start:,} to {part.start + part.length - 1:,} of {document.length:,}"
            if part.sample is None:
                lines.append(f"  dropped with the remainder of {document.subset}: {span}")
            elif part.sample == len(dataset):
                lines.append(f"  {document.subset} remainder: {span}")
            else:
                lines.append(f"  {document.subset} sample {part.sample:,}: {span}")
    for fault in found.faults:
        where = f"number {fault.ordinal:,}, {fault_place(fault)}"
        reason = fault.reason.replace("_", " ")
        lines.append(f"document {found.document_id} ({where}): left out, {reason}: {fault.message}")
    return printable("\n".join(lines))


def _size(document: Located) -> str:
    """How many ids a document has, and how many it lost for being longer than a sample."""
    if not document.cut_off:
        return counted(document.length, "id") if document.length else "empty, so it is in no sample"
    if not document.length:
        return f"left out, as its {document.cut_off:,} ids are more than a sample"
    return f"{counted(document.length, 'id')}, and {document.cut_off:,} that were cut off, as a sample has no more"
