"""A command of millstream on a Ray cluster of two nodes on this machine, a CPU each, which ends with it.

Run as `.venv-ray/bin/python bench/ray_nodes.py pack ...`; `--on` is added.
"""

import contextlib
import os
import subprocess
import sys

NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 200 << 20}


def main(arguments: list[str]) -> int:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray takes the machine's own address for 127.0.0.1
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE, wait=True)
        return subprocess.run([sys.executable, "-m", "millstream", *arguments, "--on", cluster.address]).returncode
    finally:
        with contextlib.suppress(Exception):  # how it ends says nothing of the run
            cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
