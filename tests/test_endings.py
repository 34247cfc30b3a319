"""Replies that are not whole: counted, asked again, kept out of a pipe. And the order of what is given."""

import json
import subprocess
import sys

import pytest
from runs import PATIENCE, without_progress
from test_asking import journalled, rows_of
from test_rows import prompts_in, settings_for
from wires import deciding_elsewhere, said

from millstream.errors import RequestError
from millstream.report import ask_summary
from millstream.runs.ask.asking import ask_to

CAPS = ("max_tokens", "max_completion_tokens")


class Server:
    """Cuts replies to prompts that end in "long" at fewer than 100 ids, and filters those that end in "bad"."""

    def __init__(self, url=""):
        self.url = url
        self.asked = []  # (prompt, limit of ids)

    def decide(self, body, number):
        prompt = body["messages"][-1]["content"]
        cap = next((body[name] for name in CAPS if name in body), None)
        self.asked.append((prompt, cap))
        finish = "length" if prompt.endswith("long") and cap is not None and cap < 100 else "stop"
        if prompt.endswith("bad"):
            finish = "content_filter"
        text = None if prompt.startswith("thinking") and finish == "length" else f"{prompt} {cap}"
        return 200, said(text, finish_reason=finish)

    def news(self):
        found, self.asked = sorted(self.asked), []
        return found


@pytest.fixture
def server():
    found = Server()
    with deciding_elsewhere(found.decide) as found.url:
        yield found


PROMPTS = ["a", "b long", "c", "d long", "e bad"]


@pytest.fixture
def asking(tmp_path, server):
    """asking(max_tokens, **settings) -> the report and the texts of the rows."""

    def ask(cap=None, prompts=None, out="out.jsonl", on_note=None, **more):
        file = prompts or prompts_in(tmp_path, PROMPTS)
        params = {**more.pop("params", {}), **({} if cap is None else {"max_tokens": cap})}
        path = str(tmp_path / out)
        report = ask_to(path, file, settings_for(server.url, params=params, **more), on_note=on_note)
        return report, [row.get("text", row.get("fault", {}).get("kind")) for row in rows_of(path)]

    return ask


def test_cut_and_filtered_replies_are_counted_and_asked_again_with_another_limit(asking, server, tmp_path):
    report, texts = asking(10)
    assert texts == ["a 10", "b long 10", "c 10", "d long 10", "e bad 10"]
    assert (report.endings, len(server.news())) == ({"length": 2, "content_filter": 1}, 5)
    report, _ = asking(10)
    assert (report.endings, server.news()) == ({"length": 2, "content_filter": 1}, [])

    mended = ["a 10", "b long 100", "c 10", "d long 100", "e bad 10"]
    report, texts = asking(100, retry_finish=["length"])
    assert server.news() == [("b long", 100), ("d long", 100)]
    assert (texts, report.again, report.endings) == (mended, 3, {"content_filter": 1})
    for more in ({"cap": 100, "retry_finish": ["length"]}, {"cap": 10}, {"cap": 100}):  # as it is, as before, at last
        assert (asking(**more)[1], server.news()) == (mended, [])

    report, texts = asking(200, retry_finish=["content_filter"])
    assert (server.news(), texts[-1]) == ([("e bad", 200)], "e bad 200")
    asking(50)  # a run of its own
    assert len(server.news()) == 5


def test_a_limit_of_another_name_and_none_at_all(asking, server):
    asking(10)
    server.news()
    asking(params={"max_completion_tokens": 20}, retry_finish=["length"])
    assert server.news() == [("b long", 20), ("d long", 20)]
    asking(retry_finish=["length"])
    assert server.news() == [("b long", None), ("d long", None)]
    asking(10)
    asking(params={"max_completion_tokens": 20})
    asking()
    assert server.news() == []


