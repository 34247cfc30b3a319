"""A pack run in words: progress while it goes, a summary at the end."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millstream.corpus.find import ignored_files
from millstream.folder.entries import Identity
from millstream.runs.progress import IN_VAIN, AskProgress, AskReport, Progress, Report
from millstream.terminal import counted

_WRITTEN_OVER = 0.2  # seconds between lines on a terminal
_FIRST_LINE, _LONGEST_WAIT = 10.0, 300.0  # seconds between plain lines, where there is none


def _rates(now: Progress) -> tuple[float, float]:
    """(bytes, ids) a second, of what this process did."""
    seconds = max(now.seconds, 1e-9)
    return (now.bytes - now.bytes_before) / seconds, (now.ids - now.ids_before) / seconds


def bottleneck(stages: dict[str, float]) -> str:
    """The stage that takes longest; workers share all of them.

    >>> bottleneck({"read": 1.0, "tokenize": 2.0, "wait": 3.0})
    'tokenize'
    """
    cost = {name: seconds for name, seconds in stages.items() if name != "wait"}
    return max(cost, key=lambda name: cost[name]) if cost else "-"


def progress_line(now: Progress, width: int | None = None) -> str:
    """One line of progress: how much, how fast, how long still, and what it waits for; what matters least is left out
    where it would be wider than `width`."""
    byte_rate, id_rate = _rates(now)
    parts = [
        (0, f"{now.share:4.0%}" if now.share is not None else ""),
        (2, f"{now.documents:,} documents"),
        (3, f"{now.ids:,} ids"),
        (6, f"{byte_rate / 1e6:.0f} MB/s"),
        (4, f"{id_rate / 1e6:.1f} M ids/s"),
        (1, _left(now)),
        (7, f"slowest: {bottleneck(now.stages)}"),
        (5, f"{now.faults:,} faulty" if now.faults else ""),
    ]
    return fitting(parts, width)


def _left(now: Progress) -> str:
    if now.share is None or now.share_before is None or now.share <= now.share_before:
        return ""
    return f"{_time(now.seconds * (1 - now.share) / (now.share - now.share_before))} left"


def fitting(parts: list[tuple[int, str]], width: int | None) -> str:
    """The parts (rank, text) in one line; of those that do not fit into `width`, the ones of the highest rank go.

    >>> fitting([(0, "40%"), (2, "12 documents"), (1, "0:03 left")], 20)
    '40% · 0:03 left'
    """
    kept = [part for part in parts if part[1]]
    while len(kept) > 1 and width is not None and len(" · ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return " · ".join(text for _, text in kept)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _NowAndThen:
    """When the next plain line is due: soon at first, later less often, so that a night fills no page."""

    def __init__(self) -> None:
        self._last, self._wait = time.monotonic(), _FIRST_LINE

    def due(self) -> bool:
        if time.monotonic() - self._last < self._wait:
            return False
        self._last, self._wait = time.monotonic(), min(2 * self._wait, _LONGEST_WAIT)
        return True


@contextmanager
def watch_pack() -> Iterator[Callable[[Progress], None]]:
    """Show progress on standard error: a live bar on a terminal, else a plain line now and then."""
    if not sys.stderr.isatty():
        lines = _NowAndThen()

        def line(now: Progress) -> None:
            if lines.due():
                print(progress_line(now), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar_width = 20 if console.width >= 100 else 8
    with Bar(BarColumn(bar_width), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(now: Progress) -> None:
            line = progress_line(now, console.width - bar_width - 2)
            bar.update(task, completed=now.share or 0, total=now.share and 1.0, description=line)

        yield update


@contextmanager
def watch_ask() -> Iterator[Callable[[AskProgress], None]]:
    """Show progress on standard error: a line that is written over on a terminal, else one now and then."""
    terminal = sys.stderr.isatty()
    lines, shown = _NowAndThen(), 0.0

    def line(now: AskProgress) -> None:
        nonlocal shown
        if terminal and time.monotonic() - shown >= _WRITTEN_OVER:
            shown = time.monotonic()
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1  # a cursor at the edge would wrap
            print(ask_line(now, width), file=sys.stderr, end="\033[K\r", flush=True)
        elif not terminal and lines.due():
            print(ask_line(now), file=sys.stderr, flush=True)

    yield line
    if terminal:
        print(end="\033[K", file=sys.stderr, flush=True)


def ask_line(now: AskProgress, width: int | None = None) -> str:
    """One line of progress of an ask run; what matters least is left out where it would be wider than `width`."""
    seconds = max(now.seconds, 1e-9)
    rate = now.asked / seconds
    parts = [
        (0, f"{min(1.0, now.done / now.total):4.0%}" if now.total else ""),
        (1, f"{now.done:,} done"),
        (2, f"{now.faults:,} failed" if now.faults else ""),
        (6, f"{now.in_flight} in flight"),
        (5, f"{rate:.1f} requests/s"),
        (8, f"{_scaled(now.ids_out / seconds).strip()} ids/s"),
        (4, "" if now.cost is None else f"cost {now.cost:.4g}"),
        (3, f"{_time(max(0, now.total - now.done) / rate)} left" if now.total and rate else ""),
        (7, f"waits for {now.waits_for}"),
    ]
    return fitting(parts, width)


def ask_summary(report: AskReport) -> str:
    """The closing report of an ask run, to be read aloud."""
    asked, spent = report.requests - report.again, report.spent
    lines = [
        f"{counted(report.requests, 'request')} became {counted(report.replies, 'reply', 'replies')}"
        f" and {counted(sum(report.faults.values()), 'fault')}, in {report.out}",
        f"  asked      {asked:,} in {spent['attempts']:,} attempts, {report.seconds:.1f} s,"
        f" {asked / max(report.seconds, 1e-9):.1f} requests/s",
    ]
    if report.again:
        lines.append(f"  journal    {report.again:,} were answered by an earlier run and not asked again")
    if report.damaged:
        lines.append(f"  damaged    {_damaged(report)} of the journal: what they held is asked again")
    lines.append(f"  ids        {report.ids_in:,} in the prompts, {report.ids_out:,} in the replies")
    if report.cost is not None:
        lines.append(f"  cost       {report.cost:.4f}")
    if report.ids_wasted or spent["wasted"]:
        lines.append(f"  wasted     {spent['wasted']:,} attempts; {report.ids_wasted:,} ids in replies of no use")
    if spent["hedges"]:
        lines.append(f"  hedges     {spent['hedges']:,} slow requests asked twice, {spent['hedges_won']:,} the quicker")
    if asked:
        lines.append(f"  time       {_times(spent)}")
    if spent["budget"] >= _TOLD:
        lines.append(f"  held back  retries, {spent['budget']:,.1f} s in all, by the retry budget")
    if report.limits:
        lines.append(f"  in flight  {_limits(report.limits)}")
    lines += _not_whole(report)
    for kind, count in report.faults.items():
        lines.append(f"  faults     {count:,} {kind.replace('_', ' ')}, such as: {report.examples[kind]}")
    if report.faults and report.kept:
        lines.append("  hint       --retry-faults asks the failed ones again")
    return "\n".join(lines)


_ENDED = {"length": "cut by the token limit", "content_filter": "filtered", "refusal": "refused"}


def _not_whole(report: AskReport) -> list[str]:
    """The lines that tell how replies ended, where they are not whole."""
    lines = []
    found = [f"{report.endings[kind]:,} {words}" for kind, words in _ENDED.items() if kind in report.endings]
    if found:
        left = f"; {report.left_out:,} of these left out (--all-replies sends them, too)" if report.left_out else ""
        lines.append(f"  not whole  {', '.join(found)}{left}")
    if "length" in report.endings and report.kept:
        lines.append("  hint       --retry-finish length asks those that were cut again, with another --max-tokens")
    if report.in_vain:
        what = counted(report.in_vain, "reply", "replies")
        lines.append(f"  in vain    {what} asked again, but kept, such as: {report.examples[IN_VAIN]}")
    if "unknown" in report.endings:
        unknown = counted(report.endings["unknown"], "row")
        lines.append(f"  unknown    {unknown} of an older journal do not tell how they ended: not asked again")
    return lines


def _damaged(report: AskReport) -> str:
    """Which lines: ``3 lines (2, 17, 18)``."""
    more = ", ..." if report.damaged > len(report.damaged_lines) else ""
    return f"{counted(report.damaged, 'line')} ({', '.join(map('{:,}'.format, report.damaged_lines))}{more})"


_TOLD = 0.05  # seconds; shorter waits are no news
_WHERE = {
    "server": "server",
    "queue": "rate limit",
    "backoff": "backoff",
    "budget": "retry budget",
    "slot": "for a place",
    "stall": "for its turn or the reader",
}


def _times(spent: dict[str, float]) -> str:
    """Where the requests' time went, in words."""
    total = sum(spent[name] for name in _WHERE) or 1.0
    ranked = sorted(_WHERE, key=lambda name: -spent[name])
    return ", ".join(f"{_WHERE[name]} {spent[name] / total:.0%}" for name in ranked if spent[name] / total >= 0.005)


