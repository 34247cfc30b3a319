"""The command line: arguments in, exit codes out. Everything else is the Python API."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from millstream import __version__
from millstream.errors import MillstreamError, RequestError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
INTERRUPTED = 130
WITH_FAULTS = 3


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions
    """A number of bytes: 300000, 64MiB (powers of 1,024) or 64MB (powers of 1,000)."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower())
        if not found:
            self.fail(f"{value!r} is no size; give one such as 256MiB", param, ctx)
        number, unit, binary = found.groups()
        return int(float(number) * (_BINARY if binary else _UNITS)[unit])


SIZE = Size()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="millstream", message="%(prog)s %(version)s")
def cli() -> None:
    """Text in, training samples of exactly N token ids out: in bounded memory, with nothing lost.

    \b
    millstream pack corpus/*.jsonl --out packed --eos
    millstream verify packed
    millstream show packed 0

    Exit codes: 0 done, 1 the data or the machine failed (run it again to go on), 2 the request was wrong,
    3 done with faulty documents left out, 130 interrupted (run it again to go on).
    """


@cli.command(short_help="Pack a corpus into samples of exactly N token ids.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", required=True, type=click.Path(), help="Folder of the run: new, or one to go on with.")
@click.option(
    "--tokenizer",
    default=None,
    help="gpt2 (default), cl100k_base, o200k_base, a tokenizer.json, a folder, a hub id.",
)
@click.option("--seq-len", default=2048, show_default=True, metavar="N", help="Token ids in a sample.")
@click.option(
    "--strategy",
    default="concat",
    show_default=True,
    type=click.Choice(["concat", "split"]),
    help="concat: join documents, cut every N ids. split: no two documents in a sample, padded.",
)
@click.option("--bos", is_flag=True, help="Put a BOS token before each document.")
@click.option("--eos", is_flag=True, help="Put an EOS token after each document.")
@click.option("--bos-token", metavar="T", help="The BOS token's text, if the tokenizer names none; implies --bos.")
@click.option("--eos-token", metavar="T", help="The EOS token's text, if the tokenizer names none; implies --eos.")
@click.option(
    "--remainder",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "drop", "pad"]),
    help="What becomes of the last ids, fewer than N.",
)
@click.option("--pad-id", type=int, help="Id that pads [default: EOS].")
@click.option("--pad-side", default="right", show_default=True, type=click.Choice(["right", "left"]))
@click.option("--text-field", default="text", show_default=True, help="Field or column with the text.")
@click.option("--id-field", default="id", show_default=True, help="Field or column with the document's id.")
@click.option("--ids-field", help="Field or column with token ids: the text is tokenized already.")
@click.option("--limit", type=int, metavar="DOCUMENTS", help="Stop after this many documents.")
@click.option(
    "--validation",
    default=0.0,
    metavar="FRACTION",
    help="Put this fraction of the documents, chosen by their id, into a validation subset.",
)
@click.option("--format", "format_", default="npy", show_default=True, type=click.Choice(["npy", "parquet"]))
@click.option("--workers", type=int, metavar="N", help="Processes [default: what cores and --memory allow].")
@click.option("--memory", default="1GiB", show_default=True, type=SIZE, help="Most memory of all processes together.")
@click.option(
    "--max-document", type=SIZE, help="Longer documents are faults [default: 32MiB; plain text has no limit]."
)
@click.option("--shard-size", default="256MiB", show_default=True, type=SIZE, help="Size of an output shard.")
@click.option(
    "--on-error",
    default="stop",
    show_default=True,
    type=click.Choice(["stop", "skip"]),
    help="At a document that cannot be used: stop, or write it to faults.jsonl.",
)
@click.option("--engine", default="fast", show_default=True, type=click.Choice(["fast", "reference"]))
@click.option("--overwrite", is_flag=True, help="Delete an earlier run in --out and start anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the closing report as JSON.")
def pack(sources: tuple[str, ...], out: str, as_json: bool, format_: str, **options: Any) -> None:
    """Pack SOURCE... into samples of exactly N token ids.

    A SOURCE is a JSONL or NDJSON file, a plain text file (one document), a Parquet file, the first two also as .gz or
    .zst, a folder of those, a glob, - for JSONL on standard input, or stdlib: for Python's own source.

    The same command again goes on where an interrupted one stopped, and gives the same bytes.
    """
    from millstream.engines.local import keep_freed_memory
    from millstream.report import pack_summary, watch_pack
    from millstream.runs.packing import pack_to
    from millstream.runs.settings import Settings

    settings = Settings(format=format_, **options)
    keep_freed_memory()
    try:
        with watch_pack() as on_progress:
            report = pack_to(out, sources, settings, on_progress=on_progress)
    except KeyboardInterrupt:
        click.echo("\nmillstream: stopped. Nothing is lost: run the same command again to go on.", err=True)
        sys.exit(INTERRUPTED)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else pack_summary(report))
    if report.faults and not report.already:
        sys.exit(WITH_FAULTS)


