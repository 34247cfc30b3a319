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
from millstream.runs.ask.answer_lines import Header
from millstream.runs.ask.answers import AnswerJournal, is_fault, is_ours

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
        for key, place, fault in zip(wanted, places.tolist(), map(is_fault, places.tolist()), strict=True):
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


FOREIGN = [
    b'{"mine": 1}\nno newline',
    b"no newline at all",
    b'{"key":"value"}',
    b'{"key": "' + b"0" * 32 + b'", "spaces": 1}\n',
    b"\n",
    GOOD.replace(b"0000", b"000g", 1) + GOOD,
    bytes(100) + b"\n" + GOOD,
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_not_touched(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"the first line of .*journal\.jsonl is none of millstream's"):
        AnswerJournal(str(tmp_path))
    assert path.read_bytes() == content
    assert not is_ours(str(tmp_path))


def test_a_journal_is_not_put_among_the_files_of_others(tmp_path):
    (tmp_path / ".hidden").write_text("")
    AnswerJournal(str(tmp_path)).close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    with pytest.raises(RequestError, match=r"no journal but manifest\.json"):
        AnswerJournal(str(tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["manifest.json"]


SECOND = line_of(KEYS[1], row_of("b", 1, {"text": "no"}))
DAMAGED = [
    b"\n",
    b'{"mine": 1}\n',
    b"x" * 100 + b"\n",
    bytes(len(SECOND) - 1) + b"\n",
    bytes(40) + SECOND[40:],
    SECOND[:60] + bytes(len(SECOND) - 61) + b"\n",
    SECOND[:-5] + b"\n",
    SECOND[:20] + b"\n",
    SECOND[:48] + b"\n",
    SECOND.replace(b'"}', b'"}}'),
    SECOND.replace(b'"no"', b'"n\xff"'),
    SECOND.replace(KEYS[1].hex().encode(), b"g" * 32),
    SECOND.replace(b'"index"', b'"indices"'),
    SECOND.replace(b'"no"', b'"no","fault":{'),
    SECOND[:-1] + GOOD,
    b'{"millstream":"ask/1","out":7}\n',
    b'{"millstream":"ask/2","o\n',
]


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_costs_what_it_held(tmp_path, line, size):
    third = line_of(KEYS[2], row_of("c", 2, {"fault": {"kind": "timeout", "message": "late"}}))
    (tmp_path / "journal.jsonl").write_bytes(GOOD + line + third + SECOND[:70])
    for _ in range(2):
        with reads_of(size), AnswerJournal(str(tmp_path)) as journal:
            places = journal.find_many(KEYS[:3]).tolist()
            first, second, last = (
                place >= 0 and journal.row(place, name, n)
                for n, (place, name) in enumerate(zip(places, "abc", strict=True))
            )
            assert (first, not second, last) == (row_at(GOOD), True, row_at(third))
            assert [is_fault(place) for place in places[::2]] == [False, True]
            assert (journal.damaged, journal.damaged_lines) == (1, [2])


def row_at(line):
    return b"{" + line[42:-1]


def test_of_many_damaged_lines_the_first_are_told(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(GOOD * 5 + b"damage\n" * 1000 + SECOND)
    with reads_of(60), AnswerJournal(str(tmp_path)) as journal:
        assert (journal.damaged, journal.damaged_lines) == (1000, list(range(6, 16)))
        assert len(journal) == 2


def test_what_runs_were_asked_for_is_kept_once_each(tmp_path):
    headers = [Header(model="m", params={"b": 1, "a": 2}), Header(model="m", params={"a": 2, "b": 1}), Header(out="x")]
    (tmp_path / "journal.jsonl").write_bytes(GOOD)  # as older versions wrote it
    for header in [*headers, headers[0], headers[2]]:
        with AnswerJournal(str(tmp_path)) as journal:
            journal.begin(header)
            journal.append(KEYS[1], row_of("b", 1, {"text": "no"}))
    with AnswerJournal(str(tmp_path)) as journal:
        assert [list(header.params.items()) for header in journal.headers] == [
            [("b", 1), ("a", 2)],
            [("a", 2), ("b", 1)],
            [],
        ]
        assert (journal.headers[2].out, len(journal), journal.damaged) == ("x", 2, 0)


def test_a_torn_header_is_forgotten_and_one_of_a_newer_version_refused(tmp_path):
    path = fill(tmp_path, [])
    with AnswerJournal(str(tmp_path)) as journal:
        journal.begin(Header(model="m"))
    whole = bytes_of(path)
    for length in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:length])
        assert is_ours(str(tmp_path))
        with AnswerJournal(str(tmp_path)) as journal:
            assert (journal.headers, os.path.getsize(path)) == ([], 0)
    (tmp_path / "journal.jsonl").write_bytes(whole.replace(b"ask/1", b"ask/2") + GOOD)
    with pytest.raises(RequestError, match="newer millstream"):
        AnswerJournal(str(tmp_path))
    (tmp_path / "journal.jsonl").write_bytes(whole.replace(b'"model"', b'"later":[1],"model"') + GOOD)
    with AnswerJournal(str(tmp_path)) as journal:
        assert (journal.headers, len(journal), journal.damaged) == ([Header(model="m")], 1, 0)


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
