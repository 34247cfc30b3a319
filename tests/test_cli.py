"""The command line as a user meets it: what it says, where it says it, and its exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import (
    MILLSTREAM,
    TEXTS,
    cli,
    gpt2_ids,
    jsonl,
    rows,
    run_bytes,
    run_here,
    stream,
    whole,
    without_fsync,
    write_jsonl,
)
from runs import PATIENCE

import millstream

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    corpus = write_jsonl(folder / "a.jsonl", rows([*TEXTS, "colours \x1b[31mred\x1b[0m and a bell \a"] * 5))
    millstream.pack_to(folder / "out", corpus, seq_len=32, eos=True, validation=0.3)
    return folder / "out"


@pytest.fixture
def run(monkeypatch, capfd):
    return run_here(monkeypatch, capfd)


# --- help ------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_and_version_load_nothing_heavy(flag):
    code = f"""
import sys
sys.argv = ["millstream", {flag!r}]
from millstream.cli import main
try:
    main()
finally:
    print(sorted({{"numpy", "pyarrow", "rich", "tokenizers", "tiktoken", "fastokens"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) > 1, "and it says something"


def test_a_small_run_loads_nothing_that_only_others_need(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    code = f"""
import sys
sys.argv = ["millstream", "pack", {str(corpus)!r}, "--out", {str(tmp_path / "out")!r}, "--seq-len", "32", "--json"]
from millstream.cli import main
main()
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    by_several = {f"millstream.runs.pack.{name}" for name in ("driven", "driver", "joining", "joiner", "turns", "site")}
    far_away = {"millstream.store.bucket", "millstream.store.hub", "obstore", "huggingface_hub", "asyncio"}
    of_others = {"numpy.ma", "numpy.random", "pyarrow.compute", "tokenizers", "jinja2", "zstandard", "isal", "rich"}
    unneeded = {"millstream.engines.local", "millstream.aio", "millstream.llm", *by_several, *far_away, *of_others}
    assert unneeded & set(loaded) == set()
    assert "millstream.runs.pack.inline" in loaded
    assert loaded.index("numpy") < loaded.index("millstream.records"), "from deeper down, it loads much longer"


def test_version():
    done = cli("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"millstream {millstream.__version__}")


@pytest.mark.parametrize("command", ["pack", "verify", "show", "tokenizers"])
def test_every_command_has_help(run, command):
    assert command in run("--help")[1]
    code, out, error = run(command, "--help")
    assert (code, error) == (0, "")
    assert f" {command} " in out.splitlines()[0]


# --- exit codes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pakc"], "pack"),
        (["pack"], "SOURCE"),
        (["pack", "a.jsonl"], "--out"),
        (["pack", "a.jsonl", "--out", "o", "--ot"], "--out"),
        (["pack", "a.jsonl", "--out", "o", "--seq-len", "many"], "--seq-len"),
        (["pack", "a.jsonl", "--out", "o", "--seq-len", "0"], "--seq-len 0"),
        (["pack", "a.jsonl", "--out", "o", "--seq-len", "1000000000000"], "--seq-len"),
        (["pack", "a.jsonl", "--out", ""], "--out"),
        (["pack", "a.jsonl", "--out", "o", "--tokenizer", "noise.bin"], "noise.bin"),
        (["pack", "a.jsonl", "--out", "o", "--memory", "5x"], "256MiB"),
        (["pack", "a.jsonl", "--out", "o", "--memory", "50MiB"], "--memory 50MiB is too little"),
        (["pack", "a.jsonl", "--out", "o", "--strategy", "best"], "concat"),
        (["pack", "a.jsonl", "--out", "o", "--tokenizer", "gpt5"], "give gpt2"),
        (["pack", "nowhere.jsonl", "--out", "o"], "no such file or folder: nowhere.jsonl"),
        (["pack", "*.csv", "--out", "o"], "no file matches *.csv"),
        (["pack", "a.jsonl", "--out", "a.jsonl"], "is a file"),
        (["pack", "a.jsonl", "--out", "."], "not millstream's"),
        (["verify", "nowhere"], "no run folder"),
        (["verify", "."], "no run folder"),
        (["show", "nowhere"], "no run folder"),
        (["show", "."], "no run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_2_and_changes_nothing(tmp_path, monkeypatch, run, arguments, message):
    write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "noise.bin"]


def test_done_is_0_and_again_is_0(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    command = ("pack", "a.jsonl", "--out", "out", "--seq-len", 32, "--eos")
    first = cli(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"{len(TEXTS)} documents became" in first.stdout
    before = run_bytes(tmp_path / "out")
    again = cli(*command, cwd=tmp_path)
    assert again.returncode == 0
    assert "out is finished already: nothing to do" in again.stdout
    assert run_bytes(tmp_path / "out") == before
    assert cli("verify", "out", cwd=tmp_path).returncode == 0


def test_bad_data_is_1_then_resumes_and_with_skip_is_3(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [*rows(TEXTS), b'{"text": "cut', {"text": "after"}])
    command = ("pack", "a.jsonl", "--out", "out", "--seq-len", 32)
    stopped = cli(*command, cwd=tmp_path)
    assert stopped.returncode == 1
    assert f"a.jsonl, line {len(TEXTS) + 1}: not valid JSON" in stopped.stderr
    assert "--on-error skip" in stopped.stderr
    assert stopped.stdout == ""

    unfinished = cli("verify", "out", cwd=tmp_path)
    assert unfinished.returncode == 2
    assert "not finished" in unfinished.stderr

    skipped = cli(*command[:3], "skipped", *command[4:], "--on-error", "skip", cwd=tmp_path)
    assert skipped.returncode == 3
    assert "1 faulty" in skipped.stdout
    assert "faults.jsonl" in skipped.stdout
    assert stream(tmp_path / "skipped") == gpt2_ids([*TEXTS, "after"])

    write_jsonl(corpus, [*rows(TEXTS), {"text": "mended"}, {"text": "after"}])
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on with an earlier run" in done.stdout
    assert stream(tmp_path / "out") == gpt2_ids([*TEXTS, "mended", "after"])


def test_a_surrogate_in_a_message_is_no_crash(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [b'{"\\ud800": 1, "id": "\\udfff"}'])
    stopped = cli("pack", "a.jsonl", "--out", "out", cwd=tmp_path)
    assert stopped.returncode == 1
    assert "a.jsonl, line 1" in stopped.stderr
    skipped = cli("pack", "a.jsonl", "--out", "out", "--on-error", "skip", cwd=tmp_path)
    assert skipped.returncode == 3, skipped.stderr
    assert whole(tmp_path / "out")


def test_verify_names_what_is_damaged(tmp_path, packed, run):
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    assert run("verify", folder)[0] == 0
    with open(folder / "samples-00000.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    (folder / "stray.txt").write_text("x")
    code, _, error = run("verify", folder)
    assert code == 1
    assert "samples-00000.npy" in error
    assert "stray.txt" in error
    verdict = json.loads(run("verify", folder, "--json")[1])
    assert (verdict["ok"], len(verdict["problems"])) == (False, 2)


# --- reports ---------------------------------------------------------------


def test_json_reports_are_json_and_nothing_else(tmp_path, packed, run):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS))
    code, out, _ = run("pack", corpus, "--out", tmp_path / "out", "--seq-len", 32, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ledger"]["documents"]["in"] == len(TEXTS)
    assert (report["faults"], report["already"], report["samples"]) == (
        0,
        False,
        len(millstream.open(tmp_path / "out")),
    )
    assert json.loads(run("verify", packed, "--json")[1])["ok"] is True


@pytest.mark.parametrize(
    ("given", "size"), [("1MiB", 1 << 20), ("1MB", 10**6), ("64k", 64_000), ("1.5kib", 1536), ("12345", 12345)]
)
def test_sizes(tmp_path, run, given, size):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows(TEXTS[:1]))
    assert run("pack", corpus, "--out", tmp_path / "out", "--shard-size", given)[0] == 0
    assert millstream.open(tmp_path / "out").settings["shard_size"] == size


# --- pipes and signals -----------------------------------------------------


def test_standard_input_resumes_by_piping_it_again(tmp_path):
    good = rows(f"{text} {n}" for n in range(40) for text in TEXTS)
    command = ("pack", "-", "--out", "out", "--seq-len", 64)
    stopped = cli(*command, cwd=tmp_path, stdin=jsonl([*good, b"bad"]))
    assert stopped.returncode == 1
    assert f"-, line {len(good) + 1}" in stopped.stderr or f"standard input, line {len(good) + 1}" in stopped.stderr
    done = cli(*command, cwd=tmp_path, stdin=jsonl([*good, {"text": "mended"}]))
    assert done.returncode == 0, done.stderr
    assert stream(tmp_path / "out") == gpt2_ids([*(row["text"] for row in good), "mended"])


@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGHUP)]
)
def test_ctrl_c_and_what_schedulers_send_say_how_to_go_on(tmp_path, workers, number):
    good = rows(f"{text} {n}" for n in range(2000) for text in TEXTS)
    data = jsonl(good)
    command = ["pack", "-", "--out", str(tmp_path / "out"), "--seq-len", "64", "--shard-size", "64kB"]
    command += ["--workers", str(workers), "--memory", "4GiB"]
    process = subprocess.Popen(
        [*MILLSTREAM, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        # More than a pipe holds: once it is written, the run is under way and waits for more.
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        process.send_signal(number)
        _, message = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"run the same command again to go on" in message
    assert b"Traceback" not in message
    done = cli(*command, stdin=data)
    assert done.returncode == 0, done.stderr
    assert stream(tmp_path / "out") == gpt2_ids(row["text"] for row in good)
    assert whole(tmp_path / "out")


def test_show_to_a_reader_that_has_gone(packed):
    """As in `millstream show DIR | head -1`: no traceback, no complaint."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run(
            [*MILLSTREAM, "show", str(packed), "0"], stdout=gone, stderr=subprocess.PIPE, timeout=PATIENCE
        )
    assert done.stderr == b""


def test_a_job_whose_processes_all_get_sigterm(tmp_path):
    """As Slurm ends one: the workers leave the answer to the run, which goes on another day."""
    good = rows(f"{text} {n}" for n in range(2000) for text in TEXTS)
    command = ["pack", "-", "--out", tmp_path / "out", "--seq-len", 64, "--workers", 2, "--memory", "4GiB"]
    with subprocess.Popen(
        [*MILLSTREAM, *map(str, command)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdin.write(jsonl(good)[:1_000_000])
        process.stdin.flush()
        os.killpg(process.pid, signal.SIGTERM)
        _, message = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert message.decode().strip().endswith("run the same command again to go on.")


@pytest.mark.parametrize(
    ("arguments", "name", "code"),
    [
        (("pack", "missing.jsonl", "--out", "out"), "RequestError", 2),
        (("pack", "bad.jsonl", "--out", "out"), "DataError", 1),
        (("pack", "bad.jsonl", "--out", "out", "--seq-len", "x"), "UsageError", 2),
        (("plan", "bad.jsonl"), "DataError", 1),
        (("verify", "missing"), "RequestError", 2),
        (("find", "missing", "id"), "RequestError", 2),
        (("ask", "missing.jsonl", "--out", "answers.jsonl"), "RequestError", 2),
    ],
)
def test_failures_are_json_with_json(tmp_path, arguments, name, code):
    (tmp_path / "bad.jsonl").write_text("bad\n")
    done = cli(*arguments, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, told["error"], told["exit_code"]) == (code, name, code)
    assert told["message"].splitlines()[0] in done.stderr


def test_what_was_damaged_is_told_once_in_json(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "foreign").write_text("")
    done = cli("verify", tmp_path / "copy", "--json")
    assert done.returncode == 1
    assert not json.loads(done.stdout)["ok"]


def test_somebody_elses_words_do_nothing_to_a_terminal(tmp_path):
    name = "\x9b31m\u202egnp.jsonl"
    (tmp_path / name).write_text("bad\n")
    done = cli("pack", name, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "<U+9B>31m<U+202E>gnp.jsonl, line 1" in done.stderr
    assert not {"\x9b", "\u202e"} & set(done.stderr)


def test_tab_shows_the_public_names():
    done = subprocess.run(
        [sys.executable, "-c", "import millstream; print(*dir(millstream))"], capture_output=True, text=True, check=True
    )
    assert set(millstream.__all__) <= set(done.stdout.split())


# --- show ------------------------------------------------------------------


def test_show(packed, run):
    dataset = millstream.open(packed)
    code, out, error = run("show", packed, 0)
    assert (code, error) == (0, "")
    first = dataset.documents(0)[0].id
    text = json.loads((packed.parent / "a.jsonl").read_text().splitlines()[int(first.removeprefix("d"))])["text"]
    assert out.startswith(f"sample 0 of {len(dataset)}: 32 ids")
    assert f" {first} " in out
    assert text[:20] in out
    assert run("show", packed, -1)[1] == run("show", packed, len(dataset) - 1)[1]
    code, validation, _ = run("show", packed, 0, "--subset", "validation")
    assert code == 0
    assert f" {millstream.open(packed, 'validation').documents(0)[0].id} " in validation


def test_show_sends_no_control_characters_to_the_terminal(packed, run):
    shown = "".join(run("show", packed, n)[1] for n in range(len(millstream.open(packed))))
    assert "[31mred" in shown, "the text with the colour code is among these samples"
    assert "\x1b" not in shown
    assert "\a" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["9999"], "no sample 9999"),
        (["-9999"], "no sample -9999"),
        (["x"], "'x'"),
        (["0", "--subset", "test"], "'test'"),
    ],
)
def test_show_what_is_not_there(packed, run, arguments, message):
    code, out, error = run("show", packed, *arguments)
    assert (code, out) == (2, "")
    assert message in error


@pytest.mark.parametrize(
    ("where", "arguments", "told"),
    [
        ("millstream.runs.plan.plan.make_plan", ["plan", "stdlib:"], "stopped"),
        ("millstream.integrity.verify", ["verify", "out"], "stopped"),
        (
            "millstream.runs.pack.convert.convert_to",
            ["convert", "out", "--format", "npy", "--out", "x"],
            "stopped. The same command again keeps the formats that are finished, and makes the others.",
        ),
    ],
)
def test_every_command_says_that_it_was_interrupted(monkeypatch, run, where, arguments, told):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    code, out, err = run(*arguments)
    assert (code, out, err.strip()) == (130, "", f"millstream: {told}")
    code, out, _ = run(*arguments, "--json")
    assert (code, json.loads(out)) == (130, {"error": "Interrupted", "message": told, "exit_code": 130})
