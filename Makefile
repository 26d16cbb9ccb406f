# `make demo`, `make test` and `make check` create .venv and install everything into it, where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The torch version that the tests run with. The package itself works with any torch >= 2.9.
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
