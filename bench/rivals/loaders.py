"""Batches of the same samples out of one loader: python loaders.py NAME FOLDER EPOCHS BATCH SEQ_LEN.

Shuffled, in one process, as int64 tensors; ours are all arrays of a batch, `ids` and theirs the ids alone. Prints the
ids given, the CPU seconds from the second epoch on, and the sum of the first epoch's ids, which tells that they are the
same.
"""

import glob
import json
import os
import sys
import time
import types

import numpy as np
import torch

torch.set_num_threads(1)


class Rows:
    """The samples of .npy shards, by number."""

    def __init__(self, folder: str) -> None:
        paths = sorted(glob.glob(os.path.join(folder, "run", "samples-*.npy")))
        self.shards = [np.load(path, mmap_mode="r").view(np.ndarray) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: int):
        which = int(np.searchsorted(self.ends, number, side="right"))
        return self.shards[which][number - (self.ends[which - 1] if which else 0)].astype(np.int64)


def millstream(folder, epochs, batch, seq_len, **how):
    from millstream.torch import PackedDataset

    data = PackedDataset(os.path.join(folder, "run"), seed=1, epochs=epochs)
    for each in data.loader(batch, **how):
        yield each["input_ids"]


def reuse(folder, epochs, batch, seq_len):
    return millstream(folder, epochs, batch, seq_len, reuse=True)


def ids(folder, epochs, batch, seq_len):
    from millstream.torch import collate_ids

    return millstream(folder, epochs, batch, seq_len, collate=collate_ids)


def memmap(folder, epochs, batch, seq_len):
    loader = torch.utils.data.DataLoader(Rows(folder), batch_size=batch, shuffle=True)
    for _ in range(epochs):
        yield from loader


def litdata(folder, epochs, batch, seq_len):
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    path = os.path.join(folder, "exports", "litdata", "train")
    data = StreamingDataset(path, item_loader=TokensLoader(block_size=seq_len), shuffle=True)
    loader = StreamingDataLoader(data, batch_size=batch, num_workers=0)
    for _ in range(epochs):
        for each in loader:
            yield each.long()


def grain(folder, epochs, batch, seq_len):
    import grain.python

    data = grain.python.MapDataset.source(Rows(folder)).shuffle(seed=1).repeat(epochs).batch(batch)
    return map(torch.from_numpy, data.to_iter_dataset(grain.python.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def datasets(folder, epochs, batch, seq_len):
    from datasets import load_dataset

    files = os.path.join(folder, "exports", "parquet", "*", "*.parquet")
    data = load_dataset("parquet", data_files=files, split="train", cache_dir=os.path.join(folder, "cache"))
    data = data.select_columns(["input_ids"]).with_format("torch")
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True)
    for _ in range(epochs):
        yield from (each["input_ids"] for each in loader)


def mosaic(folder, epochs, batch, seq_len):
    # Its package imports its vision part, and that torchvision; nothing here uses it.
    import transformers.tokenization_utils_base  # noqa: F401  before, as it looks whether torchvision is there

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules["torchvision.datasets"].VisionDataset = object
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    path = os.path.join(folder, "exports", "mds")
    data = StreamingDataset(local=path, split="train", shuffle=True, batch_size=batch)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=0, collate_fn=tokens)
    for _ in range(epochs):
        yield from loader


def tokens(items):
    return torch.from_numpy(np.stack([item["tokens"] for item in items]).astype(np.int64))


def main(name: str, folder: str, epochs: int, batch: int, seq_len: int) -> None:
    samples, total, given, begun = len(Rows(folder)), 0, 0, None
    for each in globals()[name](folder, epochs, batch, seq_len):
        if begun is None and given < samples:
            total += int(each[: samples - given].sum())
        given += len(each)
        if begun is None and given >= samples:
            begun, counted = time.process_time(), given
    seconds = time.process_time() - begun
    print(json.dumps({"ids": (given - counted) * seq_len, "seconds": seconds, "sum": total, "samples": given}))


main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
