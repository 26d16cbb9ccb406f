# `make demo`, `make test` and `make check` create .venv and install everything into it, where it is missing.
PYTHON ?= python3
VENV := .venv
# The torch version that the tests run with. The package itself works with any torch >= 2.9. Another version gets a virtual
# environment of its own: `make test TORCH=torch==2.15.0` (CONTRIBUTING.md).
TORCH ?= torch==2.13.0
ifneq ($(TORCH),torch==2.13.0)
VENV := .venv-$(subst =,,$(TORCH))
endif
BIN := $(VENV)/bin

.PHONY: demo test check clean

$(VENV)/.installed: pyproject.toml
	@echo "making $(VENV): PyTorch and the other packages are downloaded, which takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/digits/demo.py

# One thread for each of the two processes: with more, they wait for each other. `worksteal` gives each half of the files, so that
# few fixtures of a module are made twice, and the one that ends first takes tests from the other.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-* build dist *.egg-info out
