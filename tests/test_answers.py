"""The journal of an ask run: found again after a kill, a torn line forgotten, one writer at a time."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import ANY

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.errors import RequestError, RunError
from millstream.runs.ask import answers
from millstream.runs.ask.answers import AnswerJournal

KEYS = [bytes(8) + bytes([number]) + bytes(7) for number in range(6)]  # some with the same first half
KEYS += [bytes([number]) * 16 for number in range(1, 7)]

TRAPS = st.sampled_from(['"', "\\", '","index":1,"', ',"fault":', '"}\n', "é", "\u2028", "\0"])
TEXTS = st.lists(TRAPS | st.text(max_size=5), max_size=5).map("".join)
IDS = st.none() | TEXTS
REPLIES = st.builds(lambda text, inner: {"text": text, "usage": {"a": 1, "fault": inner}}, TEXTS, TEXTS | st.none())
FAULTS = st.builds(lambda usage, text: {**usage, "fault": {"kind": text}}, st.just({}) | REPLIES, TEXTS)
OUTCOMES = st.lists(
    st.tuples(st.sampled_from(KEYS), IDS, st.integers(0, 10**12), REPLIES | FAULTS).map(tuple), max_size=30
)


def row_of(request_id, index, rest):
    return msgspec.json.encode({"id": request_id, "index": index, **rest})


def line_of(key, row):
    return b'{"key":"' + key.hex().encode() + b'",' + row[1:] + b"\n"


def fill(folder, outcomes):
    """Append (key, row) to the journal in `folder`; gives its path."""
    with AnswerJournal(str(folder)) as journal:
        for key, row in outcomes:
            journal.append(key, row)
    return journal.path


def bytes_of(path):
    with open(path, "rb") as file:
        return file.read()


@contextmanager
def reads_of(size):
    """Read in pieces of about `size` bytes, so that small journals meet what happens between two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_BLOCK", size)
        patch.setattr(answers, "_READ_LEAST", size)
        patch.setattr(answers, "_READ_MOST", 4 * size)
        yield


@settings(max_examples=100, deadline=None)
@given(OUTCOMES, st.lists(st.sampled_from(KEYS), max_size=30), st.sampled_from([1, 60, 1000, 1 << 20]))
def test_what_was_appended_is_found_and_the_last_of_several_counts(tmp_path_factory, outcomes, wanted, size):
    folder = tmp_path_factory.mktemp("run")
    rows = [(key, row_of(*row)) for key, *row in outcomes]
    assert bytes_of(fill(folder, rows)) == b"".join(line_of(key, row) for key, row in rows)
    last = {key: row for key, *row in outcomes}
    with reads_of(size), AnswerJournal(str(folder)) as journal:
        assert len(journal) == len(last)
        places = journal.find_many(wanted)
        for key, place, fault in zip(wanted, places.tolist(), journal.is_fault(places).tolist(), strict=True):
            assert (place >= 0) == (key in last)
            assert fault == (key in last and "fault" in last[key][2])
            if key in last:
                name, index, rest = last[key]
                for moved in (name, index), ("other", index), (None, index), (name, index + 1), (name, index // 10):
                    assert journal.row(place, *moved) == row_of(*moved, rest)


def test_a_moved_row_keeps_every_other_byte(tmp_path):
    row = b'{"id":"a","index":12,"usage":{"cost":1e-7,"big":123456789012345678901234567890},"text":"\\u00e9"}'
    fill(tmp_path, [(KEYS[0], row)])
    with AnswerJournal(str(tmp_path)) as journal:
        [place] = journal.find_many([KEYS[0]]).tolist()
        assert journal.row(place, "a", 1) == row.replace(b"12,", b"1,", 1)
        assert journal.row(place, None, 12) == row.replace(b'"a"', b"null")


def test_rows_in_any_order_and_of_any_length(tmp_path):
    rows = [row_of(None, n, {"text": "x" * (n * n * 700)}) for n in range(60)]  # up to 2.4 MB
    keys = [n.to_bytes(16, "little") for n in range(60)]
    fill(tmp_path, zip(keys, rows, strict=True))
    with AnswerJournal(str(tmp_path)) as journal:
        places = journal.find_many(keys).tolist()
        for order in range(60), reversed(range(60)), [n * 37 % 60 for n in range(60)]:
            assert all(journal.row(places[n], None, n) == rows[n] for n in order)


def test_nothing_is_found_in_an_empty_journal(tmp_path):
    with AnswerJournal(str(tmp_path)) as journal:
        assert len(journal) == 0
        assert journal.find_many(KEYS).tolist() == [-1] * len(KEYS)
        assert journal.find_many([]).tolist() == []
        journal.append(KEYS[0], row_of(None, 0, {"text": ""}))
    with AnswerJournal(str(tmp_path)) as journal:
        assert journal.find_many([]).tolist() == []
        assert journal.find_many(KEYS[:2]).tolist() == [ANY, -1]


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
@pytest.mark.parametrize("before", [0, 2])
def test_a_line_that_is_torn_anywhere_is_forgotten(tmp_path, before, size):
    rows = [(KEYS[n], row_of(f"id {n}", n, {"text": "é", "attempts": 1})) for n in range(before + 1)]
    path = fill(tmp_path, rows)
    whole = bytes_of(path)
    kept = len(whole) - len(line_of(*rows[-1]))
    for length in range(kept, len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:length])
        with reads_of(size), AnswerJournal(str(tmp_path)) as journal:
            assert len(journal) == before
            assert os.path.getsize(path) == kept
            assert [place >= 0 for place in journal.find_many(KEYS[: before + 1]).tolist()] == [True] * before + [False]
            journal.append(*rows[-1])
        assert bytes_of(path) == whole


