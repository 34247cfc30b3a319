"""Prompts of every shape become requests: the same ones however they come, and a bad row is one fault."""

import gzip
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import jsonl, read_little, write, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PATIENCE, needs_proc

from millstream.client.bodies import Recipe
from millstream.corpus import sources
from millstream.corpus.find import expand
from millstream.corpus.sources import InputShard
from millstream.errors import RequestError, RunError
from millstream.runs.ask import lines, prompts
from millstream.runs.ask.prompts import batches

RECIPE = Recipe("m")
TEXTS = st.text(max_size=20) | st.sampled_from(['"', "\\", "{text}", "é\u2028🙂", "\0", "\ufeff", "</script>\x7f"])
IDS = st.none() | TEXTS | st.integers(-(2**70), 2**70)


def read(source, recipe=RECIPE, **options):
    [shard] = expand([source])
    return [request for batch in batches(shard, recipe, **options) for request in batch]


def requests_of(folder, items, recipe=RECIPE, **options):
    """The requests of JSON lines: mappings, or bytes as they stand."""
    return read(write_jsonl(Path(folder) / "rows.jsonl", items), recipe, **options)


def body_of(request):
    return msgspec.json.decode(request.data)


def told(requests):
    """All that is to be the same however rows are read."""
    return [(r.index, r.id, r.key, r.data, r.path, r.fault) for r in requests]


def user(text):
    return [{"role": "user", "content": text}]


# Shapes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "recipe", "body"),
    [
        ({"prompt": "a"}, Recipe("m"), {"model": "m", "messages": user("a")}),
        ({"prompt": "a", "messages": None}, Recipe("m"), {"model": "m", "messages": user("a")}),
        ({"prompt": "a", "messages": user("b")}, Recipe("m"), {"model": "m", "messages": user("b")}),
        (
            {"prompt": "a", "note": [1, None]},
            Recipe("m", params={"n": 2}),
            {"model": "m", "n": 2, "messages": user("a")},
        ),
        ({"prompt": "a"}, Recipe("m", params={"model": "o"}), {"model": "o", "messages": user("a")}),
        (
            {"messages": user("a")},
            Recipe("m", "be brief"),
            {"model": "m", "messages": [{"role": "system", "content": "be brief"}, *user("a")]},
        ),
        (
            {"prompt": "a"},
            Recipe("m", "say \0"),
            {"model": "m", "messages": [{"role": "system", "content": "say \0"}, *user("a")]},
        ),
        (
            {"a": "{b}", "b": 1.5},
            Recipe("m", template="{a}, {b} {{c}}"),
            {"model": "m", "messages": user("{b}, 1.5 {c}")},
        ),
        (
            {"a": {"z": 1, "b": [True]}},
            Recipe("m", template="{a}"),
            {"model": "m", "messages": user('{"z":1,"b":[true]}')},
        ),
        ({"first name": "a"}, Recipe("m", template="{first name}!"), {"model": "m", "messages": user("a!")}),
        ({"n": 10**30}, Recipe("m", template="{n}"), {"model": "m", "messages": user("1" + "0" * 30)}),
    ],
)
def test_a_row_becomes_a_body(tmp_path, row, recipe, body):
    [request] = requests_of(tmp_path, [row], recipe)
    assert request.fault is None
    assert request.data == msgspec.json.encode(body)  # as it was given
    assert request.key == canonical_key(body) or recipe.template == "{a}"


def canonical_key(body, path="/chat/completions", name=None):
    """Journals of all versions find a request by this: it may never change."""
    data = msgspec.json.encode(body, order="sorted")
    data += b"" if path == "/chat/completions" else b"\n" + msgspec.json.encode(path)
    return hashlib.blake2b(data + (b"" if name is None else b"\0" + name.encode()), digest_size=16).digest()


