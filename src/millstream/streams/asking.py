"""Asking a model about each item of a stream, between two other stages."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from millstream.aio.outcomes import Fault
from millstream.client.bodies import Bodies, in_order, no_model, printable, words
from millstream.client.client import Client
from millstream.client.requests import Reply, Request
from millstream.errors import RequestError, ResumeRefused, setting
from millstream.options import is_count
from millstream.records import Document
from millstream.runs.ask.ahead import asked_ahead
from millstream.runs.ask.answer_lines import Header
from millstream.runs.ask.answers import AnswerJournal, is_ours
from millstream.runs.ask.earlier import refuse_other_order
from millstream.runs.ask.prompts import name_of
from millstream.runs.ask.spendings import kept_spendings
from millstream.streams.base import At, Pair, State, Stream, beside, inner
from millstream.streams.change import named


@dataclass(frozen=True, slots=True)
class Answered:
    """An item that was asked about, and what the question ended with: exactly one, a reply or a fault."""

    document: Any
    outcome: Reply | Fault

    @property
    def reply(self) -> str | None:
        """What the model said; None if there is a fault in its place."""
        return self.outcome.text if isinstance(self.outcome, Reply) else None

    @property
    def fault(self) -> Fault | None:
        return self.outcome if isinstance(self.outcome, Fault) else None


def ask(
    documents: Iterable[Any],
    client: Client,
    prompt: str | Callable[[Any], Any],
    *,
    journal: str,
    window: int = 256,
    version: object = None,
    state: State | None = None,
) -> Stream[Answered]:
    """Each item with what a model said of it, in their order; many are asked at once, at most `window` ahead.

    `prompt` is a template (``"Rate from 0 to 5: {text}"``) with fields of the item ({id} and {text} of a `Document`,
    the keys of a dict, {text} of a text), or a function that makes a prompt of an item: a text, messages, or a mapping
    with one of the two and other parameters. Functions count by name and `version`. `client` is one that is not
    entered; the stream enters it, and leaves it at its end.

    Every outcome is in the folder `journal` before it is handed out, and what is there is not asked again: not when the
    stream goes on, nor in a second epoch, nor for an item that is equal to an earlier one in id and prompt. Items from
    which no prompt can be made have a fault of kind ``bad_row``.
    """
    if not is_count(window):
        raise RequestError(f"window {window!r} does not work: give at least 1")
    if not isinstance(client, Client):
        raise RequestError(f"{client!r:.60} is no client: give a millstream.Client(base_url, model=...)")
    if not isinstance(journal, str | os.PathLike):
        raise RequestError(f"journal={journal!r} does not work: name a folder")
    asking = _Asking(client, prompt, journal, window, version)
    return Stream(("ask", asking.settings), asking, upstream=documents, state=state)


class _Asking:
    """The stage at work: its place is that of its upstream, with how many items came before, and the key of the last
    that was asked."""

    def __init__(
        self, client: Client, prompt: str | Callable[[Any], Any], journal: str, window: int, version: object
    ) -> None:
        recipe = client.recipe
        if not recipe.model:
            no_model()
        self._client, self._prompt, self._journal, self._window = client, prompt, journal, window
        template = prompt if isinstance(prompt, str) else None
        self._recipe = replace(recipe, template=template)
        bodies = Bodies(self._recipe)
        self._body = bodies.of_prompt if template is None else bodies.of_row
        params = msgspec.json.decode(in_order(recipe.params))  # as it is once a state was JSON
        asked = {"template": template} if template is not None else named(prompt, version)
        self.settings = {**asked, "model": recipe.model, "system": recipe.system, "params": params}
        self._again = partial(_Asking, client, prompt, journal, window, version)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()

    def __call__(self, at: At, documents: Stream[Any]) -> Iterator[Pair[Answered]]:
        last: str | None = at.get("key") if at else None
        if last is not None and not is_ours(self._journal):
            raise ResumeRefused(f"there is no journal in {self._journal}: {_GIVE}")
        with AnswerJournal(self._journal) as journal, kept_spendings(journal.path, self._client.purse):
            if last is not None and journal.find_many([bytes.fromhex(last)])[0] < 0:
                raise ResumeRefused(f"the journal in {self._journal} has not what was handed out last: {_GIVE}")
            header = Header(
                model=self._recipe.model,
                params=dict(self._recipe.params),
                system=self._recipe.system,
                template=self._recipe.template,
            )
            refuse_other_order(journal, header)
            journal.begin(header)
            first = at.get("item", 0) if at else 0
            asked = self._requests(documents.pairs(inner(at)), first)
            with closing(asked_ahead(asked, self._client, journal, window=self._window)) as outcomes:
                for request, (item, after), outcome in outcomes:
                    last = last if request.fault else request.key.hex()
                    yield Answered(item, outcome), partial(beside, after, item=request.index + 1, key=last)

    def _requests(self, pairs: Iterator[Pair[Any]], first: int) -> Generator[tuple[Request, Pair[Any]]]:
        for number, pair in enumerate(pairs, first):
            yield self._request(pair[0], number), pair

    def _request(self, item: Any, number: int) -> Request:
        name = None
        try:
            fields = _fields_of(item)
            name = name_of(fields)
            body = self._body(fields if isinstance(self._prompt, str) else self._prompt(item))
            return Request(number, name, body.key(name), body.data, body.path)
        except (ValueError, RecursionError) as error:
            message = f"item {number:,}: {printable(words(error))}"
            return Request(number, name and printable(name), b"", b"", fault=("bad_row", message))


_GIVE = f"give the {setting('journal')} that the stream had, or leave its state out, which asks what is not answered"


def _fields_of(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Document):
        return item._asdict()
    return item if isinstance(item, Mapping) else {"text": item}
