# `make demo` shows InsPose learn, `make test` runs every test.
# Both install what is missing into .venv first; nothing outside this folder is written.
PYTHON ?= python3
RUN := .venv/bin/python
# A process of tests for each core; four take 8 GB.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

# These would otherwise leave files in the home directory and in /tmp.
export MPLCONFIGDIR := $(CURDIR)/.venv/cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.venv/cache/inductor
export XDG_CACHE_HOME := $(CURDIR)/.venv/cache

# Without bytecode each of many processes compiles the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

# Material's advertisement of its successor.
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo demo-short site test test-quick test-slow test-gpu check lint format type install clean

demo: install
	$(RUN) -m experiments.demo_synthetic

demo-short: install
	$(RUN) -m experiments.demo_synthetic --minutes 1

test: install  ## quick and slow
	$(PYTEST) -m "not gpu"

test-quick: install
	$(PYTEST) -m "not slow and not gpu"

test-slow: install
	$(PYTEST) -m "slow and not gpu"

test-gpu: install
	$(RUN) -m pytest -m gpu

site: install  ## the pages of docs/ and of the docstrings, in output/site
	$(RUN) -m mkdocs build

check: lint type test-quick

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

type: install
	$(RUN) -m mypy

install:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) tools/bootstrap.py

clean:
	rm -rf .venv build inspose_d2.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
