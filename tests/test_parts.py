"""Parts of the corpus, read for themselves, give together what one reader gives: documents, places, faults, lines."""

import contextlib
import gzip
import io
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from datetime import datetime
from hashlib import sha256
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millstream.corpus import sources, texts
from millstream.corpus.documents import Fields, decode
from millstream.corpus.limits import Limits, Manner, too_long
from millstream.corpus.parts import TOGETHER, parts, slices_of
from millstream.corpus.seen import RowHash
from millstream.corpus.slices import content_hash, slices, units
from millstream.corpus.sources import InputShard
from millstream.corpus.unpacked import Unpack
from millstream.errors import ResumeRefused
from millstream.records import Cursor, Part, Range, Ref
from millstream.store import File

START = Cursor()
LONGEST = 40
LINES = [
    b'{"text": "a"}',
    b'{"id": "x", "text": "two words"}',
    '{"text": "é🙂"}'.encode(),
    b"",
    b" ",
    b"\r",
    b'{"text": "b"}\r',
    b'{"text": 5}',
    b'{"text": "cut',
    b'{"text": "\xff"}',
    b'{"text": "' + b"y" * (LONGEST - 12) + b'"}',
    b'{"text": "' + b"y" * (LONGEST - 11) + b'"}',
    b'{"text": "' + b"y" * (LONGEST - 10) + b'"}',
    b'{"text": "' + b"y" * 3 * LONGEST + b'"}',
]
FRONTS = [b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n"]
WORDS = [b"a", b"word ", b"two words\n", "é ".encode(), b"1, 2; ", b"\xff", b"Q" * 30, b" ", b"end"]
lines_of = st.builds(
    lambda front, rows, end: front + b"\n".join(rows) + end,
    st.sampled_from(FRONTS),
    st.lists(st.sampled_from(LINES), max_size=12),
    st.sampled_from([b"", b"\n"]),
)
texts_of = st.builds(
    lambda front, words: front + b"".join(words), st.sampled_from(FRONTS), st.lists(st.sampled_from(WORDS), max_size=40)
)
rows_of = st.lists(
    st.sampled_from(["a", "two words", "é🙂", "", None, "y" * LONGEST, "z" * (LONGEST + 1)]), max_size=30
)


def in_parquet(rows, group):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), sink, row_group_size=group)
    return sink.getvalue()


def packed(data, how, keep):
    found = gzip.compress(data, 1) if how == "gzip" else zstandard.ZstdCompressor(level=1).compress(data)
    return found[: max(1, int(len(found) * keep))]


some_packed = st.builds(
    lambda data, how, keep: ("jsonl", how, packed(data, how, keep)),
    lines_of,
    st.sampled_from(["gzip", "zstd"]),
    st.sampled_from([1, 1, 0.5, 0.9]),
)
files = st.one_of(
    st.builds(lambda data: ("jsonl", None, data), lines_of),
    st.builds(lambda data: ("text", None, data), texts_of),
    st.builds(lambda data, how: ("text", how, packed(data, how, 1)), texts_of, st.sampled_from(["gzip", "zstd"])),
    some_packed,
    st.builds(lambda rows, group: ("parquet", None, in_parquet(rows, group)), rows_of, st.sampled_from([1, 3, 100])),
    st.sampled_from([("jsonl", None, None), ("text", None, None), ("parquet", None, None), ("parquet", None, b"PAR1")]),
)


def written(folder, made):
    shards = []
    for number, (kind, how, data) in enumerate(made):
        path = folder / f"{number}"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        shards.append(InputShard(str(path), f"{number}", kind, how))
    return shards


class Found:
    """What slices hold, in order: documents as (source, offset, id, text), faults with the lines of their files. Of a
    text in pieces, the pieces joined."""

    def __init__(self):
        self.all, self.lines = [], Counter()

    def take(self, pieces, block):
        for unit in units(pieces, block):
            batch = decode(unit, Fields(), LONGEST, whole_text=False)
            rows = list(zip(batch.position, batch.source, batch.offset, batch.doc_ids, batch.texts, strict=True))
            if batch.opened:
                (_, *same, text) = rows.pop(0)
                *before, begun = self.all[-1]
                assert before == same
                self.all[-1] = (*same, begun + text)
            told = [
                (each.ordinal, each.shard, each.offset, each.reason, each.message, each.id, self._line(each))
                for each in batch.faults
            ]
            self.all += [each[1:] for each in sorted([*rows, *told], key=lambda each: each[0])]
            for source, count in batch.lines:
                self.lines[source] += count
        return self

    def _line(self, fault):
        return fault.line and fault.line + self.lines[fault.shard]


