"""The benchmark: millstream beside its bare engine and the pipelines people use today, measured in one run.

`python -m bench --quick` is over in minutes and judges nothing; `python -m bench --write` measures every row
and puts the table into docs/performance.md. `make bench-env` installs the rivals.
"""
