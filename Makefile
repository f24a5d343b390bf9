PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
TASKS := scienceqa,vizwiz_vqa_val,vqav2_val
# More than one process shards the documents; on a few cores two are faster than one.
PROCESSES ?= 1
LMMS_EVAL = $(if $(filter 1,$(PROCESSES)),$(BIN)/lmms-eval,$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m lmms_eval)

.PHONY: help install test lint demo results clean

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

demo: RUNS = none-w16a16 rtn-w4a4 qlora-w4a4
demo: LIMIT = 100
demo: OUTPUT = demo-results
results: RUNS = none-w16a16 rtn-w4a4 qlora-w4a4 rtn-w6a6 qlora-w6a6 rtn-w8a8 qlora-w8a8
results: LIMIT = 1000
results: OUTPUT = full-results

demo:  ## full precision, rtn and qlora at W4A4 on 100 documents of each standard task (the embedded small LLaVA)
results:  ## full precision, rtn and qlora at W8A8, W6A6 and W4A4 on 1,000 documents of each task (about an hour)

demo results: install
	$(BIN)/qvlm demo build
	$(BIN)/qvlm demo data demo-data
	rm -rf $(OUTPUT)
	for run in $(RUNS); do \
		echo "== $$run"; \
		(cd demo-data && HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(LMMS_EVAL) --model qvlm_llava \
			--model_args pretrained=demo,method=$${run%-*},scheme=$${run#*-},calibration=calibration/train.json:64 \
			--tasks $(TASKS) --batch_size 16 --limit $(LIMIT) --output_path $(abspath $(OUTPUT))/$$run) || exit 1; \
	done
	$(BIN)/qvlm results $(addprefix $(OUTPUT)/,$(RUNS))

clean:  ## remove the environment, the demo's data and results
	rm -rf $(VENV) demo-data demo-results full-results
