"""`ask`: prompts in, one row for each out."""

import json
import sys
from typing import Any, NoReturn

import click

from millstream.cli.types import INTERRUPTED, SIZE, WITH_FAULTS, Exit, needs_ask_extra, numbers
from millstream.errors import RequestError, RunError
from millstream.store import file_at, kind_at


@click.command(short_help="Ask an LLM server every prompt of a file.")
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
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="NAME:VALUE",
    help="A header of every request, never shown; can be given again.",
)
@click.option("--proxy", metavar="URL", help="The proxy to go through [default: HTTPS_PROXY, HTTP_PROXY and NO_PROXY].")
@click.option("--system", metavar="TEXT", help="The system message of every request.")
@click.option("--template", metavar="TEXT", help="The prompt, with the row's fields in braces: 'Summarise: {text}'.")
@click.option(
    "--in-flight", default="64", show_default=True, metavar="auto|N", help="Requests at once; auto finds out how many."
)
@click.option("--timeout", default=600.0, show_default=True, metavar="S", help="Seconds for one attempt.")
@click.option("--deadline", type=float, metavar="S", help="Seconds for a request with all its retries.")
@click.option("--attempts", default=5, show_default=True, type=click.IntRange(1), help="Attempts at a request.")
@click.option(
    "--longest-wait",
    default=600.0,
    type=click.FloatRange(0),
    show_default=True,
    metavar="S",
    help="Seconds that a server's Retry-After is waited for when nothing else is left to ask.",
)
@click.option("--rpm", type=click.FloatRange(0, min_open=True), metavar="N", help="Requests a minute at most.")
@click.option("--tpm", type=click.FloatRange(0, min_open=True), metavar="N", help="Ids a minute at most.")
@click.option("--ordered", is_flag=True, help="Write rows in the prompts' order, not as they are answered.")
@click.option("--hedge", is_flag=True, help="Ask the slowest requests twice, at most 5 % of them.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Only the first N prompts.")
@click.option(
    "--price",
    metavar="IN,OUT[,CACHED]",
    help="Of a million ids in prompts, in replies and in prompts from a cache, to show what it costs.",
)
@click.option(
    "--max-cost",
    type=click.FloatRange(0),
    metavar="C",
    help="Stop before it could cost more, earlier runs on this journal included; needs --price.",
)
@click.option(
    "--schema",
    type=click.Path(),
    metavar="FILE|MODULE:MODEL",
    help="JSON schema or pydantic model that every reply must fit.",
)
@click.option("--temperature", type=float)
@click.option("--max-tokens", type=int)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other parameter of the request; can be given again.",
)
@click.option(
    "--row-params", default="", metavar="NAME,...", help="Fields of JSONL or Parquet rows to send as parameters."
)
@click.option("--retry-faults", is_flag=True, help="Ask again what an earlier run could not get answered.")
@click.option(
    "--retry-finish",
    default="",
    metavar="NAME,...",
    help="Ask replies again that ended so: length, content_filter, refusal; with another --max-tokens, if given.",
)
@click.option("--reuse", is_flag=True, help="Take answers although properties were given in another order then.")
@click.option("--keep-input", is_flag=True, help="Put the prompt's own fields into its row, under input.")
@click.option("--keep-body", is_flag=True, help="Keep the server's whole reply in the row, under body.")
@click.option("--all-replies", is_flag=True, help="With --out -, replies that were cut, filtered or refused, too.")
@click.option("--batch-format", is_flag=True, help="Write rows as OpenAI's Batch API does.")
@click.option(
    "--max-reply", type=SIZE, default="64MiB", show_default=True, metavar="SIZE", help="Bytes of a reply at most."
)
@click.option("--overwrite", is_flag=True, help="Replace an output that is there already; a journal never is.")
@click.option("--journal", type=click.Path(), metavar="DIR", help="Where to keep what is answered [default: FILE.run].")
@click.option("--json", "as_json", is_flag=True, help="Print the closing report as JSON.")
def ask(
    prompts: str,
    out: str,
    as_json: bool,
    journal: str | None,
    params: tuple[str, ...],
    headers: tuple[str, ...],
    temperature: float | None,
    max_tokens: int | None,
    in_flight: str,
    price: str | None,
    schema: str | None,
    row_params: str,
    retry_finish: str,
    **options: Any,
) -> None:
    """Ask an OpenAI-compatible server every prompt of PROMPTS, many at once, and get exactly one row for each.

    PROMPTS is JSONL (fields prompt or messages, or any with --template; custom_id or id names the row), OpenAI Batch
    JSONL, text with a prompt a line, Parquet, or - for JSONL on standard input. The same command again asks only what
    has no outcome yet. The key comes from OPENAI_API_KEY and is never printed or kept.
    """
    from dataclasses import asdict

    from millstream.report import ask_summary, watch_ask
    from millstream.terminal import printable

    with needs_ask_extra():
        from millstream.runs.ask.asking import ask_to
        from millstream.runs.ask.settings import AskSettings
    body = dict(_parameter(param) for param in params)
    body |= {} if temperature is None else {"temperature": temperature}
    body |= {} if max_tokens is None else {"max_tokens": max_tokens}
    settings = AskSettings(
        headers=dict(map(_header, headers)),
        params=body,
        in_flight=_in_flight(in_flight),
        price=numbers(price, "--price", "IN,OUT[,CACHED], such as 0.15,0.6"),
        schema=_schema(schema),
        row_params=_names(row_params),
        retry_finish=_names(retry_finish),
        **options,
    )
    try:
        with watch_ask() as on_progress:
            report = ask_to(out, prompts, settings, journal=journal, on_progress=on_progress, on_note=_note)
    except KeyboardInterrupt:
        _end_interrupted("stopped at once", kept=journal is not None or out != "-")
    click.echo(json.dumps(asdict(report), indent=1) if as_json else printable(ask_summary(report)), err=out == "-")
    if report.stopped == "too dear":
        on = "goes on from here" if report.kept else "asks everything again: only --journal keeps what is answered"
        counts = "an attempt counts with an id a byte and --max-tokens, until its reply tells"
        message = f"stopped before it could cost more than --max-cost ({counts}). A higher one {on}"
        raise Exit(message, RunError.exit_code, reported=as_json)
    if report.stopped:
        _end_interrupted("stopped", kept=report.kept, reported=as_json)
    if report.faults or report.left_out or report.in_vain:
        sys.exit(WITH_FAULTS)