@cli.command(short_help="Check a run folder: every byte, every count, every id.")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify(folder: str, as_json: bool) -> None:
    """Check the finished run folder DIR against its manifest.

    Finds missing, truncated, changed and foreign files, ids outside the vocabulary, counts that do not fit, and a
    ledger that does not balance.
    """
    from dataclasses import asdict

    from millstream.integrity import verify as check

    verdict = check(folder)
    if as_json:
        click.echo(json.dumps({"ok": verdict.ok, **asdict(verdict)}, indent=1))
    elif verdict.ok:
        click.echo(f"{folder} is whole: {verdict.files} files, {verdict.bytes:,} bytes, {verdict.samples:,} samples.")
    for problem in verdict.problems:
        click.echo(f"{folder}: {problem}", err=True)
    if not verdict.ok:
        raise MillstreamError(f"{folder} is not whole: take out what is foreign, pack the rest again with --overwrite")


@cli.command(short_help="Show a sample decoded, with its documents.", context_settings={"ignore_unknown_options": True})
@click.argument("folder", metavar="DIR")
@click.argument("index", type=int, default=0)
@click.option("--subset", default="train", show_default=True, help="train or validation.")
def show(folder: str, index: int, subset: str) -> None:
    """Show sample INDEX (from 0; negative from the end) of the run folder DIR as text, each document in its colour."""
    from millstream.view import show_sample

    show_sample(folder, index, subset)


@cli.command(short_help="List the tokenizers there are.")
def tokenizers() -> None:
    """List the tokenizers known by name and where they are."""
    from millstream.stream.tokenizers import available

    for name, where in available():
        click.echo(f"{name:24} {where}")
    click.echo(f"{'PATH':24} any tokenizer.json, or a folder with one")
    click.echo(f"{'ORG/NAME':24} any tokenizer on the Hugging Face hub, from its cache or the network")


