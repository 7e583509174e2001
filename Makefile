# Two commands: `make run` trains a model and talks to it, `make test` runs every test.
# Each sets up .venv on first use and is quick afterwards.

PYTHON ?= python3
PRESET ?= tiny
BIN := .venv/bin

.PHONY: run test bench lab site export release setup

run: .venv/ready
	$(BIN)/nanochat run --preset $(PRESET)

test: .venv/ready
	$(BIN)/python tests/in_step.py
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^labs' --skip_file_re '^5[1-7]_' --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Beside others, half an hour on two CPU cores; a checkout of the public nanochat takes part with PEER=path
bench: .venv/ready
	set -e; for what in import tokenizer data "train --compile" decode "quality --minutes 1"; do \
	  peer=; case "$$what" in (train*|decode*|quality*) peer="$(PEER:%=--peer %)";; esac; \
	  $(BIN)/nanochat bench $$what $$peer; done

lab: .venv/ready
	$(BIN)/nanochat lab

# Executes every notebook, a quarter of an hour on two CPU cores, and afterwards only those that something has changed for
site: .venv/ready
	$(BIN)/python docs/build_site.py

export: .venv/ready
	$(BIN)/python tests/in_step.py --write

# What students get of each assignment, examined and packed into assignments/course; a minute each, if something has changed
release: .venv/ready
	$(BIN)/python assignments/release.py

setup: .venv/ready

# PyPI's torch for Linux brings several gigabytes of CUDA. Without an NVIDIA GPU we ask pip's own
# sources for the CPU build first (a wheelhouse, say), and then uv, which knows where PyTorch keeps it.
.venv/ready: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "nanochat needs Python 3.10 or newer, and $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then true; \
	elif [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	  echo "installing PyTorch for the CPU"; \
	  $(BIN)/pip install -q 'torch==2.13.0+cpu' 2>/dev/null || \
	  { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu 'torch>=2.6'; }; \
	else echo "installing PyTorch"; $(BIN)/pip install -q 'torch>=2.6'; fi
	@echo "installing nanochat and what it needs"
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@
