"""The benchmark: millstream beside bare engines and clients and what people use today, measured in one run.

`python -m bench --quick` is over in minutes and judges nothing; `python -m bench --write` measures every row and puts
the tables into docs/performance.md; `--only pack` and `--only ask` are about one of them. `make bench-env` installs the
rivals.
"""