@cli.command(short_help="Ask an LLM server every prompt of a file.")
@click.argument("prompts", metavar="PROMPTS")
@click.option(
    "--out", required=True, metavar="FILE", help="JSONL with one row a request; - for replies on standard output."
)
@click.option("--model", help="The model to ask.")
@click.option(
    "--base-url",
    "base_urls",
    multiple=True,
    metavar="URL",
    help="The server, mostly ending in /v1 [default: OPENAI_BASE_URL]; several share the load.",
)
@click.option("--system", metavar="TEXT", help="The system message of every request.")
@click.option("--template", metavar="TEXT", help="The prompt, with the row's fields in braces: 'Summarise: {text}'.")
@click.option(
    "--in-flight", default=64, show_default=True, type=click.IntRange(1), metavar="N", help="Requests at once."
)
@click.option("--timeout", default=600.0, show_default=True, metavar="S", help="Seconds for one attempt.")
@click.option("--deadline", type=float, metavar="S", help="Seconds for a request with all its retries.")
@click.option("--attempts", default=5, show_default=True, type=click.IntRange(1), help="Attempts at a request.")
@click.option("--ordered", is_flag=True, help="Write rows in the prompts' order, not as they are answered.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Only the first N prompts.")
@click.option("--temperature", type=float)
@click.option("--max-tokens", type=int)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other parameter of the request; can be given again.",
)
@click.option("--retry-faults", is_flag=True, help="Ask again what an earlier run could not get answered.")
@click.option("--journal", type=click.Path(), metavar="DIR", help="Where to keep what is answered [default: FILE.run].")
@click.option("--json", "as_json", is_flag=True, help="Print the closing report as JSON.")
def ask(
    prompts: str,
    out: str,
    as_json: bool,
    journal: str | None,
    params: tuple[str, ...],
    temperature: float | None,
    max_tokens: int | None,
    **options: Any,
) -> None:
    """Ask an OpenAI-compatible server every prompt of PROMPTS, many at once, and get exactly one row for each.

    PROMPTS is JSONL (fields prompt or messages, or any with --template; custom_id or id names the row), text with a
    prompt a line, or - for JSONL on standard input. The same command again asks only what has no outcome yet. The key
    comes from OPENAI_API_KEY and is never printed or kept.
    """
    from dataclasses import asdict

    from millstream.report import ask_summary, watch_ask

    with _needs_ask_extra():
        from millstream.runs.asking import AskSettings, ask_to
    body = dict(_parameter(param) for param in params)
    body |= {} if temperature is None else {"temperature": temperature}
    body |= {} if max_tokens is None else {"max_tokens": max_tokens}
    with watch_ask() as on_progress:
        report = ask_to(out, prompts, AskSettings(params=body, **options), journal=journal, on_progress=on_progress)
    click.echo(json.dumps(asdict(report), indent=1) if as_json else ask_summary(report), err=out == "-")
    if report.stopped:
        click.echo("millstream: stopped. Nothing is lost: run the same command again to go on.", err=True)
        sys.exit(INTERRUPTED)
    if report.faults:
        sys.exit(WITH_FAULTS)


@contextmanager
def _needs_ask_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise RequestError(f"this command needs {error.name}: pip install 'millstream[ask]'") from error


def _parameter(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON if it is some, else as text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--param")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@cli.command(short_help="Run a small LLM server that misbehaves as told.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8089, show_default=True, help="0 takes a free one.")
@click.option(
    "--latency",
    default="fixed 0.05",
    show_default=True,
    metavar="FORM",
    help="fixed S, lognormal MEDIAN SIGMA, or bimodal FAST SLOW SHARE, in seconds.",
)
@click.option(
    "--piece-latency",
    default="fixed 0",
    show_default=True,
    metavar="FORM",
    help="The same between the pieces of a stream.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="KIND:PROBABILITY",
    help="Such as 429:0.05, 429:0.05:2 (Retry-After 2), 503:1:times=2, hang:0.01; can be given again.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--reply-ids", type=int, metavar="N", help="Length of every reply in ids.")
@click.option("--capacity", type=int, metavar="N", help="Requests in service at once, hidden from the client.")
@click.option(
    "--overload",
    default="queue",
    show_default=True,
    type=click.Choice(["queue", "429"]),
    help="Beyond the capacity: wait, or 429.",
)
@click.option("--rpm", type=int, metavar="N", help="Requests a minute.")
@click.option("--tpm", type=int, metavar="N", help="Ids a minute.")
@click.option("--require-key", "api_key", metavar="KEY", help="Answer 401 without this key.")
def simulate(host: str, port: int, latency: str, piece_latency: str, faults: tuple[str, ...], **options: Any) -> None:
    """Run an OpenAI-compatible server on this machine, to try a job on for free before it costs money.

    It answers chat and text completions, streamed too, with seeded latencies and faults: the same request is treated
    alike in any order. GET /_simulator/stats says what it saw. Ctrl-C ends it.
    """
    from millstream.bridge import run

    with _needs_ask_extra():
        from millstream.llm.simulator import Behaviour, parse_fault, parse_latency, serve
    behaviour = Behaviour(
        latency=parse_latency(latency),
        piece_latency=parse_latency(piece_latency),
        faults=tuple(parse_fault(fault) for fault in faults),
        **options,
    )
    run(serve(behaviour, host, port, lambda url: click.echo(f"listening on {url} (Ctrl-C ends it)")))


def main() -> None:
    try:
        cli.main(prog_name="millstream", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("\nmillstream: stopped", err=True)
        sys.exit(INTERRUPTED)
    except MillstreamError as error:
        click.echo(f"millstream: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
