"""Run folders of an earlier version (tests/data/millstream-1): finished ones are read, unfinished ones refused."""

import shutil
from pathlib import Path

import helpers
import pytest
import runs

import millstream
from millstream.errors import RequestError
from millstream.runs.pack.convert import convert_to

EARLIER = Path(__file__).parent / "data" / "millstream-1"


@pytest.fixture
def run(monkeypatch, capfd):
    return helpers.run_here(monkeypatch, capfd)


@pytest.mark.parametrize("name", ["plain", "chat", "best-fit"])
def test_a_finished_run_of_an_earlier_format_is_whole(name):
    assert helpers.whole(EARLIER / name)


def test_a_finished_run_of_an_earlier_format_is_what_its_source_gives(tmp_path):
    source = shutil.copy(EARLIER / "best-fit.jsonl", tmp_path / "a.jsonl")
    found = millstream.verify(EARLIER / "best-fit", against=source, workers=1)
    assert (found.problems, found.compared) == ([], 40)


def test_a_finished_run_of_an_earlier_format_is_read(tmp_path, run):
    text = "  two  blanks\tand\ttabs\n\nand empty lines  "
    dataset = millstream.open(EARLIER / "plain")
    assert (len(dataset), len(dataset.remainder), dataset.ledger["documents"]["faulty"]) == (8, 6, 1)
    assert millstream.text_of(dataset, "d4") == text
    assert run("find", EARLIER / "plain", "d4", "--text") == (0, text, "")
    assert "not valid JSON" in run("find", EARLIER / "plain", "corpus/a.jsonl#113")[1]
    code, shown, _ = run("show", EARLIER / "chat", 0)
    assert code == 0
    assert "── p5 ── ids 0 to 23 of 69 ── prompts.jsonl at byte 423" in shown
    assert sum(int(sample.loss.sum()) for sample in millstream.open(EARLIER / "chat")) == 95
    convert_to(tmp_path, EARLIER / "plain", ["mds", "parquet"])
    assert runs.digests(tmp_path / "mds") == runs.digests(EARLIER / "plain" / "mds")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["plain", "unfinished"])
def test_an_earlier_run_is_not_gone_on_with_but_may_be_overwritten(tmp_path, name, overwrite):
    out = Path(shutil.copytree(EARLIER / name, tmp_path / "out"))
    before = runs.digests(out)
    corpus = helpers.write_jsonl(tmp_path / "a.jsonl", helpers.rows(helpers.TEXTS))
    if overwrite:
        helpers.pack(out, corpus, seq_len=16, overwrite=True)
        assert helpers.whole(out)
        assert millstream.open(out).manifest.format == "millstream/2"
        return
    finished = r"millstream/1\), and this one writes other bytes: it can be read and verified as it is"
    unfinished = "begun by an earlier version of millstream: finish it with that version"
    with pytest.raises(RequestError, match=rf"{unfinished if name == 'unfinished' else finished}.*overwrite="):
        helpers.pack(out, corpus, seq_len=16, eos=True)
    assert runs.digests(out) == before


def test_an_unfinished_run_of_an_earlier_format_is_not_opened():
    for call in (millstream.open, millstream.verify):
        with pytest.raises(RequestError, match="finish it with that version"):
            call(EARLIER / "unfinished")
