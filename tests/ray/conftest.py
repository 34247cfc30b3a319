"""A small Ray cluster on the loopback device: a head and another node, of one CPU each."""

import contextlib
import inspect
import itertools
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from bench import served
from runs import PATIENCE, children, kept_port, wait_until

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray takes the machine's own address for 127.0.0.1
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[:2]))  # for what workers are given here
os.environ["RAY_AUTH_MODE"] = "disabled"  # else clients have to be given a token; all of it is on the loopback device
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(dir="/tmp")  # Ray makes sockets below it, whose names have a limit

# Else workers are killed where others have taken the memory.
os.environ.update({"RAY_memory_monitor_refresh_ms": "0"})

# A busy machine takes its time to start a process.
for name in (
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S",
    "RAY_gcs_server_port_wait_time_s",
    "RAY_gcs_server_request_timeout_seconds",
    "RAY_py_gcs_connect_timeout_s",
    "RAY_worker_register_timeout_seconds",
):
    os.environ[name] = str(PATIENCE)

IMPATIENT = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 6,
}
"""How soon a node is dead whose process is gone, by default after half a minute; and how late one that is slow to
answer, as its machine is busy: else it is taken for dead, ends itself, and is missing in all tests that follow."""
AGENTS = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}


@contextlib.contextmanager
def told_ports():
    """A node ends that has not read within 15 seconds at which ports its agents are, and on a busy machine they need
    more to start: it finds them written down, as they do it once they are there."""
    from ray._private import services
    from ray._raylet import get_port_filename

    start = services.start_raylet

    def started(*args, **named):
        given = inspect.signature(start).bind(*args, **named).arguments
        for name in AGENTS:
            Path(given["session_dir"], get_port_filename(given["node_id"], name)).write_text(str(given[name]))
        return start(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "start_raylet", started)
        yield


def answers(port):
    with socket.socket() as knocking:
        return knocking.connect_ex(("127.0.0.1", port)) == 0


def raylet_of(node):
    """A node's own process, whose children are its workers."""
    return node.all_processes["raylet"][0].process


class Nodes:
    """The cluster at `address`, to which nodes are added and of which some are killed."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        kept, port = kept_port()
        self._kept = [kept]
        self._cluster = Cluster()
        self.client_address = f"ray://127.0.0.1:{port}"
        self._head = self.add(include_dashboard=False, ray_client_server_port=port, _system_config=IMPATIENT)
        self.address = self._cluster.address
        self.other = self.add()
        wait_until(lambda: answers(port))

    def add(self, **how):
        kept = {name: kept_port() for name in AGENTS}
        self._kept += [each for each, _ in kept.values()]
        ports = {name: port for name, (_, port) in kept.items()}
        with told_ports():
            node = self._cluster.add_node(**{**NODE, **ports, **how}, wait=True)
        wait_until(lambda: answers(ports["runtime_env_agent_port"]))  # else clients give up that come too early
        return node

    @contextlib.contextmanager
    def more(self, **how):
        """Another node, to the end of the block."""
        node = self.add(**how)
        try:
            yield node
        finally:
            self.remove(node)

    def remove(self, node):
        self._cluster.remove_node(node, allow_graceful=False)

    def workers(self):
        """The processes of workers that have begun, on the nodes that were there first: none of another cluster."""
        raylets = [raylet_of(node).pid for node in (self._head, self.other)]
        found = []
        for pid in itertools.chain.from_iterable(map(children, raylets)):
            with contextlib.suppress(OSError):
                if Path("/proc", str(pid), "cmdline").read_bytes().startswith(b"ray::RayWorker"):
                    found.append(pid)
        return found

    def kill(self, node):
        """End a node's own process with -9, as when its machine is gone."""
        os.kill(raylet_of(node).pid, 9)

    def close(self):
        self._cluster.shutdown()
        for kept in self._kept:
            kept.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a server of buckets."""
    with served.served(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def nodes(server):
    """It begins with the credentials for the server in its environment, which workers have from it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        served.use(patch, server)
        yield from _made(ray)


def _made(ray):
    made = Nodes()
    try:
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        yield made
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        made.close()


def pytest_sessionfinish():
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
