"""What a corpus is made of: the sources that a person names become input shards, and nothing is passed over in silence.

A file that is named, or that a glob matches, is read or refused. A folder is searched for what is known to be text, and
the rest is counted.
"""

import contextlib
import errno
import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import PurePath

from millstream.corpus.kinds import KINDS, decided, ending_of, known_kind, looks_like, refusal
from millstream.corpus.objects import FarFile, FarWalk, side_by_side
from millstream.corpus.sources import InputShard, chunks
from millstream.corpus.walk import Walk, fixed_part, identity, refuse_pipe
from millstream.errors import RequestError, RunError, Unusable
from millstream.store import State, at, file_at, is_far

_PIPED = {"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}
_LOOK = 1 << 12
_LONGEST_LOOK = 32 << 20
"""Bytes of a .json file's first line that are read to tell whether it is a line of JSON."""
_SHOWN = 8


@dataclass(frozen=True)
class FoundInputs:
    """The input shards of some sources, in order, and what was left out.

    `ignored` counts, by ending and the like, what folders and globs hold besides; `unreadable` has the folders that
    could not be listed, each with the reason.
    """

    shards: list[InputShard]
    ignored: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def ignored_by_kind(self) -> dict[str, int]:
        """`ignored`, the most frequent first, and not endlessly many."""
        most = dict(sorted(self.ignored.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN])
        others = self.ignored.total() - sum(most.values())
        return {**most, **({"others": others} if others else {})}

    def repeated(self) -> str | None:
        """What is given more than once, in a line, or None: a file and its folder, say, are two sources."""
        times: Counter[tuple[int, int]] = Counter()
        names: dict[tuple[int, int], str] = {}
        for shard in self.shards:
            found = shard.known.identity if shard.known else identity(shard.uri)
            if shard.uri != "-" and found:
                times[found] += 1
                names.setdefault(found, shard.uri)
        again = [(names[found], count) for found, count in times.items() if count > 1]
        if not again:
            return None
        name, count = again[0]
        others = f", and {len(again) - 1:,} more are given again, too" if len(again) > 1 else ""
        return f"{name} is given {count:,} times and is read each time{others}"


def expand(sources: Iterable[str | os.PathLike[str]]) -> list[InputShard]:
    """The input shards of `sources`, where none may be left out: raises RequestError if a folder holds other files,
    RunError if one cannot be listed. Otherwise as `find_inputs`."""
    found = find_inputs(sources)
    if found.unreadable:
        raise RunError(f"cannot read {found.unreadable[0]}")
    if ignored := {what: count for what, count in found.ignored_by_kind().items() if what != "hidden"}:
        told = f"there are {ignored_files(ignored)}"
        raise RequestError(f"besides what can be read {told}; name the files that are meant, or a glob")
    return found.shards


def find_inputs(sources: Iterable[str | os.PathLike[str]], *, besides: str | None = None) -> FoundInputs:
    """The input shards of `sources`, in order; within a folder or a glob, sorted by path.

    A source is a file, a folder (its .jsonl, .ndjson, .parquet, .txt and .md files, the first two and plain text also
    as .gz and .zst, wherever it links to), a glob, ``-`` for JSONL on standard input, or ``stdlib:``; the first three
    may lie far away, as ``s3://bucket/folder``. A file of any other ending, named or matched by a glob, is JSON
    lines if it looks like them, and else plain text: one document. What folders and globs hold `besides`, in the
    folder that the run goes to, is none of them.
    Raises RequestError for what cannot be read, RunError for what may not be.
    """
    named, away = [os.fspath(source) for source in sources], besides is not None and is_far(besides)
    walk = Walk(None if away else besides)
    far = FarWalk(walk.ignored, besides if away else None)
    far.look_at(named)
    shards = [shard for source in named for shard in _expand(source, walk, far)]
    if not shards and walk.unreadable:
        raise RunError(f"cannot read {walk.unreadable[0]}")
    if not shards:
        raise RequestError("no source given: name a file, a folder, a glob, '-' or 'stdlib:'")
    if sum(shard.uri == "-" for shard in shards) > 1:
        raise RequestError("standard input ('-') can be read only once")
    names = called([shard.name for shard in shards])
    shards = [replace(shard, alias=alias) for shard, alias in zip(shards, names, strict=True)]
    return FoundInputs(shards, walk.ignored, walk.unreadable)


def ignored_files(counts: dict[str, int]) -> str:
    """What was ignored, in words; nothing if it is nothing.

    >>> ignored_files({".xz": 2, ".json": 1})
    '3 files: .xz 2, .json 1'
    """
    total = sum(counts.values())
    parts = ", ".join(f"{what} {count:,}" for what, count in counts.items())
    return f"{total:,} {'file' if total == 1 else 'files'}: {parts}" if total else ""


def called(names: Sequence[str]) -> list[str]:
    """What messages call inputs of these names: by number as well, if several have one name.

    >>> called(["x.jsonl", "y.jsonl", "x.jsonl"])
    ['x.jsonl (input 1)', 'y.jsonl', 'x.jsonl (input 3)']
    """
    times = Counter(names)
    return [f"{name} (input {number})" if times[name] > 1 else name for number, name in enumerate(names, 1)]


def _expand(source: str, walk: Walk, far: FarWalk) -> list[InputShard]:
    if source in _PIPED:
        return [InputShard("-", "-", "jsonl")]
    if source == "stdlib:":
        return [InputShard(path, f"stdlib:{name}", "python") for path, name in standard_library()]
    if is_far(source):
        return _far(source.rstrip("/"), walk, far)
    source = source.removeprefix("file://")
    kind = _kind(source)
    if kind == "folder":
        return _folder(source, walk)
    if kind is not None:
        refuse_pipe(source, kind)
        return [_named(source, os.path.basename(source))]
    if glob.has_magic(source):
        return [_named(path, _name(path, fixed_part(source))) for path in walk.glob(source)]
    raise RequestError(f"no such file or folder: {source}")


def _folder(root: str, walk: Walk) -> list[InputShard]:
    root = os.path.normpath(root)
    before, unreadable = walk.ignored.copy(), len(walk.unreadable)
    paths = walk.folder(root)
    if not paths and len(walk.unreadable) == unreadable:
        raise RequestError(_nothing_to_read(root, walk.ignored - before))
    return [_shard(path, _name(path, root), known_kind(path) or "text") for path in paths]


def _nothing_to_read(root: str, ignored: "Counter[str]") -> str:
    told = ignored_files(FoundInputs([], ignored).ignored_by_kind())
    return (
        f"nothing to read in {root}: a folder is searched for {' '.join(KINDS)} (and .gz, .zst of them)"
        f"{f'; there are {told}' if told else ''}. For other files name a glob such as '{root}/**/*.log'"
    )


def _far(source: str, walk: Walk, far: FarWalk) -> list[InputShard]:
    before = walk.ignored.copy()
    found = far.find(source)
    if not found:
        raise RequestError(_nothing_to_read(source, walk.ignored - before))
    # Whether what is known by its name begins with a byte order mark is not asked, file by file: reading tells.
    others = iter(side_by_side(_looked_at, [file for file in found if not known_kind(file.uri)]))
    return [_far_shard(file, kind) if (kind := known_kind(file.uri)) else next(others) for file in found]


def _far_shard(file: FarFile, kind: str) -> InputShard:
    return replace(_shard(file.uri, file.name, kind), known=file.state)


def _looked_at(file: FarFile) -> InputShard:
    return _named(file.uri, file.name, file.state)


def _kind(path: str) -> str | None:
    """What kind of file a source is; None if there is none. Raises RunError if that cannot be told."""
    try:
        return file_at(path).state().kind
    except (FileNotFoundError, NotADirectoryError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            file_at(path).state(follow=False)
            raise RequestError(f"{path} is a link to a file that is not there") from None
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and glob.has_magic(path):
            return None
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def _name(path: str, base: str) -> str:
    top = os.path.basename(os.path.abspath(base))
    return PurePath(top, os.path.relpath(path, base)).as_posix()


# Files ----------------------------------------------------------------------------------------------------------------


def _shard(path: str, name: str, kind: str) -> InputShard:
    # A file name need not be UTF-8, but everything we write is.
    return InputShard(path, os.fsencode(name).decode("utf-8", "backslashreplace"), kind, ending_of(path)[1])


def _named(path: str, name: str, known: State | None = None) -> InputShard:
    """The input shard of a file that is asked for. Raises RequestError if it is not one that can be read."""
    if why := refusal(path):
        raise RequestError(why)
    kind = known_kind(path)
    if kind == "parquet":
        return _shard(path, name, kind)
    shard = replace(_shard(path, name, kind or "text"), known=known)
    open_json = ending_of(path)[0] == ".json"
    try:
        seen = looks_like(_beginning(shard, look_on=kind is None))
    except Unusable as unusable:
        if unusable.reason == "invalid_utf8":
            raise RequestError(f"{path} is {unusable.message}") from None
        seen = "nothing"  # damaged: one fault when it is read
    except OSError:
        seen = "nothing"  # unreadable: the same
    if open_json and seen not in ("nothing", "line", "lines"):
        raise RequestError(_no_lines(path, seen))
    return replace(shard, kind="jsonl") if open_json or (kind is None and seen == "lines") else shard


def _beginning(shard: InputShard, look_on: bool) -> bytes:
    """The first bytes of a file, unpacked; enough to tell what it is, with `look_on`."""
    pieces, size, enough = [], 0, 0
    for piece in chunks(shard, size=_LOOK):
        pieces.append(piece)
        size += len(piece)
        if size < enough:  # looked at each time that it has doubled: all of it each time would be endless work
            continue
        enough = 2 * size
        if not look_on or size > _LONGEST_LOOK or decided(b"".join(pieces)):
            break
    return b"".join(pieces)


def _no_lines(path: str, seen: str) -> str:
    what, take = {"array": ("a JSON array", ".[]"), "object": ("JSON over several lines", ".")}.get(
        seen, ("no JSON", "")
    )
    if not take:
        return f"{path} is named .json and has {what}: name it .txt if it is text"
    unpack = {"gzip": "gzip -dc", "zstd": "zstd -dc", None: "cat"}[ending_of(path)[1]]
    return (
        f"{path} is {what}, and JSON is read line by line, an object each: make lines of it, as with "
        f"{unpack} {path} | jq -c '{take}'"
    )


@cache
def standard_library() -> list[tuple[str, str]]:
    """(path, name) of the standard library's own modules, sorted by name; without site-packages and tests."""
    import sysconfig

    root = sysconfig.get_path("stdlib")
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
    store, folders, found = at(root), [""], []
    while folders:
        folder = folders.pop()
        for name, link in store.entries(folder):
            path = f"{folder}/{name}".lstrip("/")
            if name.endswith(".py"):
                found += [(os.path.join(root, path), path)] if not name.startswith("_sysconfigdata") else []
            elif not (link or name in skip or name.startswith("config-")) and store.state(path).kind == "folder":
                folders.append(path)
    return sorted(found, key=lambda pair: pair[1])
