"""millstream's packer alone in its own process: only the seconds inside `feed` and `finish` are counted.

Run as `python bench/packer.py INPUT.jsonl TOKENIZER.json SEQ_LEN`; prints one JSON line. The text is
tokenized first, then its batches are fed again and again, as further documents, until there were enough ids.
"""

import json
import os
import sys
import time
from dataclasses import replace

os.environ["FASTOKENS_BPE_THREADS"] = "1"

import fastokens
import numpy as np

from millstream.records import TokenBatch
from millstream.stream.pack import Concat

ENOUGH = 200_000_000
READ = 1 << 20


def tokenized(path: str, tokenizer_file: str) -> list[TokenBatch]:
    """The text's documents as the columns that the packer gets: a batch for each MiB of lines."""
    tokenizer = fastokens.Tokenizer.from_file(tokenizer_file)
    batches: list[TokenBatch] = []
    first = 0
    with open(path, "rb") as file:
        while lines := file.readlines(READ):
            texts = [json.loads(line)["text"] for line in lines]
            flat, offsets = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
            ids = np.frombuffer(flat, dtype="<u4").astype("<u2")
            lengths = np.diff(np.frombuffer(offsets, dtype="<u8").astype(np.int64))
            none = np.zeros(len(lines), np.int64)
            ordinals = first + np.arange(len(lines), dtype=np.uint64)
            names = [str(ordinal) for ordinal in ordinals]
            batches.append(TokenBatch(ids, lengths, ordinals, none, names, none, none))
            first += len(lines)
    return batches


def main(path: str, tokenizer_file: str, seq_len: int) -> None:
    batches = tokenized(path, tokenizer_file)
    documents = sum(map(len, batches))
    packer = Concat(seq_len, np.dtype(np.uint16))
    seconds, count, passes = 0.0, 0, 0
    while count < ENOUGH:
        for batch in batches:
            further = replace(batch, ordinal=batch.ordinal + np.uint64(passes * documents))
            start = time.process_time()
            done = list(packer.feed(further))
            seconds += time.process_time() - start
            count += sum(packed.ids.size for packed in done)
        passes += 1
    start = time.process_time()
    count += packer.finish().ids.size
    print(json.dumps({"ids": count, "seconds": seconds + time.process_time() - start}))


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
