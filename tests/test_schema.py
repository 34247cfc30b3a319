"""Whether a reply is JSON of the form that was asked for, and schemas that are none."""

import asyncio
import json
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wires import body, faulty

from millstream.errors import RequestError
from millstream.llm.schema import checker, response_format
from millstream.llm.simulator import Behaviour, running
from millstream.llm.wire import Wire

CITY = {
    "title": "A city",
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 1}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def reply_to(behaviour):
    async def main():
        async with running(behaviour) as server, Wire(server.url) as wire:
            asked = body("What is the capital of France?", response_format=response_format(CITY))
            return (await wire.send(asked)).text

    return asyncio.run(main())


def test_a_server_that_is_asked_for_a_schema_fits_it_and_one_that_does_not_is_found_out():
    assert checker(CITY)(reply_to(Behaviour())) is None
    assert checker(CITY)(reply_to(faulty("bad-schema:1"))).startswith("$: ['not', 'what', 'was', 'asked'] is not")


FITS = json.dumps({"city": "Paris", "people": 2_100_000})
MISFITS = [
    ("", "no JSON: it is empty"),
    (" \n", "no JSON: it is empty"),
    (f"```json\n{FITS}\n```", "no JSON: it starts with '```json"),
    (f"Here you are: {FITS}", "no JSON"),
    (FITS + FITS, "no JSON"),
    (FITS[:-1], "no JSON"),
    ('{"city": "\\ud83d", "people": 1}', "no JSON"),
    ('{"city": "Paris", "people": NaN}', "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("{}", "$: 'city' is a required property"),
    ('{"city": "Paris", "people": "many"}', "$.people: 'many' is not of type 'integer'"),
    ('{"city": "Paris", "people": 0}', "$.people: 0 is less than the minimum of 1"),
    ('{"city": "Paris", "people": 1, "mayor": ""}', "$: Additional properties are not allowed"),
    (json.dumps({"city": "x" * 5000, "people": "\n" * 5000}), "$.people: "),
]


@pytest.mark.parametrize(("text", "reason"), MISFITS)
def test_a_text_that_does_not_fit_and_why(text, reason):
    found = checker(CITY)(text)
    assert found.startswith(reason)
    assert found.isprintable()
    assert len(found) <= 300


@pytest.mark.parametrize("text", [FITS, f"\n {FITS}\n", '{"city": "", "people": 1.0}', '{"people":1,"city":"\\u00e9"}'])
def test_a_text_that_fits(text):
    assert checker(CITY)(text) is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5), st.text())
def test_all_json_fits_the_empty_schema_and_nothing_else_does(value, text):
    misfit = checker({})
    assert misfit(json.dumps(value, ensure_ascii=False)) is None
    try:
        json.loads(text)
    except ValueError:
        assert misfit(text) is not None


TREE = {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}
PART = {"$defs": {"a": {"$id": "https://x.org/a", "type": "integer"}}, "items": {"$ref": "https://x.org/a"}}
OLD = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "definitions": {"a": {"type": "integer"}},
    "items": [{"$ref": "#/definitions/a"}],
}


@pytest.mark.parametrize(
    ("schema", "fits", "fits_not"),
    [
        (TREE, "[[], [[]]]", "[[], [1]]"),
        (PART, "[1]", '["1"]'),
        (OLD, '[1, "1"]', '["1"]'),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "{}", '{"type": "objekt"}'),
        ({"properties": {"$ref": {"type": "string"}}}, '{"$ref": "https://x.org"}', '{"$ref": 1}'),
        ({"enum": [{"$ref": "https://x.org"}]}, '{"$ref": "https://x.org"}', "{}"),
    ],
)
def test_references_within_a_schema(schema, fits, fits_not):
    misfit = checker(schema)
    assert misfit(fits) is None
    assert misfit(fits_not) is not None


def lists(levels):
    return "[" * levels + "]" * levels


STEPS = {"allOf": [{"anyOf": [{"type": "null"}, {"not": {"not": {"items": {"$ref": "#"}}}}]}]}


@pytest.mark.parametrize("schema", [TREE, STEPS])
def test_what_is_nested_too_deeply_is_a_misfit_and_overflows_nothing(schema):
    misfit = checker(schema)
    assert misfit(lists(20)) is None
    assert "too deeply" in misfit(lists(900))
    assert misfit(f"[{', '.join(['[]'] * 900)}]") is None


BROKEN = [
    ([], "an object, not list"),
    ({"type": "objekt"}, "broken at .*type"),
    ({"properties": {"a": {"type": 5}}}, "broken at .*properties"),
    ({"pattern": "("}, "broken at .*pattern"),
    ({"properties": 5}, "broken at .*properties"),
    ({"$ref": 5}, "broken at"),
    ({"a": object()}, "no JSON"),
    ({"$schema": "https://x.org/draft"}, "no draft that is known"),
    ({"$schema": 5}, "no draft that is known"),
    ({"$ref": "https://x.org/schema"}, "names 'https://x.org/schema', which is not in it"),
    ({"$ref": "file:///etc/hosts"}, "names 'file:///etc/hosts', which is not in it"),
    ({"$id": "https://x.org/a", "items": {"$ref": "b"}}, "names 'b', which is not in it"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "names '#/.defs/none', which is not in it"),
    ({"$dynamicRef": "#none"}, "names '#none', which is not in it"),
    ({"items": {"$ref": "#/unused"}, "unused": {"$ref": "https://x.org"}}, "names 'https://x.org'"),
    ({"title": "text", "$ref": "#/title"}, "broken at"),
    ({"$ref": "#"}, "refers to itself"),
    ({"not": {"$ref": "#"}}, "refers to itself"),
    ({"type": "object", "anyOf": [{"type": "null"}, {"if": {"dependentSchemas": {"a": {"$ref": "#"}}}}]}, "refers to"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
    ({"items": json.loads('{"items":' * 100 + "{}" + "}" * 100)}, "nested too deeply"),
]


@pytest.mark.parametrize(("schema", "reason"), BROKEN)
def test_a_schema_that_is_none_is_refused_and_nothing_is_fetched(schema, reason, monkeypatch):
    def opened(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", opened)
    with pytest.raises(RequestError, match=reason) as refused:
        checker(schema)
    assert str(refused.value).isprintable()


def test_what_a_request_says_of_its_schema():
    assert response_format(CITY) == {
        "type": "json_schema",
        "json_schema": {"name": "A_city", "schema": CITY, "strict": True},
    }


@pytest.mark.parametrize("title", [None, "", "?!", 5, {}])
def test_a_schema_without_a_good_title_has_a_name_all_the_same(title):
    assert response_format({"title": title})["json_schema"]["name"] == "reply"
    assert len(response_format({"title": "x" * 100})["json_schema"]["name"]) == 64


def test_only_the_order_within_a_schema_is_the_users():
    """A journal from before headers was asked with all in sorted order: what we put around a schema is no other one."""
    ordered = response_format({"properties": {"a": {}, "b": {}}, "title": "t", "type": "object"})
    assert msgspec.json.encode(ordered) == msgspec.json.encode(ordered, order="sorted")
    turned = response_format({"type": "object", "properties": {"b": {}, "a": {}}})
    assert list(turned["json_schema"]["schema"]["properties"]) == ["b", "a"]
