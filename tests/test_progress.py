"""Progress: a share and a time for every kind of input that has an end, in lines that fit."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
import runs
from helpers import MILLSTREAM, TEXTS, cli, jsonl, rows, without_fsync, write

import millstream
from millstream.corpus.find import expand
from millstream.records import Cursor
from millstream.report import ask_line, progress_line
from millstream.runs.pack.extent import Extent
from millstream.runs.progress import AskProgress, Progress

quick = pytest.fixture(scope="module", autouse=True)(without_fsync)

LINES = rows(f"{text} {n}" for n in range(4000) for text in TEXTS)


@pytest.mark.parametrize("kind", ["plain.jsonl", "packed.jsonl.gz", "packed.jsonl.zst", "rows.parquet", "folder"])
def test_the_share_grows_to_all_of_it(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for number in range(20):
            (path / f"{number}.txt").write_text("To be, or not to be. " * 2000)
    elif kind == "rows.parquet":
        runs.write_parquet(path, jsonl(LINES).splitlines())
    else:
        write(path, jsonl(LINES))
    seen = []
    millstream.pack_to(tmp_path / "out", path, seq_len=64, on_progress=seen.append, workers=1)
    shares = [now.share for now in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert seen[0].share_before == 0.0
    assert re.match(r"100% .* 0:00 left", progress_line(seen[-1]))


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_the_share_is_that_of_the_bytes_on_disk(tmp_path, packed):
    data = jsonl(LINES)
    shards = expand([str(write(tmp_path / f"{name}.jsonl{packed}", data)) for name in "abc"])
    extent = Extent(shards)
    assert extent.share(Cursor(0)) == 0
    assert extent.share(Cursor(1)) == pytest.approx(1 / 3)
    assert extent.share(Cursor(1, len(data) // 2)) == pytest.approx(1 / 2, abs=0.02)
    assert extent.share(Cursor(1, 100 * len(data))) == pytest.approx(2 / 3)
    assert extent.share(Cursor(3)) == 1


def test_standard_input_has_no_share(tmp_path):
    assert Extent(expand(["-"])).share(Cursor(0, 100)) is None


NOW = Progress(10**12, 0.4, 0.1, 123_456_789, 98_765_432_101, 1234, 90_000.0, {"tokenize": 5.0}, 2, 0, 0)
ASKED = AskProgress(1_234_567, 8910, 1_234_567, 512, 3600.0, 10**9, 10**7, 1234.5, "the first in order")


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200])
def test_a_line_fits(width):
    for line in (progress_line(NOW, width), ask_line(ASKED, width)):
        assert len(line) <= width
    assert progress_line(NOW, width).startswith(" 40%")
    assert ask_line(ASKED, width).startswith(" 12%")
    assert ("left" in ask_line(ASKED, width)) == (width > 20)


@pytest.mark.parametrize("line", [progress_line(NOW), progress_line(NOW._replace(share=None)), ask_line(ASKED)])
def test_what_else_is_told_can_be_told_from_it(line):
    assert runs.without_progress(f"{line}\nmillstream: an error\n{line}\n") == "millstream: an error\n"


@pytest.mark.parametrize("columns", [60, 80])
def test_no_line_is_wider_than_the_terminal(tmp_path, columns):
    write(tmp_path / "a.jsonl", jsonl(LINES))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [*MILLSTREAM, "pack", "a.jsonl", "--out", "out", "--seq-len", "64", "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=slave, env={**environment, "TERM": "xterm"}
    ) as process:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 1 << 16):
                shown += piece
        except OSError:  # how Linux tells that the other side is closed
            pass
    os.close(master)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert any("documents" in line or "starting" in line for line in lines)
    assert max(map(len, lines)) <= columns


def test_a_finished_run_tells_with_what_settings(tmp_path):
    write(tmp_path / "a.jsonl", jsonl(rows(TEXTS)))
    command = ("pack", "a.jsonl", "--out", "out", "--seq-len", 64, "--eos", "--shuffle", 0, "--validation", 0.25)
    first = cli(*command, cwd=tmp_path)
    again = cli(*command, cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0)
    assert "  settings   gpt2, 64 ids, concat, eos, shuffle 0, validation 0.25\n" in again.stdout
    assert "settings" not in first.stdout
