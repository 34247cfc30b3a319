"""What holds for every store, be it a folder or a bucket."""

import hashlib

import pytest
from hypothesis import strategies as st

from millstream.store import WrittenFile


def is_read_as_written(store, parts, head, late):
    with store.write("a/b", late=late) as file:
        front = bytes(len(head))
        for part in (front, *parts):
            file.write(part)
        assert file.tell() == len(front) + sum(map(len, parts))
        assert not store.exists("a/b")
        written = file.finish(head)
    whole = head + b"".join(parts)
    assert written == file.written == WrittenFile(len(whole), hashlib.sha256(whole).hexdigest())
    assert store.read("a/b") == bytes(store.map("a/b")) == whole
    assert store.read("a/b", 1, 3) == whole[1:3]
    assert store.read("a/b", 2) == whole[2:]
    with store.open("a/b") as opened:
        opened.seek(1)
        assert opened.read() == whole[1:]
    assert store.list() == ["a/b"]


def is_whole_whoever_writes_on(store, data):
    """Stretches of a file, each written by several: some are slow, begin late, or end in the middle."""
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    whole, begin, slow = bytes(range(sum(sizes))), 0, []

    def attempt(begin, end):
        with store.go_on("a/b", begin) as file:
            for at in range(begin, end, 7):
                file.write(whole[at : min(at + 7, end)])
                yield

    def step():
        for one in slow:
            for _ in range(data.draw(st.integers(0, 3))):
                next(one, None)

    for size in sizes:
        slow += [attempt(begin, begin + size) for _ in range(data.draw(st.integers(0, 2)))]
        for _ in attempt(begin, begin + size):
            step()
        begin += size
    for _ in range(data.draw(st.integers(1, 2))):
        store.finish("a/b", begin)
        assert store.read("a/b") == whole
        step()
    assert store.read("a/b") == whole
    with pytest.raises(OSError, match="a/b"):
        store.finish("a/b", begin + 1)
