"""docs/training.md runs, and prints what it says: alone, and as the only rank of a group."""

import sys

import pytest
from runs import kept_port
from test_docs import ROOT, run_page
from torch import distributed


@pytest.fixture
def rank(monkeypatch):
    """This process is the only rank of a group, should it ask; the group ends with the test."""
    kept, port = kept_port()
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        group["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name need not lead anywhere
    for name, value in {**group, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
    kept.close()


@pytest.mark.parametrize("is_rank", [False, True], ids=["alone", "as a rank"])
def test_the_page_runs(is_rank, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if is_rank:
        request.getfixturevalue("rank")
    run_page(ROOT / "docs" / "training.md")
    assert distributed.is_initialized() == is_rank
