"""litdata: `optimize` with checkpoints, which it has for functions that give one item: a document for each input; two
workers. Run again, it goes on from the last checkpoint.

Run as `python litdata_optimize.py FOLDER OUT TOKENIZER`. An EOS ends each document.
"""

import functools
import glob
import json
import os
import sys


def main(source: str, out: str, tokenizer_file: str) -> None:
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{out}/cache"
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{out}/data"
    from litdata import optimize
    from litdata.streaming.item_loader import TokensLoader

    optimize(
        fn=functools.partial(document, tokenizer_file),
        inputs=[place for path in sorted(glob.glob(f"{source}/*.jsonl")) for place in places(path)],
        output_dir=f"{out}/tokens",
        num_workers=2,
        chunk_bytes="8MB",
        item_loader=TokensLoader(),
        use_checkpoint=True,
        reorder_files=False,
    )


def places(path):
    """Where each line of a file is."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            yield [path, offset, len(line)]  # as it is read again from a checkpoint, which is JSON
            offset += len(line)


@functools.cache
def loaded(tokenizer_file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.encode_special_tokens = True
    return tokenizer, tokenizer.token_to_id("<|endoftext|>")


def document(tokenizer_file, place):
    """The ids of a document, with EOS."""
    import torch

    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        line = file.read(size)
    tokenizer, eos = loaded(tokenizer_file)
    return torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, eos], dtype=torch.int32)


if __name__ == "__main__":
    main(*sys.argv[1:4])
