"""A journal as a run leaves it that has answered COUNT prompts, written by millstream's own code without a server.

Run as `python bench/answered.py PROMPTS COUNT MODEL JOURNAL`.
"""

import json
import sys

from millstream.client.bodies import Recipe
from millstream.corpus.find import expand
from millstream.runs.ask.answers import AnswerJournal
from millstream.runs.ask.prompts import batches

TAIL = json.dumps({
    "text": "The capital of France is Paris. " * 4,
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 12, "completion_tokens": 32, "total_tokens": 44},
    "model": "simulated", "latency_s": 0.0512, "attempts": 1,
}, separators=(",", ":"))  # fmt: skip


def main(prompts: str, count: int, model: str, folder: str) -> None:
    [shard] = expand([prompts])
    with AnswerJournal(folder) as journal:
        for batch in batches(shard, Recipe(model), limit=count):
            for request in batch:
                head = json.dumps({"id": request.id, "index": request.index}, separators=(",", ":"))
                journal.append(request.key, f"{head[:-1]},{TAIL[1:]}".encode())


main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
