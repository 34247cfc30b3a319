"""What a prompt becomes: the body of a request as it is sent, and the hash that names it.

What the user gave is sent in the order in which it was given, since a constrained model writes the properties of a
schema in that order. The hash is of the canonical form, all keys sorted: so a journal finds what was asked whoever
wrote the same thing in another order.
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn

import msgspec

from millstream.errors import RequestError, setting
from millstream.llm.batch import is_request, parse_request
from millstream.llm.wire import CHAT

_GAP = msgspec.Raw(b"\0")  # a byte that nothing else puts into JSON
hash_of_nothing = blake2b(digest_size=16)

NEVER_PARAMS = {"messages": "messages come from the prompts", "stream": "replies come whole"}
_NEVER_OF_ROWS = {*NEVER_PARAMS, "prompt", "custom_id", "id", "body"}
LIKELY_PARAMS = frozenset(
    {
        *("model", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "max_tokens"),
        *("max_completion_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
        *("logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
        *("guided_json", "reasoning_effort", "chat_template_kwargs"),
    }
)
"""What a row that has a prompt means to be sent, in all likelihood."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


encode = msgspec.json.Encoder(enc_hook=_plain).encode
_encode_sorted = msgspec.json.Encoder(order="sorted", enc_hook=_plain).encode


@dataclass(frozen=True)
class Recipe:
    """How a row becomes the body of a request.

    `template` makes the prompt of a row's fields, `system` goes before the messages, `params` into the body, and so do
    those fields of the row that `row_params` names, in place of `params`; a null is none. Rows of OpenAI's Batch format
    bring their body: there `model` and `params` only fill in what it lacks.
    """

    model: str | None = None
    system: str | None = None
    template: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    row_params: Sequence[str] = ()


class Around(NamedTuple):
    """What a recipe puts around a prompt: the body's bytes before and after it, as sent; the hash of the bytes before
    it in canonical form, and those after it."""

    head: bytes
    tail: bytes
    begun: Any
    end: bytes


class Body(NamedTuple):
    """A request's body in JSON, as it is sent to `path`, and the hash of its canonical form, which may go on.

    `twin` is the body whose canonical form is hashed, where that says another thing: a template has put an object into
    the text as it was given, and the hash is of the text with that object in canonical form.
    """

    data: bytes
    digest: Any
    path: str = CHAT
    twin: bytes | None = None

    def key(self, name: str | None) -> bytes:
        """The 16 bytes that name the request. Neither a raw line end nor a NUL is in what is hashed, which is JSON."""
        if self.path != CHAT:
            self.digest.update(b"\n" + encode(self.path))
        if name is not None:
            self.digest.update(b"\0" + name.encode())
        key: bytes = self.digest.digest()
        return key


def key_again(key: bytes, before: int) -> bytes:
    """The key of a request of which so many equal ones came before in the file."""
    return blake2b(key + before.to_bytes(8, "little"), digest_size=16).digest() if before else key


CAPS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Parameters that limit the ids of a reply."""


def without_caps(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name not in CAPS}


def caps_of(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in CAPS if name in params}


def with_own(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of all requests, and over them a request's own; its limit of ids stands in place of theirs.

    >>> with_own({"n": 2, "max_tokens": 5}, {"max_completion_tokens": 7})
    {'n': 2, 'max_completion_tokens': 7}
    """
    return {**(given if own.keys().isdisjoint(CAPS) else without_caps(given)), **own}


def with_caps(data: bytes, caps: Mapping[str, Any]) -> bytes:
    """A body with these limits of ids in place of its own.

    >>> with_caps(b'{"model":"m","max_tokens":5}', {"max_completion_tokens": 7})
    b'{"model":"m","max_completion_tokens":7}'
    """
    return encode({**without_caps(msgspec.json.decode(data)), **caps})


def key_with_caps(body: Body, name: str | None, caps: Mapping[str, Any]) -> bytes:
    """The key that the same request has with other limits of ids."""
    data = msgspec.json.decode(body.data if body.twin is None else body.twin)
    return body._replace(digest=_hash(_encode_sorted({**without_caps(data), **caps}))).key(name)


class Frame:
    """Model, parameters and system message of many requests. What a row gives goes into a gap between bytes that are
    made once."""

    def __init__(self, given: Mapping[str, Any], system: str | None) -> None:
        self._given = given
        first = [{"role": "system", "content": system}] if system else []
        self.around_text = self._around([*first, {"role": "user", "content": _GAP}])
        self._around_messages = self._around([*first, _GAP])

    def _around(self, messages: list[Any]) -> Around | None:
        if not self._given["model"]:
            return None
        whole = {**self._given, "messages": messages}
        head, tail = encode(whole).split(b"\0")
        begin, end = _encode_sorted(whole).split(b"\0")
        return Around(head, tail, _hash(begin), end)

    def of_text(self, prompt: str) -> Body:
        head, tail, begun, end = self.around_text or no_model()
        text = encode(prompt)
        digest = begun.copy()
        digest.update(text + end)
        return Body(head + text + tail, digest)

    def of_messages(self, messages: Any) -> Body:
        """Raises ValueError if they are none."""
        head, tail, begun, end = self._around_messages or no_model()
        checked_messages(messages)
        data = in_order(messages)[1:-1]
        digest = begun.copy()
        digest.update(_encode_sorted(messages)[1:-1] + end)
        return Body(head + data + tail, digest)


