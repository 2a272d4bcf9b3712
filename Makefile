# `make demo` and `make test` do all the set-up themselves, in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
TINY := samples/parakeet-tdt-tiny.nemo
DEMO := build/demo

.PHONY: demo test lint clean

$(INSTALLED): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# The five scripts on the bundled checkpoint: export, tokenizer, optimize, end to end, real speech.
demo: $(INSTALLED)
	$(BIN)/python export_parakeet_to_onnx.py --model_name $(TINY) --output_dir $(DEMO)/onnx_models
	$(BIN)/python export_tokenizer.py --model_name $(TINY) --output_dir $(DEMO)/onnx_models
	$(BIN)/python optimize_encoder.py --model_dir $(DEMO)/onnx_models --output_dir $(DEMO)/onnx_models_optimized
	$(BIN)/python test_e2e.py --model_dir $(DEMO)/onnx_models_optimized
	$(BIN)/python test_real_speech.py --model_dir $(DEMO)/onnx_models_optimized --manifest samples/manifest.jsonl

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build
