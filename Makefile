# `make test` and `make demo` do all of their own set-up; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
DETECTRON2_SOURCE ?= https://github.com/facebookresearch/detectron2.git

BIN := $(VENV)/bin
REFERENCE_OPTION = $(if $(REFERENCE),--reference-module "$(REFERENCE)")
GPU_VARIANTS := eager,packed,compiled,eager+compiled,cropped on device
STAMP := $(VENV)/.flsl-d2-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test slow-tests gpu-benchmarks soak lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-18s %s\n' "$$target" "$$text"; done
	@echo "variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TEST_PROCESSES=$(TEST_PROCESSES)  DETECTRON2_SOURCE=URL, folder or none"

# The stamp is written last, so an installation that was interrupted is taken up again.
$(STAMP): requirements.txt setup.py tools/install.py tools/install_detectron2.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo 'error: $(PYTHON) is not a Python 3.10 or newer: name one, as in make PYTHON=python3.11' >&2; \
		exit 1; }
	@"$(PYTHON)" tools/install.py --environment "$(VENV)" \
		--detectron2-source "$(DETECTRON2_SOURCE)" --stamp "$@"

install: $(STAMP) ## set up the environment (.venv) and nothing else
	@echo "The environment is in place: $(VENV)"

demo: $(STAMP) ## pre-train, fine-tune and compare on a small data set of its own; no download, no GPU
	@"$(BIN)/python" tools/demo.py

test: $(STAMP) ## run the tests, in TEST_PROCESSES at a time
	@"$(BIN)/python" -m pytest -n $(TEST_PROCESSES) --dist worksteal

slow-tests: $(STAMP) ## run the long accuracy tests
	@"$(BIN)/python" -m pytest -m slow

soak: $(STAMP) ## kill and resume a run 25 times and compare its weights to the bit
	@"$(BIN)/python" tests/soak.py

gpu-benchmarks: $(STAMP) ## measure speed and memory on a GPU; IMAGES=FOLDER of JPEG files, REFERENCE=FILE.py
	@test -d "$(IMAGES)" || { echo 'error: IMAGES=$(IMAGES) is no folder; give one of JPEG files.' >&2; exit 2; }
	@mkdir -p output/benchmarks
	"$(BIN)/python" tools/benchmark.py data --images "$(IMAGES)" $(REFERENCE_OPTION) \
		--json output/benchmarks/data.json
	for batch in 64 256; do "$(BIN)/python" tools/benchmark.py pretrain-step --device cuda \
		--batch-size $$batch --variants "$(GPU_VARIANTS)" $(REFERENCE_OPTION) \
		--json output/benchmarks/step_$$batch.json || exit 1; done
	for model in base_p16 small_p8; do "$(BIN)/python" tools/benchmark.py pretrain-step \
		--device cuda --config-file configs/pretrain/flsl_vit_$${model}_in1k.py --batch-size 64 \
		--variants "packed,packed+checkpointed" --json output/benchmarks/step_$$model.json \
		model.backbone.use_act_checkpoint=False || exit 1; done
	"$(BIN)/python" tools/benchmark.py end-to-end --images "$(IMAGES)" --device cuda \
		--batch-size 256 --workers 16 --repeats 50 $(REFERENCE_OPTION) \
		--json output/benchmarks/end_to_end.json \
		views.on_device=crops model.pack_views=True train.compile=True
	for positions in "" --rel-pos; do "$(BIN)/python" tools/benchmark.py detection --device cuda \
		--model b --size 1024 --batch-size 2 $$positions \
		--json output/benchmarks/detection$$positions.json || exit 1; done
	"$(BIN)/python" tools/benchmark.py scaling --device cuda --batch-size 64 \
		--batches 16,32,64,128,256 --plot output/benchmarks/scaling.png \
		--json output/benchmarks/scaling.json

lint: $(STAMP) ## check style and formatting
	@"$(BIN)/ruff" check . && "$(BIN)/ruff" format --check .

format: $(STAMP) ## format the code
	@"$(BIN)/ruff" check --fix . && "$(BIN)/ruff" format .

clean: ## remove what builds and tests leave behind; .venv and output stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
