"""One prompt's refusal is that prompt's; what every other request would share stops the run."""

import json

import pytest
import virtual
from scripted import Scripted, asking, error, rows_of
from test_asking import journalled

from millstream.aio import Fault
from millstream.client.client import Client, Reply
from millstream.errors import AskStopped, RequestError, RunError

CONTEXT = error(400, "This model's maximum context length is 4096 tokens.", code="context_length_exceeded")
OWN = {
    "context": CONTEXT,
    "azure": error(400, "The response was filtered", code="content_filter", param="prompt"),
    "string": error(400, "Invalid 'messages[0].content'", code="string_above_max_length"),
    "null": error(400, "Invalid value for 'content': expected a string, got null.", param="messages.[0].content"),
    "moderation": error(403, "Your input was flagged for 'violence'", code=403),
    "firewall": (403, b"<html><title>Attention Required! | Cloudflare</title></html>", {}),
    "image": error(404, "No endpoints found that support image input", code=404),
    "credits": error(402, "This request requires more credits, or fewer max_tokens.", code=402),
    "unsure": error(400, "no"),
    "413": (413, b"", {}),
}
KEY = error(401, "Incorrect API key provided.", code="invalid_api_key")
MODEL = error(404, "The model `m` does not exist.", code="model_not_found")
FORBIDDEN = error(403, "You are not allowed to do this.")
CREDITS = error(402, "Insufficient credits")
MONEY = {
    "quota": error(429, code="insufficient_quota"),
    "billing": error(429, code="billing_not_active", type="billing_not_active"),
    "kimi": error(429, type="exceeded_current_quota_error"),
    "limit": error(400, code="billing_hard_limit_reached"),
    "balance": error(400, "Your credit balance is too low to access the API."),
}


def refusing(said, *numbers):
    """A server that says so to these questions."""
    texts = {f"question {number}" for number in numbers}
    return lambda time, text, which: said if text in texts else None


@pytest.mark.parametrize("said", OWN)
@pytest.mark.parametrize("ordered", [False, True])
def test_two_refusals_at_the_front_stop_nothing(monkeypatch, tmp_path, said, ordered):
    report, wire, _ = asking(monkeypatch, tmp_path, refusing(OWN[said], 0, 1), ordered=ordered)
    assert (report.replies, sum(report.faults.values())) == (198, 2)
    assert {row["index"] for row in rows_of(tmp_path) if "fault" in row} == {0, 1}
    assert set(wire.asked.values()) == {1}


@pytest.mark.parametrize("said", [(500, b"", {}), (408, b"", {})])
def test_two_prompts_at_the_front_that_a_server_fails_on_do_not(monkeypatch, tmp_path, said):
    report, wire, _ = asking(monkeypatch, tmp_path, refusing(said, 0, 1))
    assert (report.replies, sum(report.faults.values())) == (198, 2)
    assert wire.asked["question 0"] == wire.asked["question 1"] == 5


@pytest.mark.parametrize("said", ["context", "azure", "string", "null", "moderation", "image", "413"])
def test_thirty_of_them_do_not_either(monkeypatch, tmp_path, said):
    report, *_ = asking(monkeypatch, tmp_path, refusing(OWN[said], *range(30)))
    assert (report.replies, sum(report.faults.values())) == (170, 30)


@pytest.mark.parametrize("said", ["context", "azure", "string", "null", "image", "413"])
def test_a_setting_that_is_too_large_for_every_row_does(monkeypatch, tmp_path, said):
    with pytest.raises(RunError, match="the first requests all ended this way"):
        asking(monkeypatch, tmp_path, lambda *_: OWN[said])
    assert journalled(tmp_path / "out.jsonl") == 0
    report, *_ = asking(monkeypatch, tmp_path, lambda *_: None)
    assert report.replies == 200


@pytest.mark.parametrize(("said", "most"), [("unsure", 5), ("firewall", 9), ("credits", 4)])
def test_a_few_are_enough_where_nobody_says_that_it_is_the_prompt(monkeypatch, tmp_path, said, most):
    wire = Scripted(lambda *_: OWN[said])
    with pytest.raises(RunError, match=r"Stopped: "):
        asking(monkeypatch, tmp_path, wire)
    assert sum(wire.asked.values()) <= most
    assert journalled(tmp_path / "out.jsonl") == 0


def test_a_few_prompts_that_are_all_refused_are_faults(monkeypatch, tmp_path):
    report, *_ = asking(monkeypatch, tmp_path, lambda *_: CONTEXT, count=10)
    assert report.faults == {"too_large": 10}


@pytest.mark.parametrize("said", [KEY, MODEL, FORBIDDEN])
def test_a_key_or_a_model_that_is_wrong_from_the_start_is_one_message(monkeypatch, tmp_path, said):
    wire = Scripted(lambda *_: said)
    with pytest.raises(RunError, match=r"HTTP 40[134]: .* Stopped: "):
        asking(monkeypatch, tmp_path, wire)
    assert sum(wire.asked.values()) <= 4
    assert journalled(tmp_path / "out.jsonl") == 0


@pytest.mark.parametrize("said", [KEY, MODEL, FORBIDDEN, OWN["firewall"]])
@pytest.mark.parametrize("ordered", [False, True])
def test_after_a_reply_it_takes_eight_in_a_row(monkeypatch, tmp_path, said, ordered):
    report, *_ = asking(monkeypatch, tmp_path, refusing(said, 50, *range(60, 67)), in_flight=1, ordered=ordered)
    assert (report.replies, sum(report.faults.values())) == (192, 8)
    with pytest.raises(RunError, match="8 requests in a row ended this way"):
        asking(monkeypatch, tmp_path, refusing(said, *range(60, 68)), in_flight=1, ordered=ordered, out="other.jsonl")
    assert journalled(tmp_path / "other.jsonl") == 60
    again, *_ = asking(monkeypatch, tmp_path, lambda *_: None, out="other.jsonl")
    assert (again.replies, again.again, again.faults) == (200, 60, {})


