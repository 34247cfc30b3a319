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
from millstream.runs.pack.inputs import Inputs
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
    wrong = wrong or inputs.changed(out, found)
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
