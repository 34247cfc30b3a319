"""Show a person a plan: what was read, a picture of the documents' lengths, and what each strategy would give."""

import math
from collections.abc import Callable

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from millstream.runs.plan.estimates import Estimate
from millstream.runs.plan.plan import Choice, Plan
from millstream.terminal import printable

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDEST = 24  # of the picture's bars


def show_plan(plan: Plan, console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    widest = min(_WIDEST, max(8, console.width - 60))
    console.width = max(console.width, 100)  # a narrow terminal breaks lines, but no number is left out
    for part in ("\n".join(_head(plan)), _picture(plan, widest), _choices(plan)):
        console.print(part)
        console.print()
    console.print("\n".join(_notes(plan)), style="dim")


def _head(plan: Plan) -> list[str]:
    total = "" if plan.bytes_total is None else f" of {decimal(plan.bytes_total)}"
    read = "all of it, so the numbers are exact" if plan.exact else f"{plan.documents_read:,} documents"
    lines = [
        f"{_between(plan.documents, 'documents')} with {_between(plan.ids, 'ids')}",
        f"  read      {decimal(plan.bytes_read)}{total}: {read}",
    ]
    if plan.empty.value:
        lines.append(f"  empty     {_between(plan.empty, 'documents')}")
    for reason, count in plan.faults.items():
        lines.append(f"  faulty    {count:,} {reason.replace('_', ' ')}, such as {printable(plan.examples[reason])}")
    if plan.faulty.value > sum(plan.faults.values()):
        lines.append(f"  faulty    {_between(plan.faulty, 'documents in the whole corpus')}")
    shown = [f"{percent}% up to {length.value:,}" for percent, length in plan.quantiles.items() if percent >= 50]
    return [*lines, f"  lengths   {', '.join([*shown, f'the longest {plan.longest:,}'])} ids"]


def _between(number: Estimate, what: str) -> str:
    """A number of something; an estimate to four digits."""
    if number.exact:
        return f"{number.value:,} {what.removesuffix('s') if number.value == 1 else what}"
    value, *ends = (f"{int(float(f'{n:.4g}')):,}" for n in number if math.isfinite(n))
    return f"about {value} {what}{f' ({ends[0]} to {ends[1]})' if ends else ''}"


def _picture(plan: Plan, widest: int) -> Table:
    """One row for each power of two, with the sample lengths that were asked for in their rows."""
    table = Table(box=None, pad_edge=False)
    table.add_column("ids up to", justify="right", no_wrap=True)
    table.add_column("", width=widest, no_wrap=True)
    for name in ("documents", "±" if plan.ids.told and not plan.exact else "", "", "of the ids"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    documents = sum(bin.documents.value for bin in plan.lengths) or 1
    ids = sum(bin.ids.value for bin in plan.lengths) or 1
    most, seen = max((bin.documents.value for bin in plan.lengths), default=0) or 1, 0.0
    for row in plan.lengths:
        seen += row.documents.value
        inside = [n for n in sorted({choice.seq_len for choice in plan.choices}) if row.longest // 2 < n <= row.longest]
        fit = f": {seen / documents:.0%} fit" if inside == [row.longest] else ""
        cells = (
            f"{row.longest:,}",
            Text(bar(row.documents.value / most, widest), style="cyan"),
            f"{row.documents.value:,}",
            f"{row.documents.error:,}" if row.documents.told and not row.documents.exact else "",
            f"{row.documents.value / documents:.1%}",
            f"{row.ids.value / ids:.1%}",
            Text(f"◂ {', '.join(f'{n:,}' for n in inside)}{fit}" if inside else "", style="yellow"),
        )
        table.add_row(*cells)
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
    names = ["N", "strategy", "samples", "padding", "cut", "cut\n≤ N", "joined", "documents\na sample", "on disk"]
    for name in [*names, "time"]:
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True, vertical="bottom")
    before = None
    for choice in plan.choices:
        first = "" if choice.seq_len == before else f"{choice.seq_len:,}"
        table.add_row(first, choice.strategy, *_row(choice))
        if any(errors := _errors(choice)):
            table.add_row("", "", *errors, style="dim")
        before = choice.seq_len
    return table


def _row(choice: Choice) -> list[str]:
    return [
        f"{choice.samples.value:,}",
        f"{choice.padding.value:.2%}",
        f"{choice.truncation.value:.1%}",
        f"{choice.needless.value:.1%}",
        f"{choice.concatenation.value:.1%}",
        f"{choice.documents_per_sample.value:.3g}",
        decimal(round(choice.bytes.value)),
        clock(choice.seconds.value),
    ]


def _errors(choice: Choice) -> list[str]:
    """How far off each of `_row` may be; nothing where a number is certain."""
    shown: list[tuple[Estimate, Callable[[float], str]]] = [
        (choice.samples, "{:,}".format),
        (choice.padding, "{:.2%}".format),
        (choice.truncation, "{:.1%}".format),
        (choice.needless, "{:.1%}".format),
        (choice.concatenation, "{:.1%}".format),
        (choice.documents_per_sample, "{:.2g}".format),
        (choice.bytes, lambda error: decimal(round(error))),
        (choice.seconds, clock),
    ]
    return [f"±{text(number.error)}" if number.told and not number.exact else "" for number, text in shown]


def _notes(plan: Plan) -> list[str]:
    lost = [
        f"N = {choice.seq_len:,}: {_between(choice.overlong, 'documents')} lose {_between(choice.cut_off, 'ids')}"
        for choice in {each.seq_len: each for each in plan.choices}.values()
        if choice.cut_off.value
    ]
    numbers = sorted({choice.workers for choice in plan.choices})
    workers = f"{' or '.join(map(str, numbers))} worker{'' if numbers == [1] else 's'}"
    rate = f"{plan.ids_per_second / 1e6:.3g} M ids a second"
    meaning = [
        "cut        documents that are in more than one sample; ≤ N: of all documents, those cut though they would fit",
        "joined     documents that share a sample with another one",
        f"time       at least: reading and tokenizing with {workers} at {rate} each; packing and writing come on top",
    ]
    if plan.ids.told and not plan.exact:
        meaning.append("± and to   the true number lies between, with 95% confidence")
    return [*(f"overlong   {each}" for each in lost), *(f"note       {note.flags}" for note in plan.notes), *meaning]


def clock(seconds: float) -> str:
    """
    >>> clock(3.21), clock(62), clock(3725)
    ('3.2 s', '1:02', '1:02:05')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
