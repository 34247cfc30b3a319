"""What sources stand for: what is read, as what, and that nothing is passed over in silence."""

import glob
import json
import os
import random
import socket
from pathlib import Path

import pytest
from helpers import (
    TEXTS,
    cli,
    document_ids,
    faults,
    forbidding,
    gpt2_ids,
    jsonl,
    pack,
    read_little,
    rows,
    run_here,
    stream,
    whole,
    without_fsync,
    write,
    write_jsonl,
)

import millstream
from millstream.corpus import find
from millstream.corpus.find import find_inputs
from millstream.corpus.walk import Walk
from millstream.errors import DataError, RequestError, ResumeRefused, RunError

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)


@pytest.fixture
def run(monkeypatch, capfd):
    return run_here(monkeypatch, capfd)


def inputs(out):
    return json.loads((out / "manifest.json").read_bytes())["inputs"]


# --- JSON under other names -------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz", "a.json.zst", "part-00000", "a.log", "a.jsonl.1.gz"])
@pytest.mark.parametrize("given", ["named", "globbed"])
def test_lines_of_objects_are_json_lines_whatever_they_are_called(tmp_path, monkeypatch, name, given):
    read_little(monkeypatch, 50)
    items = [*rows(TEXTS[:-1]), {"text": TEXTS[-1]}]
    corpus = write_jsonl(tmp_path / name, items)
    pack(tmp_path / "out", corpus if given == "named" else f"{corpus}*", seq_len=32)
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)
    [entry] = inputs(tmp_path / "out")
    assert entry["kind"] == "jsonl"
    last = document_ids(tmp_path / "out")[-1]
    [found] = millstream.open(tmp_path / "out").locate(last)
    assert f"{name} at byte {found.offset:,}" in found.place
    assert whole(tmp_path / "out")


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbf" + jsonl(rows(TEXTS)), b"\n \n" + jsonl(rows(TEXTS)), b'{"text": NaN}\n']
)
def test_a_json_file_of_lines_may_begin_in_other_ways(tmp_path, data):
    assert find_inputs([write(tmp_path / "a.json", data)]).shards[0].kind == "jsonl"


def test_a_first_line_may_be_long(tmp_path, monkeypatch):
    looked_at = []
    decide = find.decided
    monkeypatch.setattr(find, "decided", lambda data: looked_at.append(len(data)) or decide(data))
    write_jsonl(tmp_path / "a.json", [{"text": "word " * 1_000_000}, {"text": "next"}])
    assert find_inputs([tmp_path / "a.json"]).shards[0].kind == "jsonl"
    assert sum(looked_at) < 15_000_000, "the work grows with the line, and no faster"


def test_endings_that_a_terminal_would_obey_are_not_shown(tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", rows(TEXTS))
    for name in ("b.\x1b[31m", "c." + "x" * 100):
        (tmp_path / "data" / name).touch()
    assert find_inputs([tmp_path / "data"]).ignored == {"others": 2}


def test_one_line_under_a_name_that_says_nothing_is_text(tmp_path):
    for name, data in {
        "a.map": b'{"version": 3}\n',
        "b": b"{\n}\n",
        "c.log": b"[1, 2]\n",
        "d": b"",
        "e.txt": b"{}\n{}\n",
    }.items():
        assert find_inputs([write(tmp_path / name, data)]).shards[0].kind == "text"
    assert find_inputs([write(tmp_path / "f.json", b'{"text": "one"}')]).shards[0].kind == "jsonl"
    assert find_inputs([write(tmp_path / "g.json", b" ")]).shards[0].kind == "jsonl"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "one"}]', r"a\.json is a JSON array.*jq -c '\.\[\]'"),
        ("a.json.gz", b'\n[\n{"text": "one"},\n{"text": "two"}]', r"array.*gzip -dc .*a\.json\.gz \| jq"),
        ("a.json", b'{\n "text": "one"\n}\n', r"over several lines.*jq -c '\.'"),
        ("a.json", b"Once upon a time", r"is named \.json and has no JSON"),
        ("a.csv", b"id,text\n1,one\n", r"a\.csv is a table: make it Parquet or JSONL"),
        ("a.csv.gz", b"id,text\n1,one\n", "is a table"),
        ("a.TSV", b"id\ttext\n", "is a table"),
        ("a.jsonl.xz", b"", r"\.xz is not unpacked here.*xz -dc .*a\.jsonl\.xz"),
        ("a.txt.bz2", b"", r"\.bz2 is not unpacked here. Unpack it first"),
        ("a.arrow", b"", "make it Parquet or JSONL"),
        ("a.tar", b"", "archive: unpack it"),
        ("a.tar.gz", b"", "archive: unpack it"),
        ("a.zip", b"", "archive: unpack it"),
        ("a.pdf", b"", "take its text out"),
        ("a.warc.gz", b"", "web archive"),
        ("a.jsonl", "é".encode("utf-16"), r"a\.jsonl is UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "é".encode("utf-16-be").join([b"\xfe\xff", b""]), "is UTF-16"),
        ("a.txt.gz", "é".encode("utf-32"), "is UTF-32"),
    ],
)
@pytest.mark.parametrize("command", ["pack", "plan", "ask"])
def test_what_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, run, command, name, data, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, data)
    extra = {
        "pack": ["--out", "out"],
        "plan": [],
        "ask": ["--out", "out", "--model", "m", "--base-url", "http://127.0.0.1:9"],
    }
    for given in (name, f"{name[0]}*"):
        if command == "ask" and given != name:
            continue
        code, _, told = run(command, given, *extra[command])
        assert code == 2
        with pytest.raises(RequestError, match=message):
            raise RequestError(told)
    assert os.listdir(tmp_path) == [name]


