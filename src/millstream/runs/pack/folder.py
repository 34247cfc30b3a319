"""A run folder before the run: is it ours, what is in it, and may the run go on."""

import contextlib
import os
from typing import Any

from millstream.errors import RequestError, ResumeRefused, RunError, setting
from millstream.formats.exports import FORMATS
from millstream.formats.exports.out import delete_all
from millstream.formats.manifest import (
    FAULTS,
    JOURNAL,
    MANIFEST,
    TEMPORARY,
    TOKENIZER,
    Journal,
    read_manifest,
    refuse_earlier,
    remainder_name,
    shard_names,
)
from millstream.formats.sources import InputShard, fingerprint, prefix_hash
from millstream.records import Cursor
from millstream.runs.pack.subset import Mark


def claim(out: str, overwrite: bool) -> None:
    """Make the folder, or see that it is ours; with `overwrite`, delete the run in it.

    Raises RequestError if it has files that are not ours.
    """
    if not out:
        raise RequestError(f"{setting('out')} wants the name of a folder")
    if out == "-":
        raise RequestError(
            f"{setting('out')} wants a folder: a run is more than one file, so it cannot go to standard output"
        )
    try:
        names = set(os.listdir(out))
    except FileNotFoundError:
        try:
            os.makedirs(out)
        except OSError as error:
            raise RequestError(
                f"{setting('out', out)} cannot be made: {error.strerror}; give another folder"
            ) from error
        return
    except NotADirectoryError:
        raise RequestError(f"{out} is a file; {setting('out')} wants a folder") from None
    begun = {JOURNAL, FAULTS, TOKENIZER, TOKENIZER + TEMPORARY, MANIFEST + TEMPORARY}
    if MANIFEST not in names and names and not (JOURNAL in names and names <= begun):
        raise RequestError(
            f"{out} has files that are not millstream's; give an empty or a new folder as {setting('out')}"
        )
    if MANIFEST in names and overwrite:
        with contextlib.suppress(RunError):  # damaged, but ours
            read_manifest(out)
        with contextlib.closing(Journal(out)):
            delete_run(out)
            os.truncate(os.path.join(out, JOURNAL), 0)


def found_run(out: str) -> dict[str, Any] | None:
    """The manifest of an earlier run, or None if the folder has none yet.

    Raises RequestError if an earlier version wrote it, RunError if sealed files of an unfinished run are missing.
    """
    if not os.path.exists(os.path.join(out, MANIFEST)):
        return None
    found = read_manifest(out)
    refuse_earlier(out, found)
    for name, size in _sealed(found).items():
        path = os.path.join(out, name)
        if not found["complete"] and (not os.path.exists(path) or os.path.getsize(path) != size):
            raise RunError(
                f"{path} is missing or damaged, so the run cannot go on; {setting('overwrite', True)} starts anew"
            )
    return found


def clear(out: str, found: dict[str, Any] | None) -> None:
    """Delete what an interrupted run left unsealed."""
    delete_all(out, FORMATS)
    known = {MANIFEST, JOURNAL, FAULTS, TOKENIZER, *_sealed(found or {"subsets": {}})}
    for name in os.listdir(out):
        if name not in known and (name.endswith(TEMPORARY) or _is_shard(name)):
            os.unlink(os.path.join(out, name))


def delete_run(out: str) -> None:
    """Delete all of a run but its journal; the manifest last, so that what is left of it is still ours."""
    delete_all(out, FORMATS)
    names = [name for name in os.listdir(out) if name.endswith(TEMPORARY) or _is_shard(name)]
    for name in (*names, FAULTS, TOKENIZER, MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(out, name))


def _sealed(found: dict[str, Any]) -> dict[str, int]:
    shards = (shard for subset in found["subsets"].values() for shard in subset["shards"])
    return {file["name"]: file["bytes"] for shard in shards for file in shard["files"].values()}


def _is_shard(name: str) -> bool:
    for subset in ("train", "validation"):
        names = {*shard_names(subset, 0, loss=True).values(), *shard_names(subset, 0, "parquet").values()}
        if name in (remainder_name(subset), remainder_name(subset, "remainder-loss")):
            return True
        if any(name.startswith(n.partition("00000")[0]) and name.endswith(n.partition("00000")[2]) for n in names):
            return True
    return False