def _limits(limits: list[tuple[float, int]]) -> str:
    """The history of an adaptive limit, at a few points: ``4 at 0:00, 64 at 0:03``."""
    step = max(1, len(limits) // 8)
    chosen = [*limits[::step], limits[-1]] if (len(limits) - 1) % step else limits[::step]
    return ", ".join(f"{number} at {_time(seconds)}" for seconds, number in chosen)


def pack_summary(report: Report) -> str:
    """The closing report, to be read aloud."""
    documents, ids = report.ledger["documents"], report.ledger["ids"]
    validation = report.validation
    extra = f" and {validation['samples']:,} for validation" if validation else ""
    shards = f"in {counted(report.shards, 'shard')}"
    head = (
        f"{counted(documents['in'], 'document')} became {counted(report.samples, 'sample')}"
        f" of {counted(report.seq_len, 'token id')}"
        f"{extra}, {shards}, in {report.out}"
    )
    if report.already:
        head = f"{report.out} is finished already: nothing to do.\n{head}\n  settings   {in_words(report.settings)}"
    lines = [
        head,
        f"  documents  {documents['in']:,} in = {documents['whole']:,} whole + {documents['split']:,} split"
        f"{_if_any(documents, 'truncated', 'left_out')}"
        f" + {documents['empty']:,} empty + {documents['faulty']:,} faulty",
        f"  ids        {_became(ids)}",
    ]
    if learned := report.ledger.get("learned"):
        lines.append(f"  learned    {_became(learned)}; {learned['in'] / max(1, ids['in']):.1%} of the ids")
    if ids["special"]:
        lines.append(f"  specials   {ids['special']:,} of the ids are BOS or EOS")
    if ids["padding"]:
        all_ids = ids["padding"] + ids["in_samples"]
        lines.append(f"  padding    {ids['padding']:,} ids, {ids['padding'] / max(1, all_ids):.2%} of the samples")
    for reason, count in report.ledger["faults"].items():
        lines.append(f"  faulty     {count:,} {reason.replace('_', ' ')} (in {report.out}/faults.jsonl)")
    if report.ignored:
        lines.append(f"  ignored    {ignored_files(report.ignored)}")
    lines += [f"  unreadable {folder}" for folder in report.unreadable]
    for done in report.exports:
        left = f", the remainder's {done['left_out']:,} left out" if done["left_out"] else ""
        lines.append(f"  exported   {done['written']:,} ids to {report.out}/{done['format']}{left}")
    if not report.already:
        rate = report.ids_this_time / max(report.seconds, 1e-9)
        again = ", going on with an earlier run" if report.resumed else ""
        lines.append(
            f"  speed      {report.seconds:.1f} s, {_scaled(report.bytes / max(report.seconds, 1e-9))}B/s,"
            f" {_scaled(rate).strip()} ids/s{again}"
        )
        spilled = f"; up to {_scaled(report.spilled)}B lay between them" if report.spilled else ""
        lines.append(f"  workers    {report.workers} ({report.workers_why}){spilled}")
        if report.shared:
            lines.append(f"  joined     {report.shared}")
        lines.append(f"  time       {_shares(report)}")
        if report.compared:
            lines.append(f"  compared   {_scaled(report.compared)}B with the reference engine: all ids equal")
    if report.not_compared_such_as:
        name, why = report.not_compared_such_as
        count = counted(report.not_compared, "document")
        lines.append(f"  compared   {count} not, such as {name!r}, which the fast engine alone encodes: {why}")
    if report.lost or report.unknown:
        lost, unknown = f"no id stands for {report.lost:,} bytes of text", f"{report.unknown:,} ids for unknown text"
        lines.append(f"  lost       {lost}, {unknown}: the vocabulary lacks letters of this corpus")
    lines += [f"  hint       {hint.flags}" for hint in report.hints]
    return "\n".join(lines)


def _became(ids: dict[str, int]) -> str:
    """What became of ids, as the ledger has it."""
    parts = f"{ids['in_samples']:,} in samples + {ids['remainder']:,} remainder + {ids['dropped']:,} dropped"
    return f"{ids['in']:,} in = {parts}{_if_any(ids, 'cut_off')}"


def _if_any(counts: dict[str, int], *names: str) -> str:
    """The counts with these names, where there are any.

    >>> _if_any({"truncated": 3, "left_out": 0}, "truncated", "left_out")
    ' + 3 truncated'
    """
    return "".join(f" + {counts[name]:,} {name.replace('_', ' ')}" for name in names if counts.get(name))


def in_words(settings: Identity) -> str:
    """The settings of a run, from its manifest: the tokenizer and how it packs, and what else was asked for.

    >>> from millstream.runs.pack.settings import Settings, identity
    >>> from millstream.stream.tokenizers import load_tokenizer
    >>> in_words(identity(Settings(eos=True, limit=1000), load_tokenizer("gpt2")))
    'gpt2, 2,048 ids, concat, eos, limit 1,000'
    """
    told = [settings.tokenizer.name if settings.tokenizer else "ids as they are"]
    told += [f"{settings.seq_len:,} ids", settings.strategy]
    told += [name for name, id_ in (("bos", settings.bos_id), ("eos", settings.eos_id)) if id_ is not None]
    for name in ("window", "max_segments", "shuffle", "overlong", "limit", "validation"):
        value = getattr(settings, name)
        if (value is not None and value != 0.0) or (name, value) == ("shuffle", 0):
            told.append(f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name} {value}")
    told += [f"chat, loss {settings.chat.loss}"] if settings.chat else []
    told += [f"remainder {settings.remainder}"] if settings.remainder != "keep" else []
    told += [settings.format] if settings.format != "npy" else []
    return ", ".join([*told, *(settings.exports or ())])


def _scaled(number: float) -> str:
    """A number with three digits and its prefix.

    >>> _scaled(1_234_567), _scaled(950)
    ('1.23 M', '950 ')
    """
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number:.3g} "


def _shares(report: Report) -> str:
    stages = {name: seconds for name, seconds in report.stages.items() if name != "wait"}
    total = sum(stages.values()) or 1.0
    ranked = sorted(stages.items(), key=lambda pair: -pair[1])
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ranked)
    return f"{shares}; everything waits for: {bottleneck(report.stages)}"
