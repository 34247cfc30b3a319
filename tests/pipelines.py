"""Pipelines by chance, as trees that JSON can hold: built here or in another process, stopped anywhere, gone on with.

Run as a script it goes on with those that it is given on standard input, and answers with what they gave.
"""

import gzip
import itertools
import json
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import millstream
from millstream import streams
from millstream.records import Document
from millstream.samples import Sample

TEXTS = [f"{number} " + "a word or two " * (number * 7 % 11) for number in range(23)]
SCHEMA = pa.schema({"id": pa.string(), "text": pa.string()})
FILES = ["both", *(f"{name}.{kind}" for name in ("many", "few", "none") for kind in ("jsonl", "jsonl.gz", "parquet"))]
LONG = [5, 400, 0, 7, 1, 30, 2]


def write_corpus(folder):
    """Files for `read`, of every kind, and a folder of them."""
    for name, texts in {"many": TEXTS, "few": TEXTS[:3], "none": []}.items():
        rows = [{"id": f"{name} {number}", "text": text} for number, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{name}.parquet", row_group_size=4)
    (folder / "both").mkdir()
    (folder / "both" / "a.txt").write_text("Plain text.")
    (folder / "both" / "b.jsonl").write_text((folder / "few.jsonl").read_text())
    millstream.pack_to(folder / "run", folder / "many.jsonl", seq_len=8)


# Stages of one's own ------------------------------------------------------------------------------------------------


def endless(start):
    """Lists of ids without an end, which can be read once."""
    for number in itertools.count(start):
        yield [number, number + 1][: 1 + number % 2]


def changed(item):
    return item


def chosen(item):
    """Nearly all, by what they are."""
    return len(repr(values(item))) % 5


@streams.stage
def twice(items, least=0):
    """Each item again after it, but for those with less to them."""
    for item, place in items:
        if len(repr(values(item))) >= least:
            yield item, None
        yield item, place


@streams.stage
def windows(items):
    """Two at a time, and the last alone."""
    held = []
    for item, place in items:
        held.append(item)
        if len(held) == 2:
            yield tuple(held), place
            held = []
    if held:
        yield tuple(held), place


SOURCES = {
    "samples": lambda folder: streams.samples(f"{folder}/run"),
    "read": lambda folder, name: streams.read(f"{folder}/{name}"),
    "rows": lambda folder, count: [{"text": text} for text in TEXTS[:count]],
    "ids": lambda folder, count: [[number] * LONG[number % len(LONG)] for number in range(count)],
    "endless": lambda folder, start: endless(start),
}
STAGES = {
    "tokenize": lambda stream, eos, **more: streams.tokenize(stream, eos=eos, **more),
    "split": streams.split,
    "pack": lambda stream, n, **more: streams.pack(stream, n, **more),
    "best-fit": lambda stream, n, **more: streams.pack(stream, n, strategy="best-fit", pad_id=0, window=64, **more),
    "take": streams.take,
    "skip": streams.skip,
    "enumerate": streams.enumerate,
    "batch": streams.batch,
    "shuffle": streams.shuffle,
    "map": lambda stream, **more: streams.map(changed, stream, **more),
    "filter": lambda stream, **more: streams.filter(chosen, stream, **more),
    "twice": twice,
    "windows": windows,
}
SEVERAL = {
    "chain": lambda several, **more: streams.chain(*several, **more),
    "zip": lambda several, **more: streams.zip(*several, **more),
    "mix": lambda several, weights, seed, how, **more: streams.mix(several, weights, seed, exhausted=how, **more),
}


def build(tree, folder, state=None):
    """The last of the streams that a tree stands for."""
    name, *settings = tree
    more = {} if state is None else {"state": state}
    if name in SOURCES:
        return SOURCES[name](folder, *settings, **more)
    if name == "repeat":
        return streams.repeat(partial(epoch, settings[0], folder), settings[1], **more)
    if name in SEVERAL:
        makes = [partial(epoch, inner, folder) for inner in settings[0]]
        again = name == "mix" and settings[-1] == "repeat"
        return SEVERAL[name](makes if again else [make(0) for make in makes], *settings[1:], **more)
    return STAGES[name](build(settings[0], folder), *settings[1:], **more)


def epoch(tree, folder, epoch):
    """A tree's streams, in another order in each epoch."""
    stream = build(tree, folder)
    return streams.shuffle(stream, 5, epoch) if tree[0] == "take" else stream


def values(item):
    """An item as JSON can hold it."""
    if isinstance(item, Sample):
        return [item.token_ids.tolist(), [list(segment)[1:] for segment in item.segments]]
    if isinstance(item, np.ndarray):
        return item.tolist()
    if isinstance(item, Document):
        return [item.id, item.text]
    return [values(part) for part in item] if isinstance(item, list | tuple) else item


# By chance ----------------------------------------------------------------------------------------------------------


def pipeline(rng):
    """A tree of any stages, which ends within reason or not at all."""
    kind = rng.choice(["ids", "ids", "ids", "documents", "samples"])
    tree = tree_of(rng, kind, rng.randint(0, 3))
    if kind == "ids" and rng.random() < 0.6:
        tree = [rng.choice(["pack", "split", "best-fit"]), tree, rng.choice([3, 8, 64])]
    last = rng.choice(["enumerate", "batch", "shuffle", "zip", "windows", "take", "map"])
    if last == "zip":
        return ["zip", [tree, tree_of(rng, "documents", 1), ["endless", 3]]]
    return [last, tree, *settings(rng, last)]


def tree_of(rng, kind, depth):
    """Streams of documents, of lists of ids or of samples."""
    if depth == 0 or rng.random() < 0.1:
        return leaf(rng, kind)
    if rng.random() < 0.2:
        return ["chain", [tree_of(rng, kind, depth - 1) for _ in range(rng.randint(1, 3))]]
    if rng.random() < 0.3:
        how = rng.choice(["stop", "drop", "repeat"])
        several = [
            full(rng, kind) if how == "repeat" else tree_of(rng, kind, depth - 1) for _ in range(rng.randint(1, 4))
        ]
        return ["mix", several, [rng.choice([1, 0.3, 2.5]) for _ in several], rng.randint(0, 9), how]
    if rng.random() < 0.25:
        return ["repeat", full(rng, kind), rng.choice([1, 2, 3, None])]
    name = rng.choice(["take", "skip", "shuffle", "map", "filter", "twice"])
    return [name, tree_of(rng, kind, depth - 1), *settings(rng, name)]


def settings(rng, name):
    return {
        "take": [rng.choice([0, 1, 7, 40])],
        "skip": [rng.choice([0, 1, 5])],
        "enumerate": [rng.randint(0, 3)],
        "batch": [rng.choice([1, 4])],
        "shuffle": [rng.choice([1, 6, 100]), rng.randint(0, 9)],
        "twice": [rng.choice([0, 8])],
    }.get(name, [])


def leaf(rng, kind):
    if kind == "samples":
        return ["samples"]
    if kind == "documents":
        return rng.choice([["read", rng.choice(FILES)], ["read", rng.choice(FILES)], ["rows", rng.randint(0, 9)]])
    return rng.choice(
        [
            ["ids", rng.randint(0, 20)],
            ["endless", rng.randint(0, 50)],
            ["tokenize", tree_of(rng, "documents", rng.randint(0, 1)), rng.random() < 0.5],
        ]
    )


def full(rng, kind):
    """Streams with at least one item, which end: for what begins them again and again."""
    if kind == "samples":
        return ["take", ["samples"], 5]
    if kind == "documents":
        return rng.choice([["read", "few.jsonl"], ["rows", 4], ["take", ["read", "many.parquet"], 7]])
    return rng.choice([["ids", 12], ["tokenize", ["read", "few.jsonl"], True], ["take", ["endless", 9], 6]])


# Stops --------------------------------------------------------------------------------------------------------------


def some(stream, count):
    return [values(item) for item in itertools.islice(stream, count)]


def gone_on(tree, folder, state, count):
    """(so many items from a state on, where the stream is then); the state has been through JSON."""
    stream = build(tree, folder, json.loads(json.dumps(state)))
    return some(stream, count), stream.state()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(gone_on(*json.loads(line))))
