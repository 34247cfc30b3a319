"""datatrove: a task for each input file, two workers at once; run again, it passes over the tasks that are completed.

Run as `python datatrove_shards.py FOLDER OUT TOKENIZER`. An EOS ends each document.
"""

import os
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.logging import logger


def main(source: str, out: str, tokenizer_file: str) -> None:
    logger.remove()
    tasks = len(os.listdir(source))
    writer = DocumentTokenizer(
        f"{out}/tokens", tokenizer_file, eos_token="<|endoftext|>", shuffle_documents=False, batch_size=100
    )
    LocalPipelineExecutor(
        pipeline=[JsonlReader(source), writer], tasks=tasks, workers=2, logging_dir=f"{out}/logs", skip_completed=True
    ).run()


if __name__ == "__main__":
    main(*sys.argv[1:4])
