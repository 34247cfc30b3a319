"""A run folder before the run: is it ours, what is in it, and may the run go on."""

import contextlib
import os
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec.structs import astuple

from millstream.errors import RequestError, ResumeRefused, RunError, setting
from millstream.exports import FORMATS
from millstream.exports.out import delete_all
from millstream.folder.entries import ChatEntry, Identity, InputEntry, Manifest, MaxDocument, TokenizerEntry
from millstream.folder.journal import Journal, NotCompared, events
from millstream.folder.manifest import (
    FAULTS,
    JOURNAL,
    LEASES,
    MANIFEST,
    PIECES,
    RECORDS,
    RUN,
    TEMPORARY,
    TOKENIZER,
    is_journal,
    read_manifest,
    read_sealed,
    refuse_earlier,
    remainder_name,
    shard_names,
)
from millstream.folder.records import (
    Mark,
    RunRecord,
    SealedShards,
    ShardRecord,
    begin_run,
    delete_records,
    forget_shard,
    read_inputs,
    read_run,
    read_shards,
    sealed_shards,
    sweep_records,
    this_version,
)
from millstream.records import Cursor
from millstream.runs.pack.elsewhere import delete_pieces_elsewhere
from millstream.runs.pack.inputs import Inputs, known_inputs
from millstream.store import Store, at


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
        names = {entry.name for entry in at(out).entries()}
    except FileNotFoundError:
        try:
            at(out).make()
        except OSError as error:
            raise RequestError(
                f"{setting('out', out)} cannot be made: {error.strerror}; give another folder"
            ) from error
        return
    except NotADirectoryError:
        raise RequestError(f"{out} is a file; {setting('out')} wants a folder") from None
    begun = {
        JOURNAL,
        FAULTS,
        TOKENIZER,
        RECORDS,
        PIECES,
        LEASES,
        *(name + TEMPORARY for name in (TOKENIZER, MANIFEST, RUN)),
    }
    names = {JOURNAL if is_journal(name) else name for name in names}
    known = MANIFEST in names or RUN in names
    if not known and names and not (JOURNAL in names and names <= begun):
        raise RequestError(
            f"{out} has files that are not millstream's; give an empty or a new folder as {setting('out')}"
        )
    if known and overwrite:
        for name in (MANIFEST, RUN):
            with contextlib.suppress(RunError):  # damaged, but ours
                told = read_sealed(at(out), name)
                if MANIFEST not in names and told and told.get("joint"):
                    raise RequestError(
                        f"{out} is packed by several with {setting('join', True)}, who may be at it now: end them and "
                        f"delete it, or give another {setting('out')}"
                    )
        with contextlib.closing(Journal(out)):
            delete_pieces_elsewhere(out)
            delete_run(out)
            at(out).append(JOURNAL, at=0).close()
            for name in [name for name, _ in at(out).entries() if is_journal(name) and name != JOURNAL]:
                at(out).delete(name)


@dataclass(frozen=True)
class Found:
    """What earlier calls left in a folder: a finished run, with its `manifest`, or an unfinished one.

    `settings`: what decided its bytes; `inputs` as far as they are known, which have been `read` so far. Of an
    unfinished run: its output shards by subset, the records of those behind a gap that are `lost`, and how often it has
    `told` of inputs.
    """

    settings: Identity
    inputs: list[InputEntry]
    read: Cursor
    manifest: Manifest | None = None
    subsets: dict[str, SealedShards] = field(default_factory=dict)
    lost: list[ShardRecord] = field(default_factory=list)
    told: int = 0

    def subset(self, name: str) -> SealedShards:
        return self.subsets.get(name) or SealedShards()

    @property
    def mark(self) -> Mark:
        """Where reading goes on: for the subset that is furthest behind."""
        names = ["train"] + ["validation"] * bool(self.settings.validation)
        return min((self.subset(name).resume.mark for name in names), key=lambda mark: mark.ordinal)


def found_run(out: str, *, joined: bool = False) -> Found | None:
    """What an earlier call left, or None if the folder has no run yet.

    Raises RequestError if an earlier version wrote it, or if others join it and this call is not to; RunError if sealed
    files of an unfinished run are missing.
    """
    store = at(out)
    if store.exists(MANIFEST):
        manifest = read_manifest(out)
        refuse_earlier(out, manifest)
        return Found(manifest.settings, manifest.inputs, Cursor(len(manifest.inputs)), manifest=manifest)
    run = read_run(store)
    if run is None:
        # Others that join may just have finished it: the manifest comes before run.json is deleted.
        return found_run(out) if store.exists(MANIFEST) else None
    if run.joint and not joined:
        raise RequestError(
            f"{out} is packed by several with {setting('join', True)}: give that too, or another {setting('out')}"
        )
    subsets, lost = sealed_shards(read_shards(store)), []
    sizes = {name: state.size for name, state in store.found()}
    for each in subsets.values():
        for record in each.records:
            if missing := _missing(sizes, record):
                raise RunError(
                    f"{os.path.join(out, missing)} is missing or damaged, so the run cannot go on; "
                    f"{setting('overwrite', True)} starts anew"
                )
        lost += [record for record in each.later if _missing(sizes, record)]
        each.later[:] = [record for record in each.later if record not in lost]
    read = max((record.read for each in subsets.values() for record in each.records), default=Cursor(), key=_place)
    told = read_inputs(store)
    return Found(run.settings, known_inputs(run.inputs, told), read, subsets=subsets, lost=lost, told=len(told))


