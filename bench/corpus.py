"""Mixed text for the benchmark, gathered from what lies on any machine and kept in a cache folder.

The same machine gives the same corpus: files are listed in sorted order, shuffled with a fixed seed, and
taken until the asked size is reached. Words that never repeat come from `python bench/corpus.py BYTES`.
"""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

SEED = 20240229
SUFFIXES = (".py", ".md", ".rst", ".txt", ".h", ".html", ".c", ".js")
LARGEST = 2_000_000
SKIPPED_FOLDERS = {".git", ".bench", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """One JSONL file and what it consists of; sizes in bytes of the file."""

    path: str
    size: int
    documents: int
    passes: float
    shares: dict[str, float]

    def described(self) -> str:
        """One sentence for the table's head.

        >>> Corpus("x", 30_000_000, 1200, 1.0, {".py": 0.75, ".h": 0.25}).described()
        '30 MB of JSONL, 1,200 documents found on the machine (.py 75 %, .h 25 %)'
        """
        percent = {suffix: round(100 * share) for suffix, share in self.shares.items()}
        kinds = ", ".join(f"{suffix} {share or '< 1'} %" for suffix, share in percent.items())
        repeated = f"; too little was found, so {self.passes:.1f} times over" if self.passes > 1 else ""
        size = f"{self.size / 1e6:,.0f} MB of JSONL, {self.documents:,} documents"
        return f"{size} found on the machine ({kinds}{repeated})"


def folders() -> list[Path]:
    """Where text is looked for: Python's own tree, what the system shares, version managers at home."""
    system = [sys.base_prefix, "/usr/share", "/usr/lib", "/usr/include", "/usr/local"]
    home = [Path.home() / name for name in (".pyenv", ".rustup", ".cargo", ".nvm", ".local/lib")]
    real = sorted({folder.resolve() for folder in [*map(Path, system), *home] if folder.is_dir()})
    return [folder for folder in real if not any(other in folder.parents for other in real)]


def text_files() -> list[str]:
    """Every file with a text's suffix under `folders()`, shuffled with the fixed seed."""
    found = []
    for top in folders():
        for folder, inner, names in os.walk(top):
            inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
            found += [os.path.join(folder, name) for name in names if name.endswith(SUFFIXES)]
    found.sort()
    random.Random(SEED).shuffle(found)
    return found


def read_text(path: str) -> str | None:
    """The file's text; None if it is a link, empty, too large, unreadable or not UTF-8."""
    try:
        if os.path.islink(path) or not 0 < os.path.getsize(path) <= LARGEST:
            return None
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def distinct_texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every usable file, each text once."""
    seen = set()
    for path in text_files():
        text = read_text(path)
        if text is None:
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield path, text


def chosen(size: int) -> list[str]:
    """Files with distinct texts, `size` bytes in all or whatever there is, in the order of `text_files`.

    While there is enough, no kind of file makes more than a third: generated pages, which repeat themselves
    and so tokenize faster, would otherwise be most of the text on some machines.
    """
    taken, spare = [], []
    amounts: Counter[str] = Counter()
    for path, text in distinct_texts():
        kind, length = os.path.splitext(path)[1], len(text.encode())
        if amounts[kind] + length > size / 3:
            spare.append((path, length))
            continue
        taken.append(path)
        amounts[kind] += length
        if amounts.total() >= size:
            break
    missing = size - amounts.total()
    for path, length in spare:
        if missing <= 0:
            break
        taken.append(path)
        missing -= length
    if not taken:
        raise SystemExit("bench: no text was found on this machine")
    return taken


def documents(paths: list[str]) -> Iterator[tuple[str, str, int]]:
    """(path, text, pass) without end: all files in a shuffled order, then again in another one."""
    for number in count(1):
        random.Random(SEED + number).shuffle(paths)
        for path in paths:
            if text := read_text(path):
                yield path, text, number


def write(path: Path, size: int) -> Corpus:
    """Write documents to `path` until it has `size` bytes, whole lines only."""
    written, lines, first_pass = 0, 0, 0
    shares: Counter[str] = Counter()
    with open(path, "wb") as file:
        for name, text, number in documents(chosen(size)):
            line = json.dumps({"id": f"{lines:08d}", "text": text}, ensure_ascii=False).encode() + b"\n"
            written += file.write(line)
            lines += 1
            first_pass += len(line) if number == 1 else 0
            shares[os.path.splitext(name)[1]] += len(line)
            if written >= size:
                break
    parts = {suffix: amount / written for suffix, amount in shares.most_common()}
    return Corpus(str(path), written, lines, written / first_pass, parts)


def mixed(folder: Path, megabytes: int) -> Corpus:
    """The corpus of the asked size, from the cache folder when it is there."""
    path = folder / f"mix-{megabytes}.jsonl"
    notes = path.with_suffix(".json")
    if not notes.exists():
        partial = path.with_suffix(".partial")
        made = write(partial, megabytes * 1_000_000)
        partial.replace(path)
        notes.write_text(json.dumps({**asdict(made), "path": str(path)}))
    return Corpus(**json.loads(notes.read_text()))


def subset(corpus: Corpus, folder: Path, megabytes: int) -> Path:
    """The first `megabytes` of the corpus, whole lines, in a file of its own."""
    path = folder / f"{Path(corpus.path).stem}-first-{megabytes}.jsonl"
    if not path.exists():
        partial = path.with_suffix(".partial")
        with open(corpus.path, "rb") as whole, open(partial, "wb") as part:
            for line in whole:
                part.write(line)
                if part.tell() >= megabytes * 1_000_000:
                    break
        partial.replace(path)
    return path


def fresh_words(size: int) -> Iterator[bytes]:
    """JSONL lines, `size` bytes in all, whose words are random letters: no cache of words can help."""
    source = random.Random(SEED)
    letters = bytes(97 + n % 26 for n in range(256))
    written = lines = 0
    while written < size:
        body = bytearray(source.randbytes(4096).translate(letters))
        body[7::8] = b" " * len(body[7::8])
        line = b'{"id": %d, "text": "%s"}\n' % (lines, bytes(body))
        yield line
        written += len(line)
        lines += 1


if __name__ == "__main__":
    for fresh in fresh_words(int(sys.argv[1])):
        sys.stdout.buffer.write(fresh)
