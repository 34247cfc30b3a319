"""Show a sample to a person: decoded, each document in its colour, with where it comes from."""

import os

from rich.console import Console
from rich.text import Text

from millstream.errors import RequestError
from millstream.formats.dataset import Dataset
from millstream.formats.dataset import open as open_run
from millstream.formats.manifest import TOKENIZER
from millstream.stream.tokenizers import Tokenizer, from_definition, load_tokenizer

_COLOURS = ("green", "cyan", "yellow", "magenta", "bright_blue", "bright_red")


def show_sample(folder: str, index: int, subset: str = "train", console: Console | None = None) -> None:
    """Print sample `index` of a run folder. Raises RequestError if there is none of this number."""
    console = console or Console(highlight=False, soft_wrap=True)
    dataset = open_run(folder, subset)
    if not len(dataset):
        raise RequestError(f"{folder} has no samples in {subset}: the corpus has fewer ids than one sample holds")
    try:
        sample = dataset[index]
    except IndexError:
        raise RequestError(f"there is no sample {index}: {folder} has {len(dataset):,}, from 0") from None
    number = index % len(dataset)
    parts = dataset.documents(number)
    tokenizer = tokenizer_of(dataset)
    padding = len(sample) - sum(part.length for part in parts)
    padded = f", {padding:,} of them padding" if padding else ""
    held = "document" if len(parts) == 1 else "documents"
    console.print(
        f"sample {number:,} of {len(dataset):,}: {len(sample):,} ids{padded}, {len(parts)} {held}",
        style="bold",
    )
    at = sample.pad_left
    for colour_number, part in enumerate(parts):
        colour = _COLOURS[colour_number % len(_COLOURS)]
        span = f"ids {part.start:,} to {part.start + part.length - 1:,} of {part.document_length:,}"
        console.print(Text(f"── {part.id} ── {span} ── {part.source} at {part.offset:,}", style=f"bold {colour}"))
        ids = sample.token_ids[at : at + part.length].tolist()
        text = tokenizer.engine.decode(ids) if tokenizer else " ".join(map(str, ids))
        console.print(Text(printable(text), style=colour))
        at += part.length
    if padding:
        side = "left" if sample.pad_left else "right"
        console.print(Text(f"── {padding:,} ids of padding on the {side}", style="dim"))


def printable(text: str) -> str:
    """Text without the control characters that would move a terminal's cursor or change its colours.

    >>> printable("a\\x1b[31mb\\tc")
    'a␛[31mb\\tc'
    """
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text).replace("\x7f", "␡")


def tokenizer_of(dataset: Dataset) -> Tokenizer | None:
    """The tokenizer a run was made with: from the folder itself, or by name."""
    named = dataset.settings["tokenizer"]
    if not named:
        return None
    path = os.path.join(dataset.folder, TOKENIZER)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return from_definition(named["name"], file.read())
    return load_tokenizer(named["name"])
