"""A pack run in words: progress while it goes, a summary at the end."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millstream.formats.corpus import ignored_files
from millstream.runs.progress import AskProgress, AskReport, Progress, Report

_LINE_EVERY = 10.0  # seconds between plain lines, where there is no terminal


def _rates(now: Progress) -> tuple[float, float]:
    """(bytes, ids) a second, of what this process did."""
    seconds = max(now.seconds, 1e-9)
    return (now.bytes - now.bytes_before) / seconds, (now.ids - now.ids_before) / seconds


def bottleneck(stages: dict[str, float], workers: int) -> str:
    """The stage that everything else waits for: the longest one, where workers share theirs."""
    shared = ("decode", "tokenize", "compare")
    cost = {name: seconds / (workers if name in shared else 1) for name, seconds in stages.items() if name != "wait"}
    return max(cost, key=lambda name: cost[name]) if cost else "-"


def progress_line(now: Progress) -> str:
    """One line of progress: how much, how fast, how long still, and what it waits for."""
    byte_rate, id_rate = _rates(now)
    parts = [
        f"{now.documents:,} documents",
        f"{now.ids:,} ids",
        f"{byte_rate / 1e6:.0f} MB/s",
        f"{id_rate / 1e6:.1f} M ids/s",
    ]
    if now.total_bytes:
        share = min(1.0, now.bytes / now.total_bytes)
        parts.insert(0, f"{share:4.0%}")
        if byte_rate:
            parts.append(f"{_time(max(0, now.total_bytes - now.bytes) / byte_rate)} left")
    parts.append(f"slowest: {bottleneck(now.stages, now.workers)}")
    if now.faults:
        parts.append(f"{now.faults:,} faulty")
    return " · ".join(parts)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def watch_pack() -> Iterator[Callable[[Progress], None]]:
    """Show progress on standard error: a live bar on a terminal, else a plain line every 10 seconds."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(now: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY:
                last = time.monotonic()
                print(progress_line(now), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(BarColumn(20), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(now: Progress) -> None:
            bar.update(task, completed=now.bytes, total=now.total_bytes, description=progress_line(now))

        yield update


@contextmanager
def watch_ask() -> Iterator[Callable[[AskProgress], None]]:
    """Show progress on standard error: a line that is written over on a terminal, else one every 10 seconds."""
    terminal = sys.stderr.isatty()
    every = 0.2 if terminal else _LINE_EVERY
    last = time.monotonic()

    def line(now: AskProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(ask_line(now), file=sys.stderr, end="\033[K\r" if terminal else "\n", flush=True)

    yield line
    if terminal:
        print(end="\033[K", file=sys.stderr, flush=True)


def ask_line(now: AskProgress) -> str:
    """One line of progress of an ask run."""
    seconds = max(now.seconds, 1e-9)
    rate = now.asked / seconds
    parts = [
        f"{now.done:,} done",
        f"{now.in_flight} in flight",
        f"{rate:.1f} requests/s",
        f"{_scaled(now.ids_out / seconds).strip()} ids/s",
    ]
    if now.faults:
        parts.insert(1, f"{now.faults:,} failed")
    if now.total:
        parts.insert(0, f"{min(1.0, now.done / now.total):4.0%}")
    if now.cost is not None:
        parts.append(f"cost {now.cost:.4g}")
    if now.total and rate:
        parts.append(f"{_time(max(0, now.total - now.done) / rate)} left")
    return " · ".join([*parts, f"waits for {now.waits_for}"])


def ask_summary(report: AskReport) -> str:
    """The closing report of an ask run, to be read aloud."""
    asked, spent = report.requests - report.again, report.spent
    lines = [
        f"{_count(report.requests, 'request')} became {_count(report.replies, 'reply', 'replies')}"
        f" and {_count(sum(report.faults.values()), 'fault')}, in {report.out}",
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
    if report.faults:
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
    if "length" in report.endings:
        lines.append("  hint       --retry-finish length asks those that were cut again, with another --max-tokens")
    if "unknown" in report.endings:
        unknown = _count(report.endings["unknown"], "row")
        lines.append(f"  unknown    {unknown} of an older journal do not tell how they ended: not asked again")
    return lines


def _damaged(report: AskReport) -> str:
    """Which lines: ``3 lines (2, 17, 18)``."""
    more = ", ..." if report.damaged > len(report.damaged_lines) else ""
    return f"{_count(report.damaged, 'line')} ({', '.join(map('{:,}'.format, report.damaged_lines))}{more})"


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
    shards = f"in {_count(report.shards, 'shard')}"
    head = (
        f"{_count(documents['in'], 'document')} became {_count(report.samples, 'sample')}"
        f" of {_count(report.seq_len, 'token id')}"
        f"{extra}, {shards}, in {report.out}"
    )
    if report.already:
        head = f"{report.out} is finished already: nothing to do.\n{head}"
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
        lines.append(f"  workers    {report.workers} ({report.workers_why})")
        lines.append(f"  time       {_shares(report)}")
        if report.compared:
            lines.append(f"  compared   {_scaled(report.compared)}B with the reference engine: all ids equal")
    if report.not_compared_such_as:
        name, why = report.not_compared_such_as
        count = _count(report.not_compared, "document")
        lines.append(f"  compared   {count} not, such as {name!r}, which the fast engine alone encodes: {why}")
    lines += [f"  hint       {hint}" for hint in report.hints]
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


def _scaled(number: float) -> str:
    """A number with three digits and its prefix.

    >>> _scaled(1_234_567), _scaled(950)
    ('1.23 M', '950 ')
    """
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number:.3g} "


def _count(number: int, what: str, many: str | None = None) -> str:
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def _shares(report: Report) -> str:
    stages = {name: seconds for name, seconds in report.stages.items() if name != "wait"}
    total = sum(stages.values()) or 1.0
    ranked = sorted(stages.items(), key=lambda pair: -pair[1])
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ranked)
    return f"{shares}; everything waits for: {bottleneck(report.stages, report.workers)}"
