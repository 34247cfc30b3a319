"""torchdata's loader over the dataset: what it was stopped and went on with is what it would have been."""

import json
import pickle
import random

import pytest
from torch.utils.data import SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import millstream
from millstream.torch import PackedDataset, collate

# torchdata 0.11 calls what PyTorch 2.13 would rather have nobody call.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

BATCH = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    base, rng = tmp_path_factory.mktemp("runs"), random.Random(0)
    for name in "ab":
        texts = [" ".join(rng.choices(["one", "two", "three"], k=rng.randint(1, 30))) for _ in range(40)]
        (base / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        millstream.pack_to(base / name, base / f"{name}.jsonl", seq_len=16, eos=True, shard_size=512, workers=1)
    return PackedDataset([base / "a", base / "b"], weights=[2, 1], seed=3, epochs=2)


def loader_of(data, workers):
    return StatefulDataLoader(
        data, batch_size=BATCH, sampler=SequentialSampler(data), collate_fn=collate, num_workers=workers
    )


def rows(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_to_the_same_samples_at_the_same_number_of_workers(data, workers):
    """Stopped in the middle of what workers have read ahead, and around the edge of an epoch."""
    taken, state = [], None
    for steps in (1, 6, len(data) // 2 // BATCH - 7, 3):
        loader = loader_of(pickle.loads(pickle.dumps(data)), workers)
        if state:
            loader.load_state_dict(pickle.loads(state))
        taken += rows(batch for _, batch in zip(range(steps), loader, strict=False))
        state = pickle.dumps(loader.state_dict())
    last = loader_of(data, workers)
    last.load_state_dict(pickle.loads(state))
    taken += rows(last)
    assert len(data) > 20 * BATCH
    assert taken == [data[place].token_ids.tolist() for place in range(len(data))]


def test_it_refuses_a_state_of_another_number_of_workers(data):
    loader = loader_of(data, 0)
    next(iter(loader))
    other = loader_of(data, 2)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(AssertionError, match="State doesn't contain key"):
        next(iter(other))
