"""transformers: `apply_chat_template` with the mask of what is learned, one conversation at a time."""

import hashlib
import json
import sys

import numpy as np
from transformers import AutoTokenizer


def main(source: str, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counted = learned = 0
    digest, masks = hashlib.sha256(), hashlib.sha256()
    with open(source, encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            counted += len(made["input_ids"])
            learned += sum(made["assistant_masks"])
            digest.update(np.array(made["input_ids"], "<u2").tobytes())
            masks.update(np.array(made["assistant_masks"], bool).tobytes())
    print(json.dumps({"ids": counted, "learned": learned, "sha256": digest.hexdigest() + masks.hexdigest()}))


main(sys.argv[1], sys.argv[2])
