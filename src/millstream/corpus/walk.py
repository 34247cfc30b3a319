"""Search folders and globs for files, every one once, and nothing passed over in silence."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import PurePath

from millstream.corpus.kinds import ending_of, known_kind
from millstream.errors import RequestError
from millstream.store import at, file_at, kind_at, target_of

_LONGEST_ENDING = 16


class Walk:
    """Finds files and notes what it leaves out.

    `ignored` counts, by ending and the like, what is in folders besides what is read; `unreadable` has the folders that
    could not be listed, each with the reason. What is found on the way `besides` is passed over: that folder is where
    a run goes, and was not there when it began.
    """

    def __init__(self, besides: str | None = None) -> None:
        self.ignored: Counter[str] = Counter()
        self.unreadable: list[str] = []
        self._besides = identity(besides) if besides else None

    def folder(self, root: str) -> list[str]:
        """The paths under `root` whose names say that they are read, sorted.

        Linked folders are searched last, so that each folder has its own name before any other, and none twice.
        """
        found: list[str] = []
        folders, links, seen = [root], list[str](), {identity(root)}
        while folders or links:
            if not folders:
                links.sort()
                link = links.pop(0)
                if _is_above(link, root) or identity(link) in seen:
                    self.ignored["linked folders"] += 1
                    continue
                seen.add(identity(link))
                folders.append(link)
            for path, is_link in self._listed(folders.pop()):
                kind = kind_at(path)
                if kind != "folder":
                    self._file(path, kind, found)
                elif self._is_besides(path):
                    continue
                elif is_link:
                    links.append(path)
                elif identity(path) in seen:
                    self.ignored["linked folders"] += 1
                else:
                    seen.add(identity(path))
                    folders.append(path)
        return sorted(found)

    def _file(self, path: str, kind: str | None, found: list[str]) -> None:
        if known_kind(path):
            refuse_pipe(path, kind)
            found.append(path)
        else:
            self.ignored[ending_told(path)] += 1

    def _listed(self, folder: str) -> Iterator[tuple[str, bool]]:
        """(path, whether it is a link) of what is in a folder, sorted by name, without what is hidden."""
        try:
            found = at(folder).entries()
        except OSError as error:
            self._note(folder, error)
            return
        for name, is_link in found:
            if name.startswith("."):
                self.ignored["hidden"] += 1
            else:
                yield os.path.join(folder, name), is_link

    def glob(self, pattern: str) -> list[str]:
        """The paths of the files that a glob matches, sorted; folders among them are counted, if nothing in them is
        matched. Raises RequestError if there are none."""
        unreadable = len(self.unreadable)
        base, matched = PurePath(fixed_part(pattern)), set(self._matches("", PurePath(pattern).parts, ()))
        kinds = {path: kind_at(path) for path in sorted(matched) if not self._is_in_besides(path, base)}
        folders = {path for path, kind in kinds.items() if kind == "folder"}
        paths = [path for path in kinds if path not in folders]
        if not paths and len(self.unreadable) == unreadable:
            hint = f", only folders: name them, or {pattern.rstrip('/')}/*" if folders else ""
            raise RequestError(f"no file matches {pattern}{hint}")
        read = {parent for path in paths for parent in PurePath(path).parents}
        if left := sum(PurePath(folder) not in read for folder in folders):
            self.ignored["folders"] += left
        for path in paths:
            refuse_pipe(path, kinds[path])
        return paths

    def _matches(self, base: str, parts: tuple[str, ...], above: tuple[object, ...]) -> Iterator[str]:
        """What a glob's `parts` match under the folder `base`, as glob.glob has it; but a link back to one of the
        folders `above` is not followed, and what cannot be read is noted."""
        if not parts:
            if base and self._exists(base):
                yield base
            return
        first, rest = parts[0], parts[1:]
        if first == "**":
            if not base or kind_at(base) == "folder":
                yield from self._any_depth(base, rest, (*above, identity(base or ".")))
        elif glob.has_magic(first):
            for path in self._entries(base, hidden=first.startswith(".")):
                if fnmatchcase(os.path.basename(path), first):
                    yield from self._matches(path, rest, above)
        else:
            yield from self._matches(os.path.join(base, first), rest, above)

    def _any_depth(self, base: str, rest: tuple[str, ...], above: tuple[object, ...]) -> Iterator[str]:
        yield from self._matches(base, rest, above)
        for path in self._entries(base):
            if kind_at(path) != "folder":
                if not rest:
                    yield path
            elif (here := identity(path)) in above:
                self.ignored["linked folders"] += 1
            else:
                yield from self._any_depth(path, rest, (*above, here))

    def _entries(self, base: str, hidden: bool = False) -> list[str]:
        try:
            names = [entry.name for entry in at(base).entries()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._note(base, error)
            return []
        return [os.path.join(base, name) for name in names if hidden or not name.startswith(".")]

    def _exists(self, path: str) -> bool:
        try:
            file_at(path).state(follow=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._note(path, error)
            return False
        return True

    def _is_besides(self, folder: str) -> bool:
        return self._besides is not None and identity(folder) == self._besides

    def _is_in_besides(self, path: str, base: PurePath) -> bool:
        """Whether a path that was found from the folder `base` on leads through what is passed over, or there."""
        if self._besides is None:
            return False
        below = PurePath(path)
        return any(self._is_besides(str(part)) for part in (below, *below.parents) if base in part.parents)

    def _note(self, path: str, error: OSError) -> None:
        told = f"{path}: {error.strerror}"
        if told not in self.unreadable:
            self.unreadable.append(told)


def fixed_part(pattern: str) -> str:
    """The folder that a glob is searched from.

    >>> fixed_part("a/b*/c/*.txt"), fixed_part("*.txt")
    ('a', '.')
    """
    fixed = [*takewhile(lambda part: not glob.has_magic(part), PurePath(pattern).parts[:-1])]
    return str(PurePath(*fixed or ["."]))


def identity(path: str) -> tuple[int, int] | None:
    """What is the same for one file under all its names; None if there is none."""
    try:
        return file_at(path).state().identity
    except OSError:
        return None


def refuse_pipe(path: str, kind: str | None) -> None:
    """Raises RequestError for what is no file that can be read to its end and again."""
    if kind not in ("file", None):  # where it cannot be told, that is a fault when it is read
        raise RequestError(f"{path} is a pipe, a socket or a device; leave it out, or pipe JSONL in as '-' instead")


def _is_above(link: str, root: str) -> bool:
    """Whether a link leads to a folder that `root` is in: to follow it would read what the person did not name."""
    real = target_of(link)
    return os.path.commonpath([real, target_of(root)]) == real


def ending_told(path: str) -> str:
    """What an ignored file is counted as.

    >>> ending_told("a/x.json.gz"), ending_told("x.JSONL.xz"), ending_told("Makefile")
    ('.json.gz', '.xz', 'without ending')
    """
    ending, packed = ending_of(path)
    found = ending + os.path.splitext(path.lower())[1] if packed else ending
    if not found:
        return "without ending"
    return found if len(found) <= _LONGEST_ENDING and found.isprintable() else "others"