def test_a_disk_that_is_full_keeps_whole_lines_only(tmp_path):
    """The limit on a file's size stands in for the disk's: the line that meets it is written in part at first."""
    row = row_of("a", 0, {"text": "x" * 100})
    length = len(line_of(KEYS[0], row))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerJournal(str(tmp_path)) as journal:
        journal.append(KEYS[0], row)
        for room in length - 1, 1, 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (length + room, hard))
            try:
                with pytest.raises(RunError, match="make room, then run the same command again"):
                    journal.append(KEYS[1], row)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert bytes_of(journal.path) == line_of(KEYS[0], row)
        journal.append(KEYS[2], row)
    with AnswerJournal(str(tmp_path)) as journal:
        assert [place >= 0 for place in journal.find_many(KEYS[:3]).tolist()] == [True, False, True]


def test_one_writer_at_a_time(tmp_path):
    with AnswerJournal(str(tmp_path)), pytest.raises(RequestError, match="another millstream"):
        AnswerJournal(str(tmp_path))
    AnswerJournal(str(tmp_path)).close()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="cannot keep a journal in"):
        AnswerJournal(str(tmp_path / "file"))


GOOD = line_of(KEYS[0], row_of("a", 0, {"text": "yes"}))


@pytest.mark.parametrize(
    "content",
    [
        b'{"mine": 1}\nno newline',
        b"no newline at all",
        b'{"key": "' + b"0" * 32 + b'", "spaces": 1}\n',
        b"\n",
        GOOD + b"\n",
        GOOD + b'{"mine": 1}\n',
        GOOD.replace(b"0000", b"000g", 1) + GOOD,
        GOOD.replace(b'"yes"', b'"yes","fault":{') + GOOD,
        GOOD + b"x" * 100 + b"\n" + GOOD,
    ],
)
def test_a_foreign_file_is_not_touched(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"journal\.jsonl is no journal of millstream's"):
        AnswerJournal(str(tmp_path))
    assert path.read_bytes() == content


def test_a_row_that_is_damaged_is_refused_when_it_is_wanted(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(GOOD.replace(b'"index"', b'"indices"'))
    with AnswerJournal(str(tmp_path)) as journal, pytest.raises(RunError, match="byte 0"):
        journal.row(journal.find_many(KEYS[:1]).tolist()[0], "a", 0)


def test_a_journal_that_is_cut_while_it_is_open_is_an_error(tmp_path):
    fill(tmp_path, [(KEYS[0], row_of("a", 0, {"text": "yes"}))])
    with AnswerJournal(str(tmp_path)) as journal:
        os.truncate(journal.path, 60)
        with pytest.raises(RunError, match="became shorter"):
            journal.row(journal.find_many(KEYS[:1]).tolist()[0], "a", 0)


def test_a_line_survives_the_process_that_wrote_it(tmp_path):
    script = (
        "import os, sys, signal\n"
        "from millstream.runs.ask.answers import AnswerJournal\n"
        """AnswerJournal(sys.argv[1]).append(bytes(16), b'{"id":null,"index":0,"text":"yes"}')\n"""
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    with AnswerJournal(str(tmp_path)) as journal:
        [place] = journal.find_many([bytes(16)]).tolist()
        assert json.loads(journal.row(place, "b", 3)) == {"id": "b", "index": 3, "text": "yes"}


def test_an_outcome_takes_24_bytes(tmp_path):
    row = row_of(None, 0, {"text": "yes"})
    (tmp_path / "journal.jsonl").write_bytes(b"".join(line_of(n.to_bytes(16, "little"), row) for n in range(1000)))
    with AnswerJournal(str(tmp_path)) as journal:
        assert sum(column.nbytes for column in (journal._high, journal._low, journal._places)) == 24_000
