# Every path is relative, so a checkout in a folder with spaces works.
# `make demo` and `make test` create .venv on first use; after that nothing is looked up or fetched.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: help demo test lint check claims bench docs readme format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     devices tune a language model together, then serve it in two parts"
	@echo "make test     the test suite"
	@echo "make check    format, lint, types, floors, then the test suite"
	@echo "make claims   every paper's claim in miniature (long)"
	@echo "make bench    measured figures, each beside its goal (long)"
	@echo "make docs     the documentation, into site/"
	@echo "make clean    remove what was built, .venv included"

demo: .venv/.ready
	@$(OFFLINE) $(PY) -m isthmus demo

test: .venv/.ready
	@$(OFFLINE) $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: .venv/.dev
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m basedpyright
	@PYTHONPATH=src .venv/bin/lint-imports --no-logo --no-cache

check: lint test

format: .venv/.dev
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

claims: .venv/.ready
	@$(OFFLINE) $(PY) -m isthmus claim --all

bench: .venv/.ready
	@$(OFFLINE) $(PY) -m isthmus bench

readme: .venv/.ready
	@$(PY) scripts/update_readme.py

docs: .venv/.docs
	@$(PY) scripts/update_readme.py
	@$(PY) -m zensical build --clean

# torch comes first and alone: it is the one large download, and pip then keeps it.
.venv/.ready: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing isthmus and what it needs into .venv (once, a few minutes)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e ".[report,serve,trust,test]"
	@touch .venv/.ready

.venv/.dev: .venv/.ready
	@$(PIP) -e ".[dev]"
	@touch .venv/.dev

.venv/.docs: .venv/.ready
	@$(PIP) -e ".[docs]"
	@touch .venv/.docs

.venv/bin/python:
	@for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    "$$python" -m venv .venv && exit 0; \
	    rm -rf .venv; echo "$$python -m venv failed: is the venv module (python3-venv) installed?" >&2; exit 1; \
	  fi; \
	done; \
	echo "Python 3.11 or newer was not found: make PYTHON=/path/to/python3.11 ..." >&2; exit 1

clean:
	rm -rf .venv site build dist .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
