"""A finished run in the formats that trainers read, each in a folder of its own that appears whole or not at all."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from millstream.errors import RequestError, RunError, setting
from millstream.exports import FORMATS, check_formats
from millstream.exports.out import delete_all
from millstream.exports.tasks import Export
from millstream.folder.dataset import open as open_run
from millstream.folder.manifest import MANIFEST
from millstream.folder.samples import samples_of
from millstream.runs.pack.exporting import export_all
from millstream.store import Store, WrittenFile, at, written_now

LIST = "exports.json"
"""Names what a folder of exports holds, and of which run."""

KIND = "millstream-exports/1"


@dataclass(frozen=True)
class Converted:
    """How a conversion ended. `already` names the formats that an earlier one had finished."""

    out: str
    exports: list[Export]
    already: list[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        return "\n".join(line for done in self.exports for line in self._lines(done))

    def _lines(self, done: Export) -> Iterator[str]:
        size = sum(file["bytes"] for file in done.files)
        had = ", finished earlier" if done.format in self.already else ""
        files = "file" if len(done.files) == 1 else "files"
        yield f"{os.path.join(self.out, done.format)}: {len(done.files):,} {files}, {size:,} bytes{had}"
        padding = f", {done.padding:,} of them padding" if done.padding else ""
        yield f"  ids  {done.ids:,} in = {done.written:,} written{padding} + {done.left_out:,} left out"
        if done.left_out:
            yield f"       {done.format} has samples of N ids only, and the remainder is shorter"


def convert_to(
    out: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    formats: Sequence[str],
    *,
    overwrite: bool = False,
    workers: int | None = None,
) -> Converted:
    """Write the finished run in `folder` to `out`, in each of `formats` (names in `millstream.exports`).

    `workers` processes write it, to the same bytes whatever their number; None: as many as are worth it. What an
    earlier call finished is kept; a call that was interrupted is made again. Raises RequestError for an unfinished run,
    an unknown format, ids that do not fit one, or an `out` with something else in it; LedgerError if not every id is
    accounted for.
    """
    started = time.perf_counter()
    out, folder = os.fspath(out), os.fspath(folder)
    dataset = open_run(folder)
    subsets = samples_of(folder, dataset.manifest)
    names = list(dict.fromkeys(formats))
    if not names:
        raise RequestError(f"{setting('format')} wants one or more of {', '.join(FORMATS)}")
    check_formats(names, subsets[0].vocab_size, subsets[0].masked)
    run, store = written_now(at(folder), MANIFEST).sha256, at(out)
    try:
        with _claimed(store, names, run, overwrite) as listed:
            already = [name for name in names if name in listed and _is_whole(store, listed[name])]
            left = [name for name in names if name not in already]
            _write_list(store, run, listed, begun=left)
            with contextlib.closing(export_all(left, subsets, store, workers)) as finished:
                for done, place in finished:
                    # Named in the list first: a folder that is not, is not ours.
                    left.remove(done.format)
                    _write_list(store, run, {**listed, done.format: done}, begun=left)
                    place.publish()
                    listed[done.format] = done
            return Converted(out, [listed[name] for name in names], already, time.perf_counter() - started)
    except OSError as error:
        raise RunError(f"{error}. Run the same command again to go on") from error


@contextlib.contextmanager
def _claimed(out: Store, names: list[str], run: str, overwrite: bool) -> Iterator[dict[str, Export]]:
    """What `out` holds already, locked against a second conversion."""
    with contextlib.ExitStack() as held:
        try:
            out.make()
            held.enter_context(out.lock("", f"to {out.url}"))
        except OSError as error:
            raise RequestError(
                f"{setting('out', out.url)} cannot be made: {error.strerror}; give another folder"
            ) from error
        yield _begin(out, names, run, overwrite)


def _begin(out: Store, names: list[str], run: str, overwrite: bool) -> dict[str, Export]:
    found = _read_list(out)
    _check(out, found, names, run, overwrite)
    out.sweep()
    ours = dict(found["exports"]) if found else {}
    if overwrite:
        delete_all(out, ours)
        ours = {}
    if found is None or overwrite:
        _write_list(out, run, {})
    return {name: Export(**entry) for name, entry in ours.items()}


def _check(out: Store, found: dict[str, Any] | None, names: list[str], run: str, overwrite: bool) -> None:
    """Raises RequestError if something in `out` is not ours to replace."""
    there = {entry.name for entry in out.entries()} - {LIST}
    if MANIFEST in there:
        raise RequestError(f"{out.url} is a run folder; give another {setting('out')}")
    if found is None and there and not overwrite:
        raise RequestError(
            f"{out.url} has other files; give a new folder, or {setting('overwrite', True)} to write beside them"
        )
    if found is not None and found["run"] != run and not overwrite:
        raise RequestError(
            f"{out.url} has another run's exports; give another {setting('out')}, or {setting('overwrite', True)}"
        )
    for name in names:
        # A draft is ours if there is a list.
        draft = found is None and out.draft(name).exists("")
        if draft or (name in there and not (found and name in {*found["exports"], *found.get("begun", ())})):
            raise RequestError(f"{os.path.join(out.url, name)} is not of a conversion; give another {setting('out')}")


def _read_list(out: Store) -> dict[str, Any] | None:
    path = os.path.join(out.url, LIST)
    try:
        found = json.loads(out.read(LIST))
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunError(f"{path} is damaged: not valid JSON; give another {setting('out')}") from None
    if not isinstance(found, dict) or found.get("format") != KIND:
        raise RequestError(f"{path} was not written by this version of millstream; give another {setting('out')}")
    return found


def _write_list(out: Store, run: str, exports: dict[str, Export], begun: Sequence[str] = ()) -> None:
    """`begun`: formats whose folders may have half of an export, where folders have no drafts."""
    listed = {name: asdict(exports[name]) for name in FORMATS if name in exports}
    told = {"format": KIND, "run": run, "exports": listed, **({"begun": [*begun]} if begun else {})}
    out.put(LIST, json.dumps(told, indent=1).encode())


def _is_whole(out: Store, done: Export) -> bool:
    try:
        return out.exists(done.format) and all(
            written_now(out, file["name"]) == WrittenFile(file["bytes"], file["sha256"]) for file in done.files
        )
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
