"""The benchmark of buckets, on little."""

from bench import on_bucket
from helpers import TEXTS, rows, write_jsonl


def test_a_run_into_a_bucket_is_measured_beside_one_into_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_bucket, "_BLOCKS", 2)
    on_bucket.measure(write_jsonl(tmp_path / "a.jsonl", rows(TEXTS)), repeats=1, workers=1)
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told[:2]] == ["folder", "bucket"]
    assert "of the folder's rate, by CPU seconds" in told[2]
