"""Every example in the documentation runs, and prints what the page says it prints."""

import asyncio
import doctest
import re
import selectors
from dataclasses import fields
from pathlib import Path

import click
import pytest

import millstream
from millstream import distributed, streams
from millstream.cli import asking, cli

ROOT = Path(__file__).resolve().parent.parent

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.exists()
    and ">>>" in page.read_text(encoding="utf-8")
    and page.name != "training.md"  # needs PyTorch: tests/training runs it
]
EVERYTHING = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SPEED = 50  # how much faster than real time an idle loop's clock goes


class FenceParser(doctest.DocTestParser):
    """Reads Markdown: a fence ends the expected output, as an empty line does.

    Without this the closing fence would count as one more line of output.
    A fence becomes an empty line, so the reported line numbers stay right.
    """

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"(?m)^[ \t]*```.*$", "", string), name)


class _Hurried:
    """A selector for whom a wait is over after a fraction of its time, unless something happens before, or a thread has
    work for the loop: nobody knows how long that takes."""

    def __init__(self, loop):
        self._loop, self._real = loop, selectors.DefaultSelector()

    def select(self, timeout):
        if timeout is None or timeout <= 0:
            return self._real.select(timeout)
        events = self._real.select(timeout if self._loop.in_threads else timeout / SPEED)
        if not events:
            self._loop.now += timeout
        return events

    def __getattr__(self, name):
        return getattr(self._real, name)


class QuickLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while it or its sockets are busy, and hurries while all of them wait.

    So a page may speak of seconds, its servers and clients may use real sockets, and a slow machine changes nothing.
    """

    def __init__(self):
        self.now, self.in_threads = 0.0, 0
        super().__init__(_Hurried(self))

    def time(self):
        return self.now

    def run_in_executor(self, *given):
        def over(_):
            self.in_threads -= 1

        self.in_threads += 1
        work = super().run_in_executor(*given)
        work.add_done_callback(over)
        return work


def commands(group, *names):
    """The names of each command, and the command."""
    context = click.Context(group)
    for name, found in ((name, group.get_command(context, name)) for name in group.list_commands(context)):
        if isinstance(found, click.Group):
            yield from commands(found, *names, name)
        else:
            yield " ".join([*names, name]), found


def is_told(name):
    """Whether a flag or a name stands in the documentation as a word of its own."""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", EVERYTHING) is not None


@pytest.mark.parametrize(("name", "command"), list(commands(cli)))
def test_every_flag_has_its_place_in_the_documentation(name, command):
    assert is_told(f"millstream {name}") or is_told(f"`{name.split()[-1]}`"), f"millstream {name} is nowhere"
    flags = [flag for option in command.params for flag in (*option.opts, *option.secondary_opts)]
    assert [flag for flag in flags if flag.startswith("--") and not is_told(flag)] == []


def test_every_public_name_has_its_place_in_the_documentation():
    names = [*millstream.__all__, *streams.__all__, *distributed.__all__]
    assert [name for name in names if not is_told(name)] == []


def test_every_setting_of_an_ask_run_is_a_flag():
    """So that who reads of the flags knows the settings."""
    flags = {option.name for option in asking.ask.params}
    made = {"params", "api_key"}  # of --param, --temperature and --max-tokens; of the environment
    assert {each.name for each in fields(millstream.AskSettings)} - made - flags == set()


def run_page(page):
    result = doctest.testfile(
        str(page),
        module_relative=False,
        optionflags=doctest.ELLIPSIS,
        parser=FenceParser(),
        encoding="utf-8",
    )
    assert result.attempted > 0
    assert result.failed == 0, "the examples that failed are in the captured output"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may write files
    monkeypatch.setattr(asyncio.events, "new_event_loop", QuickLoop)
    run_page(page)


@pytest.mark.slow
def test_the_async_page_in_real_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "async.md")