@pytest.mark.parametrize("kind", ["equal", "template", "batch", "row params"])
def test_prompts_of_every_shape_are_found_under_the_earlier_limit(asking, server, tmp_path, kind):
    def batch(number, **body):
        messages = [{"role": "user", "content": f"{number} long"}]
        url = "/v1/chat/completions"
        return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"messages": messages, **body}}

    rows, more = {
        "equal": ([{"prompt": "x long"}] * 3 + [{"prompt": "y"}], {}),
        "template": ([{"a": {"z": 1, "b": n}} for n in range(3)], {"template": "{a} long"}),
        "batch": ([batch(1), batch(2, max_tokens=20), batch(3)], {}),
        "row params": ([{"prompt": "x long", "max_tokens": 20}, {"prompt": "y"}], {"row_params": ["max_tokens"]}),
    }[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asking(10, str(path), **more)
    first = server.news()
    cut = [(prompt, 100) for prompt, _ in first if prompt.endswith("long")]
    _, texts = asking(100, str(path), retry_finish=["length"], **more)
    assert server.news() == cut
    _, again = asking(100, str(path), retry_finish=["length"], **more)
    assert (again, server.news()) == (texts, [])
    assert sum(text.endswith("long 100") for text in texts) == len(cut) > 0


def test_faults_of_a_reply_that_was_all_thought_are_asked_again_too(asking, server, tmp_path):
    prompts = prompts_in(tmp_path, ["thinking long", "a"])
    _, texts = asking(10, prompts)
    assert texts == ["length", "a 10"]
    server.news()
    assert asking(100, prompts, retry_finish=["length"])[1] == ["thinking long 100", "a 10"]
    assert server.news() == [("thinking long", 100)]


def test_rows_that_do_not_tell_how_they_ended_are_not_asked_again_and_that_is_told(asking, server, tmp_path):
    asking(10)
    journal = tmp_path / "out.jsonl.run" / "journal.jsonl"
    header, *lines = map(json.loads, journal.read_text().splitlines())
    for line in lines[:2]:
        del line["finish_reason"]
    journal.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in [header, *lines]))
    server.news()
    report, _ = asking(10, retry_finish=["length", "content_filter"])
    asked = len(server.news())
    assert report.endings["unknown"] == 2
    assert asked == sum(line["finish_reason"] != "stop" for line in lines[2:])
    assert "2 rows of an older journal do not tell how they ended: not asked again" in ask_summary(report)


def test_asking_again_needs_the_settings_of_before(asking, server):
    asking(10)
    server.news()
    with pytest.raises(RequestError, match="only the limit of ids may differ"):
        asking(100, retry_finish=["length"], params={"temperature": 1})
    with pytest.raises(RequestError, match="another system"):
        asking(100, retry_finish=["length"], system="Be brief.")
    with pytest.raises(RequestError, match="row params"):
        asking(100, retry_finish=["length"], row_params=["seed"])
    with pytest.raises(RequestError, match="retry_finish takes"):
        asking(100, retry_finish=["cut"])
    assert server.news() == []


def test_new_prompts_may_stand_in_front_of_those_asked_again(asking, server, tmp_path):
    asking(10)
    server.news()
    prompts = prompts_in(tmp_path, [*(f"new {n}" for n in range(100)), *PROMPTS])
    report, _ = asking(100, prompts, retry_finish=["length"])
    assert len(server.news()) == 102
    assert report.again == 3


def test_a_journal_without_headers_is_asked_again_only_as_far_as_it_is_known(asking, server, tmp_path):
    asking(10)
    journal = tmp_path / "out.jsonl.run" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))
    server.news()
    with pytest.raises(RequestError, match="too old to tell its own"):
        asking(100, retry_finish=["length"])
    asking(10)  # now it has a header
    assert server.news() == []
    asking(100, retry_finish=["length"])
    assert server.news() == [("b long", 100), ("d long", 100)]


def test_the_whole_reply_is_kept_on_request(asking, server, tmp_path):
    asking(10, keep_body=True)
    for row in rows_of(tmp_path / "out.jsonl"):
        assert row["body"] == said(row["text"], finish_reason=row["finish_reason"])