def batch_row(custom_id="a", url="/v1/chat/completions", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.mark.parametrize(
    ("row", "path", "body"),
    [
        (batch_row(messages=user("a")), "/chat/completions", {"model": "m", "n": 2, "messages": user("a")}),
        (batch_row(messages=user("a"), model=None), "/chat/completions", {"model": "m", "n": 2, "messages": user("a")}),
        (
            batch_row(messages=user("a"), model="o", n=1),
            "/chat/completions",
            {"model": "o", "n": 1, "messages": user("a")},
        ),
        (batch_row(url="/v1/completions", prompt="a"), "/completions", {"model": "m", "n": 2, "prompt": "a"}),
    ],
)
def test_a_batch_row_brings_its_body(tmp_path, row, path, body):
    [request] = requests_of(tmp_path, [row], Recipe("m", "be brief", "{text}", {"n": 2}))
    assert (request.fault, request.id, request.path) == (None, "a", path)
    assert body_of(request) == body
    assert request.key == canonical_key(body, path, "a")


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_given_is_sent_in_its_order_and_named_without(tmp_path, reverse):
    def turned(pairs):
        return dict(reversed(pairs)) if reverse else dict(pairs)

    properties = turned([("reasoning", {"type": "string"}), ("answer", {"type": "integer"})])
    schema = turned([("type", "json_schema"), ("json_schema", {"schema": {"properties": properties}})])
    params = turned([("response_format", schema), ("tools", [{"function": {"parameters": properties}}])])
    messages = [turned([("role", "user"), ("content", [turned([("type", "text"), ("text", "a")])])])]
    whole = {"model": "m", **params, "messages": messages}
    rows = [{"prompt": "a"}, {"messages": messages}, batch_row("b", **whole), {"a": properties}]
    found = requests_of(tmp_path, rows[:3], Recipe("m", params=params))
    [filled] = requests_of(tmp_path, rows[3:], Recipe("m", params=params, template="{a}"))
    sent = [
        {**whole, "messages": user("a")},
        whole,
        whole,
        {**whole, "messages": user(json.dumps(properties, **TIGHT))},
    ]
    keys = [canonical_key(sent[0]), canonical_key(whole), canonical_key(whole, name="b")]
    assert [request.data for request in [*found, filled]] == [msgspec.json.encode(body) for body in sent]
    assert [request.key for request in found] == keys
    in_text = json.dumps(properties, sort_keys=True, **TIGHT)
    assert filled.key == canonical_key({**whole, "messages": user(in_text)})


TIGHT = {"separators": (",", ":")}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"id": "a"}, "a"),
        ({"id": 7}, "7"),
        ({"id": 1.5}, "1.5"),
        ({"id": True}, "true"),
        ({"id": [1]}, "[1]"),
        ({"id": None}, None),
        ({"id": "a", "custom_id": "b"}, "b"),
        ({"id": "a", "custom_id": None}, "a"),
        ({"id": ""}, ""),
        ({}, None),
    ],
)
def test_a_row_has_an_id_or_none(tmp_path, row, name):
    plain, slow = (
        requests_of(tmp_path, [{"prompt": "x", **row}])[0],
        requests_of(tmp_path, [{"messages": user("x"), **row}])[0],
    )
    assert plain.id == slow.id == name
    assert plain.key == slow.key


@settings(max_examples=200, deadline=None)
@given(
    TEXTS, IDS, TEXTS, st.dictionaries(TEXTS.filter(lambda name: name not in ("model", "messages")), IDS, max_size=3)
)
def test_the_fast_way_gives_the_bytes_of_the_slow_way(tmp_path_factory, text, name, system, params):
    folder = tmp_path_factory.mktemp("rows")
    recipe = Recipe("m", system or None, params=params)
    named = {} if name is None else {"id": name}
    [fast] = requests_of(folder, [{"prompt": text, **named}], recipe)
    [slow] = requests_of(folder, [{"messages": user(text), **named}], recipe)
    [filled] = requests_of(folder, [{"prompt": text, **named}], Recipe("m", system or None, "{prompt}", params))
    before = [{"role": "system", "content": system}] if system else []
    body = {"model": "m", **params, "messages": [*before, *user(text)]}
    assert fast.data == msgspec.json.encode(body)
    assert fast.key == canonical_key(body, name=fast.id)
    assert fast.id == (None if name is None else str(name))
    assert told([fast]) == told([slow]) == told([filled])
    if system == "" and name is not None:
        row = batch_row(str(name) or "none", **{"model": "m", "messages": user(text)})
        [batch] = requests_of(folder, [row], Recipe(None, params=params))
        assert body_of(batch) == body_of(fast)
        assert (batch.key == fast.key) == (batch.id == fast.id)


# Parameters that rows bring -----------------------------------------------------------------------------------------

OWN = ("temperature", "model", "tools")


def test_rows_bring_the_parameters_that_are_named_and_no_others(tmp_path):
    tools = [{"function": {"name": "f", "parameters": {"z": 1, "a": 2}}}]
    rows = [
        {"prompt": "a", "temperature": 0.5, "top_p": 0.1},
        {"messages": user("b"), "model": "o", "tools": tools},
        {"prompt": "c", "temperature": None},
        {"prompt": "d", "custom_id": "d", "temperature": 0},
    ]
    recipe = Recipe("m", "s", params={"temperature": 1, "n": 2}, row_params=OWN)
    first = [{"role": "system", "content": "s"}]
    bodies = [
        {"model": "m", "temperature": 0.5, "n": 2, "messages": first + user("a")},
        {"model": "o", "temperature": 1, "n": 2, "tools": tools, "messages": first + user("b")},
        {"model": "m", "temperature": 1, "n": 2, "messages": first + user("c")},
        {"model": "m", "temperature": 0, "n": 2, "messages": first + user("d")},
    ]
    found = requests_of(tmp_path, rows, recipe)
    assert [request.data for request in found] == [msgspec.json.encode(body) for body in bodies]
    assert [request.key for request in found[:3]] == [canonical_key(body) for body in bodies[:3]]
    [filled] = requests_of(tmp_path, [{"text": "a", "temperature": 0.5}], Recipe("m", None, "{text}", row_params=OWN))
    assert body_of(filled) == {"model": "m", "temperature": 0.5, "messages": user("a")}
    [batch] = requests_of(tmp_path, [{**batch_row(messages=user("a")), "temperature": 2}], Recipe("m", row_params=OWN))
    assert body_of(batch) == {"model": "m", "messages": user("a")}


