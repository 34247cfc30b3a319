"""Hugging Face datasets: `map(tokenize, batched=True)` and `map(group_texts, batched=True)` ."""

import json
import sys
from itertools import chain

import datasets
from transformers import PreTrainedTokenizerFast


def main(source: str, folder: str, tokenizer_file: str, seq_len: int) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, split_special_tokens=True)
    counted = 0

    def tokenize(batch: dict) -> dict:
        nonlocal counted
        ids = tokenizer(batch["text"])["input_ids"]
        counted += sum(map(len, ids))
        return {"input_ids": ids}

    def group_texts(batch: dict) -> dict:
        ids = list(chain.from_iterable(batch["input_ids"]))
        whole = len(ids) // seq_len * seq_len
        return {"input_ids": [ids[start : start + seq_len] for start in range(0, whole, seq_len)]}

    datasets.disable_progress_bars()
    data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=folder)
    data = data.map(tokenize, batched=True, remove_columns=data.column_names, new_fingerprint="tokenized")
    data = data.map(group_texts, batched=True, new_fingerprint="grouped")
    print(json.dumps({"ids": counted, "lost": counted - len(data) * seq_len}))


main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
