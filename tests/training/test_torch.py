"""The dataset for PyTorch: its batches are those of the global order, whatever reads them and wherever it stopped."""

import itertools
import json
import multiprocessing
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

import millstream
from millstream import streams
from millstream.errors import RequestError, ResumeRefused, RunError
from millstream.torch import PackedDataset, StreamDataset, collate, collate_flat, collate_ids

ARRAYS = {"input_ids": "token_ids", "labels": "labels", "position_ids": "position_ids", "cu_seqlens": "cu_seqlens"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three runs of different sizes, and one that does not go with them."""
    base = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    for name, documents, seq_len in (("a", 60, 16), ("b", 25, 16), ("c", 40, 16), ("other", 20, 8)):
        texts = [
            " ".join(rng.choices(["one", "two", "three", "four", "five", "six"], k=rng.randint(1, 30)))
            for _ in range(documents)
        ]
        (base / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        millstream.pack_to(str(base / name), str(base / f"{name}.jsonl"), seq_len=seq_len, eos=True, shard_size=512)
    return base


@pytest.fixture(scope="module")
def mixed(base):
    return PackedDataset([base / "a", base / "b", base / "c"], weights=[5, 3, 2], seed=3, epochs=2)


def rows(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def in_order(data, places):
    return [data[place].token_ids.tolist() for place in places]


def test_an_epoch_has_every_sample_of_every_folder_once(base):
    folders = [base / "a", base / "b"]
    data = PackedDataset(folders, seed=1, epochs=3)
    stored = sorted(sample.token_ids.tolist() for folder in folders for sample in millstream.open(folder))
    epochs = [in_order(data, range(begin, begin + len(stored))) for begin in range(0, len(data), len(stored))]
    assert [sorted(epoch) for epoch in epochs] == [stored] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    with pytest.raises(IndexError):
        data[len(data)]
    assert rows([collate(list(data)[:5])]) == epochs[0][:5]


def test_a_batch_says_what_its_samples_say(mixed):
    samples = [mixed[place] for place in range(6)]
    expected = millstream.collate(samples)
    for found in (collate(samples), collate(mixed.__getitems__(range(6))), next(iter(mixed.loader(6)))):
        for name, array in ARRAYS.items():
            assert np.array_equal(found[name].numpy(), getattr(expected, array)), name
        assert found["max_seqlen"] == expected.max_seqlen
    flat = collate_flat(samples)
    assert flat["input_ids"].tolist() == [expected.token_ids.reshape(-1).tolist()]
    assert flat["cu_seq_lens_k"].tolist() == expected.cu_seqlens.tolist()
    assert flat["max_length_q"] == expected.max_seqlen
    for alone in (collate_ids(samples), next(iter(mixed.loader(6, collate=collate_ids)))):
        assert list(alone) == ["input_ids"]
        assert np.array_equal(alone["input_ids"].numpy(), expected.token_ids)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_all_ranks_together_take_the_global_order(mixed, workers, world):
    loaders = [mixed.loader(4, rank, world, workers=workers) for rank in range(world)]
    count = len(loaders[0])
    ranks = [rows(loader) for loader in loaders]
    together = [row for step in zip(*ranks, strict=True) for row in step]
    assert together == in_order(mixed, range(len(mixed) // world * world))
    assert count == -(-len(mixed) // (4 * world)) or len(mixed) % (4 * world) < world
    assert {json.dumps(loader.state_dict()) for loader in loaders} == {json.dumps(loaders[0].state_dict())}


def test_stopped_anywhere_it_goes_on_with_other_ranks_workers_and_batches(mixed):
    """The state is of what was handed out, though workers have read further."""
    rng = random.Random(5)
    state, taken = None, []
    for turn in range(8):
        world, batch, workers = rng.choice([1, 2, 3]), rng.choice([1, 4, 7]), (0, 2)[turn % 2]
        data = pickle.loads(pickle.dumps(mixed))
        loaders = [data.loader(batch, rank, world, workers=workers) for rank in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)))
        steps = rng.randint(1, 3)
        ranks = [rows(each for _, each in zip(range(steps), loader, strict=False)) for loader in loaders]
        taken += [row for step in zip(*ranks, strict=True) for row in step]
        [state] = {json.dumps(loader.state_dict()): loader.state_dict() for loader in loaders}.values()
        assert state["next"] == len(taken)
    assert taken == in_order(mixed, range(len(taken)))
    assert len(json.dumps(state)) < 1000


def test_a_state_of_another_order_is_refused(base, mixed):
    state = mixed.loader(2).state_dict()
    other = PackedDataset([base / "a", base / "b", base / "c"], weights=[5, 3, 2], seed=4)
    with pytest.raises(ResumeRefused, match="seed was 3 and is 4 now"):
        other.loader(2).load_state_dict(state)


def test_with_fewer_epochs_than_it_has_had_there_is_nothing_left(base):
    loader = PackedDataset(base / "a", epochs=2).loader(4)
    list(loader)
    fewer = PackedDataset(base / "a", epochs=1).loader(4)
    fewer.load_state_dict(loader.state_dict())
    assert (len(fewer), list(fewer)) == (0, [])
    more = PackedDataset(base / "a", epochs=3)
    again = more.loader(4)
    again.load_state_dict(loader.state_dict())
    assert rows(again) == in_order(more, range(len(loader.data), len(more)))


def test_no_random_number_is_drawn_from_the_global_generator(mixed):
    """Else dropout after a resume would be another."""
    before = torch.get_rng_state()
    for workers in (0, 2):
        next(iter(mixed.loader(2, workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader_takes_the_same_in_sequence(mixed, workers):
    loader = DataLoader(mixed, batch_size=5, sampler=SequentialSampler(mixed), collate_fn=collate, num_workers=workers)
    assert rows(loader) == in_order(mixed, range(len(mixed)))


def test_it_can_be_sent_to_workers_that_start_anew(mixed):
    spawn = multiprocessing.get_context("spawn")
    loader = DataLoader(mixed, batch_size=9, collate_fn=collate, num_workers=1, multiprocessing_context=spawn)
    # To the end: a spawned worker with batches still to send aborts where its iterator is dropped (PyTorch's thread for
    # them is ended within C++).
    assert rows(loader) == in_order(mixed, range(len(mixed)))


def test_memory_that_a_tensor_looks_at_is_not_taken_again(mixed):
    held = list(mixed.loader(4))
    assert rows(held) == in_order(mixed, range(len(mixed)))
    tails = [batch["input_ids"][-1, 3:] for batch in mixed.loader(4)]  # views of views
    assert [tail.tolist() for tail in tails] == [batch["input_ids"][-1, 3:].tolist() for batch in held]
    seen = {batch["input_ids"].data_ptr() for batch in mixed.loader(4)}
    assert len(seen) <= 4
    again = {batch["labels"].data_ptr() for batch in mixed.loader(4, reuse=True) if len(batch["labels"]) == 4}
    assert len(again) == 1


def test_a_loader_has_one_iterator(mixed):
    loader = mixed.loader(2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(RequestError, match="go on with its new iterator"):
        next(first)
    assert loader.state_dict()["next"] == 4


def test_the_rank_is_what_torchrun_says(mixed, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rows([next(iter(mixed.loader(3)))]) == in_order(mixed, [1, 3, 5])


def test_what_does_not_work_is_named(base, mixed, tmp_path):
    with pytest.raises(RequestError, match=r"do not go together: seq_len 16 and 8"):
        PackedDataset([base / "a", base / "other"])
    with pytest.raises(RequestError, match="at least one run folder"):
        PackedDataset([])
    with pytest.raises(RequestError, match="2 weights do not work for 1 folders"):
        PackedDataset(base / "a", weights=[1, 2])
    for epochs in (0, 1.5, "2", None):
        with pytest.raises(RequestError, match=rf"epochs={epochs!r} does not work: give a whole number"):
            PackedDataset(base / "a", epochs=epochs)
    for seed in (-1, 1.5, "a", None, 1 << 64):
        with pytest.raises(RequestError, match=rf"seed {seed!r} does not work"):
            PackedDataset(base / "a", seed=seed)
    for weights in (1, "a", [0], [float("nan")], ["a"], {"a": 1}):
        with pytest.raises(RequestError, match=r"weights .* do not work: give each a number above 0"):
            PackedDataset(base / "a", weights=weights)
    with pytest.raises(RequestError, match="shuffle=7 does not work"):
        PackedDataset(base / "a", shuffle=7)
    for none in (None, 5, {"a": 1}, {"a"}):
        with pytest.raises(RequestError, match=f"{none} is no run folder, and no list of them"):
            PackedDataset(none)
    assert len(PackedDataset(base / name for name in "aa")) == 2 * len(PackedDataset(base / "a"))
    with pytest.raises(RequestError, match="reuse=True works with workers=0"):
        mixed.loader(2, workers=1, reuse=True)
    for rank, world in ((2, 2), (-1, 2), (0, None), (None, 2), (0, 0), (0.0, 2), ("0", "2")):
        with pytest.raises(RequestError, match="give a rank from 0"):
            mixed.loader(2, rank, world)
    for size in (0, 1.5, "4", None):
        with pytest.raises(RequestError, match=f"batch_size={size!r} does not work"):
            mixed.loader(size)
    with pytest.raises(RequestError, match="workers=-1 does not work"):
        mixed.loader(2, workers=-1)
    with pytest.raises(RequestError, match=r"fewer samples than ranks, .* for 1,000 ranks"):
        mixed.loader(2, 0, 1000)
    for place in (1.5, "a", None):
        with pytest.raises(TypeError):
            mixed[place]


def test_numbers_of_numpy_are_numbers(base):
    def loader(of):
        return PackedDataset([base / "a", base / "b"], seed=of(3), epochs=of(2)).loader(of(4), of(1), of(2))

    theirs, ours = loader(np.int64), loader(int)
    assert rows(theirs) == rows(ours)
    assert json.dumps(theirs.state_dict()) == json.dumps(ours.state_dict())


def test_what_is_no_state_is_refused(mixed):
    state = mixed.loader(2).state_dict()
    for wrong in (None, 5, "state", json.dumps(state), {}, {**state, "next": -1}, {**state, "next": 1.5}):
        with pytest.raises(ResumeRefused, match=r"no state of a loader"):
            mixed.loader(2).load_state_dict(wrong)


def test_a_damaged_shard_does_not_end_a_loop(base, tmp_path):
    """An IndexError would: a loop over what has no end but that one takes it for the last sample."""
    for name, told in (("samples-00000.npy", "it has 1 samples instead of"), ("segments-00000.npy", "has no segments")):
        shutil.copytree(base / "a", tmp_path / name)
        np.save(tmp_path / name / name, np.load(tmp_path / name / name)[:1])
        with pytest.raises(RunError, match=told):
            list(PackedDataset(tmp_path / name).loader(2))
        assert len(list(PackedDataset(base / "a").loader(2)))


def test_a_stream_goes_on_where_it_was(base):
    def make(state):
        shuffled = streams.shuffle(millstream.read(base / "a.jsonl"), 10, seed=1)
        corpora = [millstream.tokenize(documents) for documents in (shuffled, millstream.read(base / "a.jsonl"))]
        return millstream.pack(streams.mix(corpora, [2, 1]), 8, remainder="drop", state=state)

    expected = [sample.token_ids.tolist() for sample in make(None)]
    state, taken = None, [[], []]
    while not state or len(taken[0]) < len(expected) // 2:
        states = []
        for rank in range(2):
            data = StreamDataset(make, rank, 2)
            if state:
                data.load_state_dict(json.loads(json.dumps(state)))
            loader = DataLoader(data, batch_size=2, collate_fn=collate)
            taken[rank] += rows(batch for _, batch in zip(range(3), loader, strict=False))
            states.append(data.state_dict())
        state = states[0]
        assert states[0] == states[1]
    together = [row for step in zip(*taken, strict=True) for row in step]
    assert together == expected[: len(expected) // 2 * 2]
    with pytest.raises(RequestError, match="num_workers=0"):
        next(iter(DataLoader(StreamDataset(make), num_workers=1, collate_fn=collate)))


def test_a_stream_that_has_ended_is_no_epoch_without_samples():
    data = StreamDataset(lambda state: millstream.pack([[1, 2, 3, 4]], 2, state=state))
    assert len(list(data)) == 2
    with pytest.raises(RequestError, match=r"come to its end: .* streams\.repeat"):
        list(data)
    data.load_state_dict(json.loads(json.dumps(data.state_dict())))  # of a run that was done when it stopped
    assert list(data) == []
    data.load_state_dict({"stream": None})
    assert len(list(data)) == 2
    for wrong in (None, 5, {}, "stream"):
        with pytest.raises(ResumeRefused, match="no state of a StreamDataset"):
            data.load_state_dict(wrong)


def test_a_stream_that_is_made_without_its_state_is_not_trained_on_again():
    data = StreamDataset(lambda state: millstream.pack([[1, 2, 3, 4]], 2))
    assert len(list(itertools.islice(data, 1))) == 1
    again = StreamDataset(lambda state: millstream.pack([[1, 2, 3, 4]], 2))
    again.load_state_dict(data.state_dict())
    with pytest.raises(RequestError, match=r"its stream begins anew: pack\(\.\.\., state=state\)"):
        next(iter(again))
    with pytest.raises(RequestError, match="make gave list, no stream"):
        next(iter(StreamDataset(lambda state: [1])))
    with pytest.raises(RequestError, match="give a function that makes the stream"):
        StreamDataset(millstream.pack([[1, 2]], 2))


@pytest.mark.parametrize("make", [collate, collate_flat])
def test_a_model_of_transformers_keeps_documents_apart(mixed, make):
    """What it says of a document in a batch is what it says of it alone; with a cache it would look at others, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50257, use_cache=False, **size)).eval()
    batch = make([mixed[place] for place in range(3)])
    bounds = batch["cu_seqlens" if make is collate else "cu_seq_lens_q"].tolist()
    with torch.no_grad():
        together = model(**batch)
        logits = together.logits.flatten(0, 1)
        ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        sums = count = 0
        for begin, end in itertools.pairwise(bounds):
            alone = model(ids[None, begin:end]).logits[0]
            assert torch.allclose(logits[begin:end], alone, atol=1e-5)
            asked = labels[begin + 1 : end]
            sums += torch.nn.functional.cross_entropy(alone[:-1], asked, reduction="sum").item()
            count += len(asked)
    assert len(bounds) > 4
    assert together.loss.item() == pytest.approx(sums / count, rel=1e-5)
