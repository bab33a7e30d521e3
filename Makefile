# `make help` lists the targets. PYTHON is the interpreter of a new environment, VENV where it goes, JOBS the processes of `make test`.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
CLP := $(BIN)/clp
INSTALLED := $(VENV)/.installed-$(EXTRAS)
# A test that hangs ends its process, which is tried once more.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --max-worker-restart=1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint types bench experiment clean

help: ## This list.
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## An environment with everything, in .venv.

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clp_jax needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

.PHONY: policy
policy: $(INSTALLED)
	$(CLP) pipeline examples/pydoc.yaml --stages=preference

quickstart: $(INSTALLED) ## Trains and steers a policy on this machine's own documentation: 6 to 10 minutes on 2 cores.
	$(CLP) pipeline examples/pydoc.yaml

test: $(INSTALLED) ## All tests; those that need several devices, or processes, by themselves.
	$(PYTEST) tests --maxprocesses=8
	$(PYTEST) tests/multi_device --maxprocesses=4
	$(PYTEST) tests/multi_process --maxprocesses=1

lint: $(INSTALLED) ## Style.
	$(BIN)/ruff check .

types: $(INSTALLED) ## Static types.
	$(BIN)/mypy

bench: $(INSTALLED) ## Speed and memory of training, experts, long inputs and decoding.
	$(BIN)/python benchmarks/train_step.py --size tiny
	$(BIN)/python benchmarks/train_step.py --size small
	$(BIN)/python benchmarks/experts.py --size tiny --repeats 7
	$(BIN)/python benchmarks/experts.py --size small --repeats 5
	$(BIN)/python benchmarks/long_inputs.py --size small
	$(BIN)/python benchmarks/decode.py --size tiny --repeats 5
	$(BIN)/python benchmarks/decode.py --size small --repeats 5

experiment: policy ## The table of docs/experiments/clp.md: hours.
	$(CLP) experiment --gin_file=examples/pydoc_experiment.gin

clean: ## Removes the environment, and nothing that was trained.
	rm -rf $(VENV)
