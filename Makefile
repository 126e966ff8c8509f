# `make demo` and `make test` set everything up themselves; they need Python 3.11 and make.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
.PHONY: help setup demo test test-slow lint bench docs figures pocket lab clean

help:            ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or call make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## Make the virtual environment

demo: $(STAMP)   ## The main job on the embedded default, headless
	$(BIN)/python -m ttsnap_lib demo $(if $(VALUES),--values "$(VALUES)")

lint: $(STAMP)   ## Ruff over code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint       ## All quick tests
	MPLBACKEND=Agg $(BIN)/python -m pytest -q

test-slow: $(STAMP) ## The long tests
	MPLBACKEND=Agg $(BIN)/python -m pytest -q -m slow

bench: $(STAMP)  ## The benchmarks, one table
	$(BIN)/python -m tests.benchmarks

docs: $(STAMP)   ## The documentation site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

figures: $(STAMP) ## The figures of README and documentation (VALUES=folder for the published one)
	MPLBACKEND=Agg $(BIN)/python docs/figures/make.py $(if $(VALUES),--values "$(VALUES)")

pocket: $(STAMP) ## Train the pocket models again (about two hours on two cores)
	$(BIN)/python -m ttsnap_lib.pocket.train --all

lab: $(STAMP)    ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

clean:           ## Remove caches, keep data_cache
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
