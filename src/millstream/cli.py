"""The command line: arguments in, exit codes out. Everything else is the Python API."""

import json
import math
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
    wanted = "size; give one such as 256MiB"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower())
        if not found:
            self.fail(f"{value!r} is no {self.wanted}", param, ctx)
        number, unit, binary = found.groups()
        return int(float(number) * (_BINARY if binary else _UNITS)[unit])


SIZE = Size()


class Ids(Size):
    """A number of ids: 1000000, 1M or 1Mi (powers of 1,024)."""

    name = "ids"
    wanted = "number of ids; give one such as 32Mi"


IDS = Ids()


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
    type=click.Choice(["concat", "best-fit", "split"]),
    help="concat: join documents, cut every N ids. best-fit: cut only longer ones than N, place the rest so that "
    "hardly anything is padded. split: no two documents in a sample, padded.",
)
@click.option("--window", type=IDS, metavar="IDS", help="Ids within which best-fit places documents [default: 32Mi].")
@click.option("--max-segments", type=int, metavar="M", help="Documents in a sample of best-fit at most.")
@click.option("--shuffle", type=int, metavar="SEED", help="Shuffle documents, within a window.")
@click.option(
    "--shuffle-window", type=IDS, metavar="IDS", help="Ids within which documents are shuffled [default: --window]."
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
@click.option(
    "--format",
    "format_",
    default="npy",
    show_default=True,
    metavar="A,B,...",
    help="npy or parquet; with commas also megatron, mds, datatrove, litdata, nanogpt, llm.c.",
)
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


@cli.command(short_help="Write a finished run in the formats that trainers read.")
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
@click.option("--json", "as_json", is_flag=True, help="Print the closing report as JSON.")
def convert(folder: str, formats: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Write the samples of the finished run folder DIR in one or more formats, every id accounted for.

    A format's folder appears when it is complete. The same command again keeps what is finished and gives the same
    bytes. Formats with samples of N ids leave the kept remainder out, and say so.
    """
    from millstream.runs.convert import convert_to

    report = convert_to(out, folder, [name.strip() for name in formats.split(",")], overwrite=overwrite)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words())


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
    "--in-flight", default="64", show_default=True, metavar="auto|N", help="Requests at once; auto finds out how many."
)
@click.option("--timeout", default=600.0, show_default=True, metavar="S", help="Seconds for one attempt.")
@click.option("--deadline", type=float, metavar="S", help="Seconds for a request with all its retries.")
@click.option("--attempts", default=5, show_default=True, type=click.IntRange(1), help="Attempts at a request.")
@click.option("--rpm", type=click.FloatRange(0, min_open=True), metavar="N", help="Requests a minute at most.")
@click.option("--tpm", type=click.FloatRange(0, min_open=True), metavar="N", help="Ids a minute at most.")
@click.option("--ordered", is_flag=True, help="Write rows in the prompts' order, not as they are answered.")
@click.option("--hedge", is_flag=True, help="Ask the slowest requests twice, at most 5 % of them.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Only the first N prompts.")
@click.option("--price", metavar="IN,OUT", help="Of a million ids in prompts and in replies, to show what it costs.")
@click.option("--max-cost", type=click.FloatRange(0), metavar="C", help="Stop before it costs more; needs --price.")
@click.option("--schema", type=click.Path(), metavar="FILE", help="JSON schema that every reply must fit.")
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
@click.option("--keep-input", is_flag=True, help="Put the prompt's own fields into its row, under input.")
@click.option("--batch-format", is_flag=True, help="Write rows as OpenAI's Batch API does.")
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
    in_flight: str,
    price: str | None,
    schema: str | None,
    **options: Any,
) -> None:
    """Ask an OpenAI-compatible server every prompt of PROMPTS, many at once, and get exactly one row for each.

    PROMPTS is JSONL (fields prompt or messages, or any with --template; custom_id or id names the row), OpenAI Batch
    JSONL, text with a prompt a line, Parquet, or - for JSONL on standard input. The same command again asks only what
    has no outcome yet. The key comes from OPENAI_API_KEY and is never printed or kept.
    """
    from dataclasses import asdict

    from millstream.report import ask_summary, watch_ask

    with _needs_ask_extra():
        from millstream.runs.asking import AskSettings, ask_to
    body = dict(_parameter(param) for param in params)
    body |= {} if temperature is None else {"temperature": temperature}
    body |= {} if max_tokens is None else {"max_tokens": max_tokens}
    settings = AskSettings(
        params=body, in_flight=_in_flight(in_flight), price=_price(price), schema=_schema(schema), **options
    )
    with watch_ask() as on_progress:
        report = ask_to(out, prompts, settings, journal=journal, on_progress=on_progress)
    click.echo(json.dumps(asdict(report), indent=1) if as_json else ask_summary(report), err=out == "-")
    if report.stopped == "too dear":
        raise MillstreamError("stopped before it would cost more than --max-cost. A higher one goes on from here")
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


def _in_flight(text: str) -> Any:
    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise click.BadParameter(f"{text!r} is neither auto nor a number from 1", param_hint="--in-flight")
    return text if text == "auto" else int(text)


def _price(text: str | None) -> tuple[float, float] | None:
    """IN,OUT as two numbers."""
    if text is None:
        return None
    try:
        given, told = (float(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not IN,OUT, such as 0.15,0.6", param_hint="--price") from None
    if not (0 <= given < math.inf and 0 <= told < math.inf):
        raise click.BadParameter(f"{text!r}: a price is a number from 0", param_hint="--price")
    return given, told


def _schema(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            schema = json.load(file)
    except OSError as error:
        raise RequestError(f"cannot read the schema {path}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"the schema {path} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise RequestError(f"the schema {path} is no JSON object")
    return schema


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


@cli.group(short_help="Split, join and ask again the files of a batch API.")
def batch() -> None:
    """Request files of a batch API in OpenAI's format: split into what it takes, and joined with what came back.

    \b
    millstream batch split requests.jsonl --out parts
    millstream batch merge requests.jsonl --outputs results-*.jsonl --out merged.jsonl
    millstream batch retry-failed requests.jsonl --outputs results-*.jsonl --out again.jsonl
    """


class _SeveralOutputs(click.Command):
    """A command that takes `--outputs A B C`, as a shell's glob gives it, for `--outputs A --outputs B --outputs C`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread, several = [], False
        for arg in args:
            if arg.startswith("-") and arg != "-":
                several = arg.partition("=")[0] == "--outputs"
                spread += [] if arg == "--outputs" else [arg]
            else:
                spread += ["--outputs", arg] if several else [arg]
        return super().parse_args(ctx, spread)


@batch.command(name="split", short_help="Cut request files into ones that a batch API takes.")
@click.argument("requests", nargs=-1, required=True, metavar="REQUESTS...")
@click.option("--out", required=True, type=click.Path(), metavar="DIR", help="Folder for requests-00000.jsonl ...")
@click.option("--max-lines", default=50_000, show_default=True, type=click.IntRange(1), help="Requests in a file.")
@click.option("--max-bytes", default="200MB", show_default=True, type=SIZE, help="Size of a file.")
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier split in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def batch_split(requests: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Write the lines of REQUESTS, unchanged, to files of one url and one model each, within both limits.

    A line that is no request, or a custom_id that comes twice, is an error that names its line; then nothing is
    written.
    """
    from millstream.runs.batching import split

    report = split(requests, out, **options)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words())


def _join_options(command: Any) -> Any:
    """What merge and retry-failed take."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        click.option("--out", required=True, metavar="FILE", help="The file to write; - is standard output."),
        click.option(
            "--outputs", multiple=True, required=True, metavar="OUTPUT...", help="What came back, error files too."
        ),
        click.argument("requests", nargs=-1, required=True, metavar="REQUESTS..."),
    ):
        command = option(command)
    return command


@batch.command(name="merge", cls=_SeveralOutputs, short_help="Join what came back, in the requests' order.")
@_join_options
def batch_merge(requests: tuple[str, ...], outputs: tuple[str, ...], out: str, as_json: bool) -> None:
    """Write exactly one outcome for each of REQUESTS, in their order, from OUTPUT... in any order.

    Outcomes are found by custom_id. Of several the last success counts, else the last failure; a request without any
    gets an error of code "missing". Exit code 3: some failed or are missing.
    """
    from millstream.runs.batching import merge

    report = merge(requests, outputs, out)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words(), err=out == "-")
    if report.faults:
        sys.exit(WITH_FAULTS)


@batch.command(name="retry-failed", cls=_SeveralOutputs, short_help="Pick the requests to ask again.")
@_join_options
def batch_retry_failed(requests: tuple[str, ...], outputs: tuple[str, ...], out: str, as_json: bool) -> None:
    """Write those of REQUESTS, unchanged, that failed in every OUTPUT or are in none."""
    from millstream.runs.batching import retry_failed

    report = retry_failed(requests, outputs, out)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words(), err=out == "-")


