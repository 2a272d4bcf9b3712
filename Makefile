# `make demo`, `make test` and `make bench` do all the set-up themselves, in VENV. What the scripts need and what the
# tests need are installed apart, so that the demo installs no development packages.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEVELOPMENT := $(VENV)/installed-development
TINY := samples/parakeet-tdt-tiny.nemo
DEMO := build/demo
RANDOM := build/parakeet-0.6b-random.nemo
BROWSER := build/browser
MODEL ?= nvidia/parakeet-tdt-0.6b-v3
CLIPS ?= 40

.PHONY: demo test check faults browser browser-programs bench published lint types clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# uv takes PyTorch's CPU build from PyTorch's own server. Where that cannot be reached, pip takes what it is configured
# for, which is by default the build with CUDA.
install = $(BIN)/python -m pip install --quiet uv && \
	{ $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --requirement $(1) 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --requirement $(1); }

$(INSTALLED): requirements.txt | $(BIN)/python
	$(call install,requirements.txt)
	touch $@

# requirements-dev.txt includes requirements.txt.
$(DEVELOPMENT): requirements-dev.txt requirements.txt | $(BIN)/python
	$(call install,requirements-dev.txt)
	touch $(INSTALLED) $@

# The five scripts on the bundled checkpoint: export, tokenizer, optimize, end to end, real speech.
demo: $(INSTALLED)
	$(BIN)/python export_parakeet_to_onnx.py --model_name $(TINY) --output_dir $(DEMO)/onnx_models
	$(BIN)/python export_tokenizer.py --model_name $(TINY) --output_dir $(DEMO)/onnx_models
	$(BIN)/python optimize_encoder.py --model_dir $(DEMO)/onnx_models --output_dir $(DEMO)/onnx_models_optimized
	$(BIN)/python test_e2e.py --model_dir $(DEMO)/onnx_models_optimized
	$(BIN)/python test_real_speech.py --model_dir $(DEMO)/onnx_models_optimized --manifest samples/manifest.jsonl

# A process for each core, up to four of them, with one thread each. They take one file of tests after the other, in the
# order of tests/conftest.py: what the tests of a file share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

test: $(DEVELOPMENT)
	$(PYTEST) -rs

# Before every commit: lint, types, and the tests that are not marked slow; about a minute.
check: lint types
	$(PYTEST) -m "not slow"

# Kills, full disks, hostile and odd input, with a table of the results: about ten minutes. `test` has each fault once.
faults: $(DEVELOPMENT)
	$(BIN)/python -m tests.faults.drill

# The page of docs/runtimes.md in a headless Chromium, on what the scripts export: two minutes. It is a part of `test` as
# well, once the programs are installed.
browser: $(DEVELOPMENT) browser-programs
	$(BIN)/python -m pytest -rs tests/test_browser.py

# Chromium, npm and the packages of npm. Debian's packages are installed where a program is missing and root runs this.
browser-programs: $(BROWSER)/installed
	@for program in chromium node npm; do \
		command -v $$program >/dev/null || { echo "$$program is not on the path; install it"; exit 2; }; done

$(BROWSER)/installed: tests/browser/package.json
	@missing=$$(for program in chromium npm; do command -v $$program >/dev/null || echo $$program; done); \
		test -z "$$missing" || test "$$(id -u)" != 0 || \
		{ apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends $$missing; }
	@command -v npm >/dev/null || { echo "npm is not on the path; install Node.js 20 or newer"; exit 2; }
	mkdir -p $(BROWSER)
	cp tests/browser/package.json $(BROWSER)/package.json
	cd $(BROWSER) && npm install --no-package-lock --ignore-scripts --no-audit --no-fund
	touch $@

# At full size, on random weights: hours, 16 GB of memory, 30 GB of disk. What is built stays, a second run only times.
bench: $(DEVELOPMENT) $(RANDOM)
	$(BIN)/python -m benchmarks.pipeline --model_name $(RANDOM)
	$(BIN)/python -m benchmarks.encoder --model_name $(RANDOM)
	$(BIN)/python -m benchmarks.decoding --model_name $(RANDOM)

# A published checkpoint on public speech, with a network: `make published MODEL=moondream/parakeet-ultra CLIPS=all`.
# It says first what it downloads and needs. A run that was stopped goes on where it was (docs/published.md).
published: $(DEVELOPMENT)
	$(BIN)/python -m benchmarks.published --model_name $(MODEL) --clips $(CLIPS)

$(RANDOM): | $(DEVELOPMENT)
	$(BIN)/python -m benchmarks.random_checkpoint --topology 0.6b --output $@

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEVELOPMENT)
	$(BIN)/mypy

clean:
	rm -rf build
