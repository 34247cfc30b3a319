"""Conversations to text by a tokenizer's chat template, and which letters of it are to be learned.

A template is a program that came with a download: it runs in Jinja's sandbox and sees plain data only.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import merge
from typing import Any, NamedTuple

from millstream.errors import RequestError, Unusable, setting

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

FIELDS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
"""The fields of a row that are looked at."""
LOSSES = ("replies", "all")
DEEPEST = 100
"""Levels of lists and objects in a row: Python's own limit differs from version to version."""
MOST_REPLIES = 500
"""A template without blocks is rendered twice for each reply, and each time from the beginning."""

# Noncharacters, which Unicode keeps for private use: where a reply begins and ends, and what spells a special token.
_MARKS = _BEGIN, _END, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_ENDS = {_BEGIN: _END, _OPEN: _CLOSE}
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Letters(NamedTuple):
    """Letters `start` to `stop` of a text."""

    start: int
    stop: int


class Rendered(NamedTuple):
    """A row as text. `learned` letters are to be learned. Special tokens in it are tokens, but for those that the
    `plain` letters spell."""

    text: str
    learned: tuple[Letters, ...] = ()
    plain: tuple[Letters, ...] = ()


@dataclass(frozen=True)
class Chat:
    """How rows become text; small and picklable.

    `templates` by name, `variables` are the special tokens that a template may write, by their names, `specials` the
    texts of all special tokens; with `allow`, a text that spells one is that token. `loss`: replies (what the assistant
    says, or the completion), or all.

    >>> row = {"prompt": "2 + 2 =", "completion": " 4"}
    >>> Chat().render(row)
    Rendered(text='2 + 2 = 4', learned=(Letters(start=7, stop=9),), plain=(Letters(start=0, stop=9),))
    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    >>> messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> Chat((("default", template),)).render({"messages": messages})
    Rendered(text='<user>2 + 2?<assistant>4', learned=(Letters(start=23, stop=24),), plain=())
    """

    templates: tuple[tuple[str, str], ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    specials: tuple[str, ...] = ()
    loss: str = "replies"
    allow: bool = False

    def check(self) -> None:
        """Raises RequestError if a template is no program, or if Jinja is not there to run it."""
        for _, template in self.templates:
            _compiled(template)

    def render(self, row: Row) -> Rendered:
        """Raises Unusable if the row is no conversation, or not one for this template; RequestError without one."""
        if not isinstance(row, Mapping):
            raise Unusable("not_messages", f"a conversation is an object with messages, not {type(row).__name__}")
        try:
            found = self._rendered(row)
            found.text.encode()
        except UnicodeEncodeError:
            message = "it has half of a surrogate pair, which no tokenizer accepts"
            raise Unusable("lone_surrogate", message) from None
        return found

    def _rendered(self, row: Row) -> Rendered:
        if row.get("messages") is not None:
            return self._conversation(row, _messages(row["messages"], "messages"), None)
        prompt, completion = row.get("prompt"), row.get("completion")
        if prompt is None or completion is None:
            names = ", ".join(map(str, row)) or "none"
            raise Unusable("missing_field", f"neither messages nor prompt and completion; there are {names}")
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            begin = len(prompt) if self.loss == "replies" else 0
            return Rendered(text, _spans((begin, len(text))), () if self.allow else _spans((0, len(text))))
        first = _messages(prompt, "prompt")
        return self._conversation(row, first + _messages(completion, "completion"), len(first))

    def _conversation(self, row: Row, messages: Messages, prompt: int | None) -> Rendered:
        """A conversation, of which the first `prompt` messages are not to be learned (None: it is not said)."""
        template = _compiled(self._template(row))
        data = {**_kwargs(row), "tools": _tools(row.get("tools"))}
        spelled = _spelled(() if self.allow else self.specials)
        data, messages = _marked(data, spelled), _marked(messages, spelled)

        def text_of(count: int, goes_on: bool = False) -> str:
            return template.render(messages[:count], goes_on, {**dict(self.variables), **data})

        whole = text_of(len(messages))
        found = _unmarked(whole)
        if self.loss == "all":
            return found._replace(learned=_spans((0, len(found.text))))
        if prompt is not None:
            turns = [(prompt, len(messages))]
        elif template.tells:
            return found
        else:
            turns = [(n, n + 1) for n, message in enumerate(messages) if message["role"] == "assistant"]
            if len(turns) > MOST_REPLIES:
                raise Unusable(
                    "not_a_prefix",
                    f"it has {len(turns):,} replies; of more than {MOST_REPLIES} only a template with "
                    "{% generation %} blocks can say in reasonable time what is learned",
                )
        return found._replace(learned=_spans(*(_turn(text_of, whole, turn, len(messages)) for turn in turns)))

    def _template(self, row: Row) -> str:
        named = dict(self.templates)
        if not named:
            raise RequestError(
                f"the tokenizer has no chat template for messages; give one with {setting('chat_template')}, "
                "or beside its tokenizer.json"
            )
        if row.get("tools") and "tool_use" in named:
            return named["tool_use"]
        return named.get("default") or next(iter(named.values()))


def _spans(*found: tuple[int, int]) -> tuple[Letters, ...]:
    return tuple(Letters(*span) for span in found if span[0] < span[1])


def _turn(text_of: Any, whole: str, turn: tuple[int, int], count: int) -> tuple[int, int]:
    """The letters that the messages turn[0] to turn[1] of `count` add, after the prompt for them."""
    first, last = turn
    before = text_of(first, goes_on=True)
    after = whole if last == count else text_of(last)
    bare = [_bare(text) for text in (before, after, whole)]
    if not (bare[2].startswith(bare[1]) and bare[1].startswith(bare[0])):
        raise Unusable(
            "not_a_prefix",
            f"the chat template writes message {first + 1} differently after its generation prompt, or once others "
            "follow, so what it adds cannot be told: take a template with {% generation %} blocks, or learn all of it",
        )
    return len(_unmarked(before).text), len(_unmarked(after).text)


def _bare(text: str) -> str:
    """Without the marks of a template's own blocks, which may stand where a turn is cut."""
    return text.replace(_BEGIN, "").replace(_END, "")


# What a row holds ---------------------------------------------------------------------------------------------------


def _messages(found: Any, name: str) -> Messages:
    """Messages as plain data, without keys whose value is null, and with reasoning under the names in use for it."""
    if not isinstance(found, list) or not found:
        what = "is empty" if isinstance(found, list) else f"is not a list of messages but {type(found).__name__}"
        raise Unusable("not_messages", f"field {name!r} {what}")
    messages = []
    for number, message in enumerate(found, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Unusable("not_messages", f"message {number} of field {name!r} has no role")
        plain = {key: _plain_data(value) for key, value in message.items() if value is not None}
        reasoning = next((plain[key] for key in _REASONING if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        messages.append(plain)
    return messages


def _kwargs(row: Row) -> dict[str, Any]:
    found = row.get("chat_template_kwargs") or {}
    if not isinstance(found, Mapping):
        raise Unusable("not_messages", "field 'chat_template_kwargs' is no object")
    return {str(key): _plain_data(value) for key, value in found.items() if value is not None}


def _tools(found: Any) -> Any:
    """A list of schemas, or what it is as JSON, in a column of text."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise Unusable("not_messages", f"field 'tools' is no JSON: {error}") from error
    if found is not None and not isinstance(found, list):
        raise Unusable("not_messages", f"field 'tools' is not a list but {type(found).__name__}")
    return _plain_data(found)


def _plain_data(value: Any, depth: int = 0) -> Any:
    """JSON values as they are; what Parquet has besides (dates, bytes) as text, so that a template gets no objects."""
    if depth > DEEPEST:
        raise Unusable("not_messages", f"it is nested more than {DEEPEST} deep")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise Unusable("invalid_utf8", f"not valid UTF-8: {error.reason}") from error
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_data(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(inner, depth + 1) for inner in value]
    return str(value)


class _Spelled(NamedTuple):
    """What special tokens look like: `every` matches each (the longest first), and marks, which no text may have.

    A text without any of `fronts`, the first two letters of them, has none: looking for those is several times faster.
    """

    every: "re.Pattern[str]"
    fronts: tuple[str, ...]


@cache
def _spelled(specials: tuple[str, ...]) -> _Spelled:
    longest = sorted(filter(None, specials), key=len, reverse=True)
    every = [*longest, *_MARKS]
    return _Spelled(re.compile("|".join(map(re.escape, every))), tuple(sorted({token[:2] for token in every})))


def _marked(value: Any, spelled: _Spelled) -> Any:
    """`value` with marks around everything in its texts that spells a special token."""
    if isinstance(value, str):
        if any(front in value for front in spelled.fronts):
            return spelled.every.sub(_around, value)
        return value
    if isinstance(value, dict):
        return {_marked(key, spelled): _marked(inner, spelled) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, spelled) for inner in value]
    return value


def _around(found: "re.Match[str]") -> str:
    if found[0] in _MARKS:
        raise Unusable("not_text", f"U+{ord(found[0]):X} is a noncharacter, which no text may have")
    return f"{_OPEN}{found[0]}{_CLOSE}"


def _unmarked(text: str) -> Rendered:
    """
    >>> _unmarked("a" + _BEGIN + "bc" + _OPEN + "d" + _CLOSE + _END + "e")
    Rendered(text='abcde', learned=(Letters(start=1, stop=4),), plain=(Letters(start=3, stop=4),))
    """
    begun: dict[str, int] = {}  # by the mark that will end it
    spans: dict[str, list[tuple[int, int]]] = {_END: [], _CLOSE: []}
    parts, last = [], 0
    for before, (place, mark) in enumerate(merge(*(_places(text, mark) for mark in _MARKS))):
        parts.append(text[last:place])
        last, at = place + 1, place - before
        if mark in spans and mark in begun:
            spans[mark].append((begun.pop(mark), at))
        elif mark in spans or _ENDS[mark] in begun:
            raise Unusable("template", "the chat template cuts a reply, or a text that spells a special token, in two")
        else:
            begun[_ENDS[mark]] = at
    if begun:
        raise Unusable("template", "the chat template cuts a reply, or a text that spells a special token, in two")
    return Rendered("".join([*parts, text[last:]]), _spans(*spans[_END]), _spans(*spans[_CLOSE]))


def _places(text: str, mark: str) -> Iterator[tuple[int, str]]:
    """Where a mark is: `find` is several times faster than `re` looking for all of them."""
    place = text.find(mark)
    while place >= 0:
        yield place, mark
        place = text.find(mark, place + 1)


# The template -------------------------------------------------------------------------------------------------------


class _Template:
    """A compiled template; `tells`: it says itself what is learned, with {% generation %} blocks."""

    def __init__(self, source: str) -> None:
        environment: Any = _environment()
        environment.tells = False
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a syntax error, or whatever a strange template makes the compiler raise
            raise RequestError(f"the chat template cannot be used: {type(error).__name__}: {error}") from error
        self.tells: bool = environment.tells

    def render(self, messages: Messages, goes_on: bool, variables: dict[str, Any]) -> str:
        data = {"documents": None, **variables, "messages": messages, "add_generation_prompt": goes_on}
        try:
            text: str = self._template.render(data)
            return text
        except Unusable:
            raise
        except Exception as error:  # it is a program, and can fail in every way
            raise Unusable("template", f"the chat template failed: {str(error) or type(error).__name__}") from error


@cache
def _compiled(source: str) -> _Template:
    return _Template(source)


@cache
def _environment() -> Any:
    """What transformers gives a template, so that the same one works; without the time of day."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ModuleNotFoundError as error:
        raise RequestError(f"{setting('chat', True)} needs {error.name}: pip install 'millstream[chat]'") from error

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what is between comes out between marks."""

        tags = {"generation"}  # noqa: RUF012  as Jinja wants it

        def parse(self, parser: Any) -> Any:
            self.environment.tells = True  # type: ignore[attr-defined]
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

        def _between(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    class Variables(Namespace):
        """A `namespace` whose names cannot reach into Python."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")
            super().__setitem__(name, value)

    def refuse(message: Any) -> None:
        raise Unusable("template", f"the chat template refuses it: {message}")

    def as_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return _ESCAPED.sub(lambda found: found[1] + _MARKS[int(found[2])], text) if ensure_ascii else text

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    for name in ("random", "lipsum"):  # would write other bytes every time
        environment.filters.pop(name, None)
        environment.globals.pop(name, None)
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "namespace": Variables}
    return environment


_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd([0-3])")  # a mark, as JSON writes it in ASCII


def templates_of(found: Any) -> tuple[tuple[str, str], ...]:
    """Templates by name, from `chat_template` in a tokenizer_config.json: one text, or a list of named ones.

    >>> templates_of("A"), templates_of([{"name": "tool_use", "template": "B"}])
    ((('default', 'A'),), (('tool_use', 'B'),))
    """
    if isinstance(found, str):
        return (("default", found),) if found else ()
    if isinstance(found, Sequence):
        named = (one for one in found if isinstance(one, Mapping) and {"name", "template"} <= one.keys())
        return tuple((str(one["name"]), str(one["template"])) for one in named)
    if isinstance(found, Mapping):
        return tuple((str(name), str(template)) for name, template in found.items())
    return ()
