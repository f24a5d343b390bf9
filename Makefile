PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# The lock's uv: pip checks its hash, and it installs everything else several times as fast as pip.
INSTALL_UV = sed -n '/^uv==/,/[^\\]$$/p' requirements.lock | $(1)/bin/pip install --quiet --require-hashes --requirement /dev/stdin
# More than one process shards the documents of a run; on a few cores two are faster than one.
PROCESSES ?= 1
# Another arithmetic for results, such as packed; plans are those of any.
BACKEND ?= reference

# Container images often set this. Each process would then compile every module that it imports, for ten seconds and more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install lock newest test lint oldest slurm fuzz demo results seeds bench page clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

install: $(VENV)/installed  ## create the environment in .venv, from the lock, with everything the demo and the tests need

$(VENV)/installed: setup.cfg pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL_UV,$(VENV))
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

lock: install  ## resolve the newest versions into requirements.lock; run make newest before
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile setup.cfg --extra test --universal --python-version 3.11 \
		--prerelease disallow --generate-hashes --no-strip-extras --upgrade --quiet --output-file requirements.lock

# What tells in two minutes whether versions fit: loading, kernels, plans, the harness's wrapper and tasks.
QUICK := tests/kernels tests/models tests/test_plan.py tests/test_plan_request.py tests/test_plan_cache.py \
	tests/test_planning.py tests/test_quantizers.py tests/test_linear.py tests/test_topology.py \
	tests/test_conversation.py tests/harness/test_wrapper.py tests/harness/test_provenance.py \
	tests/harness/test_task_source.py tests/harness/test_checks.py
newest: install  ## without the lock: what the newest versions change, doctor, and the quick tests, in an environment of their own
	$(PYTHON) -m venv --clear .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest/bin/python --upgrade --editable '.[test]'
	@echo "== what the lock (+) has in place of the newest versions (-)"
	@$(BIN)/uv pip install --python .venv-newest/bin/python --dry-run --requirement requirements.lock 2>&1 | grep -E '^ [-+~]' || echo nothing
	.venv-newest/bin/qvlm doctor --tasks ""
	.venv-newest/bin/pytest -n 2 --dist loadfile $(QUICK)

lint: install  ## style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

test: lint  ## lint, then every test, on two cores
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile --durations 20

oldest:  ## every test on the oldest versions that are supported, in an environment of their own
	$(PYTHON) -m venv .venv-oldest
	$(call INSTALL_UV,.venv-oldest)
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --constraint tests/oldest.txt --editable '.[test]'
	OMP_WAIT_POLICY=passive .venv-oldest/bin/pytest -n 2 --dist loadfile

slurm: install  ## grids as jobs of a real Slurm on this machine; needs Debian's slurmctld, slurmd and munge
	tests/slurm/with_slurm.sh $(BIN)/pytest -m slurm tests/slurm

fuzz: install  ## 107,000 hostile files and arguments and 300 kills (a quarter of an hour); a new seed each time
	$(BIN)/pytest tests/hostile tests/faults/test_kills.py --hypothesis-profile=fuzz

demo: install  ## full precision, qlora and Q-VLM at W4A4 on 100 documents of each standard task (the embedded small LLaVA)
	@$(BIN)/qvlm demo run demo-results --processes $(PROCESSES)

# A run is METHOD-SCHEME or METHOD-SCHEME-WEIGHTS.
RUNS = none-w16a16 \
	$(foreach scheme,w4a4 w6a6 w8a8,rtn-$(scheme) qlora-$(scheme) awq-$(scheme)-nf qvlm-$(scheme) qvlm_jacobian-$(scheme))
COMMA := ,
results: install  ## five methods at W4A4, W6A6 and W8A8 on 1,000 documents of each task (hours); resumes
	@$(BIN)/qvlm demo run $(BACKEND)-results --runs $(subst $() ,$(COMMA),$(strip $(RUNS))) --limit 1000 --samples 64 \
		--backend $(BACKEND) --processes $(PROCESSES)

seeds: install  ## methods at W4A4 on three draws of 32 and of 64 calibration samples (hours); resumes
	@$(BIN)/qvlm demo build && $(BIN)/qvlm demo data demo-data
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/seeds.py run seeds-results
	$(BIN)/python benchmarks/seeds.py table seeds-results

bench: install  ## speed and memory of packed execution on this machine, beside bfloat16 (some 20 minutes)
	$(BIN)/python benchmarks/kernels.py --layouts 7b --seconds 0.5 --json docs/performance/kernels-cpu.json
	$(BIN)/python benchmarks/generate.py --layers 2 --rounds 3 --json docs/performance/generate-cpu.json
	$(BIN)/python benchmarks/generate.py --layout demo --prompt-tokens 90 --rounds 3 \
		--variants bf16,reference-w4a4,packed-w4a4,nf4a4,reference-w8a8,packed-w8a8 \
		--json docs/performance/generate-demo-cpu.json
	$(BIN)/python benchmarks/search.py --json docs/performance/search-cpu.json
	$(BIN)/python benchmarks/markdown.py docs/performance/*.json

page: install  ## pictures of the leaderboard's page, its pauses with 5,000 rows, and axe-core's rules; needs a Chromium and npm
	$(BIN)/python benchmarks/page.py pictures page-results
	$(BIN)/python benchmarks/page.py times page-results
	npm install --silent --no-save --no-package-lock --prefix page-results axe-core@4.14.1
	$(BIN)/python benchmarks/page.py rules page-results --axe page-results/node_modules/axe-core/axe.min.js

clean:  ## remove the environment, the demo's data and results
	rm -rf $(VENV) .venv-oldest .venv-newest demo-data *-results
