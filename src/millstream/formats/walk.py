"""Search folders and globs for files, every one once, and nothing passed over in silence."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import PurePath

from millstream.errors import RequestError
from millstream.formats.kinds import ending_of, known_kind

_LONGEST_ENDING = 16


class Walk:
    """Finds files and notes what it leaves out.

    `ignored` counts, by ending and the like, what is in folders besides what is read; `unreadable` has the folders that
    could not be listed, each with the reason.
    """

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self.unreadable: list[str] = []

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
                mode = _mode(path)
                if mode is None or not stat.S_ISDIR(mode):
                    self._file(path, mode, found)
                elif is_link:
                    links.append(path)
                elif identity(path) in seen:
                    self.ignored["linked folders"] += 1
                else:
                    seen.add(identity(path))
                    folders.append(path)
        return sorted(found)

    def _file(self, path: str, mode: int | None, found: list[str]) -> None:
        if known_kind(path):
            refuse_pipe(path, mode)
            found.append(path)
        else:
            self.ignored[_ending(path)] += 1

    def _listed(self, folder: str) -> Iterator[tuple[str, bool]]:
        """(path, whether it is a link) of what is in a folder, sorted by name, without what is hidden."""
        try:
            with os.scandir(folder) as entries:
                found = sorted((entry.name, entry.is_symlink()) for entry in entries)
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
        modes = {path: _mode(path) for path in sorted(set(self._matches("", PurePath(pattern).parts, ())))}
        folders = {path for path, mode in modes.items() if mode is not None and stat.S_ISDIR(mode)}
        paths = [path for path in modes if path not in folders]
        if not paths and len(self.unreadable) == unreadable:
            hint = f", only folders: name them, or {pattern.rstrip('/')}/*" if folders else ""
            raise RequestError(f"no file matches {pattern}{hint}")
        read = {parent for path in paths for parent in PurePath(path).parents}
        if left := sum(PurePath(folder) not in read for folder in folders):
            self.ignored["folders"] += left
        for path in paths:
            refuse_pipe(path, modes[path])
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
            if not base or self._exists(os.path.join(base, "")):
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
            mode = _mode(path)
            if mode is None or not stat.S_ISDIR(mode):
                if not rest:
                    yield path
            elif (here := identity(path)) in above:
                self.ignored["linked folders"] += 1
            else:
                yield from self._any_depth(path, rest, (*above, here))

    def _entries(self, base: str, hidden: bool = False) -> list[str]:
        try:
            names = os.listdir(base or ".")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._note(base, error)
            return []
        return [os.path.join(base, name) for name in names if hidden or not name.startswith(".")]

    def _exists(self, path: str) -> bool:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._note(path, error)
            return False
        return True

    def _note(self, path: str, error: OSError) -> None:
        told = f"{path}: {error.strerror}"
        if told not in self.unreadable:
            self.unreadable.append(told)


def identity(path: str) -> tuple[int, int] | None:
    """What is the same for one file under all its names; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def refuse_pipe(path: str, mode: int | None) -> None:
    """Raises RequestError for what is no file that can be read to its end and again."""
    if mode is not None and not stat.S_ISREG(mode):
        raise RequestError(f"{path} is a pipe, a socket or a device; leave it out, or pipe JSONL in as '-' instead")


def _mode(path: str) -> int | None:
    """What kind of file a path leads to; None, too, if that cannot be told: it becomes a fault when it is read."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return None


def _is_above(link: str, root: str) -> bool:
    """Whether a link leads to a folder that `root` is in: to follow it would read what the person did not name."""
    real = os.path.realpath(link)
    return os.path.commonpath([real, os.path.realpath(root)]) == real


def _ending(path: str) -> str:
    """What an ignored file is counted as.

    >>> _ending("a/x.json.gz"), _ending("x.JSONL.xz"), _ending("Makefile")
    ('.json.gz', '.xz', 'without ending')
    """
    ending, packed = ending_of(path)
    found = ending + os.path.splitext(path.lower())[1] if packed else ending
    if not found:
        return "without ending"
    return found if len(found) <= _LONGEST_ENDING and found.isprintable() else "others"
