"""Show a person a sample, decoded, each document in its colour, with where it comes from; and a plan, as a picture of
the documents' lengths and a table."""

import math
import os

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from millstream.errors import RequestError
from millstream.formats.dataset import Dataset
from millstream.formats.dataset import open as open_run
from millstream.formats.manifest import TOKENIZER
from millstream.runs.pack.plan import Estimate, Plan
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


# A plan -------------------------------------------------------------------------------------------------------------

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDEST = 24  # of the picture's bars


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan: what was read, the lengths of documents, what each strategy would give."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 100)  # a narrow terminal breaks lines, but no number is left out
    for part in ("\n".join(_plan_head(plan)), _picture(plan), _choices(plan)):
        console.print(part)
        console.print()
    console.print("\n".join(_plan_notes(plan)), style="dim")


def _plan_head(plan: Plan) -> list[str]:
    total = "" if plan.bytes_total is None else f" of {decimal(plan.bytes_total)}"
    read = "all of it, so the numbers are exact" if plan.exact else f"{plan.documents_read:,} documents"
    lines = [
        f"{_between(plan.documents, 'documents')} with {_between(plan.ids, 'ids')}",
        f"  read      {decimal(plan.bytes_read)}{total}: {read}",
    ]
    if plan.empty:
        lines.append(f"  empty     {plan.empty:,}")
    for reason, count in plan.faults.items():
        lines.append(f"  faulty    {count:,} {reason.replace('_', ' ')}, such as {printable(plan.examples[reason])}")
    if plan.faulty > sum(plan.faults.values()):
        lines.append(f"  faulty    about {plan.faulty:,} in the whole corpus")
    shown = [f"{percent}% up to {plan.quantiles[percent]:,}" for percent in (50, 90, 99)]
    return [*lines, f"  lengths   {', '.join(shown)} ids; the longest {plan.quantiles[100]:,}"]


def _between(number: Estimate, what: str) -> str:
    """A number of something; an estimate to four digits."""
    if number.exact:
        return f"{number.value:,} {what}"
    value, low, high = (f"{int(float(f'{n:.4g}')):,}" for n in number)
    return f"about {value} {what} ({low} to {high})"


def _picture(plan: Plan) -> Table:
    """One row for each power of two, with the sample lengths that were asked for in their rows."""
    table = Table(box=None, pad_edge=False)
    table.add_column("ids up to", justify="right", no_wrap=True)
    table.add_column("", width=_WIDEST, no_wrap=True)
    for name in ("documents", "", "of the ids"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    documents, ids = sum(bin.documents for bin in plan.lengths), sum(bin.ids for bin in plan.lengths)
    most, seen = max(bin.documents for bin in plan.lengths), 0
    for row in plan.lengths:
        seen += row.documents
        inside = [n for n in sorted({choice.seq_len for choice in plan.choices}) if row.longest // 2 < n <= row.longest]
        fit = f": {seen / max(1, documents):.0%} fit" if inside == [row.longest] else ""
        table.add_row(
            f"{row.longest:,}",
            Text(bar(row.documents / max(1, most), _WIDEST), style="cyan"),
            f"{row.documents:,}",
            f"{row.documents / max(1, documents):.1%}",
            f"{row.ids / max(1, ids):.1%}",
            Text(f"◂ {', '.join(f'{n:,}' for n in inside)}{fit}" if inside else "", style="yellow"),
        )
    return table


def bar(share: float, width: int) -> str:
    """A bar that is `share` of `width` characters long, to an eighth of one; never none for more than nothing.

    >>> bar(0.5, 3), bar(1, 2), bar(0.001, 8), bar(0, 8)
    ('█▌', '██', '▏', '')
    """
    eighths = max(round(share * width * 8), 1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _choices(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    names = ["N", "strategy", "samples", "±", "padding", "cut", "cut\n≤ N", "joined", "documents\na sample", "on disk"]
    for name in [*names, "time"]:
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True, vertical="bottom")
    before = None
    for choice in plan.choices:
        count = choice.samples
        error = max(count.high - count.value, count.value - count.low) / max(1, count.value)
        table.add_row(
            "" if choice.seq_len == before else f"{choice.seq_len:,}",
            choice.strategy,
            f"{count.value:,}",
            "" if count.exact else f"{error:.1%}",
            f"{choice.padding:.2%}",
            f"{choice.truncation:.1%}",
            f"{choice.needless:.1%}",
            f"{choice.concatenation:.1%}",
            f"{choice.documents_per_sample:.3g}",
            decimal(choice.bytes),
            clock(choice.seconds),
        )
        before = choice.seq_len
    return table


def _plan_notes(plan: Plan) -> list[str]:
    numbers = sorted({choice.workers for choice in plan.choices})
    workers = f"{' or '.join(map(str, numbers))} worker{'' if numbers == [1] else 's'}"
    rate = f"{plan.ids_per_second / 1e6:.3g} M ids a second"
    meaning = [
        "cut        documents that are in more than one sample; ≤ N: of all documents, those cut though they would fit",
        "joined     documents that share a sample with another one",
        f"time       an estimate: reading and tokenizing with {workers} at {rate} each; writing is not in it",
    ]
    if not plan.exact:
        meaning.append("intervals  ± and to: the true number lies between, with 95% confidence")
    return [*(f"note       {note}" for note in plan.notes), *meaning]


def clock(seconds: float) -> str:
    """
    >>> clock(3.2), clock(3725)
    ('0:03', '1:02:05')
    """
    minutes, seconds = divmod(math.ceil(seconds) if seconds > 60 else round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
