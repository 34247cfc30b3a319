"""A finished run in the formats that trainers read, each in a folder of its own that appears whole or not at all."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from millstream.errors import RequestError, RunError, setting
from millstream.formats.dataset import open as open_run
from millstream.formats.exports import FORMATS, Export, check_formats, export
from millstream.formats.exports.out import delete
from millstream.formats.exports.samples import samples_of
from millstream.formats.manifest import MANIFEST, TEMPORARY, file_hash, sync_folder

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
) -> Converted:
    """Write the finished run in `folder` to `out`, in each of `formats` (names in `millstream.formats.exports`).

    What an earlier call finished is kept; a call that was interrupted is made again, to the same bytes. Raises
    RequestError for an unfinished run, an unknown format, ids that do not fit one, or an `out` with something else in
    it; LedgerError if not every id is accounted for.
    """
    started = time.perf_counter()
    out, folder = os.fspath(out), os.fspath(folder)
    dataset = open_run(folder)
    subsets = samples_of(folder, dataset.manifest)
    names = list(dict.fromkeys(formats))
    if not names:
        raise RequestError(f"{setting('format')} wants one or more of {', '.join(FORMATS)}")
    check_formats(names, subsets[0].vocab_size, subsets[0].masked)
    run = file_hash(os.path.join(folder, MANIFEST))
    try:
        with _claimed(out, names, run, overwrite) as listed:
            already = [name for name in names if name in listed and _is_whole(out, listed[name])]
            for name in names:
                if name not in already:
                    done, written = export(name, subsets, out)
                    # Named in the list first: a folder that is not, is not ours.
                    _write_list(out, run, {**listed, name: done})
                    written.publish()
                    listed[name] = done
            return Converted(out, [listed[name] for name in names], already, time.perf_counter() - started)
    except OSError as error:
        raise RunError(f"{error}. Run the same command again to go on") from error


@contextlib.contextmanager
def _claimed(out: str, names: list[str], run: str, overwrite: bool) -> Iterator[dict[str, Export]]:
    """What `out` holds already, locked against a second conversion."""
    try:
        os.makedirs(out, exist_ok=True)
        lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RequestError(f"{setting('out', out)} cannot be made: {error.strerror}; give another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"another millstream is writing to {out}; wait for it, or give another {setting('out')}"
            ) from None
        yield _begin(out, names, run, overwrite)
    finally:
        os.close(lock)


def _begin(out: str, names: list[str], run: str, overwrite: bool) -> dict[str, Export]:
    found = _read_list(out)
    there = set(os.listdir(out)) - {LIST, LIST + TEMPORARY}
    if MANIFEST in there:
        raise RequestError(f"{out} is a run folder; give another {setting('out')}")
    if found is None and there and not overwrite:
        raise RequestError(
            f"{out} has other files; give a new folder, or {setting('overwrite', True)} to write beside them"
        )
    if found is not None and found["run"] != run and not overwrite:
        raise RequestError(
            f"{out} has another run's exports; give another {setting('out')}, or {setting('overwrite', True)}"
        )
    ours = dict(found["exports"]) if found else {}
    for name in names:
        # What is unfinished has a temporary name, and is ours if there is a list.
        if name not in ours and (name in there or (found is None and name + TEMPORARY in there)):
            raise RequestError(f"{os.path.join(out, name)} is not of a conversion; give another {setting('out')}")
    if overwrite:
        for name in ours:
            delete(out, name)
        ours = {}
    if found is None or overwrite:
        _write_list(out, run, {})
    return {name: Export(**entry) for name, entry in ours.items()}


def _read_list(out: str) -> dict[str, Any] | None:
    path = os.path.join(out, LIST)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunError(f"{path} is damaged: not valid JSON; give another {setting('out')}") from None
    if not isinstance(found, dict) or found.get("format") != KIND:
        raise RequestError(f"{path} was not written by this version of millstream; give another {setting('out')}")
    return found


def _write_list(out: str, run: str, exports: dict[str, Export]) -> None:
    listed = {name: asdict(exports[name]) for name in FORMATS if name in exports}
    path = os.path.join(out, LIST)
    with open(path + TEMPORARY, "w", encoding="utf-8") as file:
        json.dump({"format": KIND, "run": run, "exports": listed}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + TEMPORARY, path)
    sync_folder(out)


def _is_whole(out: str, done: Export) -> bool:
    for file in done.files:
        path = os.path.join(out, file["name"])
        if not os.path.isfile(path) or os.path.getsize(path) != file["bytes"] or file_hash(path) != file["sha256"]:
            return False
    return os.path.isdir(os.path.join(out, done.format))
