"""OpenAI's Batch format: requests are split and joined again with what came back, and nothing is lost on the way."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import runs
from helpers import cli, jsonl, read_little, run_here, without_fsync, write, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.corpus.sources import InputShard
from millstream.errors import DataError, RequestError
from millstream.llm.batch import (
    failure_row,
    is_request,
    output_row,
    parse_line,
    parse_request,
    read_outcome,
    render_line,
    request_row,
)
from millstream.runs.batch.custom_ids import CustomIds
from millstream.runs.batch.joining import merge, retry_failed
from millstream.runs.batch.splitting import split
from millstream.store import at

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def request(custom_id, model="m", url=CHAT, **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **body}}


def success(custom_id, text="fine"):
    body = {"choices": [{"message": {"content": text}}], "error": None}
    return output_row(custom_id, name=f"batch_req_{text}", body=body)


FAILURES = {
    "openai": lambda i: {
        "id": "batch_req_1",
        "custom_id": i,
        "response": {
            "status_code": 429,
            "request_id": "r",
            "body": {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limited"}},
        },
        "error": None,
    },
    "openai_expired": lambda i: {
        "id": "batch_req_1",
        "custom_id": i,
        "response": None,
        "error": {"code": "batch_expired", "message": "not done in time"},
    },
    "vllm_text": lambda i: {
        "id": "vllm-1",
        "custom_id": i,
        "response": {"status_code": 400, "request_id": "vllm-batch-1"},
        "error": "too long",
    },
    "vllm_object": lambda i: {
        "id": "vllm-1",
        "custom_id": i,
        "response": {"status_code": 400, "request_id": "vllm-batch-1", "body": None},
        "error": {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}},
    },
    "ours_http": lambda i: output_row(i, name="b", status=503, error={"code": "server_error", "message": "down"}),
    "ours_timeout": lambda i: output_row(i, name="b", error={"code": "timeout", "message": "after 5 s"}),
    "bare": lambda i: {"custom_id": i},
}
CODES = {
    "openai": ("rate_limited", "slow down"),
    "openai_expired": ("batch_expired", "not done in time"),
    "vllm_text": ("http_400", "too long"),
    "vllm_object": ("BadRequestError", "too long"),
    "ours_http": ("server_error", "down"),
    "ours_timeout": ("timeout", "after 5 s"),
    "bare": ("no_response", "there is no response"),
}


@pytest.fixture
def run(monkeypatch, capfd):
    return run_here(monkeypatch, capfd, "batch")


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- rows ------------------------------------------------------------------


@given(st.text(min_size=1, max_size=64).filter(lambda text: text.isprintable()), st.sampled_from([CHAT, TEXT]))
def test_a_request_written_is_read_again(custom_id, url):
    body = {"model": "m", "messages": [{"role": "user", "content": custom_id}]}
    row = parse_line(render_line(request_row(custom_id, body, url.removeprefix("/v1"))))
    assert is_request(row)
    assert row == {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    assert parse_request(row) == (custom_id, url.removeprefix("/v1"), body)


@pytest.mark.parametrize("length", [0, 65])
def test_a_custom_id_is_written_with_1_to_64_characters(length):
    with pytest.raises(ValueError, match=f"has {length}$"):
        request_row("x" * length, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"custom_id": None}, "'custom_id' is not text but NoneType"),
        ({"custom_id": 7}, "'custom_id' is not text but int"),
        ({"custom_id": ""}, "'custom_id' is empty"),
        ({"custom_id": "\ud800"}, "surrogate"),
        ({"method": "GET"}, "'method' is 'GET'; a batch takes POST only"),
        ({"url": None}, "'url' is None"),
        ({"url": "chat"}, "'url' is 'chat'; it is a path"),
        ({"body": [1]}, "'body' is not an object but list"),
        ({"body": {"stream": True}}, "'stream'"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_what_is_no_request_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        parse_request({**request("a"), **change})


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_what_is_missing_in_a_request_is_named(name):
    row = request("a")
    del row[name]
    with pytest.raises(ValueError, match=f"'{name}' is missing; there are '"):
        parse_request(row)


def test_any_path_will_do():
    assert parse_request(request("a", url="/v1/embeddings")).path == "/embeddings"
    assert parse_request(request("a", url="/v10/x")).path == "/v10/x"


@pytest.mark.parametrize("shape", FAILURES)
def test_failures_of_every_producer_are_read_and_unified(shape):
    row = FAILURES[shape]("a")
    assert read_outcome(row) == ("a", False, *CODES[shape])
    unified = failure_row(row)
    assert read_outcome(unified) == read_outcome(row)
    assert failure_row(unified) == unified
    assert set(unified) == {"id", "custom_id", "response", "error"}
    if unified["error"] is None:
        assert set(unified["response"]) == {"status_code", "request_id", "body"}
        assert unified["response"]["status_code"] == row["response"]["status_code"] != 200
        assert unified["response"]["body"]["error"]["message"] == CODES[shape][1]
    else:
        assert unified["response"] is None
        assert unified["error"] == dict(zip(("code", "message"), CODES[shape], strict=True))


def test_what_openai_says_of_a_failure_is_kept_whole():
    row = FAILURES["openai"]("a")
    assert failure_row(row) == row


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"error": ""}, "error"),
        ({"error": {}}, "error"),
        ({"error": 7}, "error"),
        ({"error": {"code": None, "type": "odd"}}, "odd"),
        ({"response": None}, "no_response"),
        ({"response": "text"}, "no_response"),
        ({"response": {}}, "no_status"),
        ({"response": {"status_code": None, "body": {}}}, "no_status"),
        ({"response": {"status_code": 200}}, "no_body"),
        ({"response": {"status_code": 200, "body": {"error": {"code": "late"}}}}, "late"),
        ({"response": {"status_code": 200, "body": {"error": "text"}}}, "error"),
        ({"response": {"status_code": 500, "body": "<html>"}}, "http_500"),
        ({"response": {"status_code": 500, "body": {}}}, "http_500"),
    ],
    ids=str,
)
def test_odd_outcomes_are_failures(change, code):
    row = {**success("a"), **change}
    outcome = read_outcome(row)
    assert outcome[:3] == ("a", False, code)
    assert isinstance(outcome.message, str)
    assert read_outcome(failure_row(row)) == outcome


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "code", "x"]), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"custom_id": st.just("a")},
        optional={
            "id": JSON,
            "error": JSON,
            "response": JSON
            | st.fixed_dictionaries(
                {}, optional={"status_code": st.sampled_from([200, 400]) | JSON, "body": JSON, "request_id": JSON}
            ),
        },
    )
)
def test_any_row_with_a_custom_id_has_an_outcome(row):
    outcome = read_outcome(row)
    if outcome.ok:
        assert row.get("error") is None
        assert row["response"]["status_code"] == 200
        body = row["response"]["body"]
        assert isinstance(body, list) or body.get("error") is None
    else:
        unified = json.loads(render_line(failure_row(row)))
        assert read_outcome(unified) == outcome
        assert (unified["response"] is None) != (unified["error"] is None)


@pytest.mark.parametrize("custom_id", [None, 7, ""])
def test_an_outcome_has_a_custom_id(custom_id):
    with pytest.raises(ValueError, match="custom_id"):
        read_outcome({**success("a"), "custom_id": custom_id})
    with pytest.raises(ValueError, match="custom_id"):
        read_outcome({"response": None, "error": None})


def test_a_row_with_nothing_to_say_is_not_written():
    with pytest.raises(ValueError, match="a body or an error"):
        output_row("a", name="b")


# --- the whole way ---------------------------------------------------------

JOBS = st.lists(
    st.tuples(
        st.sampled_from(["m", "ft:n:org::1"]),  # model
        st.sampled_from([CHAT, TEXT]),
        st.text(max_size=12),  # content
        # What comes back, in this order; True is a success.
        st.lists(st.just(True) | st.sampled_from(sorted(FAILURES)), max_size=3),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None)
@given(
    jobs=JOBS,
    max_lines=st.integers(1, 6),
    room=st.integers(0, 300),
    seed=st.integers(0, 99),
    ending=st.sampled_from(["", ".gz", ".zst"]),
    read=st.sampled_from([1, 7, 100, 1 << 20]),
)
def test_split_ask_merge_and_ask_again(jobs, max_lines, room, seed, ending, read):
    rng = random.Random(seed)
    lines, outcomes = [], []
    for number, (model, url, content, come) in enumerate(jobs):
        custom_id = f"{number}:{content}"
        row = request(custom_id, model, url, messages=[{"role": "user", "content": content}])
        lines.append(json.dumps(row, ensure_ascii=bool(number % 2)).encode("utf-8", "backslashreplace"))
        outcomes.append(
            [success(custom_id, f"{n}") if way is True else FAILURES[way](custom_id) for n, way in enumerate(come)]
        )
    succeeded = [any(way is True for way in job[3]) for job in jobs]

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        read_little(patch, read)
        folder = Path(name)
        source = write(folder / f"requests.jsonl{ending}", b"\n\n".join(lines))
        max_bytes = max(map(len, lines)) + 1 + room

        report = split([source], str(folder / "parts"), max_lines=max_lines, max_bytes=max_bytes)
        parts = [Path(folder, "parts", part.file) for part in report.files]
        assert names(folder / "parts") == [path.name for path in parts]
        found = []
        for part, path in zip(report.files, parts, strict=True):
            data = path.read_bytes()
            rows = [json.loads(line) for line in data.splitlines()]
            assert (part.lines, part.bytes) == (len(rows), len(data))
            assert part.lines <= max_lines
            assert part.bytes <= max_bytes
            assert {(row["url"], row["body"]["model"]) for row in rows} == {(part.url, part.model)}
            found += data.splitlines()
        assert Counter(found) == Counter(lines)

        # Output files in which every request's outcomes keep their order, and else nothing is in order.
        turns = [n for n, some in enumerate(outcomes) for _ in some]
        rng.shuffle(turns)
        waiting = [iter(some) for some in outcomes]
        came = [next(waiting[n]) for n in turns]
        cut = rng.randrange(len(came) + 1)
        outputs = [
            write_jsonl(folder / f"a.jsonl{ending}", came[:cut]),
            write_jsonl(folder / "b.jsonl", [*came[cut:], success("nobody's"), b"{cut"]),
        ]

        merged = merge([source], outputs, str(folder / "merged.jsonl"))
        rows = rows_of(folder / "merged.jsonl")
        assert [row["custom_id"] for row in rows] == [json.loads(line)["custom_id"] for line in lines]
        for row, some, good in zip(rows, outcomes, succeeded, strict=True):
            assert read_outcome(row).ok == good
            if good:
                assert row == [one for one in some if read_outcome(one).ok][-1]
            elif some:
                assert read_outcome(row) == read_outcome(some[-1])
            else:
                assert row["error"]["code"] == "missing"
        missing = sum(not some for some in outcomes)
        assert (merged.requests, merged.ok, merged.missing) == (len(jobs), sum(succeeded), missing)
        assert merged.ok + merged.missing + sum(merged.failed.values()) == merged.requests
        assert len(jobs) - missing + merged.superseded == len(came)
        assert (merged.unknown, merged.unreadable) == (1, 1)

        again = retry_failed([source], outputs, str(folder / "again.jsonl"))
        assert (folder / "again.jsonl").read_bytes() == b"".join(
            line + b"\n" for line, good in zip(lines, succeeded, strict=True) if not good
        )
        assert {**again.as_json(), "out": ""} == {**merged.as_json(), "out": ""}

        # What was merged is an output like any other: with the rest answered, all is well.
        rest = [success(json.loads(line)["custom_id"]) for line, good in zip(lines, succeeded, strict=True) if not good]
        outputs = [folder / "merged.jsonl", write_jsonl(folder / "c.jsonl", rest)]
        assert merge(parts, outputs, str(folder / "all.jsonl")).ok == len(jobs)
        assert names(folder) == sorted(
            [source.name, "parts", f"a.jsonl{ending}", "b.jsonl", "c.jsonl", "merged.jsonl", "again.jsonl", "all.jsonl"]
        )


@given(st.lists(st.text(max_size=3), min_size=1, unique=True), st.lists(st.text(max_size=3)))
def test_custom_ids_are_found_as_in_a_dict(known, asked):
    ids, shard = CustomIds(), InputShard("a.jsonl", "a.jsonl", "jsonl")
    for line, custom_id in enumerate(known, 1):
        ids.add(custom_id, shard, line)
    ids.sort()
    numbers = {custom_id: number for number, custom_id in enumerate(known)}
    asked += known
    assert ids.find(asked).tolist() == [numbers.get(custom_id, -1) for custom_id in asked]


# --- split -----------------------------------------------------------------


def test_lines_stay_as_they_are(tmp_path, run):
    lines = [json.dumps(request(f"{n}"), indent=None, separators=(" , ", " : ")).encode() for n in range(4)]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n  \r\n" + lines[1] + b"\n \t" + lines[2] + b"\n" + lines[3])
    code, out, _ = run("split", source, "--out", tmp_path / "parts")
    data = (tmp_path / "parts" / "requests-00000.jsonl").read_bytes()
    assert data == lines[0] + b"\r\n" + lines[1] + b"\n \t" + lines[2] + b"\n" + lines[3] + b"\n"
    assert (code, out) == (0, f"requests-00000.jsonl  4 lines  {len(data):,} bytes  m\n")


@pytest.mark.parametrize(("spare", "files"), [(0, [3, 3]), (-1, [2, 2, 2]), (1, [3, 3])])
def test_a_file_has_exactly_as_many_bytes_as_it_may(tmp_path, spare, files):
    lines = [json.dumps(request(f"{n}")).encode() + b"\n" for n in range(6)]
    write(tmp_path / "a.jsonl", b"".join(lines))
    report = split([tmp_path / "a.jsonl"], str(tmp_path / "out"), max_bytes=3 * len(lines[0]) + spare)
    assert [part.lines for part in report.files] == files
    assert [os.path.getsize(tmp_path / "out" / part.file) for part in report.files] == [
        n * len(lines[0]) for n in files
    ]


@pytest.mark.parametrize(("most", "files"), [(1, [1] * 6), (5, [5, 1]), (6, [6]), (7, [6])])
def test_a_file_has_exactly_as_many_lines_as_it_may(tmp_path, most, files):
    write_jsonl(tmp_path / "a.jsonl", [request(f"{n}") for n in range(6)])
    report = split([tmp_path / "a.jsonl"], str(tmp_path / "out"), max_lines=most)
    assert [part.lines for part in report.files] == files


def test_a_line_that_fits_nowhere_is_an_error_and_one_that_just_fits_is_none(tmp_path):
    size = len(write_jsonl(tmp_path / "a.jsonl", [request("a")]).read_bytes())
    with pytest.raises(DataError, match=rf"a.jsonl, line 1: {size} bytes do not fit in a file"):
        split([tmp_path / "a.jsonl"], str(tmp_path / "out"), max_bytes=size - 1)
    assert names(tmp_path) == ["a.jsonl"]
    assert split([tmp_path / "a.jsonl"], str(tmp_path / "out"), max_bytes=size).files[0].bytes == size


def test_urls_and_models_are_kept_apart_and_any_url_goes(tmp_path):
    kinds = [("m", CHAT), ("n", CHAT), ("m", TEXT), ("e", "/v1/embeddings")]
    write_jsonl(tmp_path / "a.jsonl", [request(f"{n}", *kinds[n % 4]) for n in range(20)])
    report = split([tmp_path / "a.jsonl"], str(tmp_path / "out"), max_lines=3)
    assert Counter((part.model, part.url) for part in report.files) == dict.fromkeys(kinds, 2)
    assert [part.file for part in report.files] == [f"requests-{n:05d}.jsonl" for n in range(8)]


def test_too_many_models_to_keep_apart_are_an_error(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [request(f"{n}", f"model {n}") for n in range(257)])
    with pytest.raises(DataError, match="over 256 models"):
        split([tmp_path / "a.jsonl"], str(tmp_path / "out"))
    assert names(tmp_path) == ["a.jsonl"]


BAD_LINES = [
    (b"{cut", "not valid JSON"),
    (b'{"custom_id": "\xff"}', "not valid UTF-8"),
    (b"[1]", "not a JSON object but list"),
    (b"[" * 100_000, "not valid JSON"),
    ({"prompt": "a"}, "'custom_id' is missing; there are 'prompt'"),
    ({**request("x"), "method": "GET"}, "POST only"),
    (request("x", model=None), "no 'model'"),
    (request("x", stream=True), "'stream'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_line_that_is_no_request_is_named_and_nothing_is_left(tmp_path, run, bad, message):
    write_jsonl(tmp_path / "a.jsonl", [request("a")])
    write_jsonl(tmp_path / "b.jsonl", [request("b"), b"", bad, request("c")])
    code, out, error = run("split", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "b.jsonl, line 3: " in error
    assert message in error
    assert names(tmp_path) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("command", ["split", "merge", "retry-failed"])
def test_a_custom_id_that_comes_twice_is_named_with_both_places(tmp_path, run, command):
    write_jsonl(tmp_path / "a.jsonl", [request("z"), b"", request("a"), request("b")])
    write_jsonl(tmp_path / "b.jsonl", [request("c"), request("a"), request("z")])
    more = [] if command == "split" else ["--outputs", write_jsonl(tmp_path / "o.jsonl", [])]
    before = names(tmp_path)
    code, out, error = run(command, tmp_path / "a.jsonl", tmp_path / "b.jsonl", *more, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "b.jsonl, line 2: the same custom_id as a.jsonl, line 3" in error
    assert names(tmp_path) == before


def test_an_earlier_split_stays_unless_it_is_to_be_replaced(tmp_path, run):
    write_jsonl(tmp_path / "a.jsonl", [request(f"{n}") for n in range(6)])
    write_jsonl(tmp_path / "b.jsonl", [request("b")])
    write_jsonl(tmp_path / "bad.jsonl", [request("b"), b"{"])
    out = tmp_path / "out"
    assert run("split", tmp_path / "a.jsonl", "--out", out, "--max-lines", 2)[0] == 0
    (out / "mine.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before) == 4

    code, _, error = run("split", tmp_path / "b.jsonl", "--out", out)
    assert code == 2
    assert "--overwrite" in error
    assert run("split", tmp_path / "bad.jsonl", "--out", out, "--overwrite")[0] == 1
    code, _, error = run("split", out / "requests-00001.jsonl", "--out", out, "--overwrite")
    assert code == 2
    assert "is an input itself" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    assert run("split", tmp_path / "b.jsonl", "--out", out, "--overwrite")[0] == 0
    assert names(out) == ["mine.txt", "requests-00000.jsonl"]
    assert (out / "requests-00000.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_split_holds_its_folder_and_clears_what_a_killed_one_left(tmp_path):
    requests, out = write_jsonl(tmp_path / "a.jsonl", [request("a"), request("b")]), tmp_path / "out"
    out.mkdir()
    begun = (
        "import os, sys; from millstream.store import at; at(sys.argv[1]).write('requests-00000.jsonl'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", begun, out]).returncode == 9
    assert len(os.listdir(out)) == 1
    with at(out).lock("", ""), pytest.raises(RequestError, match="another millstream is writing to"):
        split([requests], str(out))
    split([requests], str(out))
    assert os.listdir(out) == ["requests-00000.jsonl"]


def test_split_from_standard_input_with_sizes_and_json(tmp_path):
    data = jsonl(request(f"{n}", prompt="x" * 1000) for n in range(10)) + jsonl([request("y" * 65)])
    done = cli("batch", "split", "-", "--out", "parts", "--max-bytes", "4kB", "--json", cwd=tmp_path, stdin=data)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["requests"], report["long_ids"]) == (11, 1)
    assert [part["lines"] for part in report["files"]] == [3, 3, 3, 2]
    parts = [(tmp_path / "parts" / part["file"]).read_bytes() for part in report["files"]]
    assert b"".join(parts) == data


# --- merge and retry-failed ------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """Four requests: a success, a failure and then a success, two failures, and nothing."""
    write_jsonl(tmp_path / "requests.jsonl", [request(name) for name in "abcd"])
    write_jsonl(tmp_path / "out-1.jsonl", [FAILURES["vllm_text"]("c"), FAILURES["openai"]("b"), success("a")])
    write_jsonl(tmp_path / "out-2.jsonl", [success("b"), success("x"), FAILURES["openai"]("c"), b"{cut"])
    return tmp_path


def test_merge_in_words(job, run):
    outputs = job / "out-1.jsonl", job / "out-2.jsonl"
    code, out, error = run("merge", job / "requests.jsonl", "--outputs", *outputs, "--out", job / "m.jsonl")
    assert (code, error) == (3, "")
    assert out.splitlines() == [
        "requests     4 = 2 ok + 1 failed + 1 missing",
        "failed       1 rate_limited",
        "superseded   2 by another outcome of the same request",
        "unknown      1 of no request, the first at out-2.jsonl, line 2",
        "unreadable   1, the first at out-2.jsonl, line 4: not valid JSON:"
        " Expecting property name enclosed in double quotes, at character 2 of the line",
    ]
    codes = [read_outcome(row).code for row in rows_of(job / "m.jsonl")]
    assert codes == [None, None, "rate_limited", "missing"]


def test_a_success_is_never_displaced_and_is_written_byte_for_byte(tmp_path, run):
    write_jsonl(tmp_path / "r.jsonl", [request("a")])
    line = b'{"custom_id":"a" ,"error":null, "response":{"status_code":200,"body":{"n":1.50,"x":NaN}}, "more":1}'
    write_jsonl(tmp_path / "o.jsonl", [FAILURES["bare"]("a"), line, FAILURES["openai"]("a")])
    assert run("merge", tmp_path / "r.jsonl", "--outputs", tmp_path / "o.jsonl", "--out", tmp_path / "m.jsonl")[0] == 0
    assert (tmp_path / "m.jsonl").read_bytes() == line + b"\n"


def test_all_well_is_0_as_a_user_runs_it(job):
    write_jsonl(job / "out-3.jsonl", [success("c"), success("d")])
    command = ("requests.jsonl", "--outputs", "out-1.jsonl", "out-2.jsonl", "-", "--json", "--out")
    stdin = (job / "out-3.jsonl").read_bytes()
    done = cli("batch", "merge", *command, "m.jsonl", cwd=job, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "out": "m.jsonl",
        "requests": 4,
        "ok": 4,
        "failed": {},
        "missing": 0,
        "superseded": 3,
        "unknown": 1,
        "unreadable": 1,
        "first": {
            "unknown": "out-2.jsonl, line 2",
            "unreadable": "out-2.jsonl, line 4: not valid JSON: Expecting property name enclosed in double quotes,"
            " at character 2 of the line",
        },
    }
    piped = cli("batch", "merge", *command, "-", cwd=job, stdin=stdin)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.encode() == (job / "m.jsonl").read_bytes()
    assert json.loads(piped.stderr)["ok"] == 4


def test_retry_failed_as_a_user_runs_it(job):
    done = cli(
        "batch",
        "retry-failed",
        "--outputs=out-1.jsonl",
        "out-2.jsonl",
        "--json",
        "--out",
        "-",
        "--",
        "requests.jsonl",
        cwd=job,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == ["c", "d"]
    report = json.loads(done.stderr)
    assert (report["ok"], report["failed"], report["missing"]) == (2, {"rate_limited": 1}, 1)


def test_nothing_to_retry_is_an_empty_file(tmp_path, run):
    write_jsonl(tmp_path / "r.jsonl", [request("a")])
    write_jsonl(tmp_path / "o.jsonl", [success("a")])
    code, out, _ = run("retry-failed", tmp_path / "r.jsonl", "--outputs", tmp_path / "o.jsonl", "--out", tmp_path / "n")
    assert (code, out) == (0, "requests     1 = 1 ok + 0 failed + 0 missing\n")
    assert (tmp_path / "n").read_bytes() == b""


@pytest.mark.parametrize("command", ["merge", "retry-failed"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outputs", "o.jsonl", "--out", "x"], "REQUESTS"),
        (["r.jsonl", "--out", "x"], "--outputs"),
        (["r.jsonl", "--outputs", "--out", "x"], "--outputs"),
        (["r.jsonl", "--outputs", "o.jsonl"], "--out"),
        (["r.jsonl", "--outputs", "nowhere.jsonl", "--out", "x"], "no such file or folder: nowhere.jsonl"),
        (
            ["r.jsonl", "--outputs", "r.jsonl", "--out", "x"],
            "r.jsonl, line 1: a request; --outputs takes what came back",
        ),
        (["-", "--outputs", "o.jsonl", "--out", "x"], "standard input"),
        (["r.jsonl", "--outputs", "o.jsonl", "--out", "o.jsonl"], "o.jsonl is an input"),
        (["r.jsonl", "--outputs", "o.jsonl", "--out", "r.jsonl", "--overwrite"], "r.jsonl is an input"),
        (["r.jsonl", "--outputs", "o.jsonl", "--out", "no/x"], "no such folder"),
        (["r.jsonl", "--outputs", "o.jsonl", "--out", "folder"], "folder is a folder"),
        (["r.jsonl", "--outputs", "o.jsonl", "--out", "a.parquet"], "exists already"),
        (["empty.jsonl", "--outputs", "o.jsonl", "--out", "x"], "there are no requests"),
        (["a.parquet", "--outputs", "o.jsonl", "--out", "x"], "JSONL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_2_and_changes_nothing(tmp_path, monkeypatch, run, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.parquet").touch()
    write_jsonl(tmp_path / "r.jsonl", [request("a")])
    write_jsonl(tmp_path / "o.jsonl", [success("a")])
    write_jsonl(tmp_path / "empty.jsonl", [b"", b"  "])
    before = names(tmp_path)
    code, out, error = run(command, *arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert names(tmp_path) == before


def test_a_damaged_output_is_named_and_the_file_of_before_stays(tmp_path, run):
    write_jsonl(tmp_path / "r.jsonl", [request("a")])
    data = gzip.compress(jsonl([success("a", "x" * 1000)] * 50))
    (tmp_path / "o.jsonl.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "m.jsonl").write_text("before")
    code, _, error = run(
        "merge",
        tmp_path / "r.jsonl",
        "--outputs",
        tmp_path / "o.jsonl.gz",
        "--out",
        tmp_path / "m.jsonl",
        "--overwrite",
    )
    assert code == 1
    assert "o.jsonl.gz: the gzip data ends early" in error
    assert (tmp_path / "m.jsonl").read_text() == "before"
    assert names(tmp_path) == ["m.jsonl", "o.jsonl.gz", "r.jsonl"]


def test_codes_from_a_file_do_not_reach_the_terminal_as_they_are(tmp_path, run):
    write_jsonl(tmp_path / "r.jsonl", [request("a"), request("b", model="\x1b[31m")])
    odd = {"custom_id": "a", "response": None, "error": {"code": "\x1b[31mred", "message": "\ud800"}}
    write_jsonl(tmp_path / "o.jsonl", [odd, {**odd, "custom_id": "\ud800"}])
    code, out, _ = run("merge", tmp_path / "r.jsonl", "--outputs", tmp_path / "o.jsonl", "--out", tmp_path / "m.jsonl")
    assert code == 3
    assert "\x1b" not in out
    assert "1 error" in out
    assert rows_of(tmp_path / "m.jsonl")[0]["error"] == odd["error"]
    code, out, _ = run("split", tmp_path / "r.jsonl", "--out", tmp_path / "parts")
    assert (code, out.count("requests-"), "\x1b" in out) == (0, 2, False)


def test_limits_below_one_are_refused(tmp_path):
    for limit in ({"max_lines": 0}, {"max_bytes": 0}):
        with pytest.raises(RequestError, match="at least one"):
            split(["nowhere"], str(tmp_path / "out"), **limit)


PEAK = """
import re, sys
from millstream.cli import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


@pytest.mark.slow
@runs.needs_proc
def test_a_million_requests_take_less_than_200_mb(tmp_path):
    count = 1_000_000
    with open(tmp_path / "r.jsonl", "wb") as file:
        file.writelines(render_line(request(f"request-{n}", prompt="why")) for n in range(count))
    with open(tmp_path / "o.jsonl", "wb") as file:
        file.writelines(render_line(success(f"request-{n * 7919 % count}")) for n in range(count))
    for command in ("split", "merge", "retry-failed"):
        outputs = [] if command == "split" else ["--outputs", "o.jsonl"]
        call = [sys.executable, "-c", PEAK, "batch", command, "r.jsonl", *outputs, "--out", command]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peak = int(done.stderr) * 1024
        print(f"\n{command}: peak {peak / 1e6:.0f} MB")
        assert 20e6 < peak < 200e6
    assert (tmp_path / "retry-failed").read_bytes() == b""
    with open(tmp_path / "merge", "rb") as file:
        assert all(parse_line(line)["custom_id"] == f"request-{n}" for n, line in enumerate(file))