def test_parquet_rows_bring_parameters_too(tmp_path):
    columns = {
        "prompt": ["a", "b"],
        "temperature": [0.5, None],
        "tools": [[{"x": 1, "y": None}], [{"x": None, "y": 2}]],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    one, two = read(tmp_path / "rows.parquet", Recipe("m", row_params=("temperature", "tools")))
    assert body_of(one) == {"model": "m", "temperature": 0.5, "tools": [{"x": 1}], "messages": user("a")}
    assert body_of(two) == {"model": "m", "tools": [{"y": 2}], "messages": user("b")}
    with pytest.raises(RequestError, match="no column 'seed' for --row-params"):
        read(tmp_path / "rows.parquet", Recipe("m", row_params=("seed",)))


@pytest.mark.parametrize("name", ["messages", "prompt", "custom_id", "id", "stream", "body", ""])
def test_what_rows_cannot_bring(tmp_path, name):
    with pytest.raises(RequestError, match="cannot be a parameter that rows bring"):
        requests_of(tmp_path, [{"prompt": "a"}], Recipe("m", row_params=("temperature", name)))


def test_bad_parameters_of_a_row_are_its_fault(tmp_path):
    lines = [
        b'{"prompt": "a", "temperature": NaN}',
        {"prompt": "b"},
        {"prompt": "c", "model": 5},
        {"prompt": "d", "model": "m"},
    ]
    nan, none, odd, fine = requests_of(tmp_path, lines, Recipe(None, row_params=("temperature", "model")))
    assert [request.fault and request.fault[0] for request in (nan, none, odd, fine)] == ["bad_row"] * 3 + [None]
    assert "NaN" in nan.fault[1]
    assert "names no model" in none.fault[1]
    with pytest.raises(RequestError, match="bring no parameters"):
        read(write(tmp_path / "rows.txt", b"a\n"), Recipe("m", row_params=OWN))


def told_of(folder, rows, recipe=RECIPE):
    words = []
    found = requests_of(folder, rows, recipe, tell=words.append)
    return words, found


def test_a_rows_own_limit_of_ids_stands_in_place_of_the_commands(tmp_path):
    rows = [
        batch_row("a", messages=user("a"), max_completion_tokens=5),
        {"id": "a", "prompt": "a", "max_completion_tokens": 5},
    ]
    keys = set()
    for cap in {}, {"max_tokens": 40}, {"max_tokens": 50}:
        recipe = Recipe("m", params=cap, row_params=("max_completion_tokens",))
        found = requests_of(tmp_path, rows, recipe)
        for request in found:
            assert body_of(request) == {"model": "m", "max_completion_tokens": 5, "messages": user("a")}
        keys.add(tuple(request.key for request in found))
    assert len(keys) == 1  # an earlier run's are found, whatever the command's limit is


def test_what_batch_rows_have_no_use_for_is_told_once(tmp_path):
    row = {"method": "POST", "url": "/v1/chat/completions", "body": {"messages": user("a")}}
    rows = [{"prompt": "x"}, *({"custom_id": str(number), **row} for number in range(3))]
    recipe = Recipe("m", system="Be brief.", row_params=OWN)
    words, found = told_of(tmp_path, rows, recipe)
    flags = "--system and --row-params are not for rows of the Batch format"
    assert words == [f"rows.jsonl, line 2: {flags}, whose body is sent as it is"]
    assert {request.data for request in found[1:]} == {msgspec.json.encode({"model": "m", "messages": user("a")})}
    assert told_of(tmp_path, rows[:1], recipe)[0] == told_of(tmp_path, rows)[0] == []


def test_parameters_that_are_not_sent_are_told_once(tmp_path):
    rows = [{"prompt": "x"}, *({"prompt": "a", "temperature": 1, "max_tokens": 5, "note": 1} for _ in range(3000))]
    [words], found = told_of(tmp_path, rows)
    assert words.startswith("rows.jsonl, line 2: temperature, max_tokens beside the prompt are not sent")
    assert "--row-params temperature,max_tokens" in words
    assert {request.data for request in found[1:]} == {msgspec.json.encode({"model": "m", "messages": user("a")})}
    [words], _ = told_of(tmp_path, rows[1:], Recipe("m", row_params=("max_tokens",)))
    assert "temperature beside the prompt is not sent" in words
    assert "--row-params max_tokens,temperature" in words


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        ({"prompt": "a", "temperature": None, "note": 1}, RECIPE),
        ({"prompt": "a", "temperature": 1}, Recipe("m", row_params=("temperature",))),
        ({"prompt": "a", "temperature": 1}, Recipe("m", template="{prompt} at {temperature}")),
        ({"text": "an answer", "model": "m"}, Recipe("m", template="{text}")),
        ({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": user("a")}}, RECIPE),
    ],
)
def test_what_is_not_told(tmp_path, row, recipe):
    assert told_of(tmp_path, [row], recipe)[0] == []


def test_parquet_columns_that_are_not_sent_are_told_once(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"] * 9, "seed": [1] * 9}), tmp_path / "rows.parquet", row_group_size=2)
    words = []
    read(tmp_path / "rows.parquet", tell=words.append)
    assert len(words) == 1
    assert "--row-params seed" in words[0]


# The same however they come -----------------------------------------------------------------------------------------

ROWS = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a", "b", "é 🙂", ""])}, optional={"id": st.sampled_from(["x", "y"])}
)


@settings(max_examples=30, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=30))
def test_every_kind_of_file_gives_the_same_requests(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    wanted = told(requests_of(folder, rows))
    assert len({key for _, _, key, *_ in wanted}) == len(rows)
    for ending in "jsonl.gz", "jsonl.zst", "ndjson":
        assert told(read(write(folder / f"rows.{ending}", jsonl(rows)))) == wanted
    columns = {"prompt": [row["prompt"] for row in rows], "id": [row.get("id") for row in rows]}
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=7)
    assert told(read(folder / "rows.parquet")) == wanted
    texts = [row["prompt"] for row in rows if row["prompt"]]
    lines = write(folder / "rows.txt", "".join(text + "\n" for text in texts).encode())
    assert told(read(lines)) == told(requests_of(folder, [{"prompt": text} for text in texts]))


