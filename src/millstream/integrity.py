"""Check a finished run folder against its own manifest: every byte, every count, every id."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from millstream.formats.manifest import JOURNAL, MANIFEST, file_hash
from millstream.formats.shards import count_documents
from millstream.records import Ids
from millstream.runs.pack.ledger import written, written_learned
from millstream.samples import IGNORED

_ROWS = 4096


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: `problems` is empty if the folder is whole."""

    problems: list[str]
    files: int
    samples: int
    bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(folder: str | os.PathLike[str], on_file: Callable[[str], None] = lambda name: None) -> Verdict:
    """Check a finished run folder: all files there, none foreign, every SHA-256, ids within the vocabulary, segments
    and documents that fit the samples, and the ledger.

    Raises RequestError if it is no run folder or is unfinished, RunError if the manifest itself is damaged.
    """
    from millstream.formats.dataset import open as open_run

    folder = os.fspath(folder)
    manifest = open_run(folder).manifest
    problems: list[str] = []
    files = list(_files(manifest))
    size = 0
    for entry in files:
        on_file(entry["name"])
        problem = _file_problem(folder, entry)
        size += entry["bytes"]
        if problem:
            problems.append(f"{entry['name']}: {problem}")
    known = {entry["name"] for entry in files} | {MANIFEST, JOURNAL}
    problems += [f"{name}: not part of this run" for name in _foreign(folder, known)]
    if not problems:  # counts of damaged files would only say the same again
        for name, subset in manifest["subsets"].items():
            on_file(f"{name} counts")
            problems += _subset_problems(folder, manifest, subset)
        problems += _ledger_problems(folder, manifest)
    samples = sum(shard["samples"] for subset in manifest["subsets"].values() for shard in subset["shards"])
    return Verdict(problems, len(files), samples, size)


