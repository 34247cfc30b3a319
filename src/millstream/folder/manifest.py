"""The run folder's files: names, the manifest, and writing them so that a crash leaves nothing half done.

What the manifest names is whole; what it does not name does not exist.
"""

import hashlib
import json
import os
from typing import Any

import msgspec

from millstream.errors import RequestError, RunError, setting
from millstream.folder.entries import Manifest
from millstream.store import Store, at

MANIFEST = "manifest.json"
RUN = "run.json"
RECORDS = "records"
PIECES = "pieces"
LEASES = "leases"
JOURNAL = "journal.jsonl"
FAULTS = "faults.jsonl"
TOKENIZER = "tokenizer.json"
TEMPORARY = ".tmp"
FORMAT = "millstream/2"
READABLE = ("millstream/1", FORMAT)
"""Formats whose finished folders are read. Another format means other bytes: a run goes on only in its own."""


def journal_name(by: str | None = None) -> str:
    """The name of a run's journal; of several that write to one folder at once, each has its own.

    >>> journal_name(), journal_name("node3")
    ('journal.jsonl', 'journal-node3.jsonl')
    """
    return JOURNAL if by is None else f"journal-{by}.jsonl"


def is_journal(name: str) -> bool:
    return name == JOURNAL or (name.startswith("journal-") and name.endswith(".jsonl"))


def shard_names(subset: str, number: int, format: str = "npy", loss: bool = False) -> dict[str, str]:
    """The names of one output shard's files; those of the validation subset carry its name in front."""
    front = "" if subset == "train" else f"{subset}-"
    names = {
        "samples": f"{front}samples-{number:05d}.{format}",
        "segments": f"{front}segments-{number:05d}.npy",
        "documents": f"{front}documents-{number:05d}.parquet",
    }
    return names | ({"loss": f"{front}loss-{number:05d}.npy"} if loss else {})


def remainder_name(subset: str, what: str = "remainder") -> str:
    """The name of the kept remainder, or of its loss mask (`what` is remainder-loss)."""
    return f"{what}.npy" if subset == "train" else f"{subset}-{what}.npy"


def sealed(content: dict[str, Any]) -> bytes:
    """The bytes of a file of ours: JSON, of which the last entry is the SHA-256 of all that stands before it."""
    body = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return f'{body.removesuffix("}").rstrip()},\n "sha256": "{seal}"\n}}\n'.encode()


def unsealed(path: str, data: bytes) -> dict[str, Any]:
    """The content of a file that `sealed` made. Raises RequestError if it is none of ours, RunError if damaged."""
    try:
        content = json.loads(data)
    except ValueError:
        raise RunError(f"{path} is damaged: not valid JSON") from None
    if not isinstance(content, dict) or not str(content.get("format", "")).startswith("millstream/"):
        raise RequestError(f"{path} was not written by millstream")
    seal = content.pop("sha256", None)
    if data != sealed(content):
        raise RunError(f"{path} is damaged: its own SHA-256 {str(seal)[:12]}… does not fit its content")
    return content


def read_sealed(store: Store, name: str) -> dict[str, Any] | None:
    """The content of such a file, None if there is none. Raises as `unsealed` does."""
    try:
        data = store.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return unsealed(os.path.join(store.url, name), data)


def write_manifest(folder: str, manifest: Manifest) -> None:
    at(folder).put(MANIFEST, sealed(msgspec.to_builtins(manifest)))


def read_manifest(folder: str) -> Manifest:
    """The manifest of a finished run. Raises RequestError if the folder is none of ours, or if its run is unfinished,
    RunError if it is damaged."""
    path, store = os.path.join(folder, MANIFEST), at(folder)
    told = read_sealed(store, MANIFEST)
    if told is None:
        if store.exists(RUN):
            raise RequestError(f"{folder} is not finished; run the same pack command again to go on")
        raise RequestError(f"{folder} is no run folder: it has no {MANIFEST}")
    if told["format"] not in READABLE:
        raise RequestError(f"{path} has format {told['format']}; this version reads {' and '.join(READABLE)}")
    if not told.get("complete"):  # millstream/1, and millstream/2 at first, kept such of unfinished runs
        raise RequestError(
            f"{folder} is not finished, and was begun by an earlier version of millstream: finish it with that "
            f"version, or pack it anew with {setting('overwrite', True)}"
        )
    try:
        return msgspec.convert(told, Manifest)
    except msgspec.ValidationError as error:
        raise RunError(f"{path} is damaged: {error}") from None


def refuse_earlier(folder: str, manifest: Manifest) -> None:
    """Raises RequestError, with what to do, if a finished run is of an earlier format: its bytes would be others."""
    if manifest.format != FORMAT:
        raise RequestError(
            f"{folder} was packed by an earlier version of millstream (format {manifest.format}), and this one "
            "writes other bytes: it can be read and verified as it is; "
            f"to pack the corpus again give another {setting('out')}, or {setting('overwrite', True)}"
        )
