"""The command line: arguments in, exit codes out. Everything else is the Python API."""

import itertools
import json
import os
import sys
from typing import NoReturn

import click

from millstream import __version__
from millstream.cli import asking, batch, folders, packing, simulate
from millstream.cli.types import INTERRUPTED, Ended, ending_like_an_interrupt
from millstream.errors import MillstreamError
from millstream.terminal import printable, show_what_can_be_shown


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


for command in (
    packing.pack,
    packing.plan,
    folders.verify,
    folders.show,
    folders.find,
    folders.convert,
    folders.tokenizers,
    asking.ask,
    simulate.simulate,
    batch.batch,
):
    cli.add_command(command)


def main() -> None:
    show_what_can_be_shown()
    try:
        with ending_like_an_interrupt():
            cli.main(prog_name="millstream", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        _end("UsageError", error.format_message(), error.exit_code)
    except KeyboardInterrupt:
        click.echo("\nmillstream: stopped", err=True)
        _end("Interrupted", "stopped", INTERRUPTED)
    except Ended as end:
        click.echo(f"millstream: {printable(str(end))}", err=True)
        if end.reported:
            sys.exit(end.exit_code)
        _end("Interrupted", str(end), end.exit_code)
    except MillstreamError as error:
        click.echo(f"millstream: {printable(error.words.flags)}", err=True)
        _end(type(error).__name__, error.words.flags, error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _end(name: str, message: str, code: int) -> NoReturn:
    """With `--json`, whoever reads it is told of a failure in JSON too, where the report would have been."""
    given = sys.argv[1:]
    if "--json" in given:
        replies_go_there = "ask" in given and ("--out=-" in given or ("--out", "-") in itertools.pairwise(given))
        failure = {"error": name, "message": message, "exit_code": code}
        click.echo(json.dumps(failure, indent=1), err=replies_go_there)
    sys.exit(code)
