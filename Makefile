# make search: set up, then run the bundled example.   make test: set up, then every check.
# PYTHON       the interpreter for a new .venv (3.11 or newer)
# TORCH_INDEX  an extra package index for PyTorch. Empty: the ordinary index, whose Linux build carries CUDA (large).
#              Without a GPU: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup search test test-slow wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^PYTHON/{/^#/s/^# //p;}' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "Python 3.11 or newer is needed, but '$(PYTHON)' is older or missing. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[dev,nni]"
	@touch $@

search: $(READY)
	$(BIN)/nas search experiments/digits.yaml --resume

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find nas search_spaces tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
