# `make quickstart` and `make test` need Python 3.11 or newer, git and make, and nothing else: each makes a virtual
# environment and installs into it. Use another directory with `make test VENV=/path`, another Python with PYTHON=.
# `make bench` makes one of its own, with the systems that the benchmark compares; to try it: make bench BENCH_ARGS=--quick

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The everyday tests share two cores; the second stage runs alone, because it measures or starts many processes.
WORKERS ?= 2
BENCH_VENV ?= .venv-bench
BENCH_ARGS ?= --write docs/performance_results.md

.PHONY: quickstart test lint types unit slow docs bench clean

quickstart: $(VENV)/examples.installed
	$(BIN)/python examples/quickstart.py

test: lint types unit slow docs

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.installed
	$(BIN)/mypy

unit: $(VENV)/dev.installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal

slow: $(VENV)/dev.installed
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/dev.installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

bench: $(BENCH_VENV)/bench.installed
	$(BENCH_VENV)/bin/python benchmarks/speed.py $(BENCH_ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/examples.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable ".[examples]"
	touch $@

$(VENV)/dev.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/examples.installed

$(BENCH_VENV)/bin/python:
	$(PYTHON) -m venv $(BENCH_VENV)

# The published version has the import name of this one, so it goes to a place that only its own worker looks into.
$(BENCH_VENV)/bench.installed: setup.cfg pyproject.toml constraints.txt benchmarks/requirements.txt | $(BENCH_VENV)/bin/python
	$(BENCH_VENV)/bin/python $(INSTALL) --editable . --requirement benchmarks/requirements.txt
	$(BENCH_VENV)/bin/python $(INSTALL) --no-deps --upgrade --target $(BENCH_VENV)/published pytorch-accelerated==0.1.61
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
