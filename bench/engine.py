"""The bare engine in its own process: fastokens on batches of text, only its `encode` calls timed.

Run as `python bench/engine.py INPUT.jsonl TOKENIZER.json BATCH_BYTES`; prints one JSON line.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator

os.environ["FASTOKENS_BPE_THREADS"] = "1"

import fastokens
import numpy as np


def batches(path: str, batch_bytes: int) -> Iterator[list[str]]:
    """Lists of texts of about `batch_bytes` each."""
    with open(path, "rb") as file:
        while lines := file.readlines(batch_bytes):
            yield [json.loads(line)["text"] for line in lines]


def main(path: str, tokenizer_file: str, batch_bytes: int) -> None:
    tokenizer = fastokens.Tokenizer.from_file(tokenizer_file)
    digest = hashlib.sha256()
    seconds, count = 0.0, 0
    for texts in batches(path, batch_bytes):
        start = time.process_time()
        flat, _ = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        seconds += time.process_time() - start
        ids = np.frombuffer(flat, dtype="<u4").astype("<u2")
        count += len(ids)
        digest.update(ids.tobytes())
    print(json.dumps({"ids": count, "seconds": seconds, "sha256": digest.hexdigest()}))


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
