"""A real server of buckets (moto's) on 127.0.0.1, for the tests whose environment has it, and for a row of the
benchmarks."""

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

OWN = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
}


@contextlib.contextmanager
def served(folder, python=sys.executable):
    """The address of a server of this environment or of another `python`'s, which ends with the block; its log is in a
    folder."""
    log = Path(folder, "log")
    command = [Path(python).with_name("moto_server"), "-H", "127.0.0.1", "-p", "0"]
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            while not (found := re.search(r"Running on (http://[\d.:]+)\s", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield found[1]
        finally:
            process.kill()


def make_bucket(server, name):
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    return f"s3://{name}"


def bucket_for(server, name):
    """A new bucket, which is called like a test."""
    return make_bucket(server, f"{re.sub(r'[^a-z0-9]+', '-', name.lower())[:40].strip('-')}-{os.urandom(4).hex()}")


def use(patch, server):
    """See that what is done from here on goes to the server, with nothing of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in {**OWN, "AWS_ENDPOINT_URL": server}.items():
        patch.setenv(name, value)