def _files(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for subset in manifest["subsets"].values():
        for shard in subset["shards"]:
            yield from shard["files"].values()
        if "name" in subset["remainder"]:
            yield subset["remainder"]
        if "loss" in subset["remainder"]:
            yield subset["remainder"]["loss"]
    for export in manifest.get("exports", ()):
        yield from export["files"]
    for single in (manifest["faults"], manifest["tokenizer_file"]):
        if single:
            yield single


def _foreign(folder: str, known: set[str]) -> Iterator[str]:
    """What is in the folder beside the files `known` and the folders that they are in."""
    homes = {os.path.dirname(name) for name in known}
    homes |= {os.path.dirname(name) for name in homes}
    for name in sorted(os.listdir(folder)):
        if name not in homes and name not in known:
            yield name
    for home in sorted(homes - {""}):
        if os.path.isdir(os.path.join(folder, home)):
            inside = {f"{home}/{name}" for name in os.listdir(os.path.join(folder, home))}
            yield from sorted(inside - known - homes)


def _file_problem(folder: str, entry: dict[str, Any]) -> str | None:
    path = os.path.join(folder, entry["name"])
    if not os.path.exists(path):
        return "missing"
    size = os.path.getsize(path)
    if size != entry["bytes"]:
        return f"{size:,} bytes instead of {entry['bytes']:,}"
    try:
        found = file_hash(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == entry["sha256"] else "its content has changed (SHA-256 differs)"


def _subset_problems(folder: str, manifest: dict[str, Any], subset: dict[str, Any]) -> Iterator[str]:
    import pyarrow.parquet as pq

    settings = manifest["settings"]
    limit = settings["tokenizer"]["vocab_size"] if settings["tokenizer"] else 1 << 32
    spans = documents = 0
    for shard in subset["shards"]:
        names = {kind: file["name"] for kind, file in shard["files"].items()}
        rows = 0
        for ids in _sample_rows(os.path.join(folder, names["samples"]), settings):
            rows += len(ids)
            if ids.shape[1] != settings["seq_len"]:
                yield f"{names['samples']}: samples of {ids.shape[1]} ids instead of {settings['seq_len']}"
            for number in (int(ids.min()), int(ids.max())) if ids.size else ():
                if not 0 <= number < limit:
                    yield f"{names['samples']}: id {number}, the vocabulary ends at {limit - 1}"
        if rows != shard["samples"]:
            yield f"{names['samples']}: {rows} samples instead of {shard['samples']}"
        if "learned" in shard:
            yield from _loss_problems(folder, names, shard, settings)
        segments = np.load(os.path.join(folder, names["segments"]), mmap_mode="r")
        if len(segments) != shard["segments"]:
            yield f"{names['segments']}: {len(segments)} segments instead of {shard['segments']}"
        inside = segments[segments["sample"] < shard["samples"]]
        used = int(inside["length"].sum())
        if used != rows * settings["seq_len"] - shard["padding"]:
            yield f"{names['segments']}: {used} ids in segments, {shard['padding']} of padding do not fill the samples"
        per_sample = np.bincount(inside["sample"], inside["length"], minlength=rows)
        if len(per_sample) and (per_sample > settings["seq_len"]).any():
            yield f"{names['segments']}: a sample has more ids than {settings['seq_len']}"
        spans += int(segments["length"].sum())
        table = pq.read_table(os.path.join(folder, names["documents"]))
        lengths = table["length"].to_numpy()
        cut_off = table["cut_off"].to_numpy() if "cut_off" in table.column_names else np.zeros_like(lengths)
        for key, count in count_documents(lengths, table["split"].to_numpy(), cut_off).items():
            if count != shard.get(key, 0):
                yield f"{names['documents']}: {count} {key} instead of {shard.get(key, 0)}"
        documents += int(lengths.sum())
        if settings["strategy"] == "best-fit":
            yield from _best_fit_problems(names, segments, lengths, table["split"].to_numpy(), settings)
    dropped = subset["remainder"]["ids"] if subset["remainder"]["policy"] == "drop" else 0
    if spans + dropped != documents:
        yield f"{spans} ids in segments and {dropped} dropped, {documents} in documents"
    if "name" in subset["remainder"]:
        rest = np.load(os.path.join(folder, subset["remainder"]["name"]))
        if len(rest) != subset["remainder"]["ids"]:
            yield f"{subset['remainder']['name']}: {len(rest)} ids instead of {subset['remainder']['ids']}"
        if len(rest) and int(rest.max()) >= limit:
            yield f"{subset['remainder']['name']}: id {int(rest.max())}, the vocabulary ends at {limit - 1}"
        if "loss" in subset["remainder"]:
            loss = np.load(os.path.join(folder, subset["remainder"]["loss"]["name"]))
            if len(loss) != len(rest) or int(loss.sum()) != subset["remainder"]["learned"]:
                yield f"{subset['remainder']['loss']['name']}: it does not fit the remainder and its count"


def _loss_problems(
    folder: str, names: dict[str, str], shard: dict[str, Any], settings: dict[str, Any]
) -> Iterator[str]:
    """A loss mask has the shape of its samples and as many ids to be learned as were counted."""
    if "loss" in names:
        name = names["loss"]
        loss = np.load(os.path.join(folder, name), mmap_mode="r")
        if loss.shape != (shard["samples"], settings["seq_len"]):
            yield f"{name}: its shape is {loss.shape}, not that of the samples"
        learned = int(loss.sum())
    else:
        name = names["samples"]
        rows = _sample_rows(os.path.join(folder, name), settings, "labels")
        learned = sum(int((labels != IGNORED).sum()) for labels in rows)
    if learned != shard["learned"]:
        yield f"{name}: {learned} ids to be learned instead of {shard['learned']}"


def _best_fit_problems(
    names: dict[str, str], segments: Ids, lengths: Ids, split: Ids, settings: dict[str, Any]
) -> Iterator[str]:
    """What best-fit does not do: cut a document that fits into a sample, or put too many into one."""
    n, most = settings["seq_len"], settings["max_segments"]
    if (segments["start"] % n).any():
        yield f"{names['segments']}: a document is cut elsewhere than every {n} ids"
    if most and len(segments) and int(np.bincount(segments["sample"]).max()) > most:
        yield f"{names['segments']}: a sample has more documents than {most}"
    if (split != (lengths > n)).any():
        yield f"{names['documents']}: not just the documents of more than {n} ids are split"


def _sample_rows(path: str, settings: dict[str, Any], column: str = "input_ids") -> Iterator[Ids]:
    if settings["format"] == "npy":
        samples = np.load(path, mmap_mode="r")
        for row in range(0, len(samples), _ROWS):
            yield samples[row : row + _ROWS]
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=[column]):
            yield batch[column].flatten().to_numpy().reshape(batch.num_rows, -1)


def _ledger_problems(folder: str, manifest: dict[str, Any]) -> list[str]:
    """The ledger balances and is what the shards' counts, which fit their files by now, and the faults add up to."""
    ledger, settings = manifest["ledger"], manifest["settings"]
    documents, ids = written(manifest["subsets"], settings["seq_len"])
    faults: Counter[str] = Counter()
    if manifest["faults"]:
        with open(os.path.join(folder, manifest["faults"]["name"]), encoding="utf-8") as file:
            faults.update(json.loads(line)["reason"] for line in file)
    documents["faulty"] = faults.total()
    documents["in"] = sum(documents.values())
    specials = (settings["bos_id"] is not None) + (settings["eos_id"] is not None)
    ids["special"] = specials * (documents["in"] - documents["empty"] - documents["faulty"])
    ids["in"] = ids["in_samples"] + ids["remainder"] + ids["dropped"] + ids["cut_off"]
    ids["text"] = ids["in"] - ids["special"]
    problems = [
        f"ledger: {name} {kind} are {ledger[kind][name]}, the files have {count}"
        for kind, counts in (("documents", documents), ("ids", ids))
        for name, count in counts.items()
        if ledger[kind].get(name, 0) != count
    ]
    learned = written_learned(manifest["subsets"])
    if learned:  # what documents longer than a sample did not keep is nowhere
        learned["cut_off"] = ledger["learned"].get("cut_off", 0)
    told = {name: count for name, count in ledger.get("learned", {}).items() if count or name != "cut_off"}
    if told != {
        name: count
        for name, count in {"in": sum(learned.values()), **learned}.items()
        if learned and (count or name != "cut_off")
    }:
        problems.append(f"ledger: ids to be learned are {ledger.get('learned')}, the files have {learned}")
    every = ids["in_samples"] + ids["padding"] + ids["remainder"]
    for export in manifest.get("exports", ()):
        if not every == export["ids"] == export["written"] + export["left_out"]:
            wrong = f"{export['written']} ids and {export['left_out']} left out, not {every}"
            problems.append(f"{export['format']}: {wrong}")
    if ledger["faults"] != dict(faults):
        problems.append(f"ledger: faults are {ledger['faults']}, the files have {dict(faults)}")
    return problems