def test_json_lines_by_another_name_are_prompts(tmp_path):
    from millstream.corpus.find import expand
    from millstream.runs.ask.prompts import Recipe, batches

    [shard] = expand([write_jsonl(tmp_path / "q.json", [{"prompt": "one"}, {"prompt": "two"}])])
    [[first, _]] = batches(shard, Recipe("m"))
    assert json.loads(first.data)["messages"] == [{"role": "user", "content": "one"}]


def test_a_wide_encoding_in_a_folder_or_a_pipe_is_one_fault(tmp_path):
    data = jsonl(rows(TEXTS)).decode().encode("utf-16")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", data)
    write(tmp_path / "data" / "b.txt", b"good")
    report = pack(tmp_path / "out", tmp_path / "data", seq_len=4, on_error="skip")
    assert report.ledger["faults"] == {"invalid_utf8": 1}
    assert "UTF-16" in faults(tmp_path / "out")[0]["message"]
    done = cli("pack", "-", "--out", tmp_path / "piped", stdin=data)
    assert done.returncode == 1
    assert "UTF-16, and text has to be UTF-8" in done.stderr


def test_dev_stdin_is_standard_input(tmp_path):
    with open(write_jsonl(tmp_path / "corpus.jsonl", rows(TEXTS)), "rb") as file:
        data = file.read()
    done = cli("pack", "/dev/stdin", "--out", tmp_path / "out", "--seq-len", 32, stdin=data)
    assert done.returncode == 0, done.stderr
    assert stream(tmp_path / "out") == gpt2_ids(TEXTS)
    assert inputs(tmp_path / "out") == [{"name": "-", "kind": "jsonl"}]


def test_another_kind_under_the_same_name_is_another_input(tmp_path):
    corpus = write_jsonl(tmp_path / "part-0", rows(TEXTS))
    pack(tmp_path / "out", corpus, seq_len=8)
    write(corpus, b"text now")
    with pytest.raises(ResumeRefused, match="part-0 was read as jsonl, and looks like text now"):
        pack(tmp_path / "out", corpus, seq_len=8)


# --- nothing is passed over in silence --------------------------------------


def test_what_a_folder_holds_besides_is_counted(tmp_path, run):
    folder = tmp_path / "data"
    for name in ("a.jsonl", "b.json", "c.jsonl.xz", "d.csv", "e.csv", "f.csv.gz", "Makefile", ".hidden", "sub/x.bin"):
        write_jsonl(folder / name, rows(TEXTS))
    report = pack(tmp_path / "out", folder, seq_len=32)
    wanted = {".csv": 2, ".bin": 1, ".csv.gz": 1, ".json": 1, ".xz": 1, "hidden": 1, "without ending": 1}
    assert report.ignored == wanted
    code, told, _ = run("pack", folder, "--out", tmp_path / "out2")
    assert code == 0
    assert "  ignored    8 files: .csv 2, .bin 1, .csv.gz 1, .json 1, .xz 1, hidden 1, without ending 1\n" in told
    assert json.loads(run("pack", folder, "--out", tmp_path / "out2", "--json")[1])["ignored"] == wanted
    assert "ignored 8 files: .csv 2" in run("plan", folder)[1]
    with pytest.warns(UserWarning, match=r"ignored 7 files: \.csv 2"):
        millstream.read(folder)
    (folder / "a.jsonl").unlink()
    with pytest.raises(RequestError, match=r"nothing to read in .*there are 8 files: \.csv 2.*glob"):
        pack(tmp_path / "out3", folder)


