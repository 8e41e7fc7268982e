# `make quickstart` and `make test` need Python 3.11 or newer, git and make, and nothing else: each makes a virtual
# environment and installs into it. Use another directory with `make test VENV=/path`, another Python with PYTHON=.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The everyday tests share two cores; the second stage runs alone, because it measures or starts many processes.
WORKERS ?= 2

.PHONY: quickstart test lint types unit slow docs clean

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

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/examples.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable ".[examples]"
	touch $@

$(VENV)/dev.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/examples.installed

clean:
	rm -rf $(VENV) docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
