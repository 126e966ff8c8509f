# `make demo` and `make test` set everything up themselves; they need Python 3.11 (to 3.13) and make.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PARITY := .venv-parity
OLD    := .venv-old
pins    = $(foreach name,$(1),'$(shell grep -i '^$(name)==' constraints.txt)')
.PHONY: help setup demo test test-slow test-old parity lint types coverage docs docs-executed figures bench pocket lab clean

help:            ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or call make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## Make the virtual environment

demo: $(STAMP)   ## Try it: generate, finetune and simulate on the tiny built-in models, headless
	$(BIN)/python -m ttsnap_lib demo $(if $(VALUES),--values "$(VALUES)")

lint: types      ## Ruff over code and notebooks, mypy over the library
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy over the library
	$(BIN)/mypy

test: lint       ## All quick tests, two files at a time
	MPLBACKEND=Agg $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) $(PARITY)/.installed ## The long tests
	MPLBACKEND=Agg $(BIN)/python -m pytest -q -m slow

# image-reward runs on transformers below 4.56 only, and names a timm that nothing else takes: it has its own environment.
$(PARITY)/.installed: tests/parity/requirements.txt constraints.txt
	test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install $(call pins,torch torchvision numpy pillow) --requirement tests/parity/requirements.txt
	@touch $@

parity: $(STAMP) $(PARITY)/.installed ## ImageReward against the image-reward package, at real size
	$(BIN)/python -m pytest -q -s -m slow tests/parity

$(OLD)/.installed: tests/oldest.txt pyproject.toml constraints.txt
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install $(call pins,torch torchvision) --requirement tests/oldest.txt --editable '.[models,notebooks]'
	@touch $@

test-old: $(OLD)/.installed ## Rewards and pipelines on the lowest versions that pyproject.toml allows
	MPLBACKEND=Agg $(OLD)/bin/python -m pytest -q tests/rewards tests/diffusion tests/pocket tests/live

coverage: $(STAMP) ## Lines of the library that the quick tests do not run
	MPLBACKEND=Agg $(BIN)/python -m pytest -q --cov --cov-report=term-missing:skip-covered

docs: $(STAMP)   ## The documentation site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-executed: $(STAMP) ## The same with every notebook as it runs, outputs and all; each is run once (8 minutes on two cores)
	for name in $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/*.ipynb)); do $(BIN)/ttsnap run $$name || exit 1; done
	$(MAKE) docs

figures: $(STAMP) ## The figures of README and documentation (VALUES=folder for the published one)
	MPLBACKEND=Agg $(BIN)/python docs/figures/make.py $(if $(VALUES),--values "$(VALUES)")

bench: $(STAMP)  ## The benchmarks, one table
	$(BIN)/python -m tests.benchmarks

pocket: $(STAMP) ## Train the pocket models again (about two hours on two cores)
	$(BIN)/python -m ttsnap_lib.pocket.training.train --all

lab: $(STAMP)    ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

clean:           ## Remove caches, keep data_cache
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov .coverage .coverage.* *.egg-info
	rm -rf $(PARITY) $(OLD)
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