def test_endlessly_many_endings_are_counted_together(tmp_path):
    for number in range(30):
        write_jsonl(tmp_path / "data" / f"part.{number:05}", rows(TEXTS))
    write_jsonl(tmp_path / "data" / "a.jsonl", rows(TEXTS))
    assert sum(pack(tmp_path / "out", tmp_path / "data").ignored.values()) == 30
    assert len(find_inputs([tmp_path / "data"]).ignored_by_kind()) == 9


def test_folders_that_a_glob_matches_are_counted(tmp_path):
    for name in ("a.txt", "sub/b.txt", "other/c.txt"):
        write_jsonl(tmp_path / "data" / name, rows(TEXTS))
    assert find_inputs([f"{tmp_path}/data/*"]).ignored == {"folders": 2}
    assert find_inputs([f"{tmp_path}/data/**/*.txt"]).ignored == {}
    assert find_inputs([f"{tmp_path}/data/**"]).ignored == {}
    with pytest.raises(RequestError, match="only folders: name them"):
        find_inputs([f"{tmp_path}/d*"])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(str(path))])
@pytest.mark.parametrize("given", ["", "/*.jsonl", "/b.jsonl"])
def test_a_pipe_or_a_socket_is_refused_rather_than_waited_for(tmp_path, monkeypatch, make, given):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    write_jsonl(Path("data/a.jsonl"), rows(TEXTS))
    with pytest.warns(ResourceWarning) if make is not os.mkfifo else pytest.MonkeyPatch.context():
        make(Path("data/b.jsonl"))
    with pytest.raises(RequestError, match=r"b\.jsonl is a pipe, a socket or a device"):
        pack("out", f"data{given}")
    os.rename("data/b.jsonl", "data/b.other")
    assert find_inputs(["data"]).ignored == {".other": 1}


