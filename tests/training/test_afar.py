"""Workers of a DataLoader over a bucket: each opens it for itself, however it is started."""

import json
import pickle
import subprocess
import sys

import pytest
from bench import served
from runs import PATIENCE
from torch.utils.data import DataLoader

import millstream
from millstream.errors import RequestError
from millstream.store import at
from millstream.torch import PackedDataset, collate

TEXTS = [f"{number} " + "word " * (number % 40) for number in range(120)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A corpus and what was packed of it, in a bucket."""
    with served.served(tmp_path_factory.mktemp("server")) as server, pytest.MonkeyPatch.context() as patch:
        served.use(patch, server)
        bucket = served.bucket_for(server, "training")
        at(f"{bucket}/corpus").put("a.jsonl", "\n".join(json.dumps({"text": text}) for text in TEXTS).encode())
        millstream.pack_to(f"{bucket}/run", f"{bucket}/corpus", seq_len=32, eos=True, shard_size=2048)
        yield f"{bucket}/run"


def rows(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_our_loader_has_workers(run):
    data = PackedDataset(run, seed=3, epochs=2)
    wanted = [data[place].token_ids.tolist() for place in range(len(data))]
    assert rows(data.loader(5, workers=2)) == wanted
    loader = data.loader(5, workers=2)
    begun = iter(loader)
    head = rows([next(begun), next(begun)])
    later = PackedDataset(run, seed=3, epochs=2).loader(3, workers=2)
    later.load_state_dict(loader.state_dict())
    assert head + rows(later) == wanted


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_plain_dataloader_starts_workers_anew(run, start):
    data = PackedDataset(run, shuffle=False)
    loader = DataLoader(data, batch_size=7, collate_fn=collate, num_workers=2, multiprocessing_context=start)
    assert rows(loader) == [sample.token_ids.tolist() for sample in millstream.open(run)]


def test_workers_that_are_forked_are_told_how_to_start(run):
    loader = DataLoader(
        PackedDataset(run), batch_size=7, collate_fn=collate, num_workers=2, multiprocessing_context="fork"
    )
    with pytest.raises(RequestError, match="multiprocessing_context='forkserver'"):
        next(iter(loader))


def test_a_dataset_can_be_sent(run):
    data = pickle.loads(pickle.dumps(millstream.open(run)))
    assert [sample.token_ids.tolist() for sample in data] == [s.token_ids.tolist() for s in millstream.open(run)]


STREAMING = """
import json, sys
from contextlib import closing
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from millstream import streams

class Texts(IterableDataset):
    def __iter__(self):
        me = get_worker_info()
        with closing(streams.read(sys.argv[1], text_field="text")) as documents:
            yield from (each.text for at, each in enumerate(documents) if at % me.num_workers == me.id)

if __name__ == "__main__":
    loader = DataLoader(Texts(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[2])
    print(json.dumps([[*loader], [*loader]]))
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_streams_in_workers(run, tmp_path, start):
    """Where this process has opened no bucket yet, workers that are forked may, too; and the next ones after them."""
    script = tmp_path / "script.py"
    script.write_text(STREAMING)
    done = subprocess.run(
        [sys.executable, script, run.replace("/run", "/corpus"), start],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert [sorted(each) for each in json.loads(done.stdout)] == [sorted(TEXTS)] * 2
