"""The command line: arguments in, exit codes out. Everything else is the Python API."""

import itertools
import json
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

import click

from millstream import __version__
from millstream.cli.types import INTERRUPTED, Exit, ending_like_an_interrupt
from millstream.errors import MillstreamError
from millstream.store.pipe import to_nowhere
from millstream.terminal import printable, show_what_can_be_shown

_HOMES = {
    "ask": "asking",
    "batch": "batch",
    "convert": "folders",
    "find": "folders",
    "pack": "packing",
    "plan": "packing",
    "show": "folders",
    "simulate": "simulate",
    "tokenizers": "folders",
    "verify": "folders",
}


class _Commands(click.Group):
    """The commands, each imported when it is asked for: the options of all of them take a tenth of a small run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_HOMES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _HOMES:
            return None
        command: click.Command = getattr(import_module(f"millstream.cli.{_HOMES[name]}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _HOMES and (near := get_close_matches(args[0], _HOMES, 1)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")  # click knows those it has loaded
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


def main() -> None:
    show_what_can_be_shown()
    try:
        with ending_like_an_interrupt():
            cli.main(prog_name="millstream", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        _end("UsageError", error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):  # which is what click makes of the first, on a line of its own
        click.echo("millstream: stopped", err=True)
        _end("Interrupted", "stopped", INTERRUPTED)
    except Exit as end:
        click.echo(f"millstream: {printable(str(end))}", err=True)
        if end.reported:
            sys.exit(end.exit_code)
        _end("Interrupted", str(end), end.exit_code)
    except MillstreamError as error:
        click.echo(f"millstream: {printable(error.words.flags)}", err=True)
        _end(type(error).__name__, error.words.flags, error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; nobody is left to tell.
        to_nowhere(sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # Of a disk, or of a store far away that cannot be reached or does not let us in.
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        click.echo(f"millstream: {printable(told)}", err=True)
        _end("OSError", told, 1)


def _end(name: str, message: str, code: int) -> NoReturn:
    """With `--json`, whoever reads it is told of a failure in JSON too, where the report would have been."""
    given = sys.argv[1:]
    if "--json" in given:
        replies_go_there = "ask" in given and ("--out=-" in given or ("--out", "-") in itertools.pairwise(given))
        failure = {"error": name, "message": message, "exit_code": code}
        click.echo(json.dumps(failure, indent=1), err=replies_go_there)
    sys.exit(code)