MIXED = [
    *({"prompt": f"question {n % 40}", "id": f"{n % 80}"} for n in range(100)),
    b"",
    b"no json",
    b"  \r",
    *({"messages": user(f"é {n}"), "custom_id": f"c{n % 15}"} for n in range(20)),
    b"\xff",
    b"no json",
    {"prompt": "x" * 3000},
    {"prompt": "last"},
]


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1 << 20])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_it_does_not_matter_where_batches_and_reads_end(tmp_path, monkeypatch, size, ending):
    path = write(tmp_path / f"rows.{ending}", jsonl(MIXED))
    whole = told(read(path))
    assert len(whole) == len(MIXED) - 2
    for name in "_FIRST_BLOCK", "_BLOCK", "_ROWS":
        monkeypatch.setattr(lines, name, size)
    read_little(monkeypatch, size)
    assert told(read(path)) == whole


def test_batches_are_small_at_first_and_never_large(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"question {n}"} for n in range(20_000)])
    sizes = [len(batch) for batch in batches(expand([path])[0], RECIPE)]
    assert sum(sizes) == 20_000
    assert sizes[0] < 200
    assert max(sizes) <= 4096
    (tmp_path / "short.txt").write_text("a\n" * 20_000)
    assert max(len(batch) for batch in batches(expand([tmp_path / "short.txt"])[0], RECIPE)) <= 4096


@pytest.mark.parametrize("limit", [-1, 0, 1, 2, 124, 125, 1000])
def test_no_more_rows_than_asked_for(tmp_path, limit):
    whole = told(requests_of(tmp_path, MIXED))
    assert len(whole) == 125
    assert told(requests_of(tmp_path, MIXED, limit=limit)) == whole[: max(0, limit)]


# Keys ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(ROWS, max_size=30), st.randoms())
def test_equal_rows_stay_distinct_and_moved_ones_keep_their_keys(tmp_path_factory, rows, draw):
    folder = tmp_path_factory.mktemp("rows")
    keys = [request.key for request in requests_of(folder, rows)]
    assert len(set(keys)) == len(rows)
    assert {len(key) for key in keys} <= {16}
    draw.shuffle(rows)
    assert {request.key for request in requests_of(folder, rows)} == set(keys)
    again = [request.key for request in requests_of(folder, [*rows, *rows])]
    assert len(set(again)) == 2 * len(rows)
    assert set(again[: len(rows)]) == set(keys)


def test_an_edited_request_gets_another_key(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "a", "id": ""},
        {"prompt": "a", "id": "x"},
        batch_row("x", url="/v1/completions", prompt="a"),
        batch_row("y", messages=user("a"), n=2),
    ]
    recipes = [
        Recipe("m"),
        Recipe("o"),
        Recipe("m", "brief"),
        Recipe("m", params={"n": 1}),
        Recipe("m", params={"n": 1.5}),
    ]
    keys = Counter(request.key for recipe in recipes for request in requests_of(tmp_path, rows, recipe))
    # The last Batch row has its own `n`, and neither of them takes the system prompt.
    assert sum(keys.values()) == 30
    assert sorted(count for count in keys.values() if count > 1) == [2, 4]


def test_path_and_id_are_never_mistaken_for_each_other(tmp_path):
    names = ["", "a", "\0a", '\n"/completions"', '"/completions"', '\n"/completions"\0a']
    rows = [
        batch_row(name, url, messages=user("x"))
        for name in names
        if name
        for url in ("/v1/completions", "/v1/chat/completions")
    ]
    rows += [{"prompt": "x", "id": name} for name in names]
    made = [request for row in rows for request in requests_of(tmp_path, [row])]
    assert all(request.fault is None for request in made)
    assert len({request.key for request in made}) == len({(r.path, r.id, r.data) for r in made})


def test_a_bad_row_that_is_mended_gets_another_key(tmp_path):
    bad, again, mended = requests_of(tmp_path, [b'{"prompt": 1}', b'{"prompt": 1}', b'{"prompt": "1"}'])
    assert bad.fault
    assert mended.fault is None
    assert len({bad.key, again.key, mended.key}) == 3


def test_a_hundred_thousand_equal_rows_stay_distinct(tmp_path):
    (tmp_path / "rows.txt").write_text("same\n" * 100_000)
    assert len({request.key for request in read(tmp_path / "rows.txt")}) == 100_000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=20), max_size=40), st.sampled_from([1, 3, 22]), st.booleans())
