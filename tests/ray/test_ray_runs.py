"""Packed on a Ray cluster: the bytes of a run on this machine, whatever dies on the way."""

import contextlib
import fcntl
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import runs

import millstream
from millstream.engines import cluster
from millstream.errors import RequestError, RunError
from millstream.folder.journal import Measured, events
from millstream.runs.pack import planning
from millstream.store import at

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
SMALL = {"seq_len": 64, "shard_size": 1 << 16, "on_error": "skip"}


@pytest.fixture(autouse=True)
def in_time():
    with runs.in_time():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with every kind of input, one of them with bad lines."""
    folder = tmp_path_factory.mktemp("corpus")
    runs.write_plain(folder / "a.jsonl", runs.lines(1, 600_000, faulty=0.1))
    runs.write_gzip(folder / "b.jsonl.gz", runs.lines(2, 300_000))
    runs.write_zstd(folder / "c.jsonl.zst", runs.lines(3, 200_000))
    runs.write_parquet(folder / "d.parquet", runs.lines(4, 300_000))
    runs.write_texts(folder / "e", runs.lines(5, 100_000))
    return folder


def here(folder, corpus, **settings):
    millstream.pack_to(folder, corpus, **{**SMALL, **settings}, workers=1)
    return runs.digests(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"eos": True, "format": "npy,megatron,mds"},
        {"strategy": "best-fit", "window": 20_000, "validation": 0.2, "format": "parquet"},
        {"strategy": "split", "shuffle": 7, "shuffle_window": 5_000, "limit": 700},
    ],
    ids=["concat", "best-fit", "split"],
)
def test_the_bytes_are_those_of_this_machine(nodes, corpus, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(planning, "LARGE", 1 << 16)  # packed inputs are unpacked by one worker for all
    wanted = here(tmp_path / "here", corpus, **settings)
    report = millstream.pack_to(tmp_path / "ray", corpus, **{**SMALL, **settings}, on=nodes.address)
    assert runs.digests(tmp_path / "ray") == wanted
    assert report.workers == 2
    assert "2 nodes of the Ray cluster" in report.workers_why
    *_, last = events(at(tmp_path / "ray"), Measured)
    assert sum(node.workers for node in last.nodes) == 2
    assert all(node.memory > 10 << 20 and node.cpu > 0 for node in last.nodes)


def test_the_driver_is_outside_the_cluster(nodes, corpus, tmp_path):
    wanted = here(tmp_path / "here", corpus / "a.jsonl")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = runs.cli("pack", corpus / "a.jsonl", "--out", tmp_path / "ray", *flags, "--on", nodes.client_address)
    assert done.returncode == 3, done.stderr
    assert f"2 nodes of the Ray cluster at {nodes.client_address}" in done.stdout
    assert runs.digests(tmp_path / "ray") == wanted


def test_conversations_and_pieces_in_a_folder(nodes, tmp_path):
    source = runs.write_prompts(tmp_path / "a.jsonl", runs.lines(6, 200_000))
    wanted = here(tmp_path / "here", source, chat=True, eos=True)
    millstream.pack_to(
        tmp_path / "ray", source, **SMALL, chat=True, eos=True, on=nodes.address, spill=str(tmp_path / "spill")
    )
    assert runs.digests(tmp_path / "ray") == wanted
    assert not list(tmp_path.glob("spill/*"))


def test_a_tokenizer_that_is_on_one_machine_alone(nodes, corpus, tmp_path):
    """Workers are given it, and never look for its path: the nodes were started elsewhere, and it is a relative one."""
    runs.train_tokenizer(tmp_path / "tokenizer.json")
    wanted = here(tmp_path / "here", corpus / "a.jsonl", tokenizer=str(tmp_path / "tokenizer.json"))
    script = (
        "import os, sys, millstream\n"
        "from millstream.runs.pack import site\n"
        "begun = site.site_of\n"
        "def gone(*args):\n"
        "    os.unlink('tokenizer.json')\n"
        "    return begun(*args)\n"
        "from millstream.runs.pack import driver\n"
        "driver.site_of = gone\n"
        f"settings = {dict(SMALL, on=nodes.address, tokenizer='tokenizer.json')!r}\n"
        f"millstream.pack_to('ray', {str(corpus / 'a.jsonl')!r}, **settings)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=runs.PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert runs.digests(tmp_path / "ray") == wanted


# --- killed in the middle -----------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A corpus that takes a while, and what one worker makes of it."""
    folder = tmp_path_factory.mktemp("large")
    runs.write_plain(folder / "a.jsonl", runs.lines(7, 6_000_000))
    wanted = {"strategy": "best-fit", "window": 400_000, "shard_size": 1 << 18}
    return folder / "a.jsonl", wanted, here(folder / "here", folder / "a.jsonl", **wanted)


