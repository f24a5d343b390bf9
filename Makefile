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
	$(BIN)/qvlm demo build
	$(BIN)/qvlm demo data demo-data
	rm -rf $(RESULTS)
	for method in none rtn qlora; do \
		echo "== method=$$method"; \
		(cd demo-data && HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/lmms-eval --model qvlm_llava \
			--model_args pretrained=demo,method=$$method,scheme=w4a4,calibration=calibration/train.json:64 \
			--tasks scienceqa,vizwiz_vqa_val,vqav2_val --batch_size 16 --limit $(LIMIT) \
			--output_path $(abspath $(RESULTS))/$$method) || exit 1; \
	done
	$(BIN)/qvlm results $(foreach method,none rtn qlora,$(RESULTS)/$(method))

clean:  ## remove the environment and the demo's results
	rm -rf $(VENV) $(RESULTS) demo-data
