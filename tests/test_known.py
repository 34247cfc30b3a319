"""Parts that a run has tokenized before it was interrupted are not tokenized again, as long as they are the same."""

import contextlib
import os
import random
import shutil

import pytest
import runs
from helpers import pack, run_bytes, without_fsync
from here import pooled
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pooled import OPTIONS, interrupted
from test_resume import write_kind

from millstream.corpus import sources
from millstream.corpus.find import find_inputs
from millstream.corpus.slices import content_hash
from millstream.folder.journal import Journal, Resumed
from millstream.folder.records import read_parts
from millstream.records import Cursor, Seen
from millstream.runs.pack import inputs
from millstream.runs.pack.folder import found_run
from millstream.runs.pack.tokenizing import TokenizePart
from millstream.store import at

quick = pytest.fixture(autouse=True, scope="module")(without_fsync)

WANTED = {"seq_len": 16, "shard_size": 1024, "on_error": "skip", "memory": 8 << 30}


@contextlib.contextmanager
def tokenized():
    """The ranges of all parts that are begun to be tokenized within."""
    begun, call = [], TokenizePart.__call__

    def counted(self, task):
        begun.append(task.part.ranges)
        yield from call(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizePart, "__call__", counted)
        yield begun


def known_in(out):
    """The ranges of all parts with a record."""
    return {record.ranges for _, record in read_parts(at(out)) if record}


@pytest.mark.parametrize("kind", ["plain", "parquet", "texts"])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_parts_with_records_are_not_tokenized_again(tmp_path, kind, options):
    source, wanted = write_kind(tmp_path, kind, runs.lines(3, 30_000, 0.1)), {**WANTED, **options}
    pack(tmp_path / "whole", source, **wanted)
    with pooled(7, part=1000, piece=500):
        with interrupted(1):
            pack(tmp_path / "out", source, **wanted, workers=3)
        known = known_in(tmp_path / "out")
        with tokenized() as begun:
            pack(tmp_path / "out", source, **wanted, workers=2)
    assert known
    assert not known & set(begun)
    assert len(begun) == len(set(begun))
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def mend(path, chance):
    """Another letter in a text, as many bytes, and the time of writing as before."""
    data, times = bytearray(path.read_bytes()), os.stat(path)
    places = [at for at, byte in enumerate(data) if byte == ord("e")]
    data[chance.choice(places)] = ord("o")
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def append(path, chance):
    path.write_bytes(path.read_bytes() + b"".join(runs.lines(chance.randrange(9), 700)))


def cut_off(path, chance):
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) // 2, len(data))])


def add_before(path, chance):
    """A file that comes before, so that all later ones have other numbers."""
    (path.parent / f"{path.name[0]}-0.jsonl").write_bytes(b"".join(runs.lines(chance.randrange(9), 1500)))


def change_behind(source, out, change, chance):
    """Change a file behind what the output shards were made of."""
    before = {path: path.read_bytes() for path in sorted(source.iterdir())}
    change(chance.choice(sorted(source.iterdir())[1:]), chance)
    found, read = found_run(str(out)), (0, 0)
    if found:
        read = found.read[:2]
    for number, path in enumerate(sorted(source.iterdir())):
        then, now = before.get(path, b""), path.read_bytes()
        if path not in before or then != now:
            same = next((at for at, pair in enumerate(zip(then, now, strict=False)) if len({*pair}) > 1), len(then))
            if (number, min(same, len(now))) < read:
                break
    else:
        return
    for path in source.iterdir():
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


def add_behind(path, chance):
    (path.parent / "z.jsonl").write_bytes(b"".join(runs.lines(chance.randrange(9), 1500)))


CHANGES = [None, mend, mend, append, cut_off, add_before, add_behind]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1 << 30),
    options=st.sampled_from(OPTIONS),
    stops=st.lists(
        st.tuples(st.integers(1, 14), st.sampled_from([1, 2, 3]), st.sampled_from(CHANGES)), min_size=1, max_size=3
    ),
    part=st.sampled_from([700, 1000, 9000]),
    last=st.sampled_from([1, 2, 2]),
)
def test_inputs_that_change_behind_what_was_used_give_the_bytes_of_a_new_run(
    tmp_path_factory, seed, options, stops, part, last
):
    folder, chance = tmp_path_factory.mktemp("run"), random.Random(seed)
    source, wanted = folder / "corpus", {**WANTED, **options}
    source.mkdir()
    for name in "abcd":
        (source / f"{name}.jsonl").write_bytes(b"".join(runs.lines(chance.randrange(99), 4000, 0.1)))
    out = folder / "out"
    bound = chance.choice([3000, 1 << 30])
    with pooled(seed, part=part, piece=500, bound=bound), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "ENDS", 100)  # so that the journal tells of these files, as of large ones
        patch.setattr(inputs, "ENDS", 100)
        for records, workers, change in stops:
            with interrupted(records):
                pack(out, source, **wanted, workers=workers)
            if change and not (out / "manifest.json").exists():
                change_behind(source, out, change, chance)
        pack(out, source, **wanted, workers=last)
        pack(folder / "whole", source, **wanted)
    assert run_bytes(out) == run_bytes(folder / "whole")