def holders(some, path):
    """Those of some workers that have a file open whose name begins like that."""
    found = []
    for pid in some:
        with contextlib.suppress(OSError):
            links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
            if any(link.startswith(str(path)) for link in links):
                found.append(pid)
    return found


def kills(some, path):
    """Kill the first of some workers that have such a file open; whether there is one."""
    for pid in holders(some, path)[:1]:
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def killed(nodes, large, out, path):
    """A run of which a worker is killed that has such a file open; whether it was not too quick for that."""
    with begun(nodes, large, out) as run:
        runs.wait_until(lambda: len(nodes.workers()) == 2 or not run.goes_on())
        there = nodes.workers()
        runs.wait_until(lambda: kills(there, path) or not run.goes_on())
        end(run, out, large[2])
    return "worker died" in runs.events(out)


def begun(nodes, large, out, held=None):
    """The command line, packing on the cluster."""
    source, settings, _ = large
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **settings}.items()]
    return runs.Run("pack", source, "--out", out, *flags, "--on", nodes.address, held=held)


def end(run, out, wanted):
    code, told = run.end()
    assert code == 0, told
    assert runs.digests(out) == wanted


@pytest.mark.parametrize("held", ["a.jsonl", "samples-"], ids=["reading", "writing"])
def test_a_worker_is_killed(nodes, large, tmp_path, held):
    outs = [tmp_path / str(attempt) for attempt in range(5)]
    assert any(killed(nodes, large, out, large[0] if held == "a.jsonl" else out / held) for out in outs)


def test_a_node_is_killed(nodes, large, tmp_path):
    out = tmp_path / "out"
    with begun(nodes, large, out, held="train-") as run:
        runs.wait_until(lambda: not run.goes_on())  # a first shard is written, and most are not begun
        nodes.kill(nodes.other)
        run.let_go()
        end(run, out, large[2])
    nodes.remove(nodes.other)
    nodes.other = nodes.add()
    assert {"worker died", "node"} & set(runs.events(out))  # the second, if it was known before the run ended


@pytest.mark.parametrize("then", ["ray", "local"])
def test_the_driver_is_killed_and_the_same_command_goes_on(nodes, large, tmp_path, then):
    source, settings, wanted = large
    out = tmp_path / "out"
    with begun(nodes, large, out, held="manifest.json") as run:
        runs.wait_until(lambda: "commit" in runs.events(out) or not run.goes_on())
        run.signal(signal.SIGKILL, group=False)
        assert run.end()[0] == -signal.SIGKILL
    sealed = {(name, os.stat(out / name).st_mtime_ns) for name in os.listdir(out) if name.endswith(".npy")}
    on = nodes.address if then == "ray" else "local"
    report = millstream.pack_to(out, source, **{**SMALL, **settings}, on=on, workers=2, memory=2 << 30)
    assert report.resumed
    assert runs.digests(out) == wanted
    assert {(name, os.stat(out / name).st_mtime_ns) for name in os.listdir(out)} & sealed


# --- what will not do, in one line ----------------------------------------------


def told_of(tmp_path, *flags, **environment):
    """The one line that the command line says, and its exit code."""
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n')
    command = runs.command("pack", tmp_path / "a.jsonl", "--out", tmp_path / "out", *flags)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=runs.PATIENCE
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert not (tmp_path / "out" / "run.json").exists()
    return done.returncode, lines[0]


def test_an_address_where_nothing_answers(tmp_path):
    code, line = told_of(tmp_path, "--on", "127.0.0.1:1")
    assert code == 2
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in line


