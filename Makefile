# make test | lint | demo | cuda-check | clean
#
# VENV=/path  use an existing environment     TORCH=...  which torch to install when there is none
# A stamp is written only after its step succeeded and is named after a hash of what the step
# depends on, so running make again repairs an interrupted installation.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
LIRPA ?= auto-LiRPA==0.3
PYTEST_ARGS ?= -q -n 2 -m "not slow"

BIN := $(VENV)/bin
PY := $(BIN)/python
INPUTS := pyproject.toml setup.py $(shell find csrc -type f | LC_ALL=C sort)
KEY := $(shell { printf '%s\n' '$(TORCH)' '$(LIRPA)' '$(CURDIR)' "$${TORCH_PREPARED_CUDA-}" \
	"$${TORCH_PREPARED_NO_EXT-}"; cat $(INPUTS); } | sha256sum | cut -c1-16)
STAMP := $(VENV)/.torch_prepared-$(KEY)

.PHONY: test lint demo cuda-check install clean
install: $(STAMP)

# An environment without a working pip is incomplete: venv completes it in place.
$(STAMP):
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'; \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@if ! $(PY) -c 'import torch' >/dev/null 2>&1; then $(PY) -m pip install "$(TORCH)"; fi
	$(PY) -m pip install "setuptools>=77" wheel ninja
	$(PY) -m pip install --no-build-isolation -e ".[dev]"
	$(PY) -m pip install --no-deps "$(LIRPA)" appdirs pyyaml
	@rm -f $(VENV)/.torch_prepared-*
	@touch $@

test: $(STAMP)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	@if command -v clang-format >/dev/null; then \
	  find csrc -type f ! -name '*.md' -print0 | xargs -0 clang-format --dry-run --Werror; \
	else echo "clang-format is not installed: csrc was not checked"; fi

demo: $(STAMP)
	$(BIN)/torch-prepared demo

# Compiles every CUDA kernel for the supported architectures; needs nvcc but no GPU.
cuda-check:
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	for source in csrc/cuda/*.cu; do \
	  echo "nvcc $$source"; \
	  nvcc -O3 -std=c++17 --fmad=false -Xcompiler -fPIC -c "$$source" -o "$$out/kernel.o" \
	    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90; \
	done

clean:
	rm -rf build dist *.egg-info torch_prepared/_C*.so .pytest_cache .mypy_cache .ruff_cache
