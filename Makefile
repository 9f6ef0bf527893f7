# `make test` and `make demo` do all of their own set-up; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
FUZZ_MINUTES ?= 10
SEED ?= $(shell date +%s)
DETECTRON2_SOURCE ?= https://github.com/facebookresearch/detectron2.git

BIN := $(VENV)/bin
STAMP := $(VENV)/.flsl-d2-installed
OWN := $(VENV)/.made-by-flsl-d2
PIP := "$(BIN)/python" -m pip install -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help install demo test test-random fuzz slow-tests mutations soak gpu-benchmarks lint format docs lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-18s %s\n' "$$target" "$$text"; done
	@echo "variables: PYTHON=$(PYTHON)  VENV=$(VENV)  DETECTRON2_SOURCE=URL, folder or none"
	@echo "           TEST_PROCESSES=$(TEST_PROCESSES)  FUZZ_MINUTES=$(FUZZ_MINUTES)"

# The stamp is written last, so an installation that was interrupted is taken up again. Packages
# without a wheel are built with the locked setuptools: that of the day may not build them.
$(STAMP): requirements.lock pyproject.toml setup.py flsl_d2/install_detectron2.py
	@if [ ! -e "$(OWN)" ] && [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ]; then \
		echo 'error: $(VENV) was not made here and is left as it is: name another folder (make VENV=...),' \
			'or see "An environment that exists" in docs/INSTALL.md' >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo 'error: $(PYTHON) is not a Python 3.10 or newer: name one (make PYTHON=python3.11)' >&2; exit 1; }
	@echo "Installing requirements.lock into $(VENV): about 5 GB on Linux, one to three minutes"
	@mkdir -p "$(VENV)" && touch "$(OWN)"
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)" || { \
		echo 'error: $(PYTHON) lacks its module venv (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@for name in packaging setuptools wheel; do sed -n "/^$$name==/,/# via/p" requirements.lock; done \
		>"$(VENV)/build.lock"
	@$(PIP) --require-hashes -r "$(VENV)/build.lock"
	@$(PIP) --require-hashes --no-build-isolation -r requirements.lock
	@$(PIP) --no-build-isolation --no-deps -e .
	@"$(BIN)/python" tools/install_detectron2.py --source "$(DETECTRON2_SOURCE)"
	@touch "$@"

install: $(STAMP) ## set up the environment (.venv) and nothing else
	@echo "The environment is in place: $(VENV)"

demo: $(STAMP) ## pre-train, measure and compare on a small data set of its own: minutes on a CPU, no download
	@"$(BIN)/python" tools/demo.py

test: $(STAMP) ## run the tests, in TEST_PROCESSES at a time
	@"$(BIN)/python" -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-random: $(STAMP) ## run the tests in random order; SEED=N repeats an order
	@echo "make test-random SEED=$(SEED)"
	@"$(BIN)/python" -m pytest -n $(TEST_PROCESSES) --random-order-bucket global \
		--random-order-seed $(SEED)

fuzz: $(STAMP) ## draw new examples for the property tests, for FUZZ_MINUTES; print what repeats a failure
	@end=$$(($$(date +%s) + 60 * $(FUZZ_MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
		"$(BIN)/python" -m pytest -n $(TEST_PROCESSES) -m 'hypothesis and not slow' \
		--hypothesis-profile fuzz || exit 1; done

slow-tests: $(STAMP) ## run the long accuracy tests
	@"$(BIN)/python" -m pytest -m slow

mutations: $(STAMP) ## change the methods in one place at a time; list the changes that no test notices
	@"$(BIN)/python" tests/mutations.py

soak: $(STAMP) ## kill and resume a run 25 times and compare its weights to the bit
	@"$(BIN)/python" tests/soak.py

gpu-benchmarks: $(STAMP) ## measure speed and memory on all GPUs; IMAGES=FOLDER of JPEG files, REFERENCE=FILE.py
	@"$(BIN)/python" -m pretrain.studies.benchmark.gpus --images "$(IMAGES)" \
		$(if $(REFERENCE),--reference-module "$(REFERENCE)")

lint: $(STAMP) ## check style, formatting, docstrings and types
	@"$(BIN)/ruff" check . && "$(BIN)/ruff" format --check . && "$(BIN)/mypy"

format: $(STAMP) ## format the code
	@"$(BIN)/ruff" check --fix . && "$(BIN)/ruff" format .

docs: $(STAMP) ## build the API reference into output/docs; warnings are errors
	@rm -rf docs/api/modules && for package in flsl_d2 pretrain; do \
		"$(BIN)/sphinx-apidoc" -q --separate --module-first --no-toc -o docs/api/modules $$package; done
	@"$(BIN)/sphinx-build" --fail-on-warning --keep-going --fresh-env --quiet docs/api output/docs
	@echo "The API reference is output/docs/index.html"

lock: ## bring requirements.lock up to date with pyproject.toml; LOCK_OPTIONS=--upgrade renews all pins
	@"$(PYTHON)" -m venv build/lock && build/lock/bin/pip install --quiet uv
	@build/lock/bin/uv pip compile --quiet --universal --python-version 3.10 --all-extras \
		--generate-hashes --custom-compile-command 'make lock' $(LOCK_OPTIONS) \
		--output-file requirements.lock pyproject.toml requirements.in

clean: ## remove what builds and tests leave behind; .venv and output stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
