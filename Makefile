# Each target builds what it needs: a virtual environment in .venv, then a stamp file in it for each
# set of packages. A stamp depends on pyproject.toml, so pip is asked for nothing until that changes.
#
#   make quickstart FAMILY=gpt2                another family; ARGS="..." for any option of lathe quickstart
#   make test ARGS="tests/planner -k llama"    some of the tests; any option of pytest
#   make test PYTHON=python3.12 VENV=.venv312  another interpreter, in an environment of its own
#   make test TORCH="torch==2.12.*"            another torch, as a pip requirement

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first of these that is Python 3.11 or newer.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV ?= .venv
# Which torch: where the package index has builds of several kinds, this picks one.
TORCH ?= torch>=2.11,<2.14
FAMILY ?=
ARGS ?=
# Test processes. Each runs torch on one thread, so two keep both cores of a small machine busy.
JOBS ?= 2

# For results and benchmarks: which work, where the texts are, where to write, on how many threads.
WORK ?=
DATA ?=
OUT ?= runs/results
THREADS ?= 1

BIN := $(VENV)/bin
# optimum-intel needs an older transformers than the other peers, so OpenVINO has an environment of its own.
OPENVINO := $(VENV)-openvino/bin/python
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
VERSION_OF = -c 'import sys; print("%d.%d" % sys.version_info[:2])'
export PYTHONUTF8 := 1

# Two targets at once would be two pips in one environment.
.NOTPARALLEL:
.PHONY: help quickstart test lint format bench bench-train bench-generate bench-openvino results clean FORCE

help: ## List the targets
	@echo "Lathe cuts transformer language models to size. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

quickstart: $(VENV)/.stamp-run ## Train a small model, cut it, heal it, measure it (FAMILY=gpt2)
	@$(BIN)/lathe quickstart $(if $(FAMILY),--family $(FAMILY)) $(ARGS)

test: $(VENV)/.stamp-test ## Run the tests (ARGS="tests/planner -k llama")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.stamp-lint ## Check the style, the types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.stamp-lint ## Put the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-test ## Measure Lathe side by side with its peers (ARGS="...")
	$(BIN)/python -m benchmarks $(ARGS)

bench-train: $(VENV)/.stamp-test ## Measure training beside transformers.Trainer (DATA=folder of the reviews)
	$(BIN)/python -m benchmarks.train --data "$(DATA)" $(ARGS)

bench-generate: $(VENV)/.stamp-bench ## Measure inference beside its peers (ARGS="--quick --shapes llama")
	$(BIN)/python -m benchmarks.generate $(if $(wildcard $(OPENVINO)),--openvino "$(abspath $(OPENVINO))") $(ARGS)

bench-openvino: $(VENV)/.stamp-venv ## Make the environment in which bench-generate finds OpenVINO
	@test -e $(OPENVINO) || $(BIN)/python -m venv $(VENV)-openvino
	@$(OPENVINO) -m pip --disable-pip-version-check install --quiet --no-compile "$(TORCH)" "optimum-intel[openvino]"
	@# One of its packages asks for torchvision, which does not go with every build of torch and is not used here.
	@$(OPENVINO) -m pip --disable-pip-version-check uninstall --quiet --yes torchvision

results: $(VENV)/.stamp-results ## Rerun a work of docs/results.md (WORK=sentiment DATA=folder)
	@test -f results/$(WORK).sh || { echo "make: WORK=$(WORK) is none of" results/*.sh >&2; exit 1; }
	@test -d "$(DATA)" || { echo "make: DATA=$(DATA) is no folder; give the one that holds the texts" >&2; exit 1; }
	@mkdir -p $(OUT)
	cd $(OUT) && PATH="$(abspath $(BIN)):$$PATH" CONFIGS="$(CURDIR)/results" DATA="$(abspath $(DATA))" \
		OMP_NUM_THREADS=$(THREADS) sh "$(CURDIR)/results/$(WORK).sh"

clean: ## Remove the environment, the caches and what was built
	rm -rf $(VENV) $(VENV)-openvino build dist quickstart .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# PYTHON and TORCH count whenever they are given, not only when the environment is made.
ifneq ($(origin PYTHON),file)
$(VENV)/.stamp-venv: FORCE
endif
ifneq ($(origin TORCH),file)
$(VENV)/.stamp-run $(VENV)/.stamp-test $(VENV)/.stamp-lint $(VENV)/.stamp-results $(VENV)/.stamp-bench: FORCE
endif

$(VENV)/.stamp-venv:
	@test -n "$(PYTHON)" || { echo "make: none of python3, python3.13, python3.12, python3.11 is Python 3.11 or newer;" \
		"install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: PYTHON=$(PYTHON) is not a Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no ensurepip; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@test ! -e $(BIN)/python || test "$$($(BIN)/python $(VERSION_OF))" = "$$("$(PYTHON)" $(VERSION_OF))" || \
		{ echo "make: $(VENV) is of another version than PYTHON=$(PYTHON);" \
		"run make clean, or give it an environment of its own: VENV=.venv312" >&2; exit 1; }
	@test -e $@ || echo "Making $(VENV) with $(PYTHON)"
	@test -e $@ || "$(PYTHON)" -m venv $(VENV)
	@test -e $@ || touch $@

$(VENV)/.stamp-run: PACKAGES = .
$(VENV)/.stamp-test: PACKAGES = .[test]
$(VENV)/.stamp-lint: PACKAGES = .[lint]
$(VENV)/.stamp-results: PACKAGES = .[results]
$(VENV)/.stamp-bench: PACKAGES = .[bench]
# The native step (docs/engine.md) is compiled as Lathe is installed, and again when a source of it changes.
NATIVE := $(wildcard src/lathe/engine/native/*) src/lathe/engine/build.py hatch_build.py
# Modules are compiled as they are first imported: compiling all of them here would take longer than the rest.
$(VENV)/.stamp-run $(VENV)/.stamp-test $(VENV)/.stamp-lint $(VENV)/.stamp-results $(VENV)/.stamp-bench: \
		$(VENV)/.stamp-venv pyproject.toml $(NATIVE)
	@echo "Installing $(PACKAGES) with $(TORCH) into $(VENV) (a minute or more the first time)"
	@$(PIP) --no-compile "$(TORCH)" --editable "$(PACKAGES)"
	@touch $@