def test_a_link_to_nothing_is_a_fault_in_a_glob_too(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    report = pack(tmp_path / "out", f"{tmp_path}/*.jsonl", seq_len=4, on_error="skip")
    assert report.ledger["faults"] == {"unreadable": 1}
    with pytest.raises(RequestError, match="is a link to a file that is not there"):
        pack(tmp_path / "out2", tmp_path / "b.jsonl")


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    data = tmp_path / "data"
    write_jsonl(data / "b" / "x.jsonl", rows(TEXTS))
    write_jsonl(tmp_path / "elsewhere" / "y.jsonl", rows(TEXTS))
    (tmp_path / "elsewhere" / "back").symlink_to(data / "b")
    (data / "a").symlink_to(data / "b")  # before b in the alphabet: b keeps its own name
    (data / "b" / "loop").symlink_to(data)
    (data / "b" / "up").symlink_to(tmp_path)
    (data / "c").symlink_to(tmp_path / "elsewhere")
    (data / "d").symlink_to("d")
    found = find_inputs([data])
    assert [shard.name for shard in found.shards] == ["data/b/x.jsonl", "data/c/y.jsonl"]
    assert found.ignored == {"linked folders": 4, "without ending": 1}
    assert {shard.name for shard in find_inputs([f"{data}/**/*.jsonl"]).shards} >= {"data/b/x.jsonl", "data/c/y.jsonl"}


@pytest.mark.parametrize("seed", range(8))
def test_globs_match_what_glob_matches(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    for _ in range(40):
        parts = [rng.choice(["a", "b", "ab", ".h", "c.txt"]) for _ in range(rng.randint(1, 4))]
        path = Path(*parts[:-1], rng.choice(["x.txt", "y.log", ".z.txt", "a"]))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:
            continue  # a file stands where a folder would
    for pattern in (
        "*",
        "**",
        "**/*",
        "*/*.txt",
        "a*/**/x.txt",
        "**/a/*",
        ".h/*",
        "[ab]/?.*",
        "**/.*",
        "a/**",
        "./*/x*",
        "*/b/**/*.t?t",
        "**/**/x.txt",
        f"{tmp_path}/*",
    ):
        wanted = sorted(path for path in set(glob.glob(pattern, recursive=True)) if os.path.isfile(path))
        if wanted:
            assert [os.path.normpath(path) for path in Walk().glob(pattern)] == sorted(map(os.path.normpath, wanted))
        else:
            with pytest.raises(RequestError):
                Walk().glob(pattern)


def test_a_folder_without_permission_stops_the_run_or_is_reported(tmp_path, run):
    with forbidding(tmp_path) as home:
        for name in ("data/a.jsonl", "data/locked/b.jsonl", "data/locked/deep/c.jsonl"):
            write_jsonl(home / name, rows(TEXTS))
        (home / "data" / "locked").chmod(0)
        try:
            for source in (
                home / "data",
                f"{home}/data/**/*.jsonl",
                f"{home}/data/*/b.jsonl",
                f"{home}/data/*/*.jsonl",
            ):
                code, _, told = run("pack", source, "--out", home / "stopped", "--seq-len", 32)
                assert code == 1
                assert "data/locked" in told
                assert "Permission denied" in told
                assert "no such file" not in told
                assert "nothing to read" not in told
            for source in (home / "data", f"{home}/data/**/*.jsonl"):
                args = ("pack", source, "--out", home / "out", "--seq-len", 32, "--on-error", "skip")
                code, told, _ = run(*args, "--overwrite")
                assert code == 3
                assert f"  unreadable {home}/data/locked: Permission denied\n" in told
                assert json.loads(run(*args, "--json", "--overwrite")[1])["unreadable"] == [
                    f"{home}/data/locked: Permission denied"
                ]
                ledger = millstream.open(home / "out").ledger
                assert (
                    ledger["documents"]["in"]
                    == ledger["documents"]["whole"] + ledger["documents"]["split"]
                    == len(TEXTS)
                )
            assert "Permission denied" in run("plan", home / "data")[1]
            with pytest.raises(DataError, match="locked: Permission denied"):
                millstream.read(home / "data")
            with pytest.warns(UserWarning, match="locked: Permission denied"):
                assert len(list(millstream.read(home / "data", on_error="skip"))) == len(TEXTS)
        finally:
            (home / "data" / "locked").chmod(0o755)


def test_a_source_without_permission_is_no_missing_one(tmp_path):
    with forbidding(tmp_path) as home:
        write_jsonl(home / "locked" / "a.jsonl", rows(TEXTS))
        (home / "locked").chmod(0)
        try:
            for source in (
                "locked/a.jsonl",
                "locked",
                "locked/*.jsonl",
                "locked/**/x",
                "locked/deep/**",
                "lock*/a.jsonl",
            ):
                with pytest.raises(RunError, match=r"cannot read .*locked.*Permission denied"):
                    pack(home / "out", home / source)
        finally:
            (home / "locked").chmod(0o755)
        (home / "locked" / "a.jsonl").chmod(0)
        with pytest.raises(DataError, match=r"a\.jsonl.*Permission denied"):
            pack(home / "out", home / "locked" / "a.jsonl")


# --- what is given twice ----------------------------------------------------


def test_a_file_given_twice_is_told(tmp_path, run):
    folder = tmp_path / "data"
    corpus = write_jsonl(folder / "a.jsonl", rows(TEXTS))
    write_jsonl(folder / "b.jsonl", rows(TEXTS))
    report = pack(tmp_path / "out", [corpus, folder, f"{folder}/*.jsonl"], seq_len=8)
    [hint] = [hint for hint in report.hints if "given" in hint]
    assert hint == f"{corpus} is given 3 times and is read each time, and 1 more are given again, too"
    assert report.ledger["documents"]["in"] == 5 * len(TEXTS)
    assert f"{corpus} is given 2 times" in run("plan", corpus, folder)[1]
    assert not [hint for hint in pack(tmp_path / "once", folder, seq_len=8).hints if "given" in hint]


def test_inputs_of_one_name_are_told_apart(tmp_path, run):
    for place in ("one", "two"):
        write_jsonl(
            tmp_path / place / "x.jsonl",
            [{"text": f"{place} is here"}, b'{"text": ' + (b'"ok"}' if place == "one" else b"5}")],
        )
    sources = [tmp_path / "one" / "x.jsonl", tmp_path / "two" / "x.jsonl"]
    with pytest.raises(DataError, match=r"x\.jsonl \(input 2\), line 2: field 'text' is not text"):
        pack(tmp_path / "out", sources, seq_len=4)
    pack(tmp_path / "out", sources, seq_len=4, on_error="skip")
    assert document_ids(tmp_path / "out").count("x.jsonl#0") == 2
    _, told, _ = run("find", tmp_path / "out", "x.jsonl#0")
    assert "(number 0, x.jsonl (input 1) at byte 0)" in told
    assert "(number 2, x.jsonl (input 2) at byte 0)" in told
    offset = faults(tmp_path / "out")[0]["offset"]
    assert "x.jsonl (input 2), line 2" in run("find", tmp_path / "out", f"x.jsonl#{offset}")[1]
    assert "x.jsonl (input 1) at byte 0" in run("show", tmp_path / "out", 0)[1]