def _note(words: str) -> None:
    click.echo(f"millstream: {words}", err=True)


def _names(text: str) -> list[str]:
    """NAME,NAME as a list."""
    return [name.strip() for name in text.split(",")] if text else []


def _end_interrupted(how: str, *, kept: bool, reported: bool = False) -> NoReturn:
    on = "Nothing is lost: run the same command again to go on"
    none = "What came out is all there is: without --journal the same command asks everything again"
    raise Exit(f"{how}. {on if kept else none}.", INTERRUPTED, reported=reported)


def _in_flight(text: str) -> Any:
    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise click.BadParameter(f"{text!r} is neither auto nor a number from 1", param_hint="--in-flight")
    return text if text == "auto" else int(text)


def _schema(path: str | None) -> Any:
    if path is None:
        return None
    if ":" in path and kind_at(path) is None:
        from millstream.llm.forms import model_named

        return model_named(path)
    try:
        schema = json.loads(file_at(path).text())
    except OSError as error:
        raise RequestError(f"cannot read the schema {path}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"the schema {path} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise RequestError(f"the schema {path} is no JSON object")
    return schema


def _header(text: str) -> tuple[str, str]:
    """NAME:VALUE. A value is as good as a key, so no message shows it."""
    name, colon, value = text.partition(":")
    if not (name.strip() and colon):
        raise click.BadParameter("a header is NAME:VALUE, such as 'X-Team: mill'", param_hint="--header")
    return name.strip(), value.strip()


def _parameter(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON if it is some, else as text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--param")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