@pytest.mark.parametrize("records", [8, 9, 10, 11])
def test_what_was_written_at_the_end_of_the_input_is_not_kept_where_more_is_appended(tmp_path, records):
    source, wanted = tmp_path / "corpus", {**WANTED, **OPTIONS[2]}
    source.mkdir()
    (source / "a.jsonl").write_bytes(b"".join(runs.lines(1, 12_000)))
    with pooled(11, part=1000, piece=500):
        with interrupted(records):
            pack(tmp_path / "out", source, **wanted, workers=2)
        (source / "b.jsonl").write_bytes(b"".join(runs.lines(2, 5000)))
        if not (tmp_path / "out" / "manifest.json").exists():
            pack(tmp_path / "out", source, **wanted, workers=2)
            pack(tmp_path / "whole", source, **wanted)
            assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def test_what_was_read_behind_where_a_run_goes_on_is_not_compared_ever_after(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(runs.lines(1, 3_000_000)))
    shards = find_inputs([str(path)]).shards
    then = content_hash(shards[0], (), 999_999, 2_000_000)
    with contextlib.closing(Journal(str(tmp_path))) as journal:
        some = inputs.Inputs(shards, ())
        some.use(some.used([Seen(0, 999_999, 2_000_000, then)]))
        some.write(journal)
        data = path.read_bytes()
        path.write_bytes(data[:1_500_000] + bytes([data[1_500_000] ^ 1]) + data[1_500_001:])
        read, later = (some.with_prefix(Cursor(0, offset)) for offset in (1_000_000, 2_500_000))
        named = some.named()
        assert inputs.Inputs(shards, ()).changed(str(tmp_path), named, read, finished=False) == []
        [wrong] = inputs.Inputs(shards, ()).changed(str(tmp_path), named, later, finished=False)
        assert "has changed before byte 2,000,000" in wrong
        journal.write(Resumed(workers=1, ordinal=7, read=read))
        assert inputs.Inputs(shards, ()).changed(str(tmp_path), named, later, finished=False) == []


def damage_record(out, chance):
    path = chance.choice(sorted(out.glob("records/*.part")))
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def damage_piece(out, chance):
    path = chance.choice(sorted(out.glob("pieces/*.piece")))
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes(255 - byte for byte in data[-2:]))


def cut_piece(out, chance):
    path = chance.choice(sorted(out.glob("pieces/*.piece")))
    path.write_bytes(path.read_bytes()[:-1])


def lose_pieces(out, chance):
    shutil.rmtree(out / "pieces")


@pytest.mark.parametrize("harm", [damage_record, damage_piece, cut_piece, lose_pieces])
def test_what_is_damaged_of_what_is_known_is_made_again(tmp_path, harm):
    source, chance = write_kind(tmp_path, "plain", runs.lines(3, 30_000, 0.1)), random.Random(1)
    pack(tmp_path / "whole", source, **WANTED)
    with pooled(7, part=1000, piece=500):
        for _ in range(3):
            with interrupted(2):
                pack(tmp_path / "out", source, **WANTED, workers=3)
            for _ in range(3):
                if known_in(tmp_path / "out"):
                    harm(tmp_path / "out", chance)
                if harm is lose_pieces:
                    break
        pack(tmp_path / "out", source, **WANTED, workers=2)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")


def test_one_worker_that_goes_on_keeps_nothing_of_parts(tmp_path):
    source = write_kind(tmp_path, "plain", runs.lines(3, 30_000, 0.1))
    pack(tmp_path / "whole", source, **WANTED)
    with pooled(7, part=1000, piece=500), interrupted(2):
        pack(tmp_path / "out", source, **WANTED, workers=3)
    assert known_in(tmp_path / "out")
    with interrupted(1):
        pack(tmp_path / "out", source, **WANTED)
    assert not known_in(tmp_path / "out")
    assert not (tmp_path / "out" / "pieces").exists()
    pack(tmp_path / "out", source, **WANTED)
    assert run_bytes(tmp_path / "out") == run_bytes(tmp_path / "whole")