def test_how_often_a_hash_came_before(calls, bits, spread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "_PERHAPS", bits)
        seen, counts, given = prompts._Seen(), Counter(), 0
        for call in calls:
            hashes = [number << 61 if spread else number for number in call]
            wanted = []
            for number in call:
                wanted.append(counts[number])
                counts[number] += 1
            assert seen.before(np.array(hashes, np.uint64)).tolist() == wanted
            given += len(call)
        assert sum(run.nbytes for run in seen._runs) == 8 * given
        lengths = [len(run) for run in seen._runs if len(run)]
        assert all(one > 8 * next_ for one, next_ in itertools.pairwise(lengths))


# Bad rows -----------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no json", "not valid JSON: Expecting value, at character 1 of the line"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON: Extra data"),
        (b"[1]", "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b"null", "not a JSON object but NoneType"),
        (b"\xff", "not valid UTF-8"),
        (b'{"prompt": "a", "note": "\xff"}', "not valid UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "not valid UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "not valid"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "id": "\\udc00"}', "half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "\\ud800": 1}]}', "half of a surrogate pair"),
        (b'{"other": 1, "\\ud800": 2}', r"no 'prompt' or 'messages'; there are other, \ud800: give --template"),
        (b"{}", "no 'prompt' or 'messages'; there are none: give --template"),
        (b'{"prompt": null}', "no 'prompt' or 'messages'"),
        (b'{"prompt": 1}', "'prompt' is not text but int"),
        (b'{"prompt": ["a"]}', "'prompt' is not text but list"),
        (b'{"messages": []}', "'messages' is no list of messages"),
        (b'{"messages": "a", "prompt": "b"}', "'messages' is no list of messages"),
        (b'{"messages": ["a"]}', "no object with a 'role'"),
        (b'{"messages": [{"content": "a"}]}', "no object with a 'role'"),
        (b'{"messages": [{"role": "user", "content": NaN}]}', "NaN or Infinity"),
        (b'{"messages": [{"role": "user", "content": "a", "weight": 1e400}]}', "NaN or Infinity"),
        (b'{"messages": [{"role": "user", "content": ' + b"9" * 5000 + b"}]}", "not valid JSON"),
        (b'{"messages": ' + DEEP + b"}", "not valid JSON"),
        (b'{"prompt": "a", "deep": ' + DEEP + b"}", "not valid JSON"),
        (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "id": NaN}', "NaN or Infinity"),
        (json.dumps(batch_row(5, messages=user("a"))).encode(), "'custom_id' is not text but int"),
        (json.dumps(batch_row("", messages=user("a"))).encode(), "'custom_id' is empty"),
        (json.dumps(batch_row("a")).encode(), "'messages' is no list of messages"),
        (json.dumps(batch_row("a", "embeddings", input="a")).encode(), "'url' is 'embeddings'"),
        (json.dumps(batch_row("a", messages=user("a"), model=5)).encode(), "'body' names no model"),
        (json.dumps(batch_row("a", messages=user("a"), seed=float("inf"))).encode(), "NaN or Infinity"),
        (json.dumps(batch_row("a", messages=user("a"), stream=True)).encode(), "'stream'"),
    ],
)
def test_a_bad_row_is_one_fault(tmp_path, line, message):
    before, bad, after = requests_of(tmp_path, [{"prompt": "a"}, b"", line, {"prompt": "b"}])
    assert (before.fault, after.fault) == (None, None)
    assert [before.index, bad.index, after.index] == [0, 1, 2]
    kind, words = bad.fault
    assert kind == "bad_row"
    assert words.startswith("rows.jsonl, line 3: ")
    assert message in words
    assert len(words) < 400
    assert bad.data == b""
    assert len(bad.key) == 16
    msgspec.json.encode([bad.id, words])  # can be written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"other": 1}', "no field 'text' for the template; there are other"),
        (b'{"text": null}', "the field 'text' is null"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": [NaN]}', "NaN or Infinity"),
        (b'{"text": Infinity}', "NaN or Infinity"),
    ],
)
def test_a_row_without_what_the_template_wants(tmp_path, line, message):
    good, bad = requests_of(tmp_path, [{"text": "a"}, line], Recipe("m", template="Summarise: {text}"))
    assert good.fault is None
    assert bad.fault[0] == "bad_row"
    assert message in bad.fault[1]


def test_what_a_row_does_not_send_may_be_odd(tmp_path):
    lines = [b'{"prompt": "a", "score": NaN}', b'{"prompt": "a", "note": "\\ud800"}', b'{"prompt": "a", "big": 1e999}']
    assert {request.data for request in requests_of(tmp_path, lines)} == {
        requests_of(tmp_path, [{"prompt": "a"}])[0].data
    }


def test_a_custom_id_that_comes_again_is_a_fault(tmp_path):
    rows = [
        {"prompt": "a", "custom_id": "x"},
        {"prompt": "b", "custom_id": "x"},
        {"prompt": "c", "id": "x"},
        {"prompt": "c", "id": "x"},
        {"prompt": "d", "custom_id": "bad"},
        {"custom_id": "bad"},
        batch_row("x", messages=user("a")),
        {"prompt": "e", "custom_id": 7},
        {"prompt": "e", "custom_id": "7"},
        {"prompt": "e"},
        {"prompt": "e"},
    ]
    requests = requests_of(tmp_path, rows)
    assert [request.fault[0] if request.fault else "" for request in requests] == [
        *("", "duplicate_id", "", "", "", "bad_row", "duplicate_id", "", "duplicate_id", "", "")
    ]
    assert requests[1].fault[1] == "rows.jsonl, line 2: an earlier row has the custom_id 'x' too; rename one"
    assert requests[1].data == b""
    assert len({request.key for request in requests}) == len(rows)
    alone = requests_of(tmp_path, rows[1:])[0]
    assert alone.fault is None
    assert alone.key != requests[1].key