def _missing(sizes: dict[str, int], record: ShardRecord) -> str | None:
    """The first file of a shard that is not there, or not as long as it was."""
    for file in record.files:
        if sizes.get(file.name) != file.bytes:
            return file.name
    return None


def _place(cursor: Cursor) -> tuple[int, int]:
    return cursor.source, cursor.offset


def begin(out: str, identity: Identity, inputs: list[InputEntry]) -> None:
    """Make the folder that of an unfinished run. Raises RequestError if it has become another one's meanwhile."""
    if not begin_run(at(out), RunRecord(millstream=this_version(), settings=identity, inputs=inputs)):
        raise RequestError(f"another millstream has begun a run in {out}; give another {setting('out')}")


def settled(out: str, found: Found, inputs: Inputs, *, in_order: bool) -> Found:
    """The same without shards behind a gap, if what was read for them is not known to be unchanged, or if shards are
    written `in_order`: these are `lost`. Else the inputs have been `read` to where they were read for the last of
    them."""
    later = [record for each in found.subsets.values() for record in each.later]
    read = max((record.read for record in later), default=found.read, key=_place)
    if not later or (not in_order and inputs.are_known(out, found.inputs, read)):
        return replace(found, read=max(found.read, read, key=_place))
    subsets = {name: SealedShards(each.records) for name, each in found.subsets.items()}
    return replace(found, subsets=subsets, lost=[*found.lost, *later])


def clear(out: str, found: Found | None) -> None:
    """Delete what an interrupted run left unsealed, and shards that are lost."""
    store = at(out)
    delete_all(store, FORMATS)
    for record in found.lost if found else ():
        forget_shard(store, record)
    sweep_records(store)
    records = [record for each in found.subsets.values() for record in each.all] if found else []
    _delete_shards(store, {file.name for record in records for file in record.files})


def delete_run(out: str) -> None:
    """Delete all of a run but its journal; what says that it is ours goes last."""
    store = at(out)
    delete_all(store, FORMATS)
    store.delete(PIECES)
    store.delete(LEASES)
    delete_records(store, and_run=store.exists(MANIFEST))  # first: what has no record is deleted anyway
    _delete_shards(store, set())
    for name in (FAULTS, TOKENIZER, MANIFEST, RUN):
        store.delete(name)


def _delete_shards(store: Store, known: set[str]) -> None:
    """Delete the files of output shards that are not `known`, and what is not whole."""
    store.sweep()
    for name, _ in store.entries():
        ours = _is_shard(name) or (name.endswith(TEMPORARY) and store.state(name).kind == "file")
        if ours and name not in known:
            store.delete(name)


def _is_shard(name: str) -> bool:
    for subset in ("train", "validation"):
        names = {*shard_names(subset, 0, loss=True).values(), *shard_names(subset, 0, "parquet").values()}
        if name in (remainder_name(subset), remainder_name(subset, "remainder-loss")):
            return True
        if any(name.startswith(n.partition("00000")[0]) and name.endswith(n.partition("00000")[2]) for n in names):
            return True
    return False


def refuse_if_different(out: str, found: Found, identity: Identity, inputs: Inputs) -> None:
    """Raises ResumeRefused, naming each difference, if going on would not give the bytes of one run."""
    then, finished = found.settings, found.manifest is not None
    wrong = differences(then, identity, finished=finished)
    wrong = wrong or inputs.changed(out, found.inputs, found.read, finished=finished)
    if wrong:
        state = "is finished, with other settings or inputs" if finished else "was begun differently"
        raise ResumeRefused(
            f"{out} {state}:\n  " + "\n  ".join(wrong) + "\n"
            f"Give the same command to go on, another {setting('out')}, or {setting('overwrite', True)} to start anew"
        )


def differences(then: Identity, now: Identity, *, finished: bool = False) -> list[str]:
    """What decides the bytes of a run and was another then, in words; but for what has written a `finished` one."""
    fields = zip(now.__struct_fields__, astuple(then), astuple(now), strict=True)
    return [
        _difference(name, was, is_now)
        for name, was, is_now in fields
        if was != is_now and not (finished and name == "writer")
    ]


def refuse_unknown_to_reference(out: str) -> None:
    """Raises ResumeRefused if an unfinished run has met documents that the reference engine cannot encode."""
    met = {name: why for event in events(at(out), NotCompared) for name, why in event.documents.items()}
    for name, why in met.items():
        more = f" and {len(met) - 1:,} more" if len(met) > 1 else ""
        raise ResumeRefused(
            f"{out} cannot go on with {setting('engine', 'reference')}: document {name!r}{more} was packed by the fast "
            f"engine alone, as {why}. Give the same command without it, or another {setting('out')}"
        )


def _difference(name: str, then: Any, now: Any) -> str:
    if name == "writer":
        return f"its Parquet files, which name what wrote them, are of {then}, and this is {now}: install that to go on"
    return f"{_named(name)} was {_shown(then)}, is {_shown(now)}"


def _named(name: str) -> str:
    if name == "engine":  # by name and version, which are no value of the setting
        return "the tokenizer's engine"
    return setting({"pad_id": "pad_id", "exports": "format"}.get(name) or name.removesuffix("_id"))


def _shown(value: Any) -> str:
    if isinstance(value, TokenizerEntry):
        return f"{value.name} ({value.sha256[:12]})"
    if isinstance(value, ChatEntry):
        return f"{setting('loss', value.loss)} ({(value.sha256 or '')[:12]})"
    if isinstance(value, MaxDocument):
        return f"{value.bytes:,} bytes"
    if isinstance(value, list):
        return ",".join(value)
    return "not given" if value is None else str(value)