def test_a_cluster_of_another_version(nodes, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '1.0'\n")
    code, line = told_of(tmp_path, "--on", nodes.address, PYTHONPATH=str(tmp_path))
    assert code == 2
    assert "Version mismatch" in line


def test_a_source_that_no_node_sees_as_it_is_here(nodes, tmp_path):
    """A path below /proc/self is another one in each process."""
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n')
    with open(tmp_path / "a.jsonl", "rb") as file:
        source = f"/proc/self/fd/{file.fileno()}"
        with pytest.raises(RequestError, match=r"the Ray node .*127\.0\.0\.1.* does not see"):
            millstream.pack_to(tmp_path / "out", source, on=nodes.address, **SMALL)


def test_a_source_in_the_middle_that_no_node_can_read(nodes, tmp_path):
    """It is not looked at before the work begins, and is no fault that may be skipped: this machine can read it."""
    named = [runs.write_plain(tmp_path / f"{name}.jsonl", runs.lines(1, 3_000)) for name in "abc"]
    with open(tmp_path / "b.jsonl", "rb") as file:
        high = fcntl.fcntl(file, fcntl.F_DUPFD, 500)  # which is none of a worker's
        (tmp_path / "b.jsonl").rename(tmp_path / "there.jsonl")
        (tmp_path / "b.jsonl").symlink_to(f"/proc/self/fd/{high}")
        try:
            with pytest.raises(RunError, match=rf"b\.jsonl cannot be read on {platform.node()}: No such file"):
                millstream.pack_to(tmp_path / "out", named, on=nodes.address, **SMALL)
        finally:
            os.close(high)
    (tmp_path / "there.jsonl").replace(tmp_path / "b.jsonl")
    millstream.pack_to(tmp_path / "out", named, on=nodes.address, **SMALL)
    assert runs.digests(tmp_path / "out") == here(tmp_path / "here", named)


def test_memory_is_that_of_each_machine(nodes, tmp_path):
    code, line = told_of(tmp_path, "--on", nodes.address, "--memory", "64MiB")
    assert code == 2
    assert "has the memory that a worker needs: give more as --memory" in line


@pytest.mark.parametrize("named", [("RAY_TMPDIR", "TMPDIR"), ("TMPDIR",)])
def test_a_running_cluster_is_found_where_ray_has_written_it_down(tmp_path, monkeypatch, named):
    """Where it writes that is for Ray to say, so it is asked."""
    from ray._common.utils import get_ray_address_file

    monkeypatch.delenv("RAY_TMPDIR")
    for name in named:
        monkeypatch.setenv(name, str(tmp_path / name))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = "{}:{}".format(*listening.getsockname())
        written = Path(get_ray_address_file(None))
        written.parent.mkdir(parents=True)
        written.write_text(address)
        assert cluster._running() == address


OWN = """
import sys
from millstream.engines.cluster import Cluster

cluster = Cluster(None, 1)
print(cluster.own, flush=True)
sys.stdin.read()
cluster.close()
"""
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def listening(pid):
    """The addresses at which a process can be reached, as Linux writes them."""
    links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    for kind in ("tcp", "tcp6"):
        for line in Path("/proc", pid, "net", kind).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                yield fields[1].partition(":")[0]


def test_nobody_else_reaches_a_cluster_that_is_started_here(tmp_path):
    """That hangs on a name of Ray's that is nobody's business, and on no setting."""
    short = tempfile.mkdtemp(dir="/tmp")  # Ray makes sockets below it, whose names have a limit
    own = {**os.environ, "RAY_TMPDIR": short}
    del own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # which says the same, for the clusters of these tests
    with subprocess.Popen(
        [sys.executable, "-c", OWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own, text=True
    ) as process:
        assert process.stdout.readline() == "True\n"
        reached = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if short.encode() in Path("/proc", name, "cmdline").read_bytes() or int(name) == process.pid:
                    reached += listening(name)
    assert process.returncode == 0
    assert reached
    assert set(reached) <= set(LOOPBACK)
    shutil.rmtree(short)


def test_what_is_replaced_in_ray_is_there():
    """Where it is not, pages of Ray's go to standard output, and a cluster of this machine can be reached from others:
    who runs it is not told."""
    from ray._private import ray_constants, worker

    assert callable(worker.listen_error_messages)
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)


def test_ray_is_started_where_there_is_none_and_ended(corpus, tmp_path):
    before = {name for name in os.listdir("/proc") if name.isdigit()}
    short = tempfile.mkdtemp(dir="/tmp")  # Ray makes sockets below it, whose names have a limit
    own = {**os.environ, "RAY_TMPDIR": short}
    command = runs.command("pack", corpus / "a.jsonl", "--out", tmp_path / "out", "--on", "ray", "--on-error", "skip")
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=runs.PATIENCE)
    assert done.returncode == 3, done.stderr
    assert "by Ray, which was started on this machine" in done.stdout

    def left():
        found = set()
        for name in {name for name in os.listdir("/proc") if name.isdigit()} - before:
            try:
                if short.encode() in Path("/proc", name, "cmdline").read_bytes():
                    found.add(name)
            except OSError:
                continue
        return found

    runs.wait_until(lambda: not left())
    shutil.rmtree(short)
