"""Replies of a given form: pydantic models beside JSON schemas, in Python and for the command."""

import asyncio
import json
import re
import subprocess
import sys
from typing import Literal

import pytest
from helpers import jsonl
from pydantic import BaseModel, Field
from wires import http, serving

from millstream.client.client import Client, Fault, Reply
from millstream.errors import RequestError
from millstream.llm.forms import form_of, model_named


class Place(BaseModel):
    name: str
    people: int | None = None


class City(BaseModel):
    """A city."""

    reasoning: str = Field(description="think first")
    kind: Literal["capital", "other"] = "other"
    places: list[Place] = []


FITS = {"reasoning": "hm", "kind": "capital", "places": [{"name": "Louvre", "people": 5}]}


def saying(text):
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return lambda path, body: http(json.dumps({"choices": [choice]}).encode())


def asked(text, schema, **options):
    """The outcome of one request, and the bodies that were sent."""

    async def main():
        async with (
            serving(saying(text)) as (address, heard),
            Client(f"http://{address}/v1", model="m", schema=schema, **options) as client,
        ):
            return await client.ask("Paris?"), [body for _, body in heard]

    return asyncio.run(main())


def test_a_reply_is_an_instance_of_the_model():
    reply, _ = asked(json.dumps(FITS), City)
    assert isinstance(reply, Reply)
    assert reply.parsed == City(**FITS)
    assert isinstance(reply.parsed.places[0], Place)


def test_with_a_json_schema_it_is_plain():
    reply, _ = asked('{"a": [1]}', {"type": "object"})
    assert reply.parsed == {"a": [1]}


def test_without_one_there_is_none():
    reply, _ = asked('{"a": [1]}', None)
    assert reply.parsed is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps({**FITS, "places": [{"name": 5}]}), r"\$\.places\[0\]\.name: Input should be a valid string"),
        (json.dumps({**FITS, "kind": "village"}), r"\$\.kind: Input should be 'capital' or 'other'"),
        ("Paris", r"\$: Invalid JSON"),
        ("", r"\$: Invalid JSON"),
    ],
)
def test_what_does_not_fit_is_asked_again_and_told(text, says):
    fault, sent = asked(text, City, attempts=2)
    assert isinstance(fault, Fault)
    assert (fault.kind, len(sent)) == ("schema", 2)
    assert re.search(says, fault.message)


def test_the_server_gets_a_strict_schema_in_the_order_of_the_fields():
    _, sent = asked(json.dumps(FITS), City)
    asked_for = sent[0]["response_format"]["json_schema"]
    assert (asked_for["name"], asked_for["strict"]) == ("City", True)
    schema = asked_for["schema"]
    assert list(schema["properties"]) == schema["required"] == ["reasoning", "kind", "places"]
    assert schema["additionalProperties"] is False
    place = schema["$defs"]["Place"]
    assert (place["required"], place["additionalProperties"]) == (["name", "people"], False)
    assert "default" not in json.dumps(schema)


def test_fields_named_like_words_of_a_schema_stay():
    class Odd(BaseModel):
        default: int
        properties: str

    schema = form_of(Odd).response_format["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) == ["default", "properties"]


@pytest.mark.parametrize("schema", [5, "City", int, City(**FITS)])
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(RequestError, match="a JSON schema or a pydantic model"):
        form_of(schema)


def test_a_field_that_json_does_not_have_is_refused():
    class Call(BaseModel):
        back: type[Place] | object = Field(default=None)
        of: "dict[str, __import__('typing').Callable[[], int]]" = {}

    with pytest.raises(RequestError, match="Call has no JSON schema"):
        form_of(Call)


MODULE = """
from __future__ import annotations
from pydantic import BaseModel

class Place(BaseModel):
    name: str

class City(BaseModel):
    places: list[Place]
"""


@pytest.mark.parametrize("named", ["cities.py:City", "cities:City"])
def test_the_command_takes_a_model(tmp_path, named):
    (tmp_path / "cities.py").write_text(MODULE)
    (tmp_path / "prompts.jsonl").write_bytes(jsonl([{"prompt": "Paris?"}]))

    async def main():
        async with serving(saying('{"places": [{"name": "Louvre"}]}')) as (address, heard):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "millstream", "ask", "prompts.jsonl", "--out", "-", "--model", "m"),
                *("--base-url", f"http://{address}/v1", "--schema", named),
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            return *await process.communicate(), heard

    shown, said, heard = asyncio.run(main())
    assert json.loads(shown)["text"] == '{"places": [{"name": "Louvre"}]}', said
    assert heard[0][1]["response_format"]["json_schema"]["name"] == "City"


@pytest.mark.parametrize(
    ("content", "named", "says"),
    [
        ("x = 1", "cities.py:City", "has no 'City'"),
        ("import no_such_module", "cities.py:City", "cannot import .*no_such_module"),
        ("class", "cities.py:City", "cannot import"),
        ("", "towns.py:City", "cannot import"),
        ("", "no_such_module:City", "cannot import"),
        ("", ":City", "names no model: give one as module:Model"),
        ("", "cities:", "names no model: give one as module:Model"),
    ],
)
def test_a_model_that_is_not_there_is_told(tmp_path, monkeypatch, content, named, says):
    (tmp_path / "cities.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(RequestError, match=says):
        model_named(named)