def test_a_reply_that_is_asked_again_in_vain_stays(tmp_path):
    broken = []

    def decide(body, number):
        if broken:
            return 400, {"error": {"message": "This prompt is too odd.", "code": "content_filter"}}
        return 200, said("half of it", finish_reason="length")

    out, prompts = str(tmp_path / "out.jsonl"), prompts_in(tmp_path, ["a", "b"])
    with deciding_elsewhere(decide) as url:
        ask_to(out, prompts, settings_for(url))
        broken.append(True)
        report = ask_to(out, prompts, settings_for(url, retry_finish=["length"]))
        assert (report.replies, report.faults, report.endings, report.in_vain) == (2, {}, {"length": 2}, 2)
        assert "2 replies asked again, but kept, such as:" in ask_summary(report)
        assert "too odd" in ask_summary(report)
        assert [row["text"] for row in rows_of(out)] == ["half of it"] * 2
        assert ask_to(out, prompts, settings_for(url)).again == 2
        broken.clear()
        assert ask_to(out, prompts, settings_for(url, retry_finish=["length"])).in_vain == 0


def test_replies_that_were_to_be_asked_again_stay_when_the_run_stops(asking, server):
    asking(10)
    server.news()
    report, texts = asking(100, retry_finish=["length"], price=(1.0, 1.0), max_cost=0.0)
    assert (report.stopped, server.news()) == ("too dear", [])
    assert texts == ["a 10", "b long 10", "c 10", "d long 10", "e bad 10"]


# Order --------------------------------------------------------------------------------------------------------------


def schema(*names):
    properties = {name: {"type": "string"} for name in names}
    return {"type": "object", "properties": properties}


TOOL = {"type": "function", "function": {"name": "f", "parameters": schema("reasoning", "answer")}}


def test_another_order_is_told_and_wants_a_decision(asking, server):
    params = {"tools": [TOOL], "temperature": 0}
    asking(params=params)
    other = {**TOOL["function"], "parameters": schema("answer", "reasoning")}
    turned = {"temperature": 0, "tools": [{**TOOL, "function": other}]}
    server.news()
    with pytest.raises(RequestError, match=r"tools: .* another order .*--reuse"):
        asking(params=turned)
    assert asking(params=dict(reversed(params.items())))[0].again == 5  # the order of parameters says nothing
    assert asking(params=turned, reuse=True)[0].again == 5
    assert asking(params=turned)[0].again == 5  # it was decided
    assert server.news() == []
    with pytest.raises(RequestError, match="another order"):
        asking(50, params=params, retry_finish=["length"])  # other limits, and found all the same
    asking(params=turned, out="other.jsonl")
    assert len(server.news()) == 5


def test_journals_from_before_headers_were_asked_in_sorted_order(asking, server, tmp_path):
    asking(params={"tools": [TOOL]})
    journal = tmp_path / "out.jsonl.run" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(RequestError, match=r"tools: .* another order"):
        asking(params={"tools": [TOOL]})
    server.news()
    assert asking(params={"tools": [TOOL]}, reuse=True)[0].again == 5
    assert server.news() == []


# The command --------------------------------------------------------------------------------------------------------


def command(server, prompts, *more):
    call = [sys.executable, "-m", "millstream", "ask", prompts, "--model", "m", "--base-url", server.url, *more]
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
    done.stderr = without_progress(done.stderr)
    return done


def test_a_pipe_gets_whole_replies_only_unless_told_otherwise(server, tmp_path):
    prompts = prompts_in(tmp_path, PROMPTS)
    done = command(server, prompts, "--out", "-", "--max-tokens", "10")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["a", "c"]
    assert "2 cut by the token limit, 1 filtered" in done.stderr
    assert "3 of these left out" in done.stderr
    assert "--retry-finish" not in done.stderr  # nothing is kept that could be asked again
    assert done.returncode == 3
    done = command(server, prompts, "--out", "-", "--max-tokens", "10", "--all-replies")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == PROMPTS
    assert done.returncode == 0
    done = command(server, prompts, "--out", str(tmp_path / "out.jsonl"), "--max-tokens", "10")
    assert "--retry-finish length" in done.stdout
    assert done.returncode == 0
    again = ["--max-tokens", "100", "--retry-finish", "length"]
    done = command(server, prompts, "--out", str(tmp_path / "out.jsonl"), *again)
    assert "1 filtered" in done.stdout
    assert "cut" not in done.stdout


