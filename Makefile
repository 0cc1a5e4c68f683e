# Every target makes the environment it needs. PYTHON and VENV choose which; NAME=value after make overrides either.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes: the machines that this is built on have two cores, and each test process computes on one.
JOBS ?= 2
CODE := configs exporter plugins runtime tests demo

# BIN=FOLDER takes an environment that is there, as it is: nothing is installed into it.
ifeq ($(origin BIN),file)
EXPORT_ENV := $(VENV)/.export
DEV_ENV := $(VENV)/.dev
endif

.PHONY: demo engines matrix test test-full measure plugins lint clean

demo: $(EXPORT_ENV)  ## build the demo artifact for this machine's processor and talk to it, offline
	$(BIN)/python -m demo.talk

# `make -jN` builds N artifacts at a time. Make's own count goes to one command that sees every artifact, so that one that
# fails hides no other, and table and exit code are of all of them.
SLOTS = $(patsubst -j%,%,$(firstword $(filter -j%,$(MAKEFLAGS)) -j1))
OUT ?= artifacts
MATRIX_COMMAND = $(BIN)/gemma4-export matrix --out $(OUT) --jobs $(or $(SLOTS),$(shell nproc)) $(FLAGS)
# FLAGS: more of `gemma4-export matrix --help`, such as --dry-run, --json or --verify full
FLAGS ?=

MODEL ?=
TARGET ?=
RECIPE ?=
CHECKPOINT ?=
ENGINES ?=
engines: $(EXPORT_ENV)  ## one artifact: MODEL=e2b TARGET=rtx4090 [CHECKPOINT=DIR] [RECIPE=int4] [ENGINES=later] [OUT=DIR]
	@test -n "$(TARGET)" || { echo "make engines MODEL=e2b TARGET=rtx4090 [CHECKPOINT=DIR] [RECIPE=int4] [OUT=DIR]"; exit 2; }
	$(MATRIX_COMMAND) --target $(TARGET) $(if $(MODEL),--model $(MODEL)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) \
		$(if $(RECIPE),--recipe $(RECIPE)) $(if $(ENGINES),--engines $(ENGINES))

MATRIX ?= configs/matrix.toml
matrix: $(EXPORT_ENV)  ## every artifact of MATRIX=FILE whose inputs changed, into OUT=DIR; `make -jN matrix` builds N at a time
	$(MATRIX_COMMAND) --matrix $(MATRIX)

test: $(DEV_ENV) lint  ## format, lint, types and the tests that need no GPU and no download (10 minutes at most)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --every-message -m "not full and not gpu and not checkpoint"

test-full: $(DEV_ENV)  ## the longer tier
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m "full and not gpu and not checkpoint"

lint: $(DEV_ENV)  ## ruff and mypy, as `make test` runs them
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

# LLAMA=PATH/bin/python, an interpreter with llama-cpp-python, puts llama.cpp beside ours.
LLAMA ?=
measure: $(DEV_ENV)  ## figures of docs/measurements: by hand, on a quiet machine
	$(BIN)/python tests/measure.py $(if $(LLAMA),--llama-python $(LLAMA))

plugins: $(DEV_ENV)  ## plugins/lib/libgemma4_plugins.so: our CUDA kernels as TensorRT plugins, nvcc from pip
	$(BIN)/python -m gemma4_export.plugins.compile

clean:  ## remove environments and caches; artifacts that somebody built stay
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's CPU build (0.2 GB instead of 2.6 GB).
TORCH_INDEX ?=
TORCH_SIZE = $(if $(TORCH_INDEX),about 0.2 GB as CPU build,2.6 GB on Linux; with TORCH_INDEX=https://download.pytorch.org/whl/cpu 0.2)
$(VENV)/.torch: $(VENV)/bin/pip
	@echo "downloading PyTorch into $(VENV): $(TORCH_SIZE); pip says nothing until it is done"
	$(BIN)/pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/.export: pyproject.toml $(VENV)/.torch
	@echo "downloading onnx, onnxruntime and what else exporting needs into $(VENV): about 0.2 GB"
	$(BIN)/pip install --quiet --editable ".[export,cpu]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "downloading what tests need into $(VENV): 0.25 GB of TensorRT-RTX and nvcc, about 0.2 GB of everything else"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
