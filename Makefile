# Each target builds what it needs: a virtual environment in .venv, then a stamp file in it for each
# set of packages. A stamp depends on pyproject.toml, so nothing is asked of pip until that changes.
#
#   make quickstart ARGS="--family gpt2"       options for `lathe quickstart`
#   make test ARGS="tests/plan -k llama"       options for pytest
#   make PYTHON=python3.12 test                another interpreter
#   make TORCH="torch==2.12.*" test            another torch requirement (as pip writes it)

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first interpreter of these that is Python 3.11 or newer.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV ?= .venv
# torch is installed first and on its own, so that a CPU build can be chosen here.
TORCH ?= torch>=2.11,<2.14
FAMILY ?=
ARGS ?=
# Test processes. Each runs torch on one thread, so the two cores of a small machine are both used.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PYTHONUTF8 := 1

.PHONY: help quickstart test lint format bench clean

help: ## List the targets
	@echo "Lathe cuts transformer language models to size. Targets:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

quickstart: $(VENV)/.stamp-run ## Train a small model, cut it, heal it, measure it (FAMILY=gpt2, ARGS=...)
	$(BIN)/lathe quickstart $(if $(FAMILY),--family $(FAMILY)) $(ARGS)

test: $(VENV)/.stamp-test ## Run the tests (ARGS="tests/plan -k llama")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.stamp-lint ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.stamp-lint ## Put the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-test ## Measure side by side with the peers (ARGS=...)
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist quickstart .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that is cut short is made again: the stamp comes last.
$(VENV)/.stamp-venv:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer among python3, python3.13, python3.12, python3.11;" \
		"install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: PYTHON=$(PYTHON) is not a Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no ensurepip; on Debian or Ubuntu install the python3-venv package" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	$(PIP) install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-run
	$(PIP) install --quiet --editable '.[lint]'
	@touch $@
