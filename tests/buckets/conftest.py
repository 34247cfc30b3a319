"""A real server of buckets (moto's) on 127.0.0.1, and buckets in it."""

import threading

import pytest
from bench import served
from faulty import Proxy


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a server of this session's own."""
    with served.served(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(autouse=True)
def _to_the_server(server, monkeypatch):
    served.use(monkeypatch, server)


@pytest.fixture
def bucket(server, request):
    """The address of a bucket of this test's own."""
    return served.bucket_for(server, request.node.name)


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy that clients of this test go through."""
    proxy = Proxy(server)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.shutdown()
    thread.join()
    proxy.server_close()
