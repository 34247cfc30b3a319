"""The ledger against the files."""

import json
from collections import Counter

import numpy as np

from millstream.folder.entries import Manifest
from millstream.integrity.documents import Ordinals
from millstream.records import DocumentFault
from millstream.runs.pack.ledger import written, written_learned
from millstream.store import at


def ledger_problems(folder: str, manifest: Manifest, ordinals: Ordinals) -> list[str]:
    """The ledger balances and is what the shards' counts, which fit their files by now, and the faults add up to."""
    ledger, settings = manifest.ledger, manifest.settings
    documents, ids = written(manifest.subsets, settings.seq_len)
    faults, problems = _faults(folder, manifest, ordinals)
    documents["faulty"] = faults.total()
    documents["in"] = sum(documents.values())
    specials = (settings.bos_id is not None) + (settings.eos_id is not None)
    ids["special"] = specials * (documents["in"] - documents["empty"] - documents["faulty"])
    ids["in"] = ids["in_samples"] + ids["remainder"] + ids["dropped"] + ids["cut_off"]
    ids["text"] = ids["in"] - ids["special"]
    problems += [
        f"ledger: {name} {kind} are {told.get(name)}, the files have {count}"
        for kind, told, counts in (("documents", ledger.documents, documents), ("ids", ledger.ids, ids))
        for name, count in counts.items()
        if told.get(name, 0) != count
    ]
    learned, told_learned = written_learned(manifest.subsets), ledger.learned or {}
    if learned:  # how many were cut off is in no file, and folders of millstream/1 cut none
        learned["cut_off"] = told_learned.get("cut_off", 0)
        learned["in"] = sum(learned.values())
    if {"cut_off": 0, **told_learned} != {"cut_off": 0, **learned}:
        problems.append(f"ledger: ids to be learned are {ledger.learned}, the files have {learned}")
    every = ids["in_samples"] + ids["padding"] + ids["remainder"]
    for export in manifest.exports:
        if not every == export.ids == export.written + export.left_out:
            wrong = f"{export.written} ids and {export.left_out} left out, not {every}"
            problems.append(f"{export.format}: {wrong}")
    if ledger.faults != dict(faults):
        problems.append(f"ledger: faults are {ledger.faults}, the files have {dict(faults)}")
    if not problems and not ordinals.are_those_below(documents["in"]):
        problems.append("documents are not numbered from 0 on, each number once")
    return problems


def _faults(folder: str, manifest: Manifest, ordinals: Ordinals) -> tuple[Counter[str], list[str]]:
    """(faults by reason, what is wrong with them)."""
    faults: Counter[str] = Counter()
    if not manifest.faults:
        return faults, []
    name, inputs, before = manifest.faults.name, len(manifest.inputs), -1
    problems: list[str] = []
    with at(folder).open(name) as file:
        for fault in (DocumentFault(**json.loads(line)) for line in file):
            faults[fault.reason] += 1
            if fault.ordinal <= before and not problems:
                problems.append(f"{name}: document {fault.ordinal} does not come behind document {before}")
            elif fault.shard >= inputs and not problems:
                problems.append(f"{name}: document {fault.ordinal} is of input {fault.shard + 1} of {inputs}")
            before = fault.ordinal
            ordinals.add(np.array([fault.ordinal], np.uint64))
    return faults, problems
