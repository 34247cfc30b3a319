"""A fuzzer of packing: any corpus, in any container, with any settings, beside a slow and obvious packer.

`python tests/fuzz.py --seconds 60` makes corpora by chance until the time is up; `--seed N` makes number N alone, which
a failure names. Each is packed as it is, and again with its files damaged:

* as it is, every document, fault, sample and account is what the obvious way gives, verify finds the same in the
  sources, and the bytes are the same for other blocks and workers, after a stop at a bad document, and after interrupts
  of two workers and three, in turn;
* damaged, nothing but one of our own errors comes out, or a run that is whole and accounts for what it could read, and
  several workers say the same.
"""

import argparse
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import runs
import zstandard
from here import pooled

import millstream
from millstream.errors import DataError, MillstreamError
from millstream.folder.dataset import open as open_run
from millstream.stream.tokenizers import load_tokenizer

EOS = 50256
LONGEST = 2000  # bytes of a document, with --max-document
LETTERS = "etaoin shrdlu 0123456789 .,;'\t\n éß水🙂\u0301\x00\u200b\ufeff<|endoftext|>"


class Row(NamedTuple):
    """A line of JSON and what becomes of it: its text, or a fault's reason; neither for a blank line."""

    line: bytes
    text: str | None = None
    reason: str | None = None


class Case(NamedTuple):
    """`files`: (name, rows) in the order that they are read in."""

    files: list[tuple[str, list[Row]]]
    settings: dict


# --- what is made by chance -------------------------------------------------


def text_of(chance):
    kind = chance.random()
    if kind < 0.1:
        return ""
    if kind < 0.2:
        return chance.choice(["a", " ", "\n", "🙂", "<|endoftext|>", "x" * 300, "0" * 300, " " * 300, "\x00"])
    return "".join(chance.choices(LETTERS, k=chance.choice([1, 5, 30, 30, 200, 900])))


def row_of(chance):
    kind = chance.random()
    if kind < 0.05:
        return Row(chance.choice([b"", b" ", b"\t", b"\r"]))
    if kind < 0.25:
        return Row(*chance.choice(BAD))
    text = text_of(chance)
    row = {"text": text}
    for name, value in chance.sample(OTHERS, chance.randint(0, 3)):
        row[name] = value
    if chance.random() < 0.5:
        row["id"] = chance.choice(["a", "b", "ü", "x" * 100, 5, ""])
    names = list(row)
    chance.shuffle(names)
    line = json.dumps({name: row[name] for name in names}, ensure_ascii=chance.random() < 0.5).encode()
    if len(line) > LONGEST:
        return Row(line, reason="too_long")
    front, back = chance.choice([(b"", b""), (b"", b""), (b" ", b" "), (b"", b"\r"), (b"\t", b"")])
    if len(front + line + back) > LONGEST:
        front = back = b""
    return Row(front + line + back, text)


OTHERS = [
    ("n", float("nan")),
    ("deep", [[{"text": "no"}]]),
    ("o", {"text": 1}),
    ("big", 10**30),
    ("null", None),
    ("Text", "no"),
]
BAD = [
    (b'{"text": 5}', None, "not_text"),
    (b'{"text": null}', None, "missing_field"),
    (b'{"other": "x"}', None, "missing_field"),
    (b'{"text": "cut', None, "invalid_json"),
    (b'{"text": "a"} {"text": "b"}', None, "invalid_json"),
    (b"[]", None, "invalid_json"),
    (b"nul\0", None, "invalid_json"),
    (b'{"text": "\xff"}', None, "invalid_utf8"),
    (b'{"text": "\\ud800"}', None, "lone_surrogate"),
    (b'{"text": "' + b"y" * LONGEST + b'"}', None, "too_long"),
]


