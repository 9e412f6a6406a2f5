# make demo: the main job.  make test: the tests.  Each sets up .venv by itself; README.md has the same steps without make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# llama.cpp, which checks the GGUF files, is compiled once. No -march=native: GCC 12 miscompiles its AMX kernels.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON

.PHONY: demo test lint clean

demo: $(VENV)/ready-verify
	$(BIN)/llmforge demo

test: $(VENV)/ready-dev lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
