# `make run` trains the main job, `make test` runs the tests; both set up .venv first, once. On a machine with a CUDA GPU the same
# commands use it: the pinned torch is then its CUDA build, and Lightning's `accelerator: auto` finds the device.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test lint format clean

help: ## list the commands
	@echo "usage: make [PYTHON=python3.12] <command>"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed ## set up .venv, then train and evaluate the main job on the bundled data
	$(BIN)/mmemb fit --config recipes/r1.yaml

# From Python 3.12 on, coverage asks the interpreter (sys.monitoring) and includes every file. Before, it traces every line, which may
# double a test's time, and leaves out the longest files. `pytest --store-durations` with the options below measures the files again.
test: $(VENV)/.installed-dev ## set up .venv, then run every test, the longest files first, with coverage
	$$($(BIN)/python -c 'import sys; print("env COVERAGE_CORE=sysmon" if sys.version_info >= (3, 12) else "")') \
	  $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

lint: $(VENV)/.installed-dev ## ruff and mypy over the whole tree, and the English of the pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typecheck.py
	$(BIN)/python tools/prose.py
	$(BIN)/python tools/prose.py --code

format: $(VENV)/.installed-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed-dev ## only set up .venv, with the development tools

clean: ## remove build leftovers and caches (.venv and runs/ stay)
	rm -rf build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache src/*.egg-info *.egg-info

# Stamps: a set-up that failed half way leaves none, so that the next call goes on from there.
$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "mmemb needs Python 3.11 or newer, and there is no $(PYTHON): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mmemb needs Python 3.11 or newer, and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.installed $@
