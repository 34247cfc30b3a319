"""What a glob finds far away is what it finds in a folder of this machine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.corpus import objects
from millstream.corpus.find import find_inputs
from millstream.errors import RequestError
from millstream.store import at, file_at

PARTS = st.sampled_from(["a", "b", "ab", ".h"])
PATTERNS = st.lists(
    st.sampled_from(["*", "**", "a*", "*.txt", "?", ".*", "[ab]", "a", "f.txt"]), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.lists(PARTS, max_size=3).map("/".join), min_size=1, max_size=6), PATTERNS.map("/".join))
def test_a_glob_finds_what_it_finds_here(tmp_path_factory, names, pattern):
    folder = tmp_path_factory.mktemp("some") / "glob"
    for name in names:
        (folder / "top" / name).mkdir(parents=True, exist_ok=True)
        (folder / "top" / name / "f.txt").write_text("text")
    for magic in (f"top/{pattern}", f"*/{pattern}"):
        here = found_or_told(f"{folder}/{magic}")
        with pytest.MonkeyPatch.context() as patch:  # a folder in the place of a bucket
            patch.setattr(objects, "readable", lambda root: at(folder))
            patch.setattr(objects, "file_at", lambda url: file_at(url.replace("s3://glob", str(folder))))
            there = found_or_told(f"s3://glob/{magic}")
        assert (names, here) == (names, there)


@pytest.mark.parametrize("source", ["", "/top", "/*/*/*.txt", "/**", "/top/out"])
def test_where_the_run_goes_is_passed_over(tmp_path, monkeypatch, source):
    for name in ("top/f.txt", "top/out/f.txt", "top/outer/f.txt", "top/a/out/f.txt"):
        (tmp_path / "glob" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "glob" / name).write_text("text")
    folder = tmp_path / "glob"
    here = found_or_told(f"{folder}{source}", besides=f"{folder}/top/out")
    monkeypatch.setattr(objects, "readable", lambda root: at(folder))
    monkeypatch.setattr(objects, "file_at", lambda url: file_at(url.replace("s3://glob", str(folder))))
    assert found_or_told(f"s3://glob{source}", besides="s3://glob/top/out") == here
    names, ignored = here
    assert not ignored
    own = [name for name in names if "a/out" not in name and "/out/" in name]
    assert len(names) >= 1
    assert not own or source == "/top/out"


def found_or_told(source, besides=None):
    """(names, what was ignored) of what is found, or how the refusal begins."""
    try:
        found = find_inputs([source], besides=besides)
    except RequestError as refused:
        return str(refused).partition(" ")[0]
    return [shard.name for shard in found.shards], found.ignored