def test_a_line_of_text_that_is_no_text_is_a_fault(tmp_path):
    path = write(tmp_path / "rows.txt", b"one\n\xff\n \t\r\n\nthree\r\nfour \r")
    requests = read(path)
    assert [request.fault and request.fault[1] for request in requests] == [
        *(None, "rows.txt, line 2: not valid UTF-8: invalid start byte at byte 0; mend the text", None, None)
    ]
    assert [body_of(request)["messages"] for request in requests if not request.fault] == [
        *(user("one"), user("three"), user("four "))
    ]
    assert [request.index for request in requests] == [0, 1, 2, 3]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("data", [b"", b"\n", b"\n\r\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_has_no_requests(tmp_path, ending, data):
    assert list(batches(expand([write(tmp_path / f"rows.{ending}", data)])[0], RECIPE)) == []


@pytest.mark.parametrize("size", [1, 2, 4, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_marks_and_line_ends_are_no_part_of_a_prompt(tmp_path, monkeypatch, size, end, last):
    read_little(monkeypatch, size)
    texts = b"\xef\xbb\xbf\xef\xbb\xbfone" + end + b"\xef\xbb\xbftwo" + end * last
    assert [body_of(request)["messages"] for request in read(write(tmp_path / "rows.txt", texts))] == [
        *(user("\ufeffone"), user("\ufefftwo"))  # only the first mark is one
    ]
    lines = b"\xef\xbb\xbf" + end.join([b'{"prompt": "one"}', b'{"prompt": "two"}']) + end * last
    assert [body_of(request)["messages"] for request in read(write(tmp_path / "rows.jsonl", lines))] == [
        *(user("one"), user("two"))
    ]


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{text.__class__}",
        "{text[0]}",
        "{text!r}",
        "{text:>10}",
        "{text:{width}}",
        "{}",
        "{",
        "}",
        "{text",
        '{"a": 1} {text}',
    ],
)
def test_a_template_has_plain_fields_only(tmp_path, template):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(RequestError, match=r"write \{\{ and \}\} for braces"):
        batches(expand([path])[0], Recipe("m", template=template))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("m", params={"messages": []}), "'messages' cannot be a parameter"),
        (Recipe("m", params={"seed": float("nan")}), "NaN or Infinity"),
        (Recipe("m", params={"seed": object()}), "cannot be sent"),
        (Recipe("m", system="\ud800"), "half of a surrogate pair"),
        (Recipe("m", template="\ud800"), "half of a surrogate pair"),
        (Recipe("\ud800"), "half of a surrogate pair"),
    ],
)
def test_settings_that_fit_no_row_are_refused_at_once(tmp_path, recipe, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(RequestError, match=message):
        batches(expand([path])[0], recipe)


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"messages": user("a")}])
def test_without_a_model_only_batch_rows_can_be_asked(tmp_path, row):
    for recipe in Recipe(), Recipe(""):
        with pytest.raises(RequestError, match="one with model"):
            requests_of(tmp_path, [row], recipe)
    named, without = requests_of(
        tmp_path, [batch_row("a", messages=user("a"), model="o"), batch_row("b", messages=user("a"))], Recipe()
    )
    assert body_of(named)["model"] == "o"
    assert "--model" in without.fault[1]
    with pytest.raises(RequestError, match="one with model"):
        read(write(tmp_path / "rows.txt", b"a\n"), Recipe())


def test_a_text_file_has_one_field(tmp_path):
    path = write(tmp_path / "rows.txt", b"{text}\n")
    with pytest.raises(RequestError, match=r"rows\.txt is text"):
        read(path, Recipe("m", template="{text}"))
    [request] = read(path, Recipe("m", template="Say {prompt}!"))
    assert body_of(request)["messages"] == user("Say {text}!")


# Files that break ---------------------------------------------------------------------------------------------------


def until_it_breaks(path):
    """(requests before, the error's text)."""
    requests = []
    with pytest.raises(RunError) as raised:
        requests.extend(itertools.chain.from_iterable(batches(expand([path])[0], RECIPE)))
    return requests, str(raised.value)


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.zst"])
def test_a_cut_file_gives_what_came_before(tmp_path, ending):
    draw = random.Random(0)
    rows = [{"prompt": draw.randbytes(50).hex()} for _ in range(3000)]
    path = write(tmp_path / f"rows.{ending}", jsonl(rows))
    whole = told(read(path))
    os.truncate(path, path.stat().st_size - 5000)
    requests, message = until_it_breaks(path)
    assert 1000 < len(requests) < 3000
    assert told(requests) == whole[: len(requests)]
    assert message.startswith(f"rows.{ending}: ")
    assert "What was asked before is kept" in message


def test_a_file_that_goes_away_is_named_without_its_folder(tmp_path):
    for name in "rows.jsonl", "rows.parquet":
        [shard] = expand([write(tmp_path / name, b"")])
        os.unlink(shard.uri)
        with pytest.raises(RunError, match=f"^{name}: No such file or directory"):
            list(batches(shard, RECIPE))