def test_parameters_beside_the_prompt_are_told_once_or_sent(server, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} long", "max_tokens": 100 + n}) + "\n" for n in range(5)))
    done = command(server, str(path), "--out", str(tmp_path / "one.jsonl"))
    assert done.stderr.count("--row-params max_tokens") == 1
    assert {cap for _, cap in server.news()} == {None}
    done = command(server, str(path), "--out", str(tmp_path / "two.jsonl"), "--row-params", "max_tokens, seed")
    assert done.stderr == ""
    assert [cap for _, cap in server.news()] == [100, 101, 102, 103, 104]
    assert journalled(str(tmp_path / "two.jsonl")) == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--row-params", "messages"], "'messages' cannot be a parameter"),
        (["--retry-finish", "cut"], "--retry-finish takes length"),
        (["--param", "stream=true"], "'stream' cannot be a parameter"),
        (["--all-replies"], "--all-replies is for --out -"),
    ],
)
def test_wrong_flags_are_one_line(server, tmp_path, flags, said):
    done = command(server, prompts_in(tmp_path, ["a"]), "--out", str(tmp_path / "out.jsonl"), *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--retry-faults"], ["--retry-finish", "length"], ["--reuse"]])
def test_a_pipe_without_a_journal_has_no_earlier_run_to_go_on_from(server, tmp_path, flags):
    prompts = prompts_in(tmp_path, ["a"])
    done = command(server, prompts, "--out", "-", *flags)
    assert (done.returncode, done.stdout, server.news()) == (2, "", [])
    assert f"{flags[0]} goes on from an earlier run: with --out -, say with --journal" in done.stderr
    assert command(server, prompts, "--out", "-", "--journal", str(tmp_path / "kept"), *flags).returncode == 0


# With a schema, and at other endpoints ------------------------------------------------------------------------------

ANSWER = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_json_that_was_cut_is_paid_once_and_asked_again_on_request(tmp_path, finish):
    asked = []

    def decide(body, number):
        asked.append(body["max_tokens"])
        whole = body["max_tokens"] >= 100
        return 200, said('{"answer": "yes"}' if whole else '{"ans', finish_reason="stop" if whole else finish)

    out, prompts = str(tmp_path / "out.jsonl"), prompts_in(tmp_path, ["a", "b", "c"])
    with deciding_elsewhere(decide) as url:
        report = ask_to(out, prompts, settings_for(url, schema=ANSWER, params={"max_tokens": 10}))
        assert (report.faults, asked) == ({finish: 3}, [10] * 3)
        again = settings_for(url, schema=ANSWER, params={"max_tokens": 100}, retry_finish=[finish])
        assert ask_to(out, prompts, again).faults == {}
        assert asked[3:] == [100] * 3
    assert [row["text"] for row in rows_of(out)] == ['{"answer": "yes"}'] * 3


def test_a_refusal_and_a_call_need_not_fit_a_schema(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"content": None, "refusal": "I will not."}, {"content": None, "tool_calls": [call]}]

    def decide(body, number):
        return 200, said(message={"role": "assistant", **messages[number]})

    with deciding_elsewhere(decide) as url:
        settings = settings_for(url, schema=ANSWER, in_flight=1)
        report = ask_to(str(tmp_path / "out.jsonl"), prompts_in(tmp_path, ["a", "b"]), settings)
    assert (report.faults, report.endings) == ({}, {"refusal": 1})


def test_replies_of_responses_that_are_not_complete_count_as_cut(tmp_path):
    def decide(body, number):
        details = {"reason": "max_output_tokens"} if body["max_output_tokens"] < 100 else None
        return 200, {"status": "incomplete" if details else "completed", "incomplete_details": details, "output": []}

    row = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "x", "max_output_tokens": 10}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    out, prompts = str(tmp_path / "out.jsonl"), str(tmp_path / "rows.jsonl")
    with deciding_elsewhere(decide) as url:
        assert ask_to(out, prompts, settings_for(url)).endings == {"length": 1}
        again = settings_for(url, params={"max_output_tokens": 500}, retry_finish=["length"])
        assert ask_to(out, prompts, again).endings == {}
    assert rows_of(out)[0]["body"]["status"] == "completed"