def whole(shards, manner, cursor=START):
    return Found().take(slices(shards, cursor, manner), manner.block).all


def in_parts(shards, manner, size, cursor=START, **how):
    """The same of all parts, as a driver joins them: an input that has ended early has no further parts."""
    found, over = Found(), set()
    for number, part in enumerate(parts(shards, cursor, manner, size)):
        assert part.number == number
        if part.ranges[0].source in over:
            assert len(part.ranges) == 1
            continue
        here = list(slices_of(part, shards, manner, **how))
        over |= {piece.source for piece in here if piece.fault and piece.after.source > piece.source}
        check_seen(shards, manner, here)
        found.take(here, manner.block)
    return found.all


def check_seen(shards, manner, pieces):
    for piece in pieces:
        with contextlib.suppress(FileNotFoundError):
            now = content_hash(shards[piece.source], manner.columns, piece.seen.start, piece.seen.stop)
            assert now == piece.seen.sha256


manners = st.builds(
    lambda text, cut, block: Manner(Limits(LONGEST, text, cut), ("text", "id"), block),
    st.sampled_from([None, 100]),
    st.booleans(),
    st.sampled_from([1, 7, 50, 1000]),
)


def small(read):
    """Files are read a few bytes at a time, and texts are long early."""
    return (
        mock.patch.object(sources, "READ", read),
        mock.patch.object(sources, "_SIP", max(1, read // 3)),
        mock.patch.object(texts, "LONG_TEXT", 30),
    )


@settings(max_examples=150, deadline=None)
@given(
    made=st.lists(files, min_size=1, max_size=4),
    manner=manners,
    size=st.integers(1, 200),
    read=st.sampled_from([1, 5, 64]),
)
@example([("jsonl", None, b'{"text": "a"}\n' * 3)], Manner(Limits(LONGEST), ("text",), 1000), 14, 64)
def test_parts_give_what_one_reader_gives(tmp_path_factory, made, manner, size, read):
    shards = written(tmp_path_factory.getbasetemp(), made)
    one, two, three = small(read)
    with one, two, three:
        assert in_parts(shards, manner, size) == whole(shards, manner)


@settings(max_examples=60, deadline=None)
@given(
    made=st.lists(files, min_size=1, max_size=3),
    manner=manners,
    size=st.integers(1, 100),
    chance=st.randoms(use_true_random=False),
)
def test_parts_from_any_cursor_give_what_follows_it(tmp_path_factory, made, manner, size, chance):
    """And behind the part that the cursor is in they are the same parts, but for their numbers."""
    shards = written(tmp_path_factory.getbasetemp(), made)
    one, two, three = small(16)
    with one, two, three:
        pieces = [piece for piece in slices(shards, START, manner) if piece.ends]  # no mark is inside a document
        cursor = chance.choice([START, *(piece.after for piece in pieces)])
        assert in_parts(shards, manner, size, cursor, used=cursor) == whole(shards, manner, cursor)
        later = [part.ranges for part in parts(shards, cursor, manner, size)]
        planned = [part.ranges for part in parts(shards, START, manner, size)]
        assert later[1:] == planned[len(planned) - len(later) + 1 :]


def test_a_packed_file_that_has_changed_is_refused_when_it_is_read_again(tmp_path, monkeypatch):
    data = b"".join(b'{"text": "number %d"}\n' % number for number in range(100))
    monkeypatch.setattr(sources, "READ", 200)
    [shard] = written(tmp_path, [("jsonl", "gzip", gzip.compress(data))])
    manner = Manner(Limits(LONGEST), ("text", "id"), 100)
    cursor = next(itertools.islice(slices([shard], START, manner), 4, None)).after
    assert cursor.prefix
    [part] = parts([shard], cursor, manner)
    assert part.ranges == (Range(0, cursor.offset),)
    assert next(slices_of(part, [shard], manner, used=cursor)).start == cursor.offset
    for changed, told in ((data.replace(b"r 3", b"R 3"), "has changed before"), (data[:500], "now ends at 500")):
        written(tmp_path, [("jsonl", "gzip", gzip.compress(changed))])
        with pytest.raises(ResumeRefused, match=told):
            list(slices_of(part, [shard], manner, used=cursor))


def test_a_million_small_files_are_few_parts(tmp_path):
    """Ending where they would for a run from the beginning; only the files around the cursor are looked at."""
    path = tmp_path / "small.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 200)
    shards = [InputShard(str(path), "small.jsonl", "jsonl")] * 50_000
    manner = Manner(Limits(LONGEST), ("text", "id"))
    planned = list(parts(shards, START, manner))
    assert len(planned) == math.ceil(50_000 / TOGETHER)
    with mock.patch.object(File, "size", return_value=2800) as looked:
        later = list(itertools.islice(parts(shards, Cursor(30_500, 28), manner), 2))
    assert looked.call_count < 4 * TOGETHER
    assert later[0].ranges[0] == Range(30_500, 28)
    assert later[0].ranges[1:] == planned[30_500 // TOGETHER].ranges[30_501 % TOGETHER :]
    assert later[1].ranges == planned[30_500 // TOGETHER + 1].ranges


# Unpacked once, for others --------------------------------------------------------------------------------------------


def by_unpacking(shard, manner, size, start=0, **how):
    """What is in the pieces that one worker unpacks, in order; each is read by a worker of its own."""
    spill, found = {}, Found()

    def put(name, chunks):
        spill[name] = b"".join(chunks)
        return Ref(name, len(spill[name]), 0)

    last = None
    for number, each in enumerate(Unpack([shard], manner, put, size, **how)(Part(0, (Range(0, start),)))):
        part = each.part(number)
        data = spill[part.data.name] if part.data else None
        assert data is None or len(data) == part.ranges[0].stop - part.ranges[0].start
        here = list(slices_of(part, {0: shard}, manner, data=data))
        found.take(here, manner.block)
        last = here[-1]
        if last.after.source == 0:
            told = content_hash(shard, manner.columns, 0, last.after.offset)
            assert last.after.prefix == told == last.seen.sha256
    return found, last


@settings(max_examples=100, deadline=None)
@given(made=some_packed, manner=manners, size=st.integers(1, 200), chance=st.randoms(use_true_random=False))
def test_packed_lines_unpacked_for_others_are_what_one_reader_gives(tmp_path_factory, made, manner, size, chance):
    [shard] = written(tmp_path_factory.getbasetemp(), [made])
    one, two, three = small(16)
    with one, two, three:
        pieces = list(slices([shard], START, manner))
        found, last = by_unpacking(shard, manner, size)
        assert found.all == Found().take(pieces, manner.block).all
        assert last is None or last.after == pieces[-1].after
        inside = [piece.after for piece in pieces if piece.after.source == 0]
        if inside:  # a run goes on within it
            cursor = chance.choice(inside)
            found, _ = by_unpacking(shard, manner, size, cursor.offset, used=cursor)
            assert found.all == whole([shard], manner, cursor)


def test_what_is_in_a_slow_pipe_is_handed_on(monkeypatch):
    reading, writing = os.pipe()
    spill = {}

    def put(name, chunks):
        spill[name] = b"".join(chunks)
        return Ref(name, len(spill[name]), 0)

    shard = InputShard("-", "-", "jsonl")
    manner = Manner(Limits(LONGEST), ("text", "id"))
    with os.fdopen(reading) as stdin, os.fdopen(writing, "wb", 0) as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        pipe.write(b'{"text": "a"}\n{"text": "b"}\n{"te')
        found = Unpack([shard], manner, put, 30).piped(Part(0, (Range(0),)), 0.01)
        first = next(each for each in found if each)
        assert (first.range, spill[first.data.name]) == (Range(0, 0, 28), b'{"text": "a"}\n{"text": "b"}\n')
        assert next(found) is None, "half a line is handed on by nobody"
        pipe.write(b'xt": "c"}\n' + b'{"text": "d"}\n' * 9)
        more = next(each for each in found if each)
        assert more.range.start == 28
        pipe.write(b"[" * LONGEST * 3)
        pipe.close()
        *rest, bad = [each for each in found if each]
    data = b"".join(spill[each.data.name] for each in (first, more, *rest))
    assert data == b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n' + b'{"text": "d"}\n' * 9
    assert bad.fault == too_long(3 * LONGEST, LONGEST)
    assert bad.prefix == sha256(data + b"[" * LONGEST * 3).hexdigest()


def test_a_process_can_end_while_its_pipe_is_open():
    program = "from millstream.corpus.unpacked import timed; from millstream.corpus.sources import *;"
    program += "print(next(timed(chunks(InputShard('-', '-', 'jsonl')), 0.1)))"
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "wb", 0):
        done = subprocess.run([sys.executable, "-c", program], stdin=reading, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


# Hashes of rows -------------------------------------------------------------------------------------------------------

words = st.one_of(st.none(), st.text("abé🙂", max_size=4))
numbers = st.one_of(st.none(), st.integers(-3, 3))
COLUMNS = {
    "text": (words, pa.string()),
    "large text": (words, pa.large_string()),
    "bytes": (st.one_of(st.none(), st.binary(max_size=3)), pa.binary()),
    "as wide bytes": (st.one_of(st.none(), st.binary(min_size=3, max_size=3)), pa.binary(3)),
    "stored once": (words, pa.dictionary(pa.int32(), pa.string())),
    "numbers": (numbers, pa.int32()),
    "fractions": (st.one_of(st.none(), st.floats(allow_nan=False, width=32)), pa.float32()),
    "truths": (st.one_of(st.none(), st.booleans()), pa.bool_()),
    "times": (st.one_of(st.none(), st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1))), pa.timestamp("us")),
    "decimals": (st.one_of(st.none(), st.decimals(-9, 9, places=2)), pa.decimal128(5, 2)),
    "nothing": (st.none(), pa.null()),
    "lists": (st.one_of(st.none(), st.lists(words, max_size=3)), pa.list_(pa.string())),
    "large lists": (st.one_of(st.none(), st.lists(numbers, max_size=3)), pa.large_list(pa.int64())),
    "pairs": (st.one_of(st.none(), st.lists(numbers, min_size=2, max_size=2)), pa.list_(pa.int16(), 2)),
    "maps": (
        st.one_of(st.none(), st.lists(st.tuples(st.text("ab", max_size=2), numbers), max_size=2)),
        pa.map_(pa.string(), pa.int8()),
    ),
    "messages": (
        st.one_of(st.none(), st.lists(st.fixed_dictionaries({"role": words, "content": words}), max_size=2)),
        pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    ),
}


def row_hash(batches):
    found = RowHash()
    for batch in batches:
        found.update(batch, 0, batch.num_rows)
    return found.hexdigest()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), chance=st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", COLUMNS)
def test_the_hash_of_rows_is_that_of_their_values(name, data, chance):
    """However they are cut, and whatever they were cut from; other values have another."""
    values, kind = COLUMNS[name]
    first, second = data.draw(st.lists(values, max_size=8)), data.draw(st.lists(values, max_size=8))

    def batches(rows):
        around = data.draw(st.lists(values, max_size=2))
        batch = pa.record_batch({"x": pa.array([*around, *rows, *around], kind)}).slice(len(around), len(rows))
        cuts = sorted(chance.randint(0, len(rows)) for _ in range(chance.randint(0, 4)))
        return [batch.slice(low, high - low) for low, high in itertools.pairwise([0, *cuts, len(rows)])]

    assert row_hash(batches(first)) == row_hash(batches(first))
    same = pa.array(first, kind).equals(pa.array(second, kind))
    assert (row_hash(batches(first)) == row_hash(batches(second))) == same


def test_the_hash_of_text_is_the_same_in_columns_of_every_type():
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    texts = pa.array(["a", None, "", "a", "é"])
    assert len({row_hash([pa.record_batch({"x": texts.cast(kind)})]) for kind in kinds}) == 1
