"""datatrove: its JSONL reader and DocumentTokenizer, one task, not shuffled; writes a flat file of ids."""

import json
import os
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.logging import logger


def main(source: str, folder: str, tokenizer_file: str) -> None:
    logger.remove()
    reader = JsonlReader(os.path.dirname(source), glob_pattern=os.path.basename(source))
    writer = DocumentTokenizer(f"{folder}/tokens", tokenizer_file, shuffle_documents=False, batch_size=1000)
    writer.tokenizer.encode_special_tokens = True
    LocalPipelineExecutor(pipeline=[reader, writer], tasks=1, workers=1, logging_dir=f"{folder}/logs").run()
    names = [name for name in os.listdir(f"{folder}/tokens") if name.endswith(".ds")]
    print(json.dumps({"ids": sum(os.path.getsize(f"{folder}/tokens/{name}") // 2 for name in names)}))


main(sys.argv[1], sys.argv[2], sys.argv[3])
