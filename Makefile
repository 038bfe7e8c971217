# Each target makes what it needs on a fresh machine that has Python 3.12.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: venv demo ablations test test-all lint bench clean
venv: $(STAMP)

$(STAMP): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.8,<2.15" "megatron-core==0.19.2"
	$(BIN)/pip install --quiet --editable ".[demo,kernels,test]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

ablations: $(STAMP)
	$(BIN)/python examples/ablations.py --docs docs

test: $(STAMP)
	$(BIN)/python -m pytest -m "not exhaustive"

test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/newton_schulz.py
	$(BIN)/python benchmarks/plans.py
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --growth

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
