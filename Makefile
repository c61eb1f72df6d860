# Everything runs in .venv, which the first target that needs it creates.
# The steps of its making leave stamps inside it, so that only what changed is done again.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/core/*.h)

.DEFAULT_GOAL := help

.PHONY: help
help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: .venv/installed  ## train the example; options in ARGS="..."
	$(BIN)/python examples/denoising_autoencoder.py $(ARGS)

.PHONY: test
test: .venv/installed  ## run the tests; pytest's options in ARGS="..."
	$(BIN)/pytest --numprocesses auto --dist loadfile $(ARGS)

.PHONY: test-trainers
test-trainers: .venv/trainers  ## test with Lightning, transformers and accelerate
	$(BIN)/pytest tests/test_trainers.py $(ARGS)

.PHONY: bench
bench: .venv/installed  ## time one optimizer step; options in ARGS="..."
	$(BIN)/python bench/step.py $(ARGS)

.PHONY: gpu
gpu:  ## build, check and measure on a GPU; see bench/gpu_check.sh
	PYTHON=$(PYTHON) bash bench/gpu_check.sh

.PHONY: check-cuda
check-cuda: .venv/installed  ## compile the CUDA kernels for all GPUs and check the machine code
	$(BIN)/python tools/check_cuda.py

.PHONY: lint
lint: .venv/installed  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: .venv/installed  ## fix style and formatting
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

.PHONY: docs
docs: .venv/installed  ## build the documentation site into build/site, every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: package
package: .venv/installed  ## build sdist and wheel, check them, install the sdist where torch is not
	$(BIN)/python tools/check_package.py $(ARGS)

.PHONY: clean
clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist package *.egg-info .pytest_cache .ruff_cache .mypy_cache ctld_cuda/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: check-tools
check-tools:  ## name the system packages that are missing
	@$(PYTHON) tools/check_tools.py

.venv/created:
	@$(PYTHON) tools/check_tools.py
	$(PYTHON) -m venv .venv
	@touch $@

.venv/torch: .venv/created tools/install_torch.py
	$(BIN)/python tools/install_torch.py
	@touch $@

.venv/installed: .venv/torch setup.py pyproject.toml tools/check_tools.py tools/cuda_toolkit.py $(SOURCES)
	@$(PYTHON) tools/check_tools.py
	$(BIN)/pip install --quiet -e ".[test,examples,dev,docs]"
	@touch $@

.venv/trainers: .venv/installed
	$(BIN)/pip install --quiet -e ".[trainers]"
	@touch $@
