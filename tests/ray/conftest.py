"""A small Ray cluster on the loopback device: a head and another node, of one CPU each."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from bench import served
from runs import kept_port

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray takes the machine's own address for 127.0.0.1
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[:2]))  # for what workers are given here
os.environ["RAY_AUTH_MODE"] = "disabled"  # else clients have to be given a token; all of it is on the loopback device
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(dir="/tmp")  # Ray makes sockets below it, whose names have a limit

IMPATIENT = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 6,
}
"""How soon a node that does not answer is dead: by default after half a minute."""
NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}


class Nodes:
    """The cluster at `address`, to which nodes are added and of which some are killed."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self._port, port = kept_port()
        self.client_address = f"ray://127.0.0.1:{port}"
        own = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port}
        head = {**NODE, **own, "_system_config": IMPATIENT}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.other = self.add()

    def add(self, **how):
        return self._cluster.add_node(**{**NODE, "num_cpus": 1, **how}, wait=True)

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

    def kill(self, node):
        """End a node's own process with -9, as when its machine is gone."""
        os.kill(node.all_processes["raylet"][0].process.pid, 9)

    def close(self):
        self._cluster.shutdown()
        self._port.close()


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
