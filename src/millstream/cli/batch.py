"""`batch`: the files of a batch API, split, joined and asked again."""

import json
import sys
from typing import Any

import click

from millstream.cli.types import SIZE, WITH_FAULTS


@click.group(short_help="Split, join and ask again the files of a batch API.")
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
    from millstream.runs.batch.splitting import split

    report = split(requests, out, **options)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words())


def _join_options(command: Any) -> Any:
    """What merge and retry-failed take."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        click.option("--overwrite", is_flag=True, help="Replace a FILE that is there already."),
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
def batch_merge(requests: tuple[str, ...], outputs: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Write exactly one outcome for each of REQUESTS, in their order, from OUTPUT... in any order.

    Outcomes are found by custom_id. Of several the last success counts, else the last failure; a request without any
    gets an error of code "missing". Exit code 3: some failed or are missing.
    """
    from millstream.runs.batch.joining import merge

    report = merge(requests, outputs, out, **options)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words(), err=out == "-")
    if report.faults:
        sys.exit(WITH_FAULTS)


@batch.command(name="retry-failed", cls=_SeveralOutputs, short_help="Pick the requests to ask again.")
@_join_options
def batch_retry_failed(
    requests: tuple[str, ...], outputs: tuple[str, ...], out: str, as_json: bool, **options: Any
) -> None:
    """Write those of REQUESTS, unchanged, that failed in every OUTPUT or are in none."""
    from millstream.runs.batch.joining import retry_failed

    report = retry_failed(requests, outputs, out, **options)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else report.in_words(), err=out == "-")