@cli.command(short_help="Say what packing would give, before it is done.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--tokenizer", default=None, help="As for pack [default: gpt2].")
@click.option(
    "--seq-len",
    "seq_lens",
    multiple=True,
    default=["1024,2048,4096,8192"],
    show_default=True,
    metavar="N,...",
    help="Token ids in a sample; several are compared.",
)
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    default=["concat,split,best-fit"],
    show_default=True,
    metavar="NAME,...",
    help="Strategies to compare.",
)
@click.option("--sample", default="64MiB", show_default=True, type=SIZE, help="Read about so much of the corpus.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides what is read.")
@click.option("--bos", is_flag=True, help="Put a BOS token before each document.")
@click.option("--eos", is_flag=True, help="Put an EOS token after each document.")
@click.option("--text-field", default="text", show_default=True, help="Field or column with the text.")
@click.option("--ids-field", help="Field or column with token ids: the text is tokenized already.")
@click.option("--workers", type=int, metavar="N", help="Processes the run would have [default: what it would take].")
@click.option("--memory", default="1GiB", show_default=True, type=SIZE, help="Memory the run would have.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    sources: tuple[str, ...],
    seq_lens: tuple[str, ...],
    strategies: tuple[str, ...],
    sample: int,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what packing SOURCE... would give: samples, padding, documents cut, size and time, for several settings.

    A SOURCE is as for pack. Blocks from all over the corpus are read, and nothing is written; numbers come with the
    interval that the true ones lie in with 95 % confidence. A corpus that is no larger than --sample is read whole:
    then they are exact.
    """
    from millstream.engines.local import keep_freed_memory
    from millstream.runs.plan import make_plan
    from millstream.runs.settings import Settings

    keep_freed_memory()
    lengths = [_whole_number(text, "--seq-len") for text in ",".join(seq_lens).split(",")]
    names = ",".join(strategies).split(",")
    found = make_plan(sources, Settings(**options), lengths, names, sample=sample, seed=seed)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
        return
    from millstream.view import show_plan

    show_plan(found)


def _whole_number(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no whole number", param_hint=flag) from None


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
