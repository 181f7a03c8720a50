# Set-up, the main job and the tests. `make` alone prints the targets.
#
#   make setup PYTHON=/path/to/python3.12     take this interpreter instead of the first that fits
#   make setup TORCH_INDEX=...                another index of CPU builds of torch
#
# What is installed is in the lock, requirements/*.txt, with hashes: a new release of anything changes nothing until `make
# lock`. The set-up leaves stamps in .venv; a second run does nothing until the lock or pyproject.toml changes.

PYTHON ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
OLDER_TRITON := $(VENV)/triton-3.6
LATEST := .venv-latest
LOCKER := .venv-lock
PIP := -m pip -qq --disable-pip-version-check --no-input install
# The lock holds what packages without a wheel are built with; their own code is not compiled (deepspeed compiles at use).
INSTALL := DS_BUILD_OPS=0 $(BIN)/python $(PIP) --no-build-isolation

# Fails with one line that says why an interpreter will not do. It must run under any Python.
PROBE := import sys; \
	v = "is %d.%d" % sys.version_info[:2]; \
	(3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit(v); \
	from importlib.util import find_spec; \
	find_spec("ensurepip") or sys.exit(v + " without ensurepip (on Debian: install python3-venv)")

.PHONY: help quickstart test test-quick setup lint docs wheel lock test-latest clean

help:
	@echo "make quickstart   set up, then train, evaluate and report configs/quickstart.yaml"
	@echo "make test         set up, then lint, types and tests"
	@echo "make test-quick   set up, then the tests that take seconds and need no hosts: on each change"
	@echo "make setup        .venv with everything that training needs, and the command $(BIN)/overtone"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the site of docs/, in build/site; a broken link fails"
	@echo "make wheel        the wheel of model/ as overtone, in dist/"
	@echo "make lock         resolve pyproject.toml anew and write requirements/*.txt"
	@echo "make test-latest  types and tests with the newest release of everything, in $(LATEST)"
	@echo "make clean        remove environments and caches; prepared/ and runs/ stay"

# A CPU without bfloat16 products would take hours: see the header of configs/quickstart.yaml.
SLOWER := $(shell grep -qw avx512_bf16 /proc/cpuinfo || nvidia-smi -L >/dev/null 2>&1 || \
	echo train.precision=float32 train.steps=100)

quickstart: setup
	@test -z '$(SLOWER)' || echo "quickstart: neither a GPU nor AVX512_BF16 here; going on with $(SLOWER)"
	@$(BIN)/overtone prepare configs/quickstart.yaml
	@$(BIN)/overtone run configs/quickstart.yaml $(SLOWER)
	@$(BIN)/overtone report runs/quickstart
	@echo
	@echo "next commands:"
	@echo "  $(BIN)/overtone run configs/quickstart.yaml head.distance=dot run=runs/quickstart-softmax$(if $(SLOWER), $(SLOWER))"
	@echo "  $(BIN)/overtone report runs/quickstart runs/quickstart-softmax"
	@echo "  $(BIN)/tensorboard --logdir runs"

# Each of hundreds of processes would compile the same modules again where the environment forbids to keep them.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
PYTEST := -m pytest -q -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder

test: lint
	$(TEST_ENVIRONMENT) $(BIN)/python $(PYTEST)

test-quick: $(VENV)/.ready-dev
	$(TEST_ENVIRONMENT) $(BIN)/python $(PYTEST) -m "not slow and not hosts and not gpu"

lint: $(VENV)/.ready-dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

docs: $(VENV)/.ready-dev
	$(BIN)/python -m mkdocs build --strict

# setuptools would put what an earlier build left in build/ into the wheel too.
wheel: $(VENV)/.ready-dev
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

setup: $(VENV)/.ready

lock: $(VENV)/.python
	@test -x $(LOCKER)/bin/uv || { $(BIN)/python -m venv --clear $(LOCKER) && $(LOCKER)/bin/python $(PIP) uv; }
	@$(LOCKER)/bin/python requirements/lock.py

test-latest: $(VENV)/.python
	@echo "test-latest: installing the newest release of everything in $(LATEST) (some minutes)"
	@$(BIN)/python -m venv --clear $(LATEST)
	@$(LATEST)/bin/python $(PIP) --upgrade pip setuptools wheel
	@nvidia-smi -L >/dev/null 2>&1 || \
		$(LATEST)/bin/python $(PIP) --no-deps --retries 1 --index-url '$(TORCH_INDEX)' torch 2>/dev/null || \
		echo "test-latest: no CPU build is to be had; taking the build of torch for GPUs (several GB)"
	@DS_BUILD_OPS=0 $(LATEST)/bin/python $(PIP) $$($(LATEST)/bin/python requirements/lock.py newest)
	@$(LATEST)/bin/python -m pip list
	code=0; $(LATEST)/bin/python -m mypy || code=1; $(TEST_ENVIRONMENT) $(LATEST)/bin/python $(PYTEST) || code=1; exit $$code

clean:
	rm -rf $(VENV) $(LATEST) $(LOCKER) .ruff_cache .mypy_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@if $(BIN)/python -c '$(PROBE)' >/dev/null 2>&1; then \
		echo "setup: using the $(VENV) that is there"; touch $@; exit 0; \
	fi; \
	tried=; \
	for candidate in $(or $(PYTHON),python3.12 python3.11 python3); do \
		if why=$$("$$candidate" -c '$(PROBE)' 2>&1); then \
			echo "setup: making $(VENV) with $$candidate ($$("$$candidate" --version))"; \
			"$$candidate" -m venv --clear $(VENV) && touch $@; exit; \
		fi; \
		tried="$$tried\n  $$candidate: $$(printf '%s\n' "$$why" | sed 1q)"; \
	done; \
	printf 'setup: Overtone needs Python 3.11 or 3.12. Tried:%b\n' "$$tried" >&2; \
	echo "Install one of them, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 1

# Says cpu or gpu. Without a GPU, the CPU build spares several GB: from the sources that pip is configured with, else from
# TORCH_INDEX.
$(VENV)/.torch: $(VENV)/.python requirements/build.txt requirements/torch-cpu.txt
	@$(INSTALL) -r requirements/build.txt
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo gpu >$@; \
	elif echo "setup: installing torch for the CPU" && \
		{ $(INSTALL) --no-deps --retries 0 -r requirements/torch-cpu.txt 2>/dev/null || \
		$(INSTALL) --no-deps --retries 1 --extra-index-url '$(TORCH_INDEX)' -r requirements/torch-cpu.txt; }; then \
		echo cpu >$@; \
	else \
		echo "setup: no CPU build is to be had; taking the build of torch for GPUs (several GB)"; \
		echo gpu >$@; \
	fi

$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(wildcard requirements/*.txt)
	@echo "setup: installing dependencies (some minutes the first time)"
	@$(INSTALL) -r requirements/run-$$(cat $(VENV)/.torch).txt
	@$(INSTALL) --no-deps --editable .
	@touch $@
	@echo "setup: done"

$(VENV)/.ready-dev: $(VENV)/.torch pyproject.toml $(wildcard requirements/*.txt)
	@echo "setup: installing dependencies and development tools (some minutes the first time)"
	@$(INSTALL) -r requirements/dev-$$(cat $(VENV)/.torch).txt
	@$(INSTALL) --no-deps --editable .
	@rm -rf $(OLDER_TRITON)
	@$(INSTALL) --no-deps --target $(OLDER_TRITON) -r requirements/triton-3.6.txt || \
		echo "setup: no Triton 3.6 is to be had here: the test that compiles kernels with it will skip"
	@touch $(VENV)/.ready $@
	@echo "setup: done"
