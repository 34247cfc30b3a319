"""What a row tells of a reply: how it ended, what was thought, refused and called; and that nothing is made up."""

import json

import pytest
from test_asking import rows_of
from wires import choosing, deciding_elsewhere, said

from millstream.errors import RequestError
from millstream.runs.ask.asking import ask_to
from millstream.runs.ask.endings import CUT, FILTERED, REFUSED, UNKNOWN, WHOLE, checked_endings, ending_of
from millstream.runs.ask.settings import AskSettings

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x":1}'}}
MESSAGES = {
    "plain": said("Paris"),
    "cut": said("Par", finish_reason="length"),
    "filtered": said("P", finish_reason="content_filter"),
    "refused": said(None, message={"role": "assistant", "content": None, "refusal": "I will not."}),
    "called": said(
        None, message={"role": "assistant", "content": None, "tool_calls": [CALL]}, finish_reason="tool_calls"
    ),
    "thought": said("4", message={"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}),
    "silent": said("yes", finish_reason=None),
    "three": choosing([("a", "stop"), ("b", "length"), ("c", "stop")]),
}
"""Prompt -> the body of the reply."""


def by_prompt(body, number):
    return 200, MESSAGES[body["messages"][-1]["content"]]


def settings_for(url, **more):
    return AskSettings(**{"model": "m", "base_urls": [url], "in_flight": 4, "ordered": True, **more})


def prompts_in(folder, names):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": name}) + "\n" for name in names))
    return str(path)


@pytest.fixture
def asked(tmp_path):
    """asked(**settings) -> the rows by prompt; the second time they come from the journal."""
    with deciding_elsewhere(by_prompt) as url:

        def ask(out="out.jsonl", **more):
            path = tmp_path / out
            ask_to(str(path), prompts_in(tmp_path, MESSAGES), settings_for(url, **more))
            rows = rows_of(path)
            return dict(zip(MESSAGES, rows, strict=True))

        yield ask


def test_rows_tell_how_replies_ended_and_all_that_was_said(asked):
    for rows in asked(), asked():
        told = {name: (row["text"], row["finish_reason"]) for name, row in rows.items()}
        assert told == {
            "plain": ("Paris", "stop"),
            "cut": ("Par", "length"),
            "filtered": ("P", "content_filter"),
            "refused": ("I will not.", "stop"),
            "called": ("", "tool_calls"),
            "thought": ("4", "stop"),
            "silent": ("yes", None),
            "three": ("a", "stop"),
        }
        assert rows["refused"]["refusal"] == "I will not."
        assert rows["called"]["tool_calls"] == [CALL]
        assert rows["thought"]["reasoning"] == "2 and 2"
        assert rows["three"]["texts"] == ["a", "b", "c"]
        assert rows["three"]["finish_reasons"] == ["stop", "length", "stop"]
        assert not set(rows["plain"]) & {"refusal", "tool_calls", "reasoning", "texts", "finish_reasons", "body"}


@pytest.mark.parametrize("first", ["rows", "batch"])
def test_batch_lines_make_nothing_up(asked, tmp_path, first):
    if first == "rows":
        asked()  # the journal has no bodies
    rows = asked(batch_format=True)
    choices = {name: row["response"]["body"]["choices"] for name, row in rows.items()}
    finishes = {name: [choice["finish_reason"] for choice in choices[name]] for name in choices}
    assert finishes == {
        "plain": ["stop"],
        "cut": ["length"],
        "filtered": ["content_filter"],
        "refused": ["stop"],
        "called": ["tool_calls"],
        "thought": ["stop"],
        "silent": [None],
        "three": ["stop", "length", "stop"],
    }
    assert choices["refused"][0]["message"]["refusal"] == "I will not."
    assert choices["refused"][0]["message"]["content"] is None
    assert choices["called"][0]["message"]["tool_calls"] == [CALL]
    assert [choice["message"]["content"] for choice in choices["three"]] == ["a", "b", "c"]


def test_a_row_of_an_older_journal_has_no_end_that_could_be_told(asked, tmp_path):
    asked()
    journal = tmp_path / "out.jsonl.run" / "journal.jsonl"
    header, *lines = map(json.loads, journal.read_text().splitlines())
    for line in lines:
        line.pop("finish_reason")
    journal.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in [header, *lines]))
    rows = asked(batch_format=True)
    assert [row["response"]["body"]["choices"][0]["finish_reason"] for row in rows.values()] == [None] * len(MESSAGES)


def row(text="yes", **more):
    return json.dumps(
        {"id": '",finish_reason":"length"', "index": 0, "text": text, **more}, separators=(",", ":")
    ).encode()


@pytest.mark.parametrize(
    ("data", "ending"),
    [
        (row(finish_reason="stop", usage={}), WHOLE),
        (row(finish_reason="tool_calls", usage={}), WHOLE),
        (row(finish_reason=None, usage={}), WHOLE),
        (row(finish_reason="length", usage={}), CUT),
        (row(finish_reason="max_tokens", usage={}), CUT),
        (row(finish_reason="content_filter", usage={}), FILTERED),
        (row(finish_reason="stop", refusal="no", usage={}), REFUSED),
        (row(finish_reason="stop", texts=["a", "b"], finish_reasons=["stop", "length"], usage={}), CUT),
        (row(finish_reason="stop", texts=["a", "b"], finish_reasons=["stop", "stop"], usage={}), WHOLE),
        (row(finish_reason="stop", usage={}, body={"choices": [{"index": 0, "finish_reason": "length"}]}), WHOLE),
        (row(',"finish_reason":"length"', finish_reason="stop", usage={}), WHOLE),
        (row(usage={}), UNKNOWN),
    ],
)
def test_the_ending_of_a_row(data, ending):
    assert ending_of(data) == ending


def test_endings_have_names():
    assert checked_endings(["length", "refusal"]) == {CUT, REFUSED}
    with pytest.raises(RequestError, match="content_filter"):
        checked_endings(["long"])