class Bodies:
    """The bodies that a recipe makes."""

    def __init__(self, recipe: Recipe) -> None:
        for name in recipe.row_params:
            if name in _NEVER_OF_ROWS or not name:
                raise RequestError(f"{name!r} cannot be a parameter that rows bring")
        self.template = None if recipe.template is None else Template(recipe.template)
        self.fields = self.template.fields if self.template else frozenset()
        self.row_params = tuple(dict.fromkeys(recipe.row_params))
        self._given, self._system = {"model": recipe.model, **recipe.params}, recipe.system
        check_params(self._given, recipe.system, recipe.template)
        self.frame = Frame(self._given, recipe.system)

    def of_row(self, given: Mapping[str, Any]) -> Body:
        """The body of a row. Raises ValueError that says what is wrong with it."""
        if is_request(given):
            return self._of_batch(given)
        frame = self._frame_of(given) if self.row_params else self.frame
        if self.template is not None:
            return self._of_template(frame, self.template, given)
        messages, prompt = given.get("messages"), given.get("prompt")
        if messages is not None:
            return frame.of_messages(messages)
        if prompt is None:
            raise ValueError(f"no 'prompt' or 'messages'; there are {names(given)}: give --template")
        if not isinstance(prompt, str):
            raise ValueError(f"'prompt' is not text but {type(prompt).__name__}")
        return frame.of_text(prompt)

    def of_prompt(self, prompt: Any) -> Body:
        """The body of a prompt as Python gives it. Raises ValueError as `body_from` does, and for what is no JSON."""
        body = body_from(prompt, self._given, self._system)
        if not body["model"]:
            no_model()
        if body.get("stream"):
            raise ValueError("the prompt asks for a stream, and replies come whole: leave it out")
        return Body(in_order(body), _hash(canonical(body)))

    def _frame_of(self, given: Mapping[str, Any]) -> Frame:
        """The frame of a row that may bring parameters of its own."""
        own = {name: given[name] for name in self.row_params if given.get(name) is not None}
        in_order(own)  # raises for what JSON does not have
        whole = with_own(self._given, own)
        if "model" in self.row_params and not (whole["model"] and isinstance(whole["model"], str)):
            raise ValueError("the row names no model: put one in, or give --model")
        return Frame(whole, self._system) if own else self.frame

    def _of_template(self, frame: Frame, template: "Template", given: Mapping[str, Any]) -> Body:
        body = frame.of_text(template.fill(given, in_order))
        if not any(isinstance(given[name], dict | list) for name in template.fields):
            return body
        twin = frame.of_text(template.fill(given, canonical))
        return body._replace(digest=twin.digest, twin=twin.data)

    def _of_batch(self, given: Mapping[str, Any]) -> Body:
        _, path, body = parse_request(given)
        return self.of_body(path, body)

    def of_body(self, path: str, body: Mapping[str, Any]) -> Body:
        """A body that a row brings, with what it lacks. Raises ValueError that says what is wrong with it."""
        if path == CHAT:
            checked_messages(body.get("messages"))
        if body.get("stream"):
            raise ValueError("'body' asks for a stream, and replies come whole: leave it out")
        if self._given.keys() <= body.keys() and isinstance(body["model"], str):
            return Body(in_order(body), _hash(_encode_sorted(body)), path)
        has_choices = path.endswith("/completions")
        unfit = {*body, *(() if has_choices else ("response_format",))}
        filled = with_own({name: value for name, value in self._given.items() if name not in unfit}, body)
        if filled["model"] is None:
            filled["model"] = self._given["model"]
        if filled["model"] is None and not has_choices:
            del filled["model"]  # a server that ranks and scores may have but one
        elif not isinstance(filled["model"], str):
            raise ValueError("'body' names no model: put one in, or give --model")
        return Body(in_order(filled), _hash(_encode_sorted(filled)), path)


def check_params(params: Mapping[str, Any], *texts: str | None) -> None:
    """Raise RequestError for what no request can have beside its prompt."""
    for name, reason in NEVER_PARAMS.items():
        if params.get(name) not in (None, False):
            raise RequestError(f"{name!r} cannot be a parameter: {reason}")
    try:
        in_order([params, *texts])
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the settings cannot be sent: {words(error)}") from None


