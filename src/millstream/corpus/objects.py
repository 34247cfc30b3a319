"""Search stores far away for files: all that lies below a folder is listed, many names a request, and chosen here."""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import NamedTuple, NoReturn, TypeVar

from millstream.corpus.kinds import known_kind
from millstream.corpus.sources import InputShard
from millstream.corpus.walk import ending_told
from millstream.errors import RequestError, RunError
from millstream.store import State, file_at, is_far, pinned, readable, root_of

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 16
"""Requests that are made side by side, where there is one for each of many files."""
_SMALL = 1 << 18  # bytes


class FarFile(NamedTuple):
    """A file far away: where it is, what outputs call it, and what its store says of it."""

    uri: str
    name: str
    state: State


class FarWalk:
    """Finds files far away, and counts in `ignored` what it leaves out, but for what is found `besides`, as in `Walk`.

    What a branch of a dataset is, is looked up once, for all addresses.
    """

    def __init__(self, ignored: "Counter[str]", besides: str | None = None) -> None:
        self._ignored = ignored
        self._besides = f"{besides.rstrip('/')}/" if besides else None
        self._roots: dict[str, str] = {}
        self._states: dict[str, State | OSError] = {}

    def look_at(self, sources: Iterable[str]) -> None:
        """Ask for what many addresses are, side by side."""
        places = [self._place(source) for source in sources if is_far(source)]
        asked = [f"{root}/{path}" for root, path in places if path] if len(places) > 1 else []
        self._states |= zip(asked, side_by_side(_state, asked), strict=True)

    def find(self, source: str) -> list[FarFile]:
        """The files that an address means, be it that of one file, a folder or a glob.

        They have the names and the order that those of a folder of this machine would have. There may be none in a
        folder; raises RequestError where a file, a folder or what a glob matches is not there.
        """
        root, path = self._place(source)
        url = f"{root}/{path}"
        try:
            if not path:
                return self._folder(root, "")
            state = self._states.get(url) or _state(url)
            if isinstance(state, FileNotFoundError | NotADirectoryError):
                return self._glob(root, path) if glob.has_magic(path) else _nothing(source, path)
            if isinstance(state, OSError):
                raise state
            return [FarFile(url, path.rpartition("/")[2], state)] if state.kind == "file" else self._folder(root, path)
        except OSError as error:
            raise RunError(f"cannot read {source}: {error.strerror or error}") from error

    def _place(self, source: str) -> tuple[str, str]:
        """(root, as it is now; path) of an address."""
        root, path = root_of(source)
        if root not in self._roots:
            self._roots[root] = pinned(root)
        return self._roots[root], path.strip("/")

    def _folder(self, root: str, folder: str) -> list[FarFile]:
        found = []
        hidden = set[str]()
        for name, state in self._below(root, folder):
            parts = name.split("/")
            first = next((number for number, part in enumerate(parts) if part.startswith(".")), None)
            if first is not None:
                hidden.add("/".join(parts[: first + 1]))
            elif known_kind(name):
                found.append(_placed(root, folder, name, state))
            else:
                self._ignored[ending_told(name)] += 1
        if hidden:
            self._ignored["hidden"] += len(hidden)
        return found

    def _glob(self, root: str, pattern: str) -> list[FarFile]:
        parts = pattern.split("/")
        fixed = next(number for number, part in enumerate([*parts[:-1], "*"]) if glob.has_magic(part))
        folder, wanted = "/".join(parts[:fixed]), tuple(parts[fixed:])
        listed = self._below(root, folder)
        found = [each for each in listed if fits(tuple(each[0].split("/")), wanted)]
        folders = {above for name, _ in listed for above in _above(name)}
        matched = {each for each in folders if fits(tuple(each.split("/")), wanted, folder=True)}
        told = _joined(root, pattern)
        if not found:
            hint = f", only folders: name them, or {told.rstrip('/')}/*" if matched else ""
            raise RequestError(f"no file matches {told}{hint}")
        if left := len(matched - {above for name, _ in found for above in _above(name)}):
            self._ignored["folders"] += left
        return [_placed(root, folder, name, state) for name, state in found]

    def _below(self, root: str, folder: str) -> list[tuple[str, State]]:
        """(name from the folder on, state) of all files in it, sorted by name."""
        front = len(folder) + 1 if folder else 0
        listed = [(name, state) for name, state in readable(root).found(folder) if not name.endswith("/")]
        besides = (self._besides or "").removeprefix(f"{root}/")
        if besides != (self._besides or "") and not f"{folder}/".startswith(besides):
            listed = [(name, state) for name, state in listed if not name.startswith(besides)]
        return [(name[front:], state) for name, state in listed]


