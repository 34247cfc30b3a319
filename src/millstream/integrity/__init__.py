"""Check a finished run folder against its own manifest: every byte, every count, every id."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from millstream.errors import RunError
from millstream.folder.entries import FileEntry, Manifest
from millstream.folder.manifest import LEASES, MANIFEST, RECORDS, RUN, is_journal
from millstream.integrity.documents import Ordinals
from millstream.integrity.ledger import ledger_problems
from millstream.integrity.subset import SubsetCheck
from millstream.store import Store, at, written_now

_ENOUGH = 20
"""Problems of one subset: more only say the same again."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `problems` is empty if the folder is whole.

    `compared` documents were compared with the sources, of `documents`; `not_compared` of them could only be encoded by
    the fast engine. They are None without sources, or if the folder is not whole by itself.
    """

    problems: list[str]
    files: int
    samples: int
    bytes: int
    compared: int | None = None
    documents: int | None = None
    not_compared: int | None = None

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    folder: str | os.PathLike[str],
    on_file: Callable[[str], None] = lambda name: None,
    *,
    against: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    sample: float = 1.0,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    workers: int | None = None,
) -> Verification:
    """Check a finished run folder: all files there, none foreign, every SHA-256, ids within the vocabulary, segments
    and documents that fit the samples, and the ledger.

    With the sources of the run as `against`, they are read and tokenized again, with the reference engine, and every id
    is compared, or with a `sample` below 1 those of that part of the documents. `tokenizer` and `chat_template` say
    where these are now. Raises RequestError if it is no run folder, is unfinished, or is of other sources, RunError if
    the manifest itself is damaged.
    """
    from millstream.folder.dataset import open as open_run

    folder = os.fspath(folder)
    manifest = open_run(folder).manifest
    problems: list[str] = []
    files, store = list(manifest.files), at(folder)
    size = 0
    for entry in files:
        on_file(entry.name)
        problem = _file_problem(store, entry)
        size += entry.bytes
        if problem:
            problems.append(f"{entry.name}: {problem}")
    known = {entry.name for entry in files} | {MANIFEST, RUN, RECORDS, LEASES}  # the last may be left of a crash
    problems += [f"{name}: not part of this run" for name in _foreign(folder, known)]
    if not problems:  # counts of damaged files would only say the same again
        ordinals = Ordinals()
        for name in manifest.subsets:
            on_file(f"{name} counts")
            problems += islice(_subset_problems(folder, manifest, name, ordinals), _ENOUGH)
        problems += ledger_problems(folder, manifest, ordinals)
    whole = Verification(problems, len(files), manifest.samples, size)
    if against is None or problems:  # what does not fit in itself cannot be compared
        return whole
    from millstream.runs.pack.against import compare_with

    where = {"tokenizer": tokenizer, "chat_template": chat_template}
    found = compare_with(folder, against, sample=sample, **where, workers=workers)
    counts = {"compared": found.documents, "documents": found.of, "not_compared": found.not_compared}
    return replace(whole, problems=found.problems, **counts)


def _foreign(folder: str, known: set[str]) -> Iterator[str]:
    """What is in the folder beside the files `known` and the folders that they are in."""
    homes = {os.path.dirname(name) for name in known}
    homes |= {os.path.dirname(name) for name in homes}
    store = at(folder)
    for name, _ in store.entries():
        if name not in homes and name not in known and not is_journal(name):
            yield name
    for home in sorted(homes - {""}):
        if store.exists(home) and store.state(home).kind == "folder":
            inside = {f"{home}/{name}" for name, _ in store.entries(home)}
            yield from sorted(inside - known - homes)


def _file_problem(store: Store, entry: FileEntry) -> str | None:
    if not store.exists(entry.name):
        return "missing"
    size = store.size(entry.name)
    if size != entry.bytes:
        return f"{size:,} bytes instead of {entry.bytes:,}"
    try:
        found = written_now(store, entry.name).sha256
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == entry.sha256 else "its content has changed (SHA-256 differs)"


def _subset_problems(folder: str, manifest: Manifest, name: str, ordinals: Ordinals) -> Iterator[str]:
    """What is wrong with the samples and documents of one subset; `ordinals` gets its documents'."""
    try:
        yield from SubsetCheck(folder, manifest, name, ordinals).problems()
    except RunError as error:
        yield str(error).partition("; 'millstream verify'")[0]
