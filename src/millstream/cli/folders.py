"""Commands about a run folder: is it whole, what is in it and where, and in which other formats."""

import json
import os
import sys
from typing import Any

import click

from millstream.cli.types import INTERRUPTED, Exit
from millstream.errors import RunError


@click.command(short_help="Check a run folder: every byte, every count, every id.")
@click.argument("folder", metavar="DIR")
@click.argument("more", nargs=-1, metavar="[--against SOURCE...]")
@click.option(
    "--against",
    multiple=True,
    metavar="SOURCE...",
    help="The sources of the run: tokenize them again, with the reference engine, and compare every id.",
)
@click.option(
    "--sample",
    default=1.0,
    show_default=True,
    metavar="FRACTION",
    help="With --against, compare this part of the documents, from all over the corpus.",
)
@click.option("--tokenizer", metavar="NAME", help="With --against, where the run's tokenizer is now, if it has moved.")
@click.option("--chat-template", metavar="FILE", help="With --against, the --chat-template that the run was given.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="With --against, processes that tokenize.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify(folder: str, more: tuple[str, ...], against: tuple[str, ...], as_json: bool, **how: Any) -> None:
    """Check the finished run folder DIR against its manifest, and against its sources if they are given.

    Finds missing, truncated, changed and foreign files, ids outside the vocabulary, samples, segments and documents
    that do not fit, and a ledger that does not balance. With --against, whatever else is not as the sources are.
    """
    from dataclasses import asdict

    from millstream.engines.lean import keep_freed_memory

    keep_freed_memory()
    from millstream.integrity import verify as check
    from millstream.terminal import counted, printable

    if (more or how["sample"] != 1 or how["tokenizer"] or how["chat_template"]) and not against:
        raise click.UsageError(f"give the sources behind --against: millstream verify {folder} --against SOURCE...")
    verdict = check(folder, against=[*against, *more] if against else None, **how)
    if as_json:
        click.echo(json.dumps({"ok": verdict.ok, **asdict(verdict)}, indent=1))
    elif verdict.ok:
        size = (
            f"{counted(verdict.files, 'file')}, {counted(verdict.bytes, 'byte')}, {counted(verdict.samples, 'sample')}"
        )
        click.echo(f"{folder} is whole: {size}.")
    if verdict.compared is not None and not as_json:
        without = f", {verdict.not_compared:,} of them with the fast engine alone" if verdict.not_compared else ""
        told = "all equal" if verdict.ok else "they differ"
        click.echo(
            f"{verdict.compared:,} of {verdict.documents:,} documents compared with the sources{without}: {told}."
        )
    elif against and verdict.compared is None:
        click.echo("not compared with the sources, since the folder itself is not whole", err=True)
    for problem in verdict.problems:
        click.echo(printable(f"{folder}: {problem}"), err=True)
    if not verdict.ok:
        advice = "take out what is foreign, pack the rest again with --overwrite"
        raise Exit(f"{folder} is not whole: {advice}", RunError.exit_code, reported=as_json)


@click.command(short_help="Write a finished run in the formats that trainers read.")
@click.argument("folder", metavar="DIR")
@click.option(
    "--format",
    "formats",
    required=True,
    metavar="A,B,...",
    help="Of npy, parquet, megatron, mds, datatrove, litdata, nanogpt, llm.c.",
)
@click.option("--out", required=True, type=click.Path(), help="Folder that gets a folder for each format.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion in --out.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Processes that write [default: one a core if it is worth it].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the closing report as JSON.")
def convert(folder: str, formats: str, out: str, as_json: bool, **how: Any) -> None:
    """Write the samples of the finished run folder DIR in one or more formats, every id accounted for.

    A format's folder appears when it is complete. The same command again keeps what is finished and gives the same
    bytes. Formats with samples of N ids leave the kept remainder out, and say so.
    """
    from millstream.runs.pack.convert import convert_to

    try:
        report = convert_to(out, folder, [name.strip() for name in formats.split(",")], **how)
    except KeyboardInterrupt:
        told = "stopped. The same command again keeps the formats that are finished, and makes the others."
        raise Exit(told, INTERRUPTED) from None
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words())


@click.command(
    short_help="Show a sample decoded, with its documents.", context_settings={"ignore_unknown_options": True}
)
@click.argument("folder", metavar="DIR")
@click.argument("index", default="0")
@click.option("--subset", default="train", show_default=True, help="train or validation.")
def show(folder: str, index: str, subset: str) -> None:
    """Show sample INDEX of the run folder DIR as text, each document in its colour.

    INDEX counts from 0, negative from the end; "remainder" are the ids that filled no sample. Ids that are not to be
    learned are dim.
    """
    from millstream.view import show_sample

    try:
        number = None if index == "remainder" else int(index)
    except ValueError:
        raise click.BadParameter(f"{index!r} is neither a number nor remainder", param_hint="INDEX") from None
    show_sample(folder, number, subset)


@click.command(
    short_help="Find where a document went.",
    # An id may begin with "-": what standard input's documents are called does.
    context_settings={"ignore_unknown_options": True},
)
@click.argument("folder", metavar="DIR")
@click.argument("document_id", metavar="DOCUMENT_ID")
@click.option(
    "--text", "as_text", is_flag=True, help="Print the document's text instead, put together from the samples."
)
@click.option("--number", type=int, metavar="N", help="Of several documents of this id, the one of this number.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; with --text, the text too.")
def find(folder: str, document_id: str, as_text: bool, number: int | None, as_json: bool) -> None:
    """Find every sample of the run folder DIR that holds ids of a document, and which ones.

    All documents of this id are found, in every subset, and those left out as faults. A document that has no id of its
    own is named for its place, as in corpus.jsonl#1024. Each comes with its number in the corpus.
    """
    from millstream.runs.pack.provenance import provenance, text_of
    from millstream.terminal import printable
    from millstream.view import show_provenance

    # Under a locale without the letters, Python has the bytes of an argument and not its text.
    document_id = os.fsencode(document_id).decode(errors="backslashreplace")
    found = provenance(folder, document_id)
    if number is not None:
        found = found.only(number)
    if as_json:
        click.echo(json.dumps(found.as_json(text=as_text), indent=1))
    elif not as_text:
        click.echo(show_provenance(found))
    else:
        if not found.documents:
            raise RunError(f"there is no text: {show_provenance(found)}")
        text = text_of(*found.one())
        if sys.stdout.isatty():
            click.echo(printable(text))
        else:  # just as it is
            sys.stdout.buffer.write(text.encode())


@click.command(short_help="List the tokenizers there are.")
def tokenizers() -> None:
    """List the tokenizers known by name and where they are."""
    from millstream.stream.tokenizers import available

    for name, where in available():
        click.echo(f"{name:24} {where}")
    click.echo(f"{'PATH':24} any tokenizer.json, or a folder with one")
    click.echo(f"{'ORG/NAME':24} any tokenizer on the Hugging Face hub, from its cache or the network")