def _state(url: str) -> State | OSError:
    try:
        return file_at(url).state()
    except OSError as error:
        return error


def _nothing(source: str, path: str) -> NoReturn:
    hint = f"; for all that begins like this name the glob {source}*"
    if source.startswith("hf://") and "@" in path:
        hint = "; a revision stands behind the dataset's name: hf://datasets/ORG/NAME@REVISION/..."
    raise RequestError(f"no such file or folder: {source}{hint}")


def _above(name: str) -> list[str]:
    """The folders that a file is in.

    >>> _above("a/b/c.txt")
    ['a', 'a/b']
    """
    parts = name.split("/")
    return ["/".join(parts[:number]) for number in range(1, len(parts))]


def fits(name: tuple[str, ...], pattern: tuple[str, ...], *, folder: bool = False) -> bool:
    """Whether the parts of a file's name are those of a glob, as Python's glob has it; or those of a folder's.

    >>> some = [("a", "b.txt"), ("a", "b", "c.txt"), (".a", "b.txt"), ("b.txt",)]
    >>> [fits(name, ("*", "*.txt")) for name in some], [fits(name, ("**", "b*")) for name in some]
    ([True, False, False, False], [True, False, False, True])
    """
    if not pattern:
        return not name
    first, rest = pattern[0], pattern[1:]
    if not name:
        return folder and first == "**" and fits(name, rest, folder=True)
    hidden = name[0].startswith(".")
    if first == "**":
        if fits(name, rest, folder=folder) or (not rest and len(name) == 1 and not hidden):
            return True
        return not hidden and fits(name[1:], pattern, folder=folder)
    if hidden and not first.startswith("."):
        return False
    alike = fnmatchcase(name[0], first) if glob.has_magic(first) else name[0] == first
    return alike and fits(name[1:], rest, folder=folder)


def _placed(root: str, folder: str, name: str, state: State) -> FarFile:
    top = folder.rpartition("/")[2] or root.rpartition("/")[2].partition("@")[0]
    return FarFile(_joined(_joined(root, folder), name), f"{top}/{name}", state)


def _joined(url: str, name: str) -> str:
    return f"{url}/{name}" if name else url


def of_each(function: Callable[[InputShard], R], shards: Sequence[InputShard]) -> list[R]:
    """What a function makes of each, one by one; or side by side where it asks stores far away."""
    return side_by_side(function, shards) if any(shard.far for shard in shards) else list(map(function, shards))


def side_by_side(function: Callable[[T], R], some: Sequence[T]) -> list[R]:
    """What a function makes of each, where each is a question to a store far away."""
    if len(some) < 2:
        return list(map(function, some))
    with ThreadPoolExecutor(min(AT_ONCE, len(some)), "millstream-ask") as pool:
        return list(pool.map(function, some))


def growing(some: Iterable[T]) -> Iterator[list[T]]:
    """The same, one, two, four at a time and so on up to `AT_ONCE`: who takes only the first waits for no others.

    >>> list(growing("abcdef"))
    [['a'], ['b', 'c'], ['d', 'e', 'f']]
    """
    left, count = iter(some), 1
    while held := list(islice(left, count)):
        yield held
        count = min(2 * count, AT_ONCE)


def at_hand(some: Iterable[tuple[T, InputShard]]) -> Iterator[tuple[T, InputShard]]:
    """The same input shards, of which those far away that are small are fetched side by side: one after the other, each
    would be waited for longer than it takes to read it."""
    for held in growing(some):
        small = [shard for _, shard in held if shard.known and shard.known.size <= _SMALL]
        fetched = {shard.uri: shard for shard in side_by_side(_fetched, small)}
        for what, shard in held:
            yield what, fetched.get(shard.uri, shard)


def _fetched(shard: InputShard) -> InputShard:
    try:
        with shard.open(0) as file:
            return replace(shard, held=file.read(shard.size()))
    except OSError:
        return shard  # a fault when it is read
