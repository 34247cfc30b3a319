"""Reads exports with the projects they are for; it runs in their environments and knows nothing of millstream.

python read.py FORMAT RESULT.npz PREFIX:FOLDER:N...: what comes out of the exports in FOLDER, of samples of N ids, is
put into RESULT.npz under PREFIX/... for a test to compare.
"""

import json
import os
import sys
import types

import numpy as np


def subsets(folder):
    return sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))


def parquet(folder, seq_len):
    """Hugging Face datasets, by the folder's name alone; and TRL's collator on what it gives."""
    from datasets import load_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    found = load_dataset(folder, cache_dir=os.path.join(folder, "..", "cache"))
    for subset, rows in found.items():
        yield f"{subset}/samples", np.array(rows["input_ids"])
        collated = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(rows))
        for name in ("input_ids", "position_ids", "labels", "cu_seq_lens_q"):
            yield f"{subset}/trl_{name}", collated[name].numpy().reshape(-1)


def megatron(folder, seq_len):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    for subset in sorted({name.partition(".")[0] for name in os.listdir(folder)}):
        prefix = os.path.join(folder, subset)
        for mmap in (True, False):
            dataset = IndexedDataset(prefix, mmap=mmap)
            rows = [dataset[number].copy() for number in range(len(dataset))]
            yield f"{subset}/samples_{mmap}", np.array([row for row in rows if len(row) == seq_len])
        yield f"{subset}/rest", rows[-1] if len(rows[-1]) < seq_len else rows[-1][:0]
        yield f"{subset}/documents", dataset.document_indices.copy()
        # What its own writer makes of the same sequences.
        again = os.path.join(folder, "..", subset)
        builder = IndexedDatasetBuilder(f"{again}.bin", dtype=dataset.index.dtype)
        for row in rows:
            builder.add_document(_tensor(row), [len(row)])
        builder.finalize(f"{again}.idx")
        for ending in ("bin", "idx"):
            yield f"{subset}/same_{ending}", np.array(_bytes(f"{prefix}.{ending}") == _bytes(f"{again}.{ending}"))


def datatrove(folder, seq_len):
    from datatrove.utils.dataset import DatatroveFolderDataset

    for subset in subsets(folder):
        path = os.path.join(folder, subset)
        size = 2 if _is_small(folder) else 4
        # It hands out one id more than it is asked for, as the label of the last.
        dataset = DatatroveFolderDataset(path, seq_len - 1, token_size=size, return_positions=True)
        items = [dataset[number] for number in range(len(dataset))]
        yield f"{subset}/samples", np.array([item["input_ids"].numpy() for item in items])
        yield f"{subset}/positions", np.array([item["positions"].numpy() for item in items])


def litdata(folder, seq_len):
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    for subset in subsets(folder):
        dataset = StreamingDataset(
            os.path.join(folder, subset), item_loader=TokensLoader(block_size=seq_len), shuffle=False
        )
        yield f"{subset}/samples", np.array([dataset[number] for number in range(len(dataset))])
        loader = StreamingDataLoader(dataset, batch_size=4, num_workers=0)
        yield f"{subset}/loaded", np.concatenate([batch.long().numpy() for batch in loader])


def mds(folder, seq_len):
    # Its package imports its vision part, and that torchvision; nothing here uses it.
    import transformers.tokenization_utils_base  # noqa: F401  before, as it looks whether torchvision is there

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules["torchvision.datasets"].VisionDataset = object
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    for subset in subsets(folder):
        clean_stale_shared_memory()
        dataset = StreamingDataset(local=folder, split=subset, shuffle=False, batch_size=1)
        items = [dataset[number] for number in range(len(dataset))]
        yield f"{subset}/samples", np.array([item["tokens"] for item in items])
        yield f"{subset}/streamed", np.array([item["tokens"] for item in dataset])
        yield f"{subset}/seq_lengths", np.concatenate([item["seq_lengths"] for item in items])
        if "labels" in items[0]:
            yield f"{subset}/labels", np.array([item["labels"] for item in items])
        # What its own writer makes of the first shard's samples.
        again = os.path.join(folder, "..", f"{subset}-again")
        with MDSWriter(out=again, columns=dict.fromkeys(items[0], "ndarray:int32"), size_limit=None) as writer:
            for item in items[: dataset.samples_per_shard[0]]:
                writer.write(item)
        first = [_bytes(os.path.join(path, "shard.00000.mds")) for path in (os.path.join(folder, subset), again)]
        yield f"{subset}/same", np.array(first[0] == first[1])


def chat(folder, seq_len):
    """What transformers makes of the conversations in rows.jsonl with the tokenizer beside them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(os.path.join(folder, "rows.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ids, masks, lengths, clean, clean_lengths = [], [], [], [], []
    for row in rows:
        given = {"conversation": row["messages"], "tools": row.get("tools"), "return_dict": True}
        made = tokenizer.apply_chat_template(**given, return_assistant_tokens_mask=True)
        ids += made["input_ids"]
        masks += made["assistant_masks"]
        lengths.append(len(made["input_ids"]))
        made = tokenizer.apply_chat_template(**given, sanitize_control_tokens=True)
        clean += made["input_ids"]
        clean_lengths.append(len(made["input_ids"]))
    named = {"ids": ids, "masks": masks, "lengths": lengths, "clean": clean, "clean_lengths": clean_lengths}
    yield from ((name, np.array(values)) for name, values in named.items())


def train(folder, seq_len):
    """TRL's SFTTrainer trains a tiny model on a run of conversations; the first batch as it comes to the model."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    rows = load_dataset(
        "parquet",
        data_files=os.path.join(folder, "run", "samples-*.parquet"),
        split="train",
        cache_dir=os.path.join(folder, "cache"),
    )
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=700, num_key_value_heads=4, **size))
    settings = SFTConfig(
        output_dir=os.path.join(folder, "trained"),
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=True,
        max_length=None,
        per_device_train_batch_size=2,
        max_steps=20,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    for name in ("input_ids", "labels", "position_ids", "cu_seq_lens_q"):
        yield name, batch[name].numpy().reshape(-1)
    trainer.train()
    yield "losses", np.array([step["loss"] for step in trainer.state.log_history if "loss" in step], float)


def _tensor(row):
    import torch

    return torch.from_numpy(row.copy())


def _bytes(path):
    with open(path, "rb") as file:
        return file.read()


def _is_small(folder):
    name = os.path.join(folder, "train", "00000.ds")
    ends = np.fromfile(f"{name}.index", "<u8")
    return os.path.getsize(name) == 2 * int(ends[-1])


if __name__ == "__main__":
    _, format, result, *wanted = sys.argv
    readers = {"parquet": parquet, "megatron": megatron, "datatrove": datatrove, "litdata": litdata, "mds": mds}
    read = {**readers, "chat": chat, "train": train}[format]
    found = {}
    for place in wanted:
        prefix, folder, seq_len = place.rsplit(":", 2)
        found |= {f"{prefix}/{name}": values for name, values in read(folder, int(seq_len))}
    np.savez(result, **found)
    os._exit(0)  # how these libraries come to their end is theirs, and some of them abort in it now and then
