"""The journal of an ask run: found again after a kill, a torn line forgotten, one writer at a time."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.errors import RequestError, RunError
from millstream.runs.answers import AnswerJournal, Keys

BODIES = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "n"]), st.integers(0, 3) | st.text(max_size=3)), max_size=30
)


@settings(max_examples=50, deadline=None)
@given(BODIES, st.integers(0, 10**6))
def test_what_was_written_is_found_whatever_was_torn(tmp_path_factory, bodies, cut):
    folder = str(tmp_path_factory.mktemp("run"))
    keys = Keys()
    wanted = [(keys.of(body), {"text": f"answer {n}\n", "body": body}) for n, body in enumerate(bodies)]
    assert len({key for key, _ in wanted}) == len(bodies)
    sizes = [0]
    with AnswerJournal(folder) as journal:
        for key, outcome in wanted:
            journal.append(key, outcome)
            sizes.append(os.path.getsize(journal.path))
    at = cut % (sizes[-1] + 1)
    os.truncate(journal.path, at)
    whole = sum(size <= at for size in sizes) - 1
    with AnswerJournal(folder) as journal:
        assert len(journal) == whole
        assert os.path.getsize(journal.path) == sizes[whole]
        for number, (key, outcome) in enumerate(wanted):
            found = journal.find(key)
            assert found == ({"key": key.hex(), **outcome} if number < whole else None)
            if found is None:
                journal.append(key, outcome)
    with AnswerJournal(folder) as journal:
        assert all(journal.find(key) for key, _ in wanted)


def test_the_last_of_several_outcomes_counts(tmp_path):
    key = Keys().of({"prompt": "x"})
    with AnswerJournal(str(tmp_path)) as journal:
        journal.append(key, {"fault": "timeout"})
        journal.append(key, {"text": "yes"})
        journal.append(Keys().of({}), {})
    with AnswerJournal(str(tmp_path)) as journal:
        assert len(journal) == 2
        assert journal.find(key) == {"key": key.hex(), "text": "yes"}


def test_keys_depend_on_body_id_and_occurrence():
    keys = Keys()
    first = keys.of({"prompt": "a", "n": 1})
    assert Keys().of({"n": 1, "prompt": "a"}) == first
    assert keys.of({"prompt": "a", "n": 1}) != first
    assert keys.of({"prompt": "a", "n": 1}, "id") != first
    assert keys.of({"prompt": "a", "n": 1}, "id") == Keys().of({"prompt": "a", "n": 1}, "id")


def test_one_writer_at_a_time(tmp_path):
    with AnswerJournal(str(tmp_path)), pytest.raises(RequestError, match="another millstream"):
        AnswerJournal(str(tmp_path))


def test_a_foreign_file_is_not_touched(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"mine": 1}\nno newline')
    with pytest.raises(RunError, match=r"journal\.jsonl"):
        AnswerJournal(str(tmp_path))
    assert path.read_text() == '{"mine": 1}\nno newline'


def test_a_line_survives_the_process_that_wrote_it(tmp_path):
    script = (
        "import os, sys, signal\n"
        "from millstream.runs.answers import AnswerJournal, Keys\n"
        "AnswerJournal(sys.argv[1]).append(Keys().of({'prompt': 'x'}), {'text': 'yes'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    with AnswerJournal(str(tmp_path)) as journal:
        assert journal.find(Keys().of({"prompt": "x"}))["text"] == "yes"
