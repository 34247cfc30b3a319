"""Corpora, runs of the command line that can be killed, and what a run folder holds; for the tests beside it.

Run as a script it kills a run before each of its file operations in turn: see `crash_everywhere`.
"""

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from millstream.folder.manifest import JOURNAL, MANIFEST, TEMPORARY

PATIENCE = 300  # seconds until waiting for something counts as a failure; a busy machine may take its time
TAG = "MILLSTREAM_TEST_RUN"

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes through /proc")


# --- corpora ---------------------------------------------------------------

_FAULTY = (b'{"text": 5}', b'{"text": "cut', b'{"other": "x"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[]")


def lines(seed, size, faulty=0.0):
    """JSON lines of about `size` bytes together: empty, short and long documents, some without an id."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(3000)] + ["Größe", "naïve", "東京", "🙂"]
    found, total = [], 0
    counts = (0, 1, 3, 30, 30, 200, 200, 600, 5000) if size > 500_000 else (0, 1, 2, 5, 10, 20, 40, 150)
    while total < size:
        if rng.random() < faulty:
            line = rng.choice(_FAULTY)
        else:
            count = rng.choice(counts)
            row = {"text": " ".join(rng.choices(words, k=count))}
            if rng.random() < 0.7:
                row["id"] = f"d{len(found)}"
            line = json.dumps(row, ensure_ascii=False).encode()
        found.append(line + b"\n")
        total += len(line) + 1
    return found


def write_plain(path, rows):
    path.write_bytes(b"".join(rows))
    return path


def write_gzip(path, rows):
    path.write_bytes(gzip.compress(b"".join(rows), 1, mtime=0))
    return path


def write_zstd(path, rows):
    import zstandard

    # Unpacked in pieces: in many small frames, even a small corpus is more than one.
    packer = zstandard.ZstdCompressor(level=1)
    data = b"".join(rows)
    path.write_bytes(b"".join(packer.compress(data[at : at + 10_000]) for at in range(0, len(data), 10_000)))
    return path


def write_parquet(path, rows, group=200):
    """The lines as a Parquet file; lines without a text become rows without one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [_row(line) for line in rows]
    table = pa.table(
        {
            "id": pa.array([row.get("id") for row in found], pa.string()),
            "text": pa.array([row.get("text") for row in found], pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def _row(line):
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("text"), str) and "\ud800" not in row["text"]:
            return row
    return {}


def write_prompts(path, rows):
    """The lines with their text cut into a prompt and a completion; those without a text as they are."""
    made = []
    for line in rows:
        if row := _row(line):
            text = row.pop("text")
            cut = len(text) // 3
            line = json.dumps({**row, "prompt": text[:cut], "completion": text[cut:]}).encode() + b"\n"
        made.append(line)
    path.write_bytes(b"".join(made))
    return path


def write_texts(folder, rows):
    """The lines as plain text: a small file for most of them, and a long one that is handed on in pieces."""
    folder.mkdir()
    texts = [row["text"] for row in map(_row, rows) if row]
    for number, text in enumerate(texts[::20]):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    (folder / "0001-long.txt").write_text("\n".join(texts), encoding="utf-8")
    return folder


def train_tokenizer(path, seed=0):
    """A small byte-level BPE tokenizer.json, another one for each seed."""
    from tokenizers import ByteLevelBPETokenizer

    texts = [row["text"] for row in map(_row, lines(seed, 20_000)) if row]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    path.write_text(trained.to_str(), encoding="utf-8")
    return path


# --- run folders -----------------------------------------------------------


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digests(folder):
    """SHA-256 of every file of a run, the journal aside."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != JOURNAL)
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def is_complete(folder):
    path = Path(folder, MANIFEST)
    return path.exists() and json.loads(path.read_bytes())["complete"]


def events(folder):
    """The journal's events, without a last line that is still being written."""
    path = Path(folder, JOURNAL)
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line)["event"] for line in data[: data.rfind(b"\n") + 1].splitlines()]


def finished_files(folder):
    try:
        return sum(not name.endswith(TEMPORARY) for name in os.listdir(folder))
    except FileNotFoundError:
        return 0


# --- processes -------------------------------------------------------------


def command(*args):
    return [sys.executable, "-m", "millstream", *map(str, args)]


_PROGRESS = re.compile(r"^(?: *\d+% · )?[\d,]+ (?:documents|done) · .*\n", re.MULTILINE)


def without_progress(said):
    """What is on standard error besides how far a run is, which is told now and then where it takes long."""
    return _PROGRESS.sub("", said)


def cli(*args, piped=None):
    """Run the command line to its end; `piped` is a file that comes on standard input."""
    with contextlib.ExitStack() as stack:
        stdin = stack.enter_context(open(piped, "rb")) if piped else subprocess.DEVNULL
        done = subprocess.run(command(*args), stdin=stdin, capture_output=True, text=True, timeout=PATIENCE)
    done.stderr = without_progress(done.stderr)
    return done


_WATCHED = """
import atexit, os, re, runpy, sys
name, told, go = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def tell():
    with open("/proc/self/status", "rb") as file:
        os.write(told, re.search(rb"VmHWM:\\s+(\\d+) kB", file.read())[1])

def hold(event, args):
    global name
    if name and event == "open" and isinstance(args[0], str) and args[2] & os.O_CREAT:
        if os.path.basename(args[0]).startswith(name):
            name = ""
            os.write(told, b".")
            os.read(go, 1)

if name:
    sys.addaudithook(hold)
else:
    atexit.register(tell)
sys.argv[1:] = sys.argv[4:]
runpy.run_module("millstream", run_name="__main__", alter_sys=True)
"""


def kept_port():
    """(a socket, its port on 127.0.0.1) for a server that has to be told a port: nobody else is given it meanwhile.

    The server may listen there, as servers say SO_REUSEADDR too.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept, kept.getsockname()[1]


def wait_until(condition, process=None):
    """Poll until `condition()` is true, as a `process` may have to make it before it ends; its value."""
    end = time.monotonic() + PATIENCE
    while True:
        over = process and process.poll() is not None  # looked at before: it may end as soon as it has done it
        if found := condition():
            return found
        assert not over, "the process has ended"
        assert time.monotonic() < end, f"waited {PATIENCE} s in vain"
        time.sleep(0.005 if process else 0.001)


class Run:
    """A run of the command line in a process group of its own, whose processes can be found wherever they are.

    With `held` it waits before it makes the first file whose name begins like that, until it is let go: what is done to
    it meanwhile meets a run that is not over, however quick the machine is and however late we look. One that is
    `measured` tells in the end how much memory its first process had at most.
    """

    def __init__(self, *args, piped=None, held="", measured=False):
        self.tag = uuid.uuid4().hex
        (self._told, told), (go, self._go) = os.pipe(), os.pipe()
        env = {**os.environ, TAG: self.tag}
        # A pipe, as from another program; or whatever is readable already.
        named = isinstance(piped, str | Path)
        self.source = subprocess.Popen(["cat", str(piped)], stdout=subprocess.PIPE) if named else None
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WATCHED, held, str(told), str(go), *map(str, args)]
            if held or measured
            else command(*args),
            stdin=self.source.stdout if self.source else piped or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
            pass_fds=(told, go),
        )
        for file in (told, go):
            os.close(file)
        if self.source:
            self.source.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()
        if self.source:
            self.source.kill()
            self.source.wait()
        for file in (self._told, self._go):
            os.close(file)

    def goes_on(self):
        """Whether it is not over, and not held."""
        return not select.select([self._told], [], [], 0)[0]

    def let_go(self):
        os.write(self._go, b".")

    def own_peak(self):
        """Bytes, as the system keeps count; of a run that is `measured` and over."""
        return int(os.read(self._told, 100)) * 1024

    def alive(self):
        """The processes of this run that are still there."""
        wanted = f"{TAG}={self.tag}".encode()
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):  # it ended meanwhile, or is none of ours
                    if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0") and is_alive(name):
                        found.append(int(name))
        return found

    def signal(self, number, group=True):
        if group:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def end(self):
        """(exit code, standard error without progress) once it has ended."""
        _, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, without_progress(stderr.decode())


def _state(pid):
    """(what a process does, its parent). Raises OSError where there is none."""
    state, parent = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[:2]
    return state, int(parent)


def is_alive(pid):
    try:
        return _state(pid)[0] != "Z"
    except OSError:
        return False


def children(pid=None):
    """Processes that this one, or another, started and that have not ended."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = _state(name)
                if parent == (pid or os.getpid()) and state != "Z":
                    found.append(int(name))
    return found


def kill_in_the_middle(args, out, reached, *, piped=None, group=True):
    """Start a run and kill it once `reached(out)`, or before it writes its manifest.

    The parent process alone is killed without `group`; its workers have to notice by themselves.
    """
    begun = len(events(out))
    with Run(*args, piped=piped, held=MANIFEST) as run:
        wait_until(lambda: not run.goes_on() or (len(events(out)) > begun and reached(out)))
        with contextlib.suppress(ProcessLookupError):
            run.signal(signal.SIGKILL, group)
        code, stderr = run.end()
        wait_until(lambda: not run.alive())
    assert code == -signal.SIGKILL, stderr
    assert not is_complete(out)


@contextlib.contextmanager
def in_time():
    """Fail if the block has not ended after PATIENCE, so that a deadlock is a failure and no endless wait."""

    def late(number, frame):
        raise AssertionError(f"not done after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- what worker processes are given in tests ------------------------------


def answers_of(pool):
    """All that becomes of the units of an engine: (number, result) of each answer, and None behind the last."""
    found = []
    while some := list(pool.done()):
        for done in some:
            if done.error:
                raise done.error
            found.append((done.number, done.result))
            pool.more(done.number)
    return found


def next_of(pool, count):
    """So many answers of an engine, which may come together and need not be followed by more."""
    found = []
    while len(found) < count:
        found += pool.done()
    return found


def spin(unit):
    """(number, cost) -> number, after work in proportion to the cost."""
    number, cost = unit
    for _ in range(cost):
        hashlib.sha256(bytes(1000)).digest()
    return number


def waits_for(unit):
    """(number, a file that is waited for, or "") -> number."""
    number, path = unit
    wait_until(lambda: not path or os.path.exists(path))
    return number


def fails_at_five(unit):
    number, cost = unit
    if number == 5:
        raise ValueError("five")
    return spin((number, cost))


def own_pid(unit):
    return os.getpid()


def prints(unit):
    print("not a frame")
    sys.stdout.flush()
    return unit


class KillsItself:
    """A function that ends its process at one unit."""

    def __init__(self, bad):
        self.bad = bad

    def __call__(self, unit):
        if unit == self.bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return unit


def kills_twice(task):
    """The number of a task; two times, where it names a file, its process ends instead."""
    number, path = task
    if path:
        before = Path(path).read_text() if Path(path).exists() else ""
        if len(before) < 2:
            Path(path).write_text(before + "x")
            os.kill(os.getpid(), signal.SIGKILL)
    return number


def counts_up(unit):
    """The numbers below the first of (stop, path, at), one after the other; once, at `at`, its process ends instead."""
    stop, path, at = unit
    for number in range(stop):
        if number == at and not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield number
    return "end"


def dies_behind_the_first(unit):
    yield 0
    os._exit(7)


def exits(unit):
    os._exit(7)


# --- a crash before every file operation -----------------------------------


def crash_everywhere(job):
    """Run `pack_to` again and again, killed before its first, second, ... file operation, and then going on.

    `job`: folder, sources, settings, and `first`: settings of an earlier run in the same folder, or None; `then`:
    settings with which the killed run is gone on with, if those are others; and `pooled`: how its workers, if there are
    several, are set up in the one process that is killed. The list of (operation, what was wrong) and the number of
    operations. Each run is a fork of this process, which starts no
    threads, so that hundreds of them are cheap.
    """
    for module in ("pyarrow.parquet", "millstream.runs.pack.packing"):
        importlib.import_module(module)  # so that no fork has to import it
    root = Path(job["folder"])
    wanted = root / "wanted"
    assert _forked(job, wanted, None) == 0
    expected, wrong, number = digests(wanted), [], 0
    while True:
        number += 1
        out = root / f"crash-{number}"
        if job["first"]:
            assert _forked({**job, "settings": job["first"]}, out, None) == 0
        code = _forked(job, out, number)
        if code == 0:
            return wrong, number - 1
        if code != -signal.SIGKILL:
            wrong.append((number, f"ended with {code} before it could be killed"))
        elif (code := _forked({**job, "settings": {**job["settings"], **job.get("then", {})}}, out, None)) != 0:
            wrong.append((number, f"going on: {code}; the folder had {sorted(os.listdir(out))}"))
        elif (found := digests(out)) != expected:
            wrong.append((number, f"differs: {sorted(n for n in found | expected if found.get(n) != expected.get(n))}"))


def _forked(job, out, crash_at):
    """`pack_to` in a fork: 0, the exit signal as a negative number, or the message of its exception."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _pack_and_exit(job, str(out), crash_at, writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        message = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return message if code == 1 else code


def _pack_and_exit(job, out, crash_at, writer):
    try:
        import millstream

        os.fsync = lambda fd: None  # a killed process loses nothing that it has written, and this is quick
        if crash_at:
            _crash_at(crash_at, out)
        with _together(job.get("pooled")):
            millstream.pack_to(out, job["sources"], **job["settings"])
    except BaseException as error:
        os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os._exit(0)


def _together(how):
    """Within, several workers are in this process."""
    if not how:
        return contextlib.nullcontext()
    from here import pooled

    return pooled(**how)


def _crash_at(number, out):
    left = number

    def tick():
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        if event in ("open", "os.rename", "os.link", "os.remove", "os.truncate", "os.mkdir") and str(
            args[0]
        ).startswith(out):
            tick()

    os.fsync = lambda fd: tick()
    sys.addaudithook(watch)


def write_id_lists(path, seed, count, faulty=False):
    """JSON lines with lists of ids instead of text: nothing is tokenized, so runs are quick."""
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for number in range(count):
            if faulty and number % 13 == 5:
                file.write(b'{"ids": [1, -2]}\n')
            else:
                ids = rng.integers(0, 300, int(rng.choice([0, 1, 7, 40, 200]))).tolist()
                file.write(json.dumps({"ids": ids, "id": f"d{number}"}).encode() + b"\n")
    return path


if __name__ == "__main__":
    print(json.dumps(crash_everywhere(json.load(sys.stdin))))