@pytest.mark.parametrize("said", [KEY, FORBIDDEN])
def test_answers_of_an_earlier_run_count(monkeypatch, tmp_path, said):
    asking(monkeypatch, tmp_path, lambda *_: None, limit=10)
    report, *_ = asking(monkeypatch, tmp_path, refusing(said, *range(10, 17)), in_flight=1)
    assert (report.replies, sum(report.faults.values())) == (193, 7)


def test_payment_required_takes_three(monkeypatch, tmp_path):
    report, *_ = asking(monkeypatch, tmp_path, refusing(CREDITS, 50, 60, 61), in_flight=1)
    assert (report.replies, report.faults) == (197, {"quota": 3})
    with pytest.raises(RunError, match="3 requests in a row ended this way"):
        asking(monkeypatch, tmp_path, refusing(CREDITS, 60, 61, 62), in_flight=1, out="other.jsonl")
    assert journalled(tmp_path / "other.jsonl") == 60


@pytest.mark.parametrize("money", MONEY)
def test_no_money_stops_it_at_once(monkeypatch, tmp_path, money):
    with pytest.raises(RunError, match=r"the account has no quota left\. Stopped: every other request"):
        asking(monkeypatch, tmp_path, refusing(MONEY[money], 50), in_flight=1)
    assert journalled(tmp_path / "out.jsonl") == 50


@pytest.mark.parametrize("said", [error(498), error(400, "Failed to generate JSON", code="json_validate_failed")])
def test_what_is_worth_another_attempt_gets_one(monkeypatch, tmp_path, said):
    report, wire, _ = asking(monkeypatch, tmp_path, lambda time, text, which: said if which < 3 else None, count=40)
    assert (report.replies, report.faults) == (40, {})
    assert set(wire.asked.values()) == {3}


TYPO = [{"id": str(number), "text": f"text {number}"} for number in range(500)]


def typing(monkeypatch, tmp_path, rows, template, name="typed.jsonl", **settings):
    """Ask rows with a template."""
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    wire = Scripted(lambda *_: None)
    monkeypatch.setattr("millstream.client.client._wire", lambda *_, **__: wire)
    monkeypatch.setattr("millstream.runs.ask.asking.run", lambda main, **_: virtual.run(main))
    from millstream.runs.ask.asking import AskSettings, ask_to

    asked = AskSettings(model="m", base_urls=[wire.base_url], template=template, **settings)
    return ask_to(str(tmp_path / "out.jsonl"), str(tmp_path / name), asked), wire


@pytest.mark.parametrize("ordered", [False, True])
def test_a_template_that_no_row_fits_is_one_message(monkeypatch, tmp_path, ordered):
    with pytest.raises(RequestError, match=r"typed.jsonl, line 1: .*'txet'.* Stopped: the first 32 rows all"):
        typing(monkeypatch, tmp_path, TYPO, "Summarise: {txet}", ordered=ordered)
    assert journalled(tmp_path / "out.jsonl") == 0
    report, _ = typing(monkeypatch, tmp_path, TYPO, "Summarise: {text}", ordered=ordered)
    assert (report.replies, report.again) == (500, 0)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("good", [0, 3, 31])
def test_one_row_that_fits_is_enough(monkeypatch, tmp_path, good, ordered):
    rows = [row if number == good else {"id": row["id"]} for number, row in enumerate(TYPO)]
    report, _ = typing(monkeypatch, tmp_path, rows, "{text}", ordered=ordered)
    assert (report.replies, report.faults) == (1, {"bad_row": 499})
    assert not ordered or [row["index"] for row in rows_of(tmp_path)] == list(range(500))


def test_rows_that_are_bad_each_in_its_way_are_faults(monkeypatch, tmp_path):
    rows = [{"messages": "none"} if number % 2 else [] for number in range(50)]
    report, _ = typing(monkeypatch, tmp_path, rows, None)
    assert report.faults == {"bad_row": 50}


def test_a_few_rows_that_are_all_bad_are_faults(monkeypatch, tmp_path):
    report, _ = typing(monkeypatch, tmp_path, TYPO[:31], "{txet}")
    assert report.faults == {"bad_row": 31}


def test_in_python_one_refusal_is_a_fault_and_a_wrong_key_stops_it(monkeypatch):
    async def main(handle):
        monkeypatch.setattr("millstream.client.client._wire", lambda *_, **__: Scripted(handle))
        async with Client("http://127.0.0.1:1", model="m", in_flight=1) as client:
            return await client.gather([f"question {number}" for number in range(40)])

    for said in (OWN["moderation"], OWN["firewall"], OWN["image"], OWN["credits"]):
        outcomes = virtual.run(main(refusing(said, 0, 20)))
        assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Fault)] == [0, 20]
    outcomes = virtual.run(main(refusing(KEY, 20)))
    assert sum(isinstance(outcome, Reply) for outcome in outcomes) == 39
    with pytest.raises(AskStopped, match="8 requests in a row") as stopped:
        virtual.run(main(refusing(KEY, *range(20, 30))))
    assert len(stopped.value.outcomes) == 28
    with pytest.raises(AskStopped, match="every other request"):
        virtual.run(main(lambda *_: KEY))
