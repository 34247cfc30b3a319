"""What `millstream convert` writes comes back, sample by sample, from the readers of the projects it is for.

The readers are in environments of their own and know nothing of millstream: see read.py.
"""

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from runs import PATIENCE

import millstream
from millstream.runs.pack.convert import convert_to

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = {
    "parquet": ".venv-readers",
    "megatron": ".venv-readers",
    "datatrove": ".venv-readers",
    "litdata": ".venv-readers",
    "mds": ".venv-streaming",
}
SEQ_LEN = 16
RUNS = {
    # 50,257 ids, so 16 bits; several shards, both subsets, a remainder in each
    "concat": {"eos": True, "validation": 0.3, "shard_size": 1600},
    # padding on either side, documents cut and not
    "split": {"strategy": "split", "validation": 0.3, "shard_size": 1600},
    "left": {"strategy": "split", "pad_side": "left", "shard_size": 1600},
    # 32 bits, read from Parquet shards
    "wide": {"ids_field": "ids", "format": "parquet", "shard_size": 1600},
    # prompts and completions, of which only the latter are learned
    "chat": {"chat": True, "eos": True, "strategy": "best-fit", "shuffle": 1, "shard_size": 1600},
}
MASKED = ["parquet", "mds", "datatrove"]  # can say what is learned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four runs in NAME/run, each converted to NAME/out."""
    folder = tmp_path_factory.mktemp("exports")
    rng = random.Random(1)
    rows = [
        {
            "id": f"d{number}",
            "text": "mill " * length,
            "prompt": "stream " * (length // 2),
            "completion": "mill " * (length - length // 2),
            "ids": [rng.randrange(1 << 31) for _ in range(length)],
        }
        for number, length in enumerate(rng.choices([0, 1, 3, 16, 17, 40, 300], k=150))
    ]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in RUNS.items():
        report = millstream.pack_to(folder / name / "run", corpus, seq_len=SEQ_LEN, workers=1, **settings)
        assert report.shards > 3
        convert_to(folder / name / "out", folder / name / "run", formats_of(name))
    return folder


def formats_of(name):
    return MASKED if name == "chat" else list(ENVIRONMENTS)


def expected(folder, name):
    """subset -> (samples, the kept remainder's ids)."""
    run = folder / name / "run"
    found = {}
    for subset in json.loads((run / "manifest.json").read_bytes())["subsets"]:
        dataset = millstream.open(run, subset)
        rest = dataset.remainder
        found[subset] = (list(dataset), [] if rest is None else rest.token_ids.tolist())
    assert any(rest for _, rest in found.values()) == (name in ("concat", "wide"))
    return found


def ids(samples):
    return [sample.token_ids.tolist() for sample in samples]


def flat(rows):
    return [value for row in rows for value in row]


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def read(request, folder):
    """(format, run, subset, samples, remainder, what its reader gave) of every subset."""
    python = ROOT / ENVIRONMENTS[request.param] / "bin" / "python"
    result = folder / f"{request.param}.npz"
    names = [name for name in RUNS if request.param in formats_of(name)]
    places = [f"{name}:{folder / name / 'out' / request.param}:{SEQ_LEN}" for name in names]
    subprocess.run([python, HERE / "read.py", request.param, result, *places], check=True, timeout=PATIENCE)
    with np.load(result) as found:
        values = dict(found)
    items = []
    for name in names:
        for subset, (samples, rest) in expected(folder, name).items():
            front = f"{name}/{subset}/"
            got = {key.removeprefix(front): value for key, value in values.items() if key.startswith(front)}
            items.append((request.param, name, subset, samples, rest, got))
    return items


def test_every_sample_comes_back(read):
    for format, name, subset, samples, rest, got in read:
        where = (format, name, subset)
        whole = {
            "parquet": ["samples"],
            "megatron": ["samples_True", "samples_False"],
            "datatrove": ["samples"],
            "litdata": ["samples", "loaded"],
            "mds": ["samples", "streamed"],
        }
        for key in whole[format]:
            assert got[key].tolist() == ids(samples), where
        if format == "megatron":
            assert got["rest"].tolist() == rest, where


def test_their_own_writers_write_the_same_bytes(read):
    for format, name, subset, *_, got in read:
        same = [bool(value) for key, value in got.items() if key.startswith("same")]
        assert same == {"megatron": [True, True], "mds": [True]}.get(format, []), (format, name, subset)


def test_boundaries_come_back(read):
    for format, name, subset, samples, rest, got in read:
        where = (format, name, subset)
        # Where padding begins at 0, like a document; `Sample` has 0 for all of it.
        lengths = [np.diff(sample.cu_seqlens).tolist() for sample in samples]
        positions = [[place for length in row for place in range(length)] for row in lengths]
        if format == "datatrove":
            assert got["positions"].tolist() == positions, where
        elif format == "mds":
            assert got["seq_lengths"].tolist() == flat(lengths), where
        elif format == "megatron":
            assert got["documents"].tolist() == list(range(len(samples) + bool(rest) + 1)), where
        elif format == "parquet":
            places = flat(positions)
            bounds = np.concatenate([[0], np.cumsum(flat(lengths))])
            assert got["trl_position_ids"].tolist() == places, where
            assert got["trl_cu_seq_lens_q"].tolist() == bounds.tolist(), where
            # TRL leaves the first id of each document out of the loss, and we padding and what is not to be learned.
            labels = np.concatenate([sample.labels for sample in samples])
            assert got["trl_labels"].tolist() == labels.tolist(), where
            assert got["trl_input_ids"].tolist() == flat(ids(samples)), where
        else:
            assert format == "litdata"  # it has no place for them


def test_what_is_learned_comes_back(read):
    for format, name, subset, samples, _, got in read:
        if name == "chat" and format == "mds":
            labels = [np.where(sample.loss, sample.token_ids.astype(int), -100).tolist() for sample in samples]
            assert got["labels"].tolist() == labels, subset
            assert max(flat(labels)) > -100
        elif name == "chat" and format == "parquet":  # the other labels stand in test_boundaries_come_back
            assert (
                0 < (got["trl_labels"] != -100).sum() < sum(len(sample.segments) and len(sample) for sample in samples)
            )
