# Every target makes the environment it needs. PYTHON and VENV choose which; NAME=value after make overrides either.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes: the machines that this is built on have two cores, and each test process computes on one.
JOBS ?= 2
CODE := configs exporter plugins runtime tests demo

.PHONY: demo test test-full measure plugins lint clean

demo: $(VENV)/.export  ## build the demo artifact for this machine's processor and talk to it, offline
	$(BIN)/python -m demo.talk

test: $(VENV)/.dev lint  ## format, lint, types and the tests that need no GPU and no download (10 minutes at most)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --every-message -m "not full and not gpu and not checkpoint"

test-full: $(VENV)/.dev  ## the longer tier
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m "full and not gpu and not checkpoint"

lint: $(VENV)/.dev  ## ruff and mypy, as `make test` runs them
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

# LLAMA=PATH/bin/python, an interpreter with llama-cpp-python, puts llama.cpp beside ours.
LLAMA ?=
measure: $(VENV)/.dev  ## figures of docs/measurements: by hand, on a quiet machine
	$(BIN)/python tests/measure.py $(if $(LLAMA),--llama-python $(LLAMA))

plugins: $(VENV)/.dev  ## plugins/lib/libgemma4_plugins.so: our CUDA kernels as TensorRT plugins, nvcc from pip
	$(BIN)/python -m gemma4_export.plugins.compile

clean:  ## remove environments and caches; artifacts that somebody built stay
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's CPU build (0.2 GB instead of 2.6 GB).
TORCH_INDEX ?=
$(VENV)/.torch: $(VENV)/bin/pip
	$(BIN)/pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/.export: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet --editable ".[export,cpu]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
