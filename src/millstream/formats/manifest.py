"""The run folder's files: names, the manifest, the journal, and writing them so that a crash leaves nothing half done.

What the manifest names is whole; what it does not name does not exist.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from typing import IO, Any

from millstream.errors import RequestError, RunError, setting

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
FAULTS = "faults.jsonl"
TOKENIZER = "tokenizer.json"
TEMPORARY = ".tmp"
FORMAT = "millstream/2"
READABLE = ("millstream/1", FORMAT)
"""Formats whose finished folders are read. Another format means other bytes: a run goes on only in its own."""


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


def file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_file(folder: str, name: str, file: IO[bytes] | None = None) -> dict[str, Any]:
    """Make a finished temporary file durable under its own name: {"bytes", "sha256"} of it."""
    path = os.path.join(folder, name)
    with contextlib.ExitStack() as stack:
        file = file or stack.enter_context(open(path + TEMPORARY, "rb"))
        file.flush()
        os.fsync(file.fileno())
    entry = {"bytes": os.path.getsize(path + TEMPORARY), "sha256": file_hash(path + TEMPORARY)}
    os.replace(path + TEMPORARY, path)
    return entry


def sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def render(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes; its last entry is the SHA-256 of all that stands before it."""
    body = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return f'{body.removesuffix("}").rstrip()},\n "sha256": "{seal}"\n}}\n'.encode()


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    path = os.path.join(folder, MANIFEST)
    with open(path + TEMPORARY, "wb") as file:
        file.write(render(manifest))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)  # the shards' names first, then the manifest that names them
    os.replace(path + TEMPORARY, path)
    sync_folder(folder)


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a run folder. Raises RequestError if the folder is none of ours, RunError if it is damaged."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{folder} is no run folder: it has no {MANIFEST}") from None
    try:
        manifest = json.loads(data)
    except ValueError:
        raise RunError(f"{path} is damaged: not valid JSON") from None
    if not isinstance(manifest, dict) or not str(manifest.get("format", "")).startswith("millstream/"):
        raise RequestError(f"{path} was not written by millstream")
    seal = manifest.pop("sha256", None)
    if data != render(manifest):
        raise RunError(f"{path} is damaged: its own SHA-256 {str(seal)[:12]}… does not fit its content")
    if manifest["format"] not in READABLE:
        raise RequestError(f"{path} has format {manifest['format']}; this version reads {' and '.join(READABLE)}")
    return manifest


def refuse_earlier(folder: str, manifest: dict[str, Any]) -> None:
    """Raises RequestError, with what to do, if a run of this manifest cannot go on, since its bytes would be others."""
    if manifest["format"] == FORMAT:
        return
    earlier = f"an earlier version of millstream (format {manifest['format']}), and this one writes other bytes"
    if manifest["complete"]:
        raise RequestError(
            f"{folder} was packed by {earlier}: it can be read and verified as it is; "
            f"to pack the corpus again give another {setting('out')}, or {setting('overwrite', True)}"
        )
    raise RequestError(
        f"{folder} was begun by {earlier}: finish it with that version, or pack it anew with "
        f"{setting('overwrite', True)}"
    )


class Journal:
    """Append-only events of a run, all that differs from run to run; holding it open locks the folder."""

    def __init__(self, folder: str) -> None:
        self._file = open(os.path.join(folder, JOURNAL), "a+b")  # noqa: SIM115  it is the lock, held to the end
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RequestError(
                f"another millstream is writing to {folder}; wait for it, or give another {setting('out')}"
            ) from None
        size = os.fstat(self._file.fileno()).st_size
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write(b"\n")  # a crash cut the last line, and the next is none of it

    def write(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **facts}
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    @staticmethod
    def events(folder: str, event: str) -> list[dict[str, Any]]:
        """The events of this name in a folder's journal, oldest first; a line that a crash cut is passed over."""
        found = []
        with open(os.path.join(folder, JOURNAL), "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return [each for each in found if each.get("event") == event]

    def close(self) -> None:
        self._file.close()