BATCH_BODY = {"model": "o", "messages": user("a"), "max_tokens": 5}
UNUSUAL = [
    {},
    {"custom_id": ""},
    {"custom_id": 7},
    {"method": "GET"},
    {"url": "/chat/completions"},
    {"url": "/v1/embeddings", "body": {"model": "e", "input": ["a"]}},
    {"url": "nowhere"},
    {"body": {**BATCH_BODY, "stream": True}},
    {"body": {**BATCH_BODY, "messages": []}},
    {"body": {**BATCH_BODY, "messages": [{"content": "a"}]}},
    {"body": {**BATCH_BODY, "model": None}},
    {"body": {"messages": user("é\u2028")}},
    {"body": 5},
    {"id": "other", "more": [1]},
]


@pytest.mark.parametrize("recipe", [RECIPE, Recipe(), Recipe("m", params={"temperature": 1, "model": "n"})])
def test_batch_rows_read_quickly_are_those_read_with_care(tmp_path, monkeypatch, recipe):
    rows = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/chat/completions", "body": BATCH_BODY} for n in range(60)
    ]
    rows = [{**row, **UNUSUAL[n % len(UNUSUAL)]} for n, row in enumerate(rows)]
    plain = [{"prompt": "plain"}] if recipe.model else []
    rows = [*rows, b"no json", *rows[:3], *plain, b'{"custom_id": "\xff"}', *rows[-2:]]
    quickly = [told(requests_of(tmp_path, rows, recipe, keep_rows=keep)) for keep in (False, True)]
    seen = [request.row for request in requests_of(tmp_path, rows, recipe, keep_rows=True)]
    monkeypatch.setattr(prompts._Reader, "_of_batch_line", lambda *_: None)
    assert [told(requests_of(tmp_path, rows, recipe))] * 2 == quickly
    assert [request.row for request in requests_of(tmp_path, rows, recipe, keep_rows=True)] == seen


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\nfour\n"])
def test_a_line_that_is_too_long_is_a_fault(tmp_path, monkeypatch, kind, end):
    """Whether it ends in the piece in which it gets too long, in a later one, with the file, or begins it."""
    monkeypatch.setattr(lines, "LONGEST_LINE", 2 << 20)
    small = (lambda text: text) if kind == "txt" else (lambda text: b'{"prompt": "%b"}' % text)
    long = [b"\xef\xbb\xbf" + b"a" * (3 << 20), small(b"one"), b"x" * ((2 << 20) + 5), small(b"two"), b"y" * (5 << 20)]
    content = b"\n".join(long) + (end.replace(b"four", small(b"four")))
    requests = read(write(tmp_path / f"rows.{kind}", content))
    faulty = [0, 2, 4]
    assert [request.index for request in requests if request.fault] == faulty
    assert len(requests) == (6 if b"four" in end else 5)
    for index in faulty:
        assert requests[index].fault == ("bad_row", f"rows.{kind}, line {index + 1}: over 2 MiB, which is no prompt")
    assert len({request.key for request in requests}) == len(requests)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "READ", 100_000)
        again = read(write(tmp_path / f"rows.{kind}", content))
    assert [request.key for request in again[1:]] == [request.key for request in requests[1:]]


@needs_proc
def test_a_line_without_an_end_takes_no_memory(tmp_path):
    """200 MB in one line; what is over 32 MiB is not kept."""
    script = (
        "import re\n"
        "def most():\n"  # not `ru_maxrss`, in which the process that has started this one counts, too
        "    with open('/proc/self/status') as file:\n"
        "        return int(re.search(r'VmHWM:\\s+(\\d+) kB', file.read())[1])\n"
        "from millstream.corpus.find import expand\n"
        "from millstream.client.bodies import Recipe\n"
        "from millstream.runs.ask.prompts import batches\n"
        "[shard] = expand(['-'])\n"
        "before = most()\n"
        "print(sum(len(batch) for batch in batches(shard, Recipe('m'))))\n"
        "print(most() - before)\n"
    )
    call = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with call.stdin:
        for _ in range(200):
            call.stdin.write(b"x" * 1_000_000)
        call.stdin.write(b'\n{"prompt": "last"}')
    with call.stdout:
        count, growth = map(int, call.stdout.read().split())
    assert (call.wait(), count) == (0, 2)
    assert 33_000 < growth < 120_000  # kB: the pieces, and once more as they are joined


# Parquet ------------------------------------------------------------------------------------------------------------


def test_columns_are_fields(tmp_path):
    path = tmp_path / "rows.parquet"
    messages = [user("a"), [{"role": "user", "content": "b", "name": "bob"}], None]
    pq.write_table(pa.table({"id": [7, None, 9], "messages": messages, "rest": [1, 2, 3]}), path)
    first, second, third = read(path)
    assert (first.id, second.id) == ("7", None)
    assert body_of(first)["messages"] == user("a")  # without the name that others have
    assert body_of(second)["messages"][0]["name"] == "bob"
    assert third.fault == (
        "bad_row",
        "rows.parquet, row 3: no 'prompt' or 'messages'; there are id, messages: give --template",
    )


