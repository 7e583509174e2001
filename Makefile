# Two commands: `make run` trains a model and talks to it, `make test` runs every test.
# Each sets up .venv on first use and is quick afterwards.

PYTHON ?= python3
PRESET ?= tiny
BIN := .venv/bin

.PHONY: run test lab export setup in-step lint notebooks pytest

run: .venv/ready
	$(BIN)/nanochat run --preset $(PRESET)

test: .venv/ready
	@$(MAKE) --no-print-directory --keep-going in-step lint notebooks pytest

lab: .venv/ready
	$(BIN)/jupyter lab nbs/index.ipynb

export: .venv/ready
	$(BIN)/python tests/in_step.py --write

setup: .venv/ready

# The parts of `make test`. Stage notebooks (51 to 57) train, so pytest runs them with the demo preset.

in-step: .venv/ready
	$(BIN)/python tests/in_step.py

lint: .venv/ready
	$(BIN)/ruff check

notebooks: .venv/ready
	$(BIN)/nbdev_test --n_workers 2 --skip_file_re '^5[1-7]_' --timing

pytest: .venv/ready
	$(BIN)/python -m pytest -q

# PyTorch's usual build for Linux brings several gigabytes of CUDA. Without an NVIDIA GPU we ask pip's own
# sources for the CPU build first (a wheelhouse, say), and then uv, which knows where PyTorch keeps it.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.venv/ready: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "nanochat needs Python 3.10 or newer, and $(PYTHON) is missing or older: make $(or $(MAKECMDGOALS),run) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then true; \
	elif [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	  echo "installing PyTorch for the CPU"; \
	  $(PIP) install 'torch==2.13.0+cpu' 2>/dev/null || \
	  { $(PIP) install uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu 'torch>=2.6'; }; \
	else echo "installing PyTorch"; $(PIP) install 'torch>=2.6'; fi || \
	  { echo "PyTorch could not be installed; its message is above. Is there a connection?"; exit 2; }
	@echo "installing nanochat and what it needs"
	@$(PIP) install -e '.[dev]'
	@touch $@