def case_of(seed):
    chance = random.Random(seed)
    files = []
    for number in range(chance.choice([1, 1, 2, 4])):
        ending = chance.choice([".jsonl", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet"])
        if ending == ".txt":
            text = text_of(chance)
            rows = [Row(text.encode(), text.removeprefix("\ufeff"))]  # which marks UTF-8 and is no text
        else:
            rows = [row_of(chance) for _ in range(chance.choice([0, 1, 5, 40, 80]))]
        if ending == ".parquet":
            rows = [row for row in rows if row.text is not None]
        files.append((f"{number}{ending}", rows))
    strategy = chance.choice(["concat", "split", "best-fit"])
    settings = {
        "seq_len": chance.choice([1, 2, 7, 16, 64, 100]),
        "strategy": strategy,
        "eos": chance.random() < 0.7,
        "pad_id": EOS,
        "remainder": chance.choice(["keep", "drop", "pad"]) if strategy == "concat" else "keep",
        "overlong": chance.choice(["cut", "cut", "truncate", "drop", "fault"]),
        "shuffle": chance.choice([None, None, 0, 7]),
        "shard_size": chance.choice([1000, 5000, 1 << 20]),
        "max_document": LONGEST,
    }
    if strategy == "best-fit":
        settings["window"] = chance.choice([200, 4000, None])
        settings["max_segments"] = chance.choice([None, None, 1, 3])
    if settings["shuffle"] is not None:
        settings["shuffle_window"] = chance.choice([1, 300, None])
    return Case(files, settings)


def write(case, folder, chance):
    for name, rows in case.files:
        path = folder / name
        if name.endswith(".txt"):
            path.write_bytes(rows[0].line)
        elif name.endswith(".parquet"):
            runs.write_parquet(
                path, [json.dumps({"text": row.text}).encode() for row in rows], chance.choice([1, 7, 500])
            )
        else:
            data = b"\n".join(row.line for row in rows) + (b"\n" if rows and chance.random() < 0.5 else b"")
            path.write_bytes(packed(data, name, chance))


def packed(data, name, chance):
    """Whole, in several frames or members, of any level; zeros behind gzip are padding."""
    cuts = sorted(chance.randint(0, len(data)) for _ in range(chance.choice([0, 0, 1, 5])))
    parts = [data[low:high] for low, high in itertools.pairwise([0, *cuts, len(data)])]
    if name.endswith(".gz"):
        return b"".join(gzip.compress(part, chance.choice([0, 1, 9])) for part in parts) + bytes(
            chance.choice([0, 0, 700])
        )
    if name.endswith(".zst"):
        packer = zstandard.ZstdCompressor(level=chance.choice([-5, 1, 19]), write_checksum=chance.random() < 0.5)
        return b"".join(map(packer.compress, parts))
    return data


# --- the obvious way --------------------------------------------------------


class Obvious(NamedTuple):
    """`documents`: the ids of each in order, none of what is faulty. `faults`: (ordinal, reason). `cut_off` ids are not
    kept of documents that are too long, of which `left_out` are dropped."""

    documents: dict[int, list[int]]
    faults: list[tuple[int, str]]
    cut_off: int
    left_out: int


def obvious(case, encode):
    n, how = case.settings["seq_len"], case.settings["overlong"]
    documents, faults, ordinal, cut_off, left_out = {}, [], 0, 0, 0
    for name, rows in case.files:
        for row in rows:
            if row.text is None and row.reason is None:
                continue
            if row.reason:
                faults.append((ordinal, row.reason))
            elif not name.endswith(".jsonl") and len(row.text.encode()) > LONGEST and not packed_lines(name):
                faults.append((ordinal, "too_long"))
            else:
                ids = encode(row.text)
                ids = [*ids, EOS] if ids and case.settings["eos"] else ids
                if len(ids) > n and how == "fault":
                    faults.append((ordinal, "overlong"))
                else:
                    documents[ordinal] = kept(ids, n, how, case.settings["eos"])
                    cut_off += len(ids) - len(documents[ordinal])
                    left_out += bool(ids) and not documents[ordinal]
            ordinal += 1
    return Obvious(documents, faults, cut_off, left_out)


def kept(ids, n, how, eos):
    if len(ids) <= n or how == "cut":
        return ids
    if how == "drop":
        return []
    return [*ids[: n - 1], EOS] if eos else ids[:n]


def packed_lines(name):
    return ".jsonl" in name


def samples_of(found, settings):
    """concat and split, in order: each sample's ids, the last one shorter."""
    n = settings["seq_len"]
    if settings["strategy"] == "split":
        pieces = [ids[at : at + n] for ids in found.documents.values() for at in range(0, len(ids), n)]
        return [piece + [EOS] * (n - len(piece)) for piece in pieces], []
    flat = [each for ids in found.documents.values() for each in ids]
    whole = len(flat) // n * n
    samples, rest = [flat[at : at + n] for at in range(0, whole, n)], flat[whole:]
    if rest and settings["remainder"] == "pad":
        return [*samples, rest + [EOS] * (n - len(rest))], []
    return samples, rest if settings["remainder"] == "keep" else []


# --- what is compared -------------------------------------------------------


def check(case, found, folder, report):
    dataset, settings = open_run(folder), case.settings
    stored = [sample.token_ids.tolist() for sample in dataset]
    rest = dataset.remainder.token_ids.tolist() if dataset.remainder else []
    if settings["shuffle"] is None and settings["strategy"] != "best-fit":
        assert (stored, rest) == samples_of(found, settings)
    assert all(len(sample) == settings["seq_len"] for sample in stored)
    check_segments(dataset, found, settings)
    told = []
    if (folder / "faults.jsonl").exists():
        told = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert [(fault["ordinal"], fault["reason"]) for fault in told] == found.faults
    ledger = report.ledger
    assert ledger["documents"]["in"] == len(found.documents) + len(found.faults)
    assert ledger["documents"]["empty"] == sum(not ids for ids in found.documents.values()) - found.left_out
    assert ledger["documents"].get("left_out", 0) == found.left_out
    assert ledger["ids"]["in"] == sum(map(len, found.documents.values())) + found.cut_off
    verdict = millstream.verify(folder)
    assert verdict.ok, verdict.problems


def check_segments(dataset, found, settings):
    """Every id of every document is in just one place, in order; best-fit cuts none that fits."""
    n, have, places = settings["seq_len"], {}, Counter()
    last = [dataset.remainder] if dataset.remainder else []
    for sample in [*dataset, *last]:
        at = 0
        ids = sample.token_ids[sample.segment_ids > 0].tolist()
        for document, start, length in sample.segments:
            have.setdefault(document, []).append((start, ids[at : at + length]))
            places[document] += 1
            at += length
        assert at == len(ids)
        assert len(sample.segments) <= (settings.get("max_segments") or n)
    dropped = settings["remainder"] == "drop"
    for document, ids in found.documents.items():
        parts = sorted(have.pop(document, []))
        whole = [each for _, part in parts for each in part]
        assert whole == ids[: len(whole)] if dropped else whole == ids
        assert [start for start, _ in parts] == [0, *itertools.accumulate(len(part) for _, part in parts)][
            :-1
        ] or dropped
        if settings["strategy"] == "best-fit" and 0 < len(ids) <= n:
            assert places[document] == 1
    assert not have


def hashes(folder):
    paths = sorted(path for path in folder.iterdir() if path.name != "journal.jsonl")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def pack(folder, case, out, **more):
    return millstream.pack_to(
        folder / out,
        [folder / name for name, _ in case.files],
        **{"workers": 1, "on_error": "skip", **case.settings, **more},
    )


def one(seed, encode):
    case = case_of(seed)
    chance = random.Random(seed + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(case, folder, chance)
        found = obvious(case, encode)
        check(case, found, folder / "out", pack(folder, case, "out"))
        sources = [folder / name for name, _ in case.files]
        verdict = millstream.verify(folder / "out", against=sources, workers=1)
        assert verdict.ok, verdict.problems
        assert verdict.compared == len(found.documents) + len(found.faults)
        wanted = hashes(folder / "out")
        pack(folder, case, "blocks", block=chance.choice([1, 17, 300, 5000]))
        assert hashes(folder / "blocks") == wanted
        if seed % 40 == 0:
            pack(folder, case, "workers", workers=2, memory=3 << 30, block=500)
            assert hashes(folder / "workers") == wanted
        several(folder, case, chance, "several", times=chance.choice([0, 0, 1, 3]))
        assert hashes(folder / "several") == wanted
        if found.faults:
            with contextlib.suppress(DataError):
                pack(folder, case, "stopped", on_error="stop", block=200)
                raise AssertionError("a bad document did not stop the run")
            pack(folder, case, "stopped")
            assert hashes(folder / "stopped") == wanted
        damaged(folder, case, chance)


def several(folder, case, chance, out, times=0):
    """Several workers, in this process, who are interrupted and gone on with so many `times` by other ones."""
    for left in range(times, -1, -1):
        sizes = {"part": chance.choice([60, 500, 1 << 20]), "piece": chance.choice([1, 500, 1 << 20])}
        spilling = {"bound": chance.choice([0, 5000, 1 << 30]), "large": chance.choice([10, 1 << 30])}
        answers = chance.choice([0, 2, 10, 50]) if left else -1
        with (
            pooled(chance.randrange(1 << 30), **sizes, **spilling, answers=answers),
            contextlib.suppress(KeyboardInterrupt) if left else contextlib.nullcontext(),
        ):
            pack(folder, case, out, workers=chance.choice([2, 3]), memory=3 << 30)


def damaged(folder, case, chance):
    """Nothing worse than one of our errors, whatever the bytes."""
    path = folder / chance.choice(case.files)[0]
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 5])):
        at = chance.randint(0, len(data))
        chance.choice([_cut, _flipped, _put, _zeroed])(data, at, chance)
    path.write_bytes(data)
    began = time.process_time()
    said = []
    for out, way in (("damaged", pack), ("by-several", partial(several, chance=chance))):
        try:
            way(folder, case, out=out)
            assert millstream.verify(folder / out).ok
            said.append(hashes(folder / out))
        except MillstreamError as error:
            said.append(str(error).replace(out, ""))
    assert said[0] == said[1]
    assert time.process_time() - began < 60, "it hangs"


def _cut(data, at, chance):
    del data[at:]


def _flipped(data, at, chance):
    if at < len(data):
        data[at] ^= 1 << chance.randrange(8)


def _put(data, at, chance):
    data[at:at] = chance.randbytes(chance.choice([1, 4, 100]))


def _zeroed(data, at, chance):
    data[at : at + 20] = bytes(min(20, len(data) - at))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--first", type=int, default=random.SystemRandom().randrange(10**9), help="the first of many")
    asked = parser.parse_args()
    os.fsync = lambda _: None  # kills are tested elsewhere; here it would be most of the time
    reference = load_tokenizer("gpt2").reference_engine
    end, tried, failed = time.monotonic() + asked.seconds, 0, []
    for seed in [asked.seed] if asked.seed is not None else itertools.count(asked.first):
        if time.monotonic() > end and asked.seed is None:
            break
        try:
            one(seed, lambda text: reference.encode([text])[0].tolist())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            print(f"seed {seed} failed: python tests/fuzz.py --seed {seed}", file=sys.stderr)
            failed.append(seed)
        tried += 1
    print(f"{tried - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
