# The whole of nightherd on a bare Linux machine: Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXAMPLE := examples/prompts.jsonl
DEMO_RESULTS := build/demo-results.jsonl
# The version on cards' machines: the kernels must compile by that one too, not only by that of constraints.txt.
TRITON := 3.6.0
comma := ,
# Engines compute on all cores: their tests run one by one, all others three at once, as they often wait.
ONE_BY_ONE := $(patsubst %,tests/worker/engine/%.py,test_build test_engine test_isolation test_tokens cpu/test_level \
	cpu/test_openmp cpu/test_sampling torch/test_torch_runner transformers/test_faults)

.DEFAULT_GOAL := help
.PHONY: help demo test kernels triton cards faults soak lint format docs peers clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# Two stamps: to run, and to develop. pip compiles on one core only: all of them do it afterwards.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'nightherd needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile -c constraints.txt -e '.[$(1)]'
	@$(BIN)/python -m compileall -j 0 $(VENV)/lib 2>/dev/null | awk '/^Compiling/ && ++files % 200 == 0 \
		{ printf "\rbyte code of %d files", files; fflush() } END { print "" }'  # some templates are no Python
endef

$(VENV)/.run: pyproject.toml constraints.txt
	$(call install,worker)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,worker$(comma)dev)
	@touch $(VENV)/.run $@

demo: $(VENV)/.run  ## Run the main job here: a file of prompts in, every result out
	@mkdir -p $(dir $(DEMO_RESULTS))
	@job=$$($(BIN)/nightherd run $(EXAMPLE) --checkpoint demo --name demo --max-tokens 120 --temperature 0.5 \
		-o $(DEMO_RESULTS)) && \
	echo && $(BIN)/nightherd results $$job --limit 5 --text && \
	echo && $(BIN)/nightherd status $$job && \
	echo "  all results:  $(DEMO_RESULTS)" && \
	echo "  the database: $$($(BIN)/nightherd db path)" && \
	echo "  one row:      $(BIN)/nightherd show $$job 0"

lint: $(VENV)/.dev  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

# The C kernels of all levels of this machine, once, where all tests find them.
kernels: $(VENV)/.dev
	$(BIN)/python -P -m tests.kernels

build/triton-$(TRITON)/.installed: | $(VENV)/.dev
	@echo 'fetching triton $(TRITON)'
	@$(PIP) install --quiet --no-compile --no-deps --upgrade --target $(@D) triton==$(TRITON)
	@touch $@

# Triton is for Linux on x86-64, here.
ifeq ($(shell uname -sm),Linux x86_64)
triton: build/triton-$(TRITON)/.installed
else
triton:
endif

cards: triton  ## Compile every kernel for cards that are not there, by cards' version of Triton
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python benchmarks/gpu/compiled.py --capability 80,90

test: $(VENV)/.dev  ## Everything that must pass: lint and all tests
	$(MAKE) --no-print-directory -j 2 lint kernels triton
	$(BIN)/python -P -m pytest -n 3 --dist worksteal $(ONE_BY_ONE:%=--ignore=%)
	$(BIN)/python -P -m pytest $(ONE_BY_ONE)

faults: $(VENV)/.dev  ## Faults at length: hundreds of kills, outages, a poisonous request among a thousand
	$(BIN)/python -P -m pytest -m faults

SOAK :=
soak: $(VENV)/.dev  ## Twenty minutes of random faults under load; make soak SOAK='--minutes 5' for less
	$(BIN)/python -P -m tests.faults.soak $(SOAK)

format: $(VENV)/.dev  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## Write the generated pages: docs/cli.md, docs/settings.md
	$(BIN)/python scripts/make_docs.py

# Each peer in an environment of its own; torchvision and the like do not import beside a `+cpu` torch.
peers:  ## Install the engines that benchmarks/ compares with (gigabytes)
	@for peer in vllm openvino; do \
		own=build/peers/$$peer; \
		$(PYTHON) -m venv $$own && \
		$$own/bin/python -m pip --disable-pip-version-check install -qq -r benchmarks/peers/$$peer.txt && \
		$$own/bin/python -m pip --disable-pip-version-check uninstall -qq --yes \
			torchvision torchaudio torchcodec && \
		touch $$own/.installed && echo "$$peer: installed in $$own" || \
		{ echo "$$peer: cannot be installed here, benchmarks skip it"; rm -f $$own/.installed; }; \
	done

clean:  ## Remove what make made (not your data folder)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
