PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
RESULTS ?= demo-results
LIMIT ?= 200

.PHONY: help install test lint demo clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

install: $(VENV)/installed  ## create the environment in .venv with everything the demo and the tests need

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

lint: install  ## style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

test: lint  ## lint, then every test
	OMP_WAIT_POLICY=passive $(BIN)/pytest

demo: install  ## full precision, rtn and qlora at W4A4 on the standard tasks, with the embedded small LLaVA
	QVLM="$(BIN)/qvlm" PYTHON="$(BIN)/python" LIMIT=$(LIMIT) RESULTS="$(abspath $(RESULTS))" ./demo.sh

clean:  ## remove the environment and the demo's results
	rm -rf $(VENV) $(RESULTS) demo-data
