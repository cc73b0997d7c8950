# `make demo` and `make test` need Python >= 3.10 and nothing else: they make .venv first.
# make <target> PYTHON=python3.12            another interpreter
# make <target> TORCH_INDEX=<index URL>      where to find torch, such as an index of its CPU builds

.DEFAULT_GOAL := help
SHELL := /bin/bash

TOO_OLD := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10 python, \
	$(if $(shell $(p) -c '$(TOO_OLD)' 2>/dev/null && echo yes),$(p))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2

# Without an NVIDIA GPU: the last torch with a CPU build at hand, and the triton that pairs with it,
# which the CPU build does not bring. With one: the newest torch that is supported, which brings its triton.
TORCH_INDEX ?=
GPU := $(shell command -v nvidia-smi)
ifeq ($(GPU),)
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),triton==3.7.1)
else
TORCH ?= torch>=2.11,<2.14
TRITON ?=
endif

.PHONY: help demo test lint format test-gpu bench readme clean

help:
	@echo "make demo      compile small stock models with the plugin, compare with eager, print the report"
	@echo "make test      run the tests that need no GPU"
	@echo "make test-gpu  run all tests on one"
	@echo "make lint      what CI and pre-commit check;  make format  fixes what it can"
	@echo "make bench     measure against stock torch.compile (needs a GPU);  make readme  refreshes README.md and docs/"

$(INSTALLED): pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "Python >= 3.10 is needed and none was found; set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install -q $(if $(TRITON),'$(TRITON)') -e '.[models,test,bench,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/fusion-passes demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Not with -m gpu: tests that draw their cases bear no mark, and use the GPU where there is one.
test-gpu: $(INSTALLED)
	@test -n "$(GPU)" || { echo "test-gpu needs an NVIDIA GPU, and nvidia-smi is not here" >&2; exit 1; }
	$(BIN)/python -m pytest $(ARGS)

# Each check is a line of its own, and .pre-commit-config.yaml runs this target.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m bench readme --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(INSTALLED)
	$(BIN)/python -m bench readme

bench: $(INSTALLED)
	$(BIN)/python -m bench run $(ARGS)
	$(BIN)/python -m bench tune
	$(BIN)/python -m bench plot
	$(BIN)/python -m bench readme

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
