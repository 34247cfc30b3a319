"""One packed file unpacked as a worker does it for all others, in its own process, and nothing else.

Run as `python bench/unpacking.py FILE FOLDER`; pieces go to the folder. Prints one JSON line: `seconds` of CPU time,
`bytes` of text, `parts`.
"""

import json
import sys
import time

from millstream.corpus.find import find_inputs
from millstream.corpus.limits import Limits, Manner
from millstream.corpus.unpacked import Unpack
from millstream.records import Part, Range
from millstream.runs.pack.pieces import StoredPieces
from millstream.runs.pack.settings import DEFAULT_MAX_DOCUMENT, MIB
from millstream.store import at

PART = 16 * MIB


def main(path: str, folder: str) -> None:
    shards = find_inputs([path]).shards
    manner = Manner(Limits(DEFAULT_MAX_DOCUMENT, None, True), ("text", "id"), MIB)
    pieces = StoredPieces(at(folder))
    size = parts = 0
    start = time.process_time()
    for found in Unpack(shards, manner, pieces.put, PART)(Part(0, (Range(0),))):
        size, parts = size + found.data.size, parts + 1
        pieces.drop(found.data)  # as those do who read it
    print(json.dumps({"seconds": time.process_time() - start, "bytes": size, "parts": parts}))


main(sys.argv[1], sys.argv[2])
