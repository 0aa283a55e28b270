# make run | test | test-all | sanitize | bench | gpu | wheel | format | clean.   PYTHON=python3.12 picks an interpreter,
# TORCH_INDEX=URL the index that torch comes from (PyTorch's CPU index, say), VENV a folder other than .venv.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
SOURCES := $(shell find apc_kernels apcnet csrc -type f -not -name '*.pyc') setup.py pyproject.toml README.md

.PHONY: run test test-all sanitize lint bench gpu wheel format clean needs
.DELETE_ON_ERROR:

run: $(VENV)/installed
	$(BIN)/apcnet train

# A process for each core and a thread in each (tests/conftest.py): one test at a time is what `pytest` alone does.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/pytest $(PARALLEL) -m "not slow"

# With what costs minutes and seldom changes: wheels built in several worlds, every kernel compiled for every GPU.
test-all: lint $(VENV)/peers
	$(BIN)/pytest $(PARALLEL)

# The CPU library under the address and undefined behaviour sanitizers, built in a copy of the sources.
SANITIZED := build/sanitized
PRELOAD = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)

sanitize: $(VENV)/installed
	mkdir -p $(SANITIZED)
	for part in apc_kernels apcnet csrc tests setup.py pyproject.toml; do rm -rf $(SANITIZED)/$$part && cp -r $$part $(SANITIZED); done
	cd $(SANITIZED) && CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1" \
	  $(abspath $(BIN))/python -m apc_kernels.build
	cd $(SANITIZED) && LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
	  $(abspath $(BIN))/python -m pytest -q tests/robustness/test_operations.py tests/apc_kernels \
	  -k "(cpp or random or threads or forked or conv3x3) and not (compile or ptx or emulation or interpreter or sm_)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/codespell
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.run --rows build/rows.json $(if $(ALL),--all) $(if $(RESUME),--resume)
	$(BIN)/python -m benchmarks.report build/rows.json

# On a machine with a GPU, in the interpreter it has: builds, tests and measures, installs nothing.
gpu:
	@test -n "$(OUT)" || { echo "make gpu OUT=folder: say where the results go"; exit 2; }
	$(PYTHON) -m benchmarks.gpu "$(OUT)" $(if $(PART),--part "$(PART)") $(if $(REHEARSE),--rehearse)

# With the CUDA library where torch is a CUDA build and there is an nvcc; a GPU is not needed for it.
wheel: $(VENV)/torch
	$(PIP) install -q "setuptools>=77" ninja
	$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What must be there before anything is installed, each with the package that brings it on Debian and Ubuntu.
needs:
	@missing() { echo "$$1 is missing. On Debian or Ubuntu: apt-get install $$2"; exit 1; }; \
	command -v $(PYTHON) >/dev/null || missing "$(PYTHON)" python3; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing "Python's venv module" python3-venv; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
	  || missing "Python.h" python3-dev; \
	command -v $(or $(filter-out c++ default,$(CXX)),g++) >/dev/null || missing "a C++ compiler" g++

$(VENV)/torch: | needs
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch $(TORCH). On Linux pip's default is the CUDA build, gigabytes; TORCH_INDEX=URL names another index."
	$(PIP) install -q "torch==$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

# The packages of others that tests compare with; without them these tests are skipped. torchvision asks for a torch of
# its own, from PyPI: it is installed alone, and so are those that ask for it.
$(VENV)/peers: $(VENV)/installed
	$(PIP) install -q --no-deps "timm>=1.0.31" "torchvision==0.28.*" "segmentation-models-pytorch>=0.5"
	$(PIP) install -q huggingface_hub pyyaml "transformers>=4.44" "onnx>=1.16" "onnxscript>=0.5" "onnxruntime>=1.18"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) install -q "setuptools>=77" ninja
	$(PIP) install -q --no-build-isolation ".[test]"
	@cd $(VENV) && bin/python -m apc_kernels.info
	touch $@
