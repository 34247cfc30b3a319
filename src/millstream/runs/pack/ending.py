"""How a run ends, whatever loop it had: its manifest, its exports, and what is told of it."""

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import asdict

import msgspec

from millstream.errors import DataError, RunError, setting
from millstream.exports.out import Place
from millstream.exports.tasks import Export
from millstream.folder.entries import ExportEntry, FileEntry, Manifest, SubsetEntry
from millstream.folder.manifest import FAULTS, FORMAT, TOKENIZER
from millstream.runs.pack.hints import hints_of, nothing_learned
from millstream.runs.pack.ledger import make_ledger
from millstream.runs.pack.run import Run
from millstream.runs.pack.subset import Mark
from millstream.runs.progress import Report
from millstream.store import at, written_now


def write_tokenizer(run: Run) -> None:
    """Keep the tokenizer's definition in the folder, if it has one."""
    tokenizer, store = run.tokenizer, at(run.out)
    if tokenizer and tokenizer.definition is not None and not store.exists(TOKENIZER):
        store.put(TOKENIZER, tokenizer.definition.encode())


def refuse_unreadable(run: Run) -> None:
    """Raises DataError if folders cannot be listed and the run is to stop there."""
    unreadable = run.found.unreadable
    if unreadable and run.settings.on_error == "stop":
        raise DataError(
            f"cannot read {unreadable[0]}. Mend it and run the same command again, "
            f"or go on without what is in such folders with {setting('on_error', 'skip')}"
        )


def refuse_unlearned(run: Run, mark: Mark) -> None:
    """Raises DataError if nothing is to be learned of the conversations before a mark."""
    if run.tally.unlearned and not run.tally.taught and not mark.learned:
        raise DataError(nothing_learned(mark.ordinal))


def manifest_of(run: Run, subsets: dict[str, SubsetEntry], mark: Mark) -> Manifest:
    """What is sealed of a run that has read to `mark`, but for exports; its faults are on the disk."""
    ledger = make_ledger(mark, subsets, run.settings.seq_len)
    if not mark.faults:
        at(run.out).delete(FAULTS)
    return Manifest(
        format=FORMAT,
        complete=True,
        settings=run.identity,
        tokenizer_file=_file_entry(run.out, TOKENIZER),
        inputs=run.inputs.entries(),
        subsets=subsets,
        faults=_file_entry(run.out, FAULTS),
        ledger=ledger,
    )


def refuse_missing(run: Run, manifest: Manifest) -> None:
    """Raises RunError if the files of an output shard are not what was told when it was sealed: others may have written
    it long ago, and somebody deleted it.

    One listing for all. A name that it lacks is asked for by itself: on NFS a listing may be older than that.
    """
    store = at(run.out)
    sizes = {name: state.size for name, state in store.found()}
    for file in (file for subset in manifest.subsets.values() for file in subset.files):
        is_here = sizes.get(file.name) == file.bytes
        if not is_here and not (store.exists(file.name) and store.size(file.name) == file.bytes):
            raise RunError(
                f"{os.path.join(run.out, file.name)} is missing or damaged, so the run cannot end: delete {run.out} "
                "and begin anew"
            )


def _file_entry(out: str, name: str) -> FileEntry | None:
    store = at(out)
    if not store.exists(name):
        return None
    return FileEntry(name, *written_now(store, name))


def with_exports(manifest: Manifest, exported: Generator[tuple[Export, Place]]) -> Manifest:
    """Publish exports as they are finished; the manifest with them."""
    made = {}
    with contextlib.closing(exported) as finished:
        for done, place in finished:
            place.publish()
            made[done.format] = msgspec.convert(asdict(done), ExportEntry)
    exports = [made[name] for name in manifest.settings.exports or ()]
    return msgspec.structs.replace(manifest, exports=exports)


def report_of(
    run: Run, manifest: Manifest, *, already: bool = False, resumed: bool = False, shared: str = "", did: Mark
) -> Report:
    """What a call tells that ends with a finished run; `did` is what it has added to what others had read."""
    train, other = manifest.subsets["train"], manifest.subsets.get("validation")
    tally = run.tally
    settings, repeated = run.identity, run.found.repeated()
    validation = {"samples": other.samples, "shards": len(other.shards)} if other else None
    return Report(
        out=run.out,
        complete=True,
        already=already,
        resumed=resumed,
        ledger=msgspec.to_builtins(manifest.ledger),
        seq_len=settings.seq_len,
        samples=train.samples,
        shards=len(train.shards),
        seconds=time.perf_counter() - run.started,
        stages={k: round(v, 3) for k, v in tally.seconds.items()},
        bytes=did.bytes,
        ids_this_time=did.text_ids + did.special_ids,
        workers=run.workers,
        workers_why=run.workers_why,
        compared=tally.compared,
        not_compared=tally.not_compared,
        not_compared_such_as=tally.not_compared_such_as,
        hints=hints_of(settings, manifest.ledger, repeated, tally.unlearned, tally.twice, already=already),
        spilled=tally.spilled,
        unlearned=tally.unlearned,
        lost=tally.lost,
        unknown=tally.unknown,
        tokenizer=run.tokenizer.name if run.tokenizer else None,
        settings=settings,
        validation=validation,
        exports=msgspec.to_builtins(manifest.exports),
        ignored=run.found.ignored_by_kind(),
        unreadable=run.found.unreadable,
        shared=shared,
    )
