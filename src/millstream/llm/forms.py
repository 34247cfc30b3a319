"""The form that replies are to have: a JSON schema, or a pydantic model, which the user brings along."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from millstream.errors import RequestError
from millstream.llm.schema import checker, line, response_format


class ReplyForm(NamedTuple):
    """What the server is asked for, why a text does not fit (None: it does), and the value in one that does."""

    response_format: dict[str, Any]
    misfit: Callable[[str], str | None]
    parse: Callable[[str], Any]


def form_of(schema: Any) -> ReplyForm:
    """The form that a JSON schema (a mapping) or a pydantic model (a class) asks for. Raises RequestError for others.

    >>> form_of({"type": "object"}).parse('{"people": 2100000}')
    {'people': 2100000}
    """
    if isinstance(schema, Mapping):
        return ReplyForm(response_format(schema), checker(schema), msgspec.json.decode)
    if not (isinstance(schema, type) and hasattr(schema, "model_json_schema")):
        raise RequestError(f"a schema is a JSON schema or a pydantic model, not {schema!r:.80}")
    model: Any = schema
    try:
        asked = _strict(model.model_json_schema())
    except RuntimeError as error:  # pydantic's, of a field that JSON cannot hold
        raise RequestError(f"the model {model.__name__} has no JSON schema: {line(str(error))}") from error

    def misfit(text: str) -> str | None:
        try:
            model.model_validate_json(text)
        except ValueError as error:
            return _reason(error)
        return None

    return ReplyForm(response_format(asked), misfit, model.model_validate_json)


def model_named(name: str) -> Any:
    """The class that MODULE:NAME or FILE.py:NAME says, imported. Raises RequestError if there is none."""
    module_name, _, class_name = name.rpartition(":")
    if not (module_name and class_name):
        raise RequestError(f"the schema {name} names no model: give one as module:Model or file.py:Model")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location("schema_of_replies", module_name)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where pydantic looks up what annotations name
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")  # the folder of whoever calls, as for python -m
            module = importlib.import_module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise RequestError(f"cannot import the schema's module {module_name}: {line(str(error))}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise RequestError(f"{module_name} has no {class_name!r} that could be the schema")
    return found


def _strict(schema: Any) -> Any:
    """A schema as servers want it of a strict one: an object has all of its properties, and no others.

    >>> _strict({"type": "object", "properties": {"a": {"default": 1}, "b": {}}, "required": ["b"]})
    {'type': 'object', 'properties': {'a': {}, 'b': {}}, 'required': ['a', 'b'], 'additionalProperties': False}
    """
    if isinstance(schema, list):
        return list(map(_strict, schema))
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs")  # whose keys are names, and no words of the schema
    found = {
        key: {name: _strict(each) for name, each in value.items()} if key in named else _strict(value)
        for key, value in schema.items()
        if key != "default"
    }
    if "properties" in found:
        found["required"] = list(found["properties"])
        found.setdefault("additionalProperties", False)
    return found


def _reason(error: ValueError) -> str:
    """What pydantic says of the first thing that does not fit, in a line."""
    errors: Any = getattr(error, "errors", None)
    if errors is None:
        return line(str(error))
    first = errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"])
    return line(f"${place}: {first['msg']}")
