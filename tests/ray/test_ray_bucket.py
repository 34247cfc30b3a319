"""A cluster and a bucket: the bytes of a run on this machine."""

import os
import shutil

import pytest
import runs
from bench import served

import millstream
from millstream.errors import RequestError
from millstream.store import at

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
SMALL = {"seq_len": 64, "shard_size": 1 << 16, "text_field": "text", "id_field": "id"}


@pytest.fixture(autouse=True)
def in_time():
    with runs.in_time():
        yield


@pytest.fixture
def bucket(nodes, server, request):
    return served.bucket_for(server, request.node.name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "corpus"
    folder.mkdir()
    runs.write_plain(folder / "a.jsonl", runs.lines(1, 600_000))
    runs.write_zstd(folder / "b.jsonl.zst", runs.lines(2, 200_000))
    runs.write_parquet(folder / "c.parquet", runs.lines(3, 300_000))
    return folder


def into(bucket, folder):
    """The files of a folder, as objects below an address."""
    for path in folder.iterdir():
        at(bucket).put(path.name, path.read_bytes())
    return bucket


def fetched(url, folder):
    """A run in a bucket, as a folder of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in at(url).list():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(at(url).read(name))
    return folder


@pytest.mark.parametrize(
    ("way", "spill"),
    [({"eos": True, "format": "npy,megatron"}, False), ({"strategy": "best-fit", "validation": 0.2}, True)],
    ids=["concat", "best-fit"],
)
def test_from_a_bucket_into_a_bucket(nodes, bucket, corpus, tmp_path, way, spill):
    source, out = into(f"{bucket}/corpus", corpus), f"{bucket}/run"
    millstream.pack_to(tmp_path / "here", corpus, **SMALL, **way, workers=1)
    more = {"spill": f"{bucket}/spill"} if spill else {}
    report = millstream.pack_to(out, source, **SMALL, **way, **more, on=nodes.address)
    assert "2 nodes of the Ray cluster" in report.workers_why
    assert runs.digests(fetched(out, tmp_path / "there")) == runs.digests(tmp_path / "here")
    assert millstream.verify(out, against=source).problems == []
    assert millstream.pack_to(out, source, **SMALL, **way, on=nodes.address).already
    assert {name.partition("/")[0] for name in at(bucket).list()} == {"corpus", "run"}


def test_a_node_without_credentials_is_refused_by_name(nodes, bucket, corpus):
    source = into(f"{bucket}/corpus", corpus)
    own = {"AWS_ACCESS_KEY_ID": "", "PYTHONPATH": os.environ["PYTHONPATH"]}
    with nodes.more(env_vars=own), pytest.raises(RequestError, match=r"the Ray node .* no credentials") as error:
        millstream.pack_to(f"{bucket}/run", source, **SMALL, on=nodes.address)
    assert "\n" not in str(error.value)