def test_a_template_takes_columns_of_any_type(tmp_path):
    import datetime
    import decimal

    path = tmp_path / "rows.parquet"
    columns = {"day": [datetime.date(2024, 5, 1)], "price": [decimal.Decimal("1.50")], "n": [3], "none": [None]}
    pq.write_table(pa.table(columns), path)
    [request] = read(path, Recipe("m", template="{day} {price} {n}"))
    assert body_of(request)["messages"] == user("2024-05-01 1.50 3")
    [request] = read(path, Recipe("m", template="{none}"))
    assert "the field 'none' is null" in request.fault[1]


def test_columns_that_are_not_there_are_refused_at_once(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(RequestError, match=r"rows\.parquet has no column 'prompt' or 'messages'; it has text"):
        read(path)
    with pytest.raises(RequestError, match="no column 'other' for the template; it has text"):
        read(path, Recipe("m", template="{text} {other}"))


def test_a_bad_value_in_a_column_is_one_fault(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), path)
    first, second, third = read(path)
    assert (first.fault, third.fault) == (None, None)
    assert second.fault[1].startswith("rows.parquet, row 2: not valid UTF-8")


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    path = write(tmp_path / "rows.parquet", b"no Parquet at all")
    requests, message = until_it_breaks(path)
    assert requests == []
    assert message.startswith("rows.parquet: damaged or no Parquet")
    assert "this is not a parquet file. What was asked before is kept" in message


# Rows that are kept -------------------------------------------------------------------------------------------------


def test_rows_are_kept_as_they_were_read_if_they_are_wanted(tmp_path):
    lines = [
        b'{"n": 1.50, "prompt": "a"}\r',
        b' {"messages": [{"role": "user", "content": "a"}], "n": 1.50}',
        b'{"other": 1}',
        b"no json",
        b'{"prompt": "a", "score": NaN}',
        b'{"prompt": "a", "custom_id": "x"}',
        b'{"prompt": "b", "custom_id": "x"}',
    ]
    requests = requests_of(tmp_path, lines, keep_rows=True)
    assert [request.row for request in requests] == [
        *(lines[0].strip(), lines[1].strip(), lines[2], None, None, lines[5], lines[6])
    ]
    assert {request.row for request in requests_of(tmp_path, lines)} == {None}
    [request] = read(write(tmp_path / "rows.txt", b'say "a"\r\n'), keep_rows=True)
    assert json.loads(request.row) == {"prompt": 'say "a"'}
    pq.write_table(pa.table({"prompt": ["a"], "other": [1], "none": [None]}), tmp_path / "rows.parquet")
    [request] = read(tmp_path / "rows.parquet", keep_rows=True)
    assert json.loads(request.row) == {"prompt": "a", "other": 1, "none": None}


# Standard input -----------------------------------------------------------------------------------------------------


@contextmanager
def piped(monkeypatch):
    """A function that writes to our standard input, and a queue of what `batches` makes of it; None at the end."""
    out, into = os.pipe()
    with open(out, "rb") as reader, open(into, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reader))
        made = Queue()

        def read_all():
            for batch in batches(InputShard("-", "-", "jsonl"), RECIPE):
                made.put(batch)
            made.put(None)

        thread = threading.Thread(target=read_all)
        thread.start()
        try:
            yield writer, made
        finally:
            writer.close()
            thread.join()


def test_a_pipe_that_waits_is_answered_with_what_has_come(monkeypatch):
    with piped(monkeypatch) as (writer, made):
        writer.write(b'{"prompt": "one"}\n')
        [first] = made.get(timeout=PATIENCE)
        writer.write(b'{"prompt": "two"}\n{"prompt": "three"}\n{"pro')
        second, third = made.get(timeout=PATIENCE)
        writer.write(b'mpt": "four"}')
        writer.close()
        [fourth] = made.get(timeout=PATIENCE)
        assert made.get(timeout=PATIENCE) is None
    assert [body_of(request)["messages"] for request in (first, second, third, fourth)] == [
        *(user("one"), user("two"), user("three"), user("four"))
    ]
    assert [request.index for request in (first, second, third, fourth)] == [0, 1, 2, 3]


def test_standard_input_and_files_give_the_same_requests(tmp_path, monkeypatch):
    whole = told(requests_of(tmp_path, MIXED))
    with piped(monkeypatch) as (writer, made):
        for at in range(0, len(jsonl(MIXED)), 13):
            writer.write(jsonl(MIXED)[at : at + 13])
        writer.close()
        came = [request for batch in iter(made.get, None) for request in batch]
    renamed = [(*rest, fault and (fault[0], fault[1].replace("-, ", "rows.jsonl, ", 1))) for *rest, fault in told(came)]
    assert renamed == whole


def test_a_limit_does_not_wait_for_more(monkeypatch):
    out, into = os.pipe()
    with open(out, "rb") as reader, open(into, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reader))
        writer.write(b'{"prompt": "one"}\n{"prompt": "two"}\n')
        [batch] = batches(InputShard("-", "-", "jsonl"), RECIPE, limit=2)  # the pipe is still open
    assert len(batch) == 2


def test_gzip_of_several_members_is_one_file(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"".join(gzip.compress(jsonl([{"prompt": text}])) for text in "ab"))
    assert [body_of(request)["messages"] for request in read(tmp_path / "rows.jsonl.gz")] == [user("a"), user("b")]