class Inputs:
    """The input shards of this call, with their fingerprints taken once."""

    def __init__(self, shards: list[InputShard]) -> None:
        self.shards = shards
        self._known: dict[int, dict[str, Any]] = {}

    def fingerprint(self, number: int) -> dict[str, Any]:
        if number not in self._known:
            shard = self.shards[number]
            try:
                self._known[number] = fingerprint(shard)
            except OSError:
                self._known[number] = {"name": shard.name, "kind": shard.kind, "unreadable": True}
        return self._known[number]

    def entries(self, used: int) -> list[dict[str, Any]]:
        """For the manifest: the first `used` shards with their fingerprints, the others by name."""
        return [
            self.fingerprint(number) if number < used else {"name": shard.name, "kind": shard.kind}
            for number, shard in enumerate(self.shards)
        ]

    def with_prefix(self, cursor: Cursor) -> Cursor:
        """`cursor` with what identifies the bytes before it; that of what cannot be sought is there already."""
        if cursor.source < len(self.shards) and cursor.offset:
            shard = self.shards[cursor.source]
            if shard.seekable and shard.kind != "parquet":
                return cursor._replace(prefix=prefix_hash(shard, cursor.offset))
        return cursor

    def changed(self, found: dict[str, Any]) -> list[str]:
        """What differs from the inputs that the run had read when it sealed its last shard; later ones may.

        What cannot be sought is compared when it is read again (`formats.slices`).
        """
        then, names = found["inputs"], [shard.name for shard in self.shards]
        cursor = Cursor(len(then)) if found["complete"] else Cursor(*found["read"])
        wrong = []
        for number, entry in enumerate(then[: cursor.source + 1]):
            if number >= len(names) or names[number] != entry["name"]:
                now = names[number] if number < len(names) else "not given"
                wrong.append(f"input {number + 1} was {entry['name']}, is {now}")
            elif (kind := self.shards[number].kind) != entry["kind"]:
                wrong.append(f"{self.shards[number].called} was read as {entry['kind']}, and looks like {kind} now")
            elif number < cursor.source and entry != self.fingerprint(number):
                wrong.append(f"{self.shards[number].called} has changed since it was packed")
        if found["complete"] and len(names) > len(then):
            wrong.append(f"input {len(then) + 1} was not given, is {names[len(then)]}")
        if not wrong and not found["complete"] and cursor.source < len(names):
            name = self.shards[cursor.source].called
            try:
                if self.with_prefix(cursor) != cursor:
                    wrong.append(f"{name} has changed before byte {cursor.offset:,}, which the run has read")
            except OSError as error:
                raise RunError(f"{name} cannot be read: {error.strerror}") from error
        return wrong


def first_mark(found: dict[str, Any]) -> Mark:
    """Where reading goes on: for the subset that is furthest behind."""
    marks = [Mark.load(subset["resume"]["mark"]) for subset in found["subsets"].values()]
    return min(marks, key=lambda mark: mark.ordinal)


def refuse_if_different(out: str, found: dict[str, Any], identity: dict[str, Any], inputs: Inputs) -> None:
    """Raises ResumeRefused, naming each difference, if going on would not give the bytes of one run."""
    then = found["settings"]
    wrong = [
        f"{_named(key)} was {_shown(then.get(key))}, is {_shown(value)}"
        for key, value in identity.items()
        if then.get(key) != value
    ]
    wrong = wrong or inputs.changed(found)
    if wrong:
        state = "is finished, with other settings or inputs" if found["complete"] else "was begun differently"
        raise ResumeRefused(
            f"{out} {state}:\n  " + "\n  ".join(wrong) + "\n"
            f"Give the same command to go on, another {setting('out')}, or {setting('overwrite', True)} to start anew"
        )


NOT_COMPARED = "not compared"
"""The journal's event for documents that only the fast engine can encode: what the reference said, by their ids."""


def refuse_unknown_to_reference(out: str) -> None:
    """Raises ResumeRefused if an unfinished run has met documents that the reference engine cannot encode."""
    met = {name: why for event in Journal.events(out, NOT_COMPARED) for name, why in event["documents"].items()}
    for name, why in met.items():
        more = f" and {len(met) - 1:,} more" if len(met) > 1 else ""
        raise ResumeRefused(
            f"{out} cannot go on with {setting('engine', 'reference')}: document {name!r}{more} was packed by the fast "
            f"engine alone, as {why}. Give the same command without it, or another {setting('out')}"
        )


def _named(key: str) -> str:
    return setting({"pad_id": "pad_id", "exports": "format"}.get(key) or key.removesuffix("_id"))


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({value['sha256'][:12]})"
    if isinstance(value, dict) and "bytes" in value:
        return f"{value['bytes']:,} bytes"
    if isinstance(value, list):
        return ",".join(value)
    return "not given" if value is None else str(value)
