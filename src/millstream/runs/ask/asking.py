"""`ask_to`: prompts from a file to one row each in another, resumable, with nothing asked twice."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from millstream.bridge import run
from millstream.client.bodies import Recipe
from millstream.client.client import Client
from millstream.client.requests import Request
from millstream.corpus.find import expand
from millstream.corpus.sources import InputShard
from millstream.errors import RequestError, setting
from millstream.runs.ask.answer_lines import Header
from millstream.runs.ask.answers import JOURNAL, AnswerJournal, is_ours
from millstream.runs.ask.earlier import Again, refuse_other_order
from millstream.runs.ask.endings import checked_endings
from millstream.runs.ask.output import Output, identity, opened, refuse_existing, refuse_inputs, refuse_journal
from millstream.runs.ask.prompts import batches
from millstream.runs.ask.run import AskRun, advice
from millstream.runs.ask.settings import AskSettings
from millstream.runs.ask.spendings import kept_spendings
from millstream.runs.ask.typos import unless_all_fail
from millstream.runs.progress import AskProgress, AskReport
from millstream.store import kind_at, target_of


def ask_to(
    out: str,
    prompts: str,
    settings: AskSettings,
    *,
    journal: str | None = None,
    on_progress: Callable[[AskProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> AskReport:
    """Ask every prompt of `prompts` and write one JSON row each to `out` ("-": replies alone, to standard output).

    The journal (in `out`.run unless `journal` names a folder) is the truth: every outcome is in it before it is
    anywhere else, and the same call after any interruption asks only what has none. `out` is never an input, and a file
    that no journal of ours has written is replaced only with `AskSettings.overwrite`. `on_note` is told at once what is
    worth knowing of the prompts and the servers; the report has it, too.

    Raises RequestError for wrong settings, RunError when a server refuses for a reason that every request shares, and
    KeyboardInterrupt when it is interrupted a second time, before what ran has ended.
    """
    if settings.all_replies and out != "-":
        raise RequestError(f"{setting('all_replies')} is for {setting('out', '-', '-')}: a file gets all rows")
    if out == "-" and journal is None:
        _refuse_without_journal(settings)
    shards = expand([prompts])
    if len(shards) != 1:
        raise RequestError(f"{prompts}: prompts come from one file, or '-'")
    folder = _journal_folder(out, journal)
    _refuse_places(out, shards[0].uri, folder, overwrite=settings.overwrite)
    client = _client(settings)
    recipe = Recipe(settings.model, settings.system, settings.template, client.params, settings.row_params)
    notes = _Notes(on_note)
    with contextlib.ExitStack() as stack:
        first, rows = _read(shards[0], recipe, settings, notes)
        kept = stack.enter_context(AnswerJournal(folder)) if folder else None
        header = Header(
            out=_seen_from(kept, out),
            model=settings.model,
            params=dict(client.params),
            system=settings.system,
            template=settings.template,
            row_params=tuple(settings.row_params),
            retry_finish=tuple(sorted(checked_endings(settings.retry_finish))),
        )
        again = _again(kept, header, settings, first)
        output = stack.enter_context(_opened(out, kept, header, overwrite=settings.overwrite))
        if kept is not None:
            stack.enter_context(kept_spendings(kept.path, client.purse))
        course = AskRun(
            out,
            shards[0],
            rows,
            settings,
            client=client,
            journal=kept,
            again=again,
            output=output,
            on_progress=on_progress,
            on_note=notes,
        )
        report = run(course.main(), answers_signals=True)
    if report is None:
        raise KeyboardInterrupt
    if client.shortage:
        notes(client.shortage)
    return replace(report, notes=notes.told)


def _refuse_without_journal(settings: AskSettings) -> None:
    """Raise RequestError for what goes on from an earlier run, of which nothing is known without a journal."""
    for name in ("retry_faults", "retry_finish", "reuse"):
        if getattr(settings, name):
            raise RequestError(
                f"{setting(name)} goes on from an earlier run: with {setting('out', '-', '-')}, say with "
                f"{setting('journal')} where it was kept"
            )


def _client(settings: AskSettings) -> Client:
    return Client(
        list(settings.base_urls),
        model=settings.model,
        api_key=settings.api_key,
        in_flight=settings.in_flight,
        timeout=settings.timeout,
        deadline=settings.deadline,
        attempts=settings.attempts,
        longest_wait=settings.longest_wait,
        rpm=settings.rpm,
        tpm=settings.tpm,
        hedge=settings.hedge,
        price=settings.price,
        max_cost=settings.max_cost,
        schema=settings.schema,
        params=settings.params,
        headers=settings.headers,
        proxy=settings.proxy,
        max_reply=settings.max_reply,
    )


class _Notes:
    """What is told of the prompts and the servers; called with the words."""

    def __init__(self, on_note: Callable[[str], None] | None) -> None:
        self.told: list[str] = []
        self._on_note = on_note

    def __call__(self, words: str) -> None:
        self.told.append(words)
        if self._on_note:
            self._on_note(words)


def _read(
    shard: InputShard, recipe: Recipe, settings: AskSettings, tell: Callable[[str], None]
) -> tuple[list[Request], Iterator[list[Request]]]:
    """The first requests, and all; what is wrong with the file or the settings shows before anything is written."""
    rows = unless_all_fail(batches(shard, recipe, limit=settings.limit, keep_rows=settings.keep_input, tell=tell))
    first = next(rows, None)
    if first is None and settings.limit != 0:
        raise RequestError(f"{shard.name} is empty: there is nothing to ask")
    return (first, chain([first], rows)) if first else ([], rows)


def _again(journal: AnswerJournal | None, header: Header, settings: AskSettings, first: list[Request]) -> Again | None:
    """What is asked again of a journal. Raises RequestError for one that these settings do not go with."""
    if journal is None:
        return None
    if not settings.reuse:
        refuse_other_order(journal, header)
    again = Again(journal, header, faults=settings.retry_faults)
    again.refuse_strangers(first)
    return again


# Where things are written ---------------------------------------------------------------------------------------------


def _journal_folder(out: str, journal: str | None) -> str | None:
    if journal is not None or out == "-":
        return journal
    if kind_at(out) in ("pipe", "device"):
        raise RequestError(f"{out} is a device or a pipe: say with {setting('journal')} where to keep what is answered")
    return f"{out}.run"


def _refuse_places(out: str, prompts: str, folder: str | None, *, overwrite: bool) -> None:
    """Before anything is opened: raise RequestError if something else would be written over, or asked without end."""
    refuse_inputs(out, [prompts])
    refuse_journal(out, folder)
    if folder is None:
        return
    journal = identity(os.path.join(folder, JOURNAL))
    if journal is not None and identity(0 if prompts == "-" else prompts) == journal:
        raise RequestError(
            f"the prompts are the journal in {folder}, which this run writes to: give another {setting('journal')}"
        )
    if out == "-":
        return
    parent = os.path.dirname(target_of(out))
    if kind_at(out) == "folder" or not (kind_at(parent) == "folder" or os.path.dirname(target_of(folder)) == parent):
        why = "it is a folder" if kind_at(out) == "folder" else "there is no such folder"
        raise RequestError(f"cannot write {out}: {why}")
    if target_of(out) == target_of(folder):
        raise RequestError(f"{out} cannot be both {setting('out')} and {setting('journal')}")
    if not is_ours(folder):
        refuse_existing(out, overwrite=overwrite, because=f" and {folder} has no journal of ours")


@contextlib.contextmanager
def _opened(out: str, journal: AnswerJournal | None, header: Header, *, overwrite: bool) -> Iterator[Output]:
    """The output, after the journal says that this is where it went."""
    if journal is not None and journal.headers and all(earlier.out != header.out for earlier in journal.headers):
        beside = target_of(journal.folder) == target_of(f"{out}.run")
        refuse_existing(out, overwrite=overwrite or beside, because=f", and was not written with {journal.folder}")
    with opened(out, advice=advice(journal)) as output:
        if journal is not None:
            journal.begin(header)
        yield output


def _seen_from(journal: AnswerJournal | None, out: str) -> str | None:
    """The path of the output from the journal's folder, so that both may move together."""
    if out == "-" or journal is None:
        return None
    return os.path.relpath(target_of(out), target_of(journal.folder))
