"""The pipeline of many courses: one document at a time, a list as buffer, arrays at the end."""

import json
import sys
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerFast


def generate_documents(path: str) -> Iterator[dict]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def generate_tokenized(tokenizer: PreTrainedTokenizerFast, documents: Iterator[dict]) -> Iterator[list[int]]:
    for document in documents:
        yield tokenizer(document["text"])["input_ids"]


def generate_constant_length(seq_len: int, tokenized: Iterator[list[int]]) -> Iterator[list[int]]:
    buffer: list[int] = []
    for ids in tokenized:
        buffer.extend(ids)
        while len(buffer) >= seq_len:
            yield buffer[:seq_len]
            del buffer[:seq_len]
    if buffer:
        yield buffer


def main(source: str, folder: str, tokenizer_file: str, seq_len: int) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, split_special_tokens=True)
    samples, remainder = [], 0
    tokenized = generate_tokenized(tokenizer, generate_documents(source))
    for sample in generate_constant_length(seq_len, tokenized):
        if len(sample) == seq_len:
            samples.append(np.array(sample, dtype=np.uint16))
        else:
            remainder = len(sample)
    np.save(f"{folder}/samples.npy", np.stack(samples))
    print(json.dumps({"ids": len(samples) * seq_len + remainder}))


main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
