# The README's two commands are `make demo` and `make test`. Both make .venv first, with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without a GPU the Triton kernels run in Triton's interpreter.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
INTERPRET := $(if $(GPU),0,1)

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/kdkernels demo

test: $(VENV)/.installed
	TRITON_INTERPRET=$(INTERPRET) $(BIN)/python -m pytest -n 2 --cov=kdkernels --cov-report=term-missing:skip-covered

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.report --check

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.memory_scaling
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train,bench,test]"
	touch $@
