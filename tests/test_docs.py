"""Every example in the documentation runs, and prints what the page says it prints."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.exists() and ">>>" in page.read_text(encoding="utf-8")
]


class FenceParser(doctest.DocTestParser):
    """Reads Markdown: a fence ends the expected output, as an empty line does.

    Without this the closing fence would count as one more line of output.
    A fence becomes an empty line, so the reported line numbers stay right.
    """

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"(?m)^[ \t]*```.*$", "", string), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may write files
    result = doctest.testfile(
        str(page),
        module_relative=False,
        optionflags=doctest.ELLIPSIS,
        parser=FenceParser(),
        encoding="utf-8",
    )
    assert result.attempted > 0
    assert result.failed == 0, "the examples that failed are in the captured output"
