# Set-up, the main job and the tests. `make` alone prints the targets.
#
#   make setup PYTHON=/path/to/python3.12     take this interpreter instead of the first that fits
#   make setup TORCH_INDEX=...                another index of CPU builds of torch
#
# The set-up leaves stamps in .venv; a second run does nothing until pyproject.toml changes.

PYTHON ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_CPU ?= torch==2.13.0+cpu
TORCH ?= torch>=2.11

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input install

# Fails with one line that says why an interpreter will not do. It must run under any Python.
PROBE := import sys; \
	v = "is %d.%d" % sys.version_info[:2]; \
	(3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit(v); \
	from importlib.util import find_spec; \
	find_spec("ensurepip") or sys.exit(v + " without ensurepip (on Debian: install python3-venv)")

.PHONY: help quickstart test setup lint clean

help:
	@echo "make quickstart   set up, then train, evaluate and report configs/quickstart.yaml"
	@echo "make test         set up, then lint, types and tests"
	@echo "make setup        .venv with everything that training needs"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove .venv and caches; prepared/ and runs/ stay"

quickstart: setup
	@$(BIN)/python -m data prepare configs/quickstart.yaml
	@$(BIN)/python -m launch run configs/quickstart.yaml
	@$(BIN)/python -m pretrain.report runs/quickstart
	@echo
	@echo "next commands:"
	@echo "  $(BIN)/python -m launch run configs/quickstart.yaml head.distance=dot run=runs/quickstart-softmax"
	@echo "  $(BIN)/python -m pretrain.report runs/quickstart runs/quickstart-softmax"
	@echo "  $(BIN)/tensorboard --logdir runs"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

setup: $(VENV)/.ready

clean:
	rm -rf $(VENV) .ruff_cache .mypy_cache .pytest_cache .hypothesis build *.egg-info
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

# Without a GPU, the CPU build spares several GB: from the sources that pip is configured with, else from TORCH_INDEX.
$(VENV)/.torch: $(VENV)/.python
	@if $(BIN)/python -c 'import torch' >/dev/null 2>&1; then \
		echo "setup: torch is there"; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
		echo "setup: installing torch for GPUs (several GB)"; \
		$(PIP) '$(TORCH)'; \
	else \
		echo "setup: installing torch for the CPU"; \
		$(PIP) --retries 0 '$(TORCH_CPU)' 2>/dev/null || \
		$(PIP) --extra-index-url '$(TORCH_INDEX)' '$(TORCH_CPU)' || { \
			echo "setup: no CPU build is to be had; installing the default build of torch (several GB)"; \
			$(PIP) '$(TORCH)'; \
		}; \
	fi
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@echo "setup: installing dependencies (some minutes the first time)"
	@DS_BUILD_OPS=0 $(PIP) --editable .
	@touch $@
	@echo "setup: done"

$(VENV)/.ready-dev: $(VENV)/.torch pyproject.toml
	@echo "setup: installing dependencies and development tools (some minutes the first time)"
	@DS_BUILD_OPS=0 $(PIP) --editable '.[dev]'
	@touch $(VENV)/.ready $@
	@echo "setup: done"
