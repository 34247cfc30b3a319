"""The table: plain on a terminal, Markdown between two markers of a page."""

import os
import platform
import re
import textwrap
from pathlib import Path

from bench.rows import Row

HEADINGS = ("What", "Target", "Measured", "Met")
WIDTHS = (34, 22, 44, 3)
NEW_PAGE = "# Performance\n\nMeasured by `python -m bench --write`, which rewrites what is between the markers.\n"


def met(row: Row) -> str:
    return {True: "yes", False: "no", None: "–"}[row.met]


def cells(row: Row) -> tuple[str, str, str, str]:
    return row.what, row.target, row.measured, met(row)


def plain(rows: list[Row]) -> str:
    """Columns side by side, long cells wrapped."""
    lines = [joined(HEADINGS), joined(["-" * width for width in WIDTHS])]
    for row in rows:
        wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells(row), WIDTHS, strict=True)]
        height = max(map(len, wrapped))
        columns = [[*column, *[""] * (height - len(column))] for column in wrapped]
        lines += [joined(line) for line in zip(*columns, strict=True)] + [""]
    return "\n".join(lines)


def joined(parts: list[str] | tuple[str, ...]) -> str:
    return "  ".join(part.ljust(width) for part, width in zip(parts, WIDTHS, strict=True)).rstrip()


def markdown(rows: list[Row]) -> str:
    """The same rows as a Markdown table."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def machine() -> str:
    """Processor, cores and Python, without anything that names this machine."""
    python = f"Python {platform.python_version()}"
    return f"{processor()}, {cores()}, {platform.system()} {platform.machine()}, {python}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or "unknown processor"


def cores() -> str:
    """How many cores, and whether they are only hardware threads of fewer."""
    count = os.cpu_count() or 1
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    siblings = {path.read_text() for path in files}
    real = len(siblings) or count
    return f"{count} cores" if real >= count else f"{count} hardware threads on {real} cores"


def replace_section(page: str, name: str, section: str) -> str:
    """The page with what is between the markers of that name replaced; they are added at its end if they are missing.

    >>> replace_section("a <!-- bench:pack:start -->old<!-- bench:pack:end --> b", "pack", "new")
    'a <!-- bench:pack:start -->\\nnew\\n<!-- bench:pack:end --> b'
    """
    start, end = f"<!-- bench:{name}:start -->", f"<!-- bench:{name}:end -->"
    block = f"{start}\n{section}\n{end}"
    if start in page and end in page:
        return page[: page.index(start)] + block + page[page.index(end) + len(end) :]
    return f"{page.rstrip()}\n\n{block}\n"


def write(page: Path, name: str, section: str) -> None:
    page.parent.mkdir(exist_ok=True)
    page.write_text(replace_section(page.read_text() if page.exists() else NEW_PAGE, name, section))
