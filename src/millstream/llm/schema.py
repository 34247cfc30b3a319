"""Replies that must be JSON of a given form: what to ask the server for, and whether it came."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from millstream.errors import RequestError

_LONGEST_REASON = 300  # characters
_DEEPEST_SCHEMA = 100  # levels of JSON
_FRAMES = 500  # of Python's stack, out of 1000, that a check may take
_FRAMES_PER_STEP = 3  # a little more than jsonschema takes from one schema to the next


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a request's body says under "response_format" to get JSON that fits `schema`; its title is the name.

    >>> response_format({"title": "City guide", "type": "object"})["json_schema"]["name"]
    'City_guide'
    """
    title = schema.get("title")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:64] if isinstance(title, str) else ""
    # In sorted order, as journals from before headers were asked: of those only the order in `schema` is the user's.
    json_schema = {"name": name.strip("_") or "reply", "schema": dict(schema), "strict": True}
    return {"json_schema": json_schema, "type": "json_schema"}


def checker(schema: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Why a text does not fit a JSON schema, in a line; None if it fits. The network is never asked for a schema.

    Draft 2020-12 unless "$schema" says another. Raises RequestError for a schema that is none.

    >>> misfit = checker({"type": "object", "properties": {"people": {"type": "integer"}}, "required": ["people"]})
    >>> misfit('{"people": 2100000}') is None
    True
    >>> print(misfit('{"people": "many"}'))
    $.people: 'many' is not of type 'integer'
    >>> print(misfit("Paris has 2.1 million."))
    no JSON: it starts with 'Paris has 2.1 million.'
    """
    try:
        from jsonschema.exceptions import best_match
    except ImportError as error:
        raise RequestError('schemas need jsonschema: pip install "millstream[ask]"') from error
    validator, steps = _validator(schema)
    deepest = _FRAMES // (_FRAMES_PER_STEP * (steps + 1))

    def misfit(text: str) -> str | None:
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return f"no JSON: it starts with {text[:60]!r}" if text.strip() else "no JSON: it is empty"
        # Python's stack must not overflow in jsonschema: the maps below it do not survive that.
        if text.count("[") + text.count("{") > deepest and _depth(value) > deepest:
            return f"it is nested too deeply to be checked: more than {deepest} levels"
        error = best_match(validator.iter_errors(value))
        return None if error is None else line(f"{error.json_path}: {error.message}")

    return misfit


def _validator(schema: Mapping[str, Any]) -> tuple[Any, int]:
    """jsonschema's validator, and the most steps from schema to schema that it takes at one place of a value."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY  # the drafts' own schemas, and nothing that could fetch others
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    plain = _plain(schema)
    named = plain.get("$schema", Draft202012Validator.META_SCHEMA["$id"])
    unknown: Any = type(None)
    kind = validator_for({"$schema": named}, default=unknown) if isinstance(named, str) else unknown
    if kind is unknown:
        raise RequestError(f"the JSON schema is of no draft that is known: {named!r:.100}")
    nexts: dict[int, list[int]] = {}  # schema -> those that look at the same place of a value, all by their id()

    def follow(contents: Any, resolver: Any) -> None:
        """Look up whatever is referred to, and whatever that refers to."""
        if id(contents) in nexts:
            return
        nexts[id(contents)] = [id(each) for each in _at_the_same_place(contents)]
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(contents, dict) and keyword in contents:
                target = _target(contents[keyword], resolver)
                kind.check_schema(target.contents)
                nexts[id(contents)].append(id(target.contents))
                follow(target.contents, target.resolver)
        resource: Any = Resource.from_contents(contents, default_specification=DRAFT202012)
        for inner in resource.subresources():
            follow(inner.contents, resolver.in_subresource(inner))

    try:
        kind.check_schema(plain)
        follow(plain, REGISTRY.resolver_with_root(Resource.from_contents(plain, default_specification=DRAFT202012)))
    except SchemaError as error:
        raise RequestError(f"the JSON schema is broken at {error.json_path}: {line(error.message)}") from error
    return kind(plain, registry=REGISTRY), _longest_way(nexts)


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as plain JSON. Raises RequestError."""
    if not isinstance(schema, Mapping):
        raise RequestError(f"a JSON schema is an object, not {type(schema).__name__}")
    try:
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dict(schema)))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {line(str(error))}") from error
    if _depth(plain) > _DEEPEST_SCHEMA:
        raise RequestError(f"the JSON schema is nested too deeply: more than {_DEEPEST_SCHEMA} levels")
    return plain


def _target(reference: str, resolver: Any) -> Any:
    from referencing.exceptions import Unresolvable

    try:
        return resolver.lookup(reference)
    except (Unresolvable, ValueError) as error:
        raise RequestError(f"the JSON schema names {reference!r:.200}, which is not in it; none is fetched") from error


def _at_the_same_place(contents: Any) -> Iterator[Any]:
    """The schemas in a schema that look at the same value as it does, and not at a part of it."""
    if isinstance(contents, dict):
        for keyword in ("allOf", "anyOf", "oneOf"):
            yield from contents.get(keyword, [])
        for keyword in ("not", "if", "then", "else"):
            if keyword in contents:
                yield contents[keyword]
        for keyword in ("dependentSchemas", "dependencies"):
            yield from contents.get(keyword, {}).values()


def _longest_way(nexts: Mapping[int, list[int]]) -> int:
    """The steps of the longest way. Raises RequestError if one comes back to where it was.

    >>> _longest_way({1: [2, 3], 2: [3], 3: []})
    2
    """
    lengths: dict[int, int | None] = {}  # None: on the way now

    def length(node: int) -> int:
        if node not in lengths:
            lengths[node] = None
            lengths[node] = max((1 + length(each) for each in nexts.get(node, ())), default=0)
        found = lengths[node]
        if found is None:
            raise RequestError("the JSON schema refers to itself without an end")
        return found

    return max(map(length, nexts))


def _depth(value: Any) -> int:
    """
    >>> _depth(1), _depth([]), _depth({"a": [1]})
    (0, 1, 2)
    """
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def line(words: str) -> str:
    """Somebody else's words in one line that is not too long."""
    words = " ".join(words.split())
    return words if len(words) <= _LONGEST_REASON else words[: _LONGEST_REASON - 4] + " ..."
