PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
TASKS := scienceqa,vizwiz_vqa_val,vqav2_val
# More than one process shards the documents; on a few cores two are faster than one.
PROCESSES ?= 1
# Another arithmetic for demo and results, such as packed; plans are those of any.
BACKEND ?=
LMMS_EVAL = $(if $(filter 1,$(PROCESSES)),$(BIN)/lmms-eval,$(BIN)/torchrun --nproc_per_node $(PROCESSES) -m lmms_eval)

.PHONY: help install test lint oldest fuzz demo results bench clean

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

oldest:  ## every test on the oldest versions that are supported, in an environment of their own
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable '.[test]'
	OMP_WAIT_POLICY=passive .venv-oldest/bin/pytest

fuzz: install  ## 100,000 hostile files and arguments (ten minutes); a new seed each time
	$(BIN)/pytest tests/hostile --hypothesis-profile=fuzz

# A run is METHOD-SCHEME or METHOD-SCHEME-WEIGHTS.
demo: RUNS = none-w16a16 qlora-w4a4 qvlm_jacobian-w4a4
demo: LIMIT = 100
demo: SAMPLES = 32
demo: OUTPUT = demo-results
results: RUNS = none-w16a16 \
	$(foreach scheme,w4a4 w6a6 w8a8,rtn-$(scheme) qlora-$(scheme) awq-$(scheme)-nf qvlm-$(scheme) qvlm_jacobian-$(scheme))
results: LIMIT = 1000
results: SAMPLES = 64
results: OUTPUT = $(if $(BACKEND),$(BACKEND),full)-results

demo:  ## full precision, qlora and Q-VLM at W4A4 on 100 documents of each standard task (the embedded small LLaVA)
results:  ## every method at W4A4, W6A6 and W8A8 on 1,000 documents of each task (three hours); goes on where it stopped

demo results: install
	$(BIN)/qvlm demo build
	$(BIN)/qvlm demo data demo-data
	for run in $(RUNS); do \
		set -- $$(echo $$run | tr - ' '); \
		folder=$(abspath $(OUTPUT))/$$run; arguments=pretrained=demo; \
		echo "== $$run"; \
		if ls $$folder/*/*_results.json > /dev/null 2>&1; then continue; fi; \
		if [ $$1 != none ]; then \
			(cd demo-data && $(BIN)/qvlm search $$folder/plan --pretrained demo --method $$1 --scheme $$2 \
				--calibration calibration/train.json:$(SAMPLES) $${3:+--option weights=$$3}) || exit 1; \
			arguments=$$arguments,plan=$$folder/plan$(BACKEND:%=,backend=%); \
		fi; \
		(cd demo-data && HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(LMMS_EVAL) --model qvlm_llava \
			--model_args $$arguments --tasks $(TASKS) --batch_size 16 --limit $(LIMIT) --log_samples \
			--output_path $$folder) || exit 1; \
	done
	$(BIN)/qvlm results $(addprefix $(OUTPUT)/,$(RUNS))

bench: install  ## speed and memory of packed execution on this machine, beside bfloat16 (some 20 minutes)
	$(BIN)/python benchmarks/kernels.py --layouts 7b --seconds 0.4 --json docs/performance/kernels-cpu.json
	$(BIN)/python benchmarks/generate.py --layers 2 --rounds 2 --json docs/performance/generate-cpu.json
	$(BIN)/python benchmarks/generate.py --layout demo --prompt-tokens 90 --rounds 3 \
		--variants bf16,reference-w4a4,packed-w4a4,nf4a4,reference-w8a8,packed-w8a8 \
		--json docs/performance/generate-demo-cpu.json
	$(BIN)/python benchmarks/search.py --json docs/performance/search-cpu.json
	$(BIN)/python benchmarks/markdown.py docs/performance/*.json

clean:  ## remove the environment, the demo's data and results
	rm -rf $(VENV) .venv-oldest demo-data *-results
