# `make demo` and `make test` do all set-up on a fresh machine: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version that the suite is run with; any torch >= 2.9 will do for using the package.
TORCH ?= torch==2.13.0

.PHONY: demo test check clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/digits/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -q

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info out
