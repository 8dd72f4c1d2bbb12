# Everything happens in .venv, made on first use. TORCH picks another build: make test TORCH=torch==2.11.0
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN     = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

# torch first and pinned, so that nothing that depends on it replaces it.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test,examples,cli,hub,dev]" "$(TORCH)"
	touch $@

demo: .venv/ready  ## sample digits from a diffusion transformer on every backend that runs here
	$(BIN)/python examples/digits/demo.py

test: .venv/ready  ## run all tests (pytest -m gpu runs those that need a GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels tests/distributed/test_merge_kernel.py

check: .venv/ready  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src
	$(BIN)/mypy

bench: .venv/ready  ## measure: cost of a call, and the kernels if there is a GPU
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/kernels.py

docs: .venv/ready  ## write the generated table of backends
	$(BIN)/attention-dispatch list --markdown > docs/backends.md

clean:  ## remove what the other targets made
	rm -rf .venv output build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