def body_from(prompt: Any, given: Mapping[str, Any], system: str | None) -> dict[str, Any]:
    """The body of a prompt from Python: a text, messages, or a mapping that has one of the two and other parameters.

    `given` are the parameters of all requests. Raises ValueError that says what is wrong with it.

    >>> body_from({"prompt": "Hello?", "temperature": 0}, {"model": "m"}, None)
    {'model': 'm', 'temperature': 0, 'messages': [{'role': 'user', 'content': 'Hello?'}]}
    """
    body = dict(given)
    if isinstance(prompt, Mapping):
        own = dict(prompt)
        text, messages = own.pop("prompt", None), own.pop("messages", None)
        if own.get("model", "") is None:
            del own["model"]
        body = with_own(body, own)
        if messages is None and isinstance(text, str):
            messages = [{"role": "user", "content": text}]
    elif isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = prompt
    try:
        checked_messages(messages)
    except ValueError as error:
        advice = "give a text, messages, or a mapping with one of the two"
        raise ValueError(f"no prompt: {printable(f'{prompt!r:.80}')}; {error if messages else advice}") from None
    first = [{"role": "system", "content": system}] if system else []
    return {**body, "messages": [*first, *messages]}


def no_model() -> NoReturn:
    raise RequestError(f"no model given: name one with {setting('model')}")


def checked_messages(messages: Any) -> None:
    """Raises ValueError unless it is a list of messages."""
    # By `type` first: to ask an abstract class takes longer than all the rest.
    if not messages or not (type(messages) is list or (isinstance(messages, Sequence) and not _is_text(messages))):
        raise ValueError("'messages' is no list of messages")
    for message in messages:
        is_object = type(message) is dict or isinstance(message, Mapping)
        if not is_object or not isinstance(message.get("role"), str):
            raise ValueError("'messages' has one that is no object with a 'role'")


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes | bytearray)


# JSON ---------------------------------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """A value in JSON with sorted keys. Raises ValueError for what JSON does not have."""
    return _checked_json(value, _encode_sorted)


def in_order(value: Any) -> bytes:
    """A value in JSON as it is. Raises ValueError for what JSON does not have."""
    return _checked_json(value, encode)


def _checked_json(value: Any, encoded: Callable[[Any], bytes]) -> bytes:
    try:
        data = encoded(value)
    except TypeError as error:
        raise ValueError(f"no JSON: {error}") from None
    if b"null" in data:  # which may stand for what JSON does not have
        try:
            json.dumps(value, allow_nan=False, default=str)
        except ValueError:
            raise ValueError("NaN or Infinity, which JSON does not have") from None
    return data


def _hash(data: bytes) -> Any:
    digest = hash_of_nothing.copy()
    digest.update(data)
    return digest


def text_of(value: Any, as_json: Callable[[Any], bytes] = canonical) -> str:
    """A value as text; what is none, as in JSON. Raises ValueError for what JSON does not have."""
    if isinstance(value, str):
        return value
    data = as_json(value)
    return str(msgspec.json.decode(data)) if data.startswith(b'"') else data.decode()  # a date has no quotes


# Templates ----------------------------------------------------------------------------------------------------------


class Template:
    """Text with fields: only {name} is one, as {text.__class__} would look into objects; {{ and }} are braces."""

    def __init__(self, text: str) -> None:
        try:
            self._parts = [(literal, name) for literal, name, *_ in _checked(string.Formatter().parse(text))]
        except ValueError as error:
            raise RequestError(f"the template {text!r:.80} is none: {error}; write {{{{ and }}}} for braces") from None
        self.fields = frozenset(name for _, name in self._parts if name is not None)

    def fill(self, given: Mapping[str, Any], as_json: Callable[[Any], bytes] = in_order) -> str:
        """The text with a row's fields; other values than text as JSON. Raises ValueError for one that is not there."""
        parts = self._parts
        return "".join([text + ("" if name is None else self._value(given, name, as_json)) for text, name in parts])

    def _value(self, given: Mapping[str, Any], name: str, as_json: Callable[[Any], bytes]) -> str:
        if name not in given:
            raise ValueError(f"no field {name!r} for the template; there are {names(given)}")
        if given[name] is None:
            raise ValueError(f"the field {name!r} is null, and the template wants it")
        return text_of(given[name], as_json)


def _checked(parts: Any) -> Iterator[tuple[str, str | None]]:
    for literal, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or re.search(r"[.\[\]]", name)):
            raise ValueError(f"only plain fields such as {{name}} are filled in, not {{{name}...}}")
        yield literal, name


# Words --------------------------------------------------------------------------------------------------------------


def words(error: Exception) -> str:
    """What is wrong, for a person."""
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which no server takes; mend the text"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8: {error.reason} at byte {error.start}; mend the text"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return str(error)


def names(given: Mapping[str, Any]) -> str:
    found = ", ".join(map(str, given)) or "none"
    return found if len(found) <= 200 else found[:200] + "..."


def printable(text: str) -> str:
    """Text with halves of surrogate pairs written out."""
    return text.encode("utf-8", "backslashreplace").decode()
