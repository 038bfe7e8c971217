# Each target makes what it needs on a fresh machine that has Python 3.12.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

# A second environment: Megatron takes Transformer Engine's kernels wherever it finds the package, and they need CUDA.
TE_VENV := .venv-te
TE_STAMP := $(TE_VENV)/.installed
TE_VERSION := 2.20.2
# TE's torch extension, built for this Python and torch. PyPI has its source only, which takes a quarter of an hour.
TE_WHEEL ?= $(firstword $(wildcard ../shared/wheels/transformer_engine_torch-$(TE_VERSION)-*.whl))

.PHONY: venv demo chat ablations test test-fast test-all test-gpu test-te test-versions lint bench bench-gpu docs clean
venv: $(STAMP)

$(STAMP): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.8,<2.15" "megatron-core==0.19.2"
	$(BIN)/pip install --quiet --editable ".[demo,kernels,test]"
	touch $@

# FP8=1 (or delayed, mxfp8): Muon with the experts in FP8, emulated on the CPU, against bf16.
demo: $(STAMP)
	$(BIN)/python examples/demo.py $(if $(FP8),--fp8 $(FP8:1=tensorwise) --out runs/demo-fp8)

# Pretrains (or reuses the demo's checkpoint), fine-tunes on chats, exports, serves with Transformers, and asks.
chat: $(STAMP)
	$(BIN)/pip install --quiet "transformers[serving]>=5"
	$(BIN)/python examples/sft chat $(if $(wildcard runs/demo/checkpoint),--pretrained runs/demo/checkpoint)

ablations: $(STAMP)
	$(BIN)/python examples/ablations.py --docs docs

# Two workers: the ranks of one test wait for each other about half of the time, which another test uses.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not exhaustive"

# For the inner loop: tests that start no processes.
test-fast: $(STAMP)
	$(PYTEST) -m "fast and not exhaustive"

test-all: $(STAMP)
	$(PYTEST)

# On every GPU of this node; without one, all of it is skipped with the reason. docs/first_gpu_run.md.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu

# transformer-engine is a metapackage, without which TE refuses to be imported.
$(TE_STAMP): setup.py $(TE_WHEEL)
	$(PYTHON) -m venv $(TE_VENV)
	$(TE_VENV)/bin/pip install --quiet --upgrade pip
	$(TE_VENV)/bin/pip install --quiet "torch==2.14.1" "megatron-core==0.19.2"
	$(TE_VENV)/bin/pip install --quiet "transformer-engine-cu13==$(TE_VERSION)" "$(TE_WHEEL)"
	$(TE_VENV)/bin/pip install --quiet --no-deps "transformer-engine==$(TE_VERSION)"
	$(TE_VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@

ifeq ($(TE_WHEEL),)
test-te:
	@echo "test-te: skipped, for want of transformer_engine_torch-$(TE_VERSION)-*.whl in ../shared/wheels; give TE_WHEEL=PATH"
else
test-te: $(TE_STAMP)
	$(TE_VENV)/bin/python -m pytest -m "not exhaustive" tests/te
endif

# The version-dependent part of the suite on other versions of megatron-core, each in an environment that shares the
# installed torch. 0.20 comes from a source tree of Megatron-LM's main branch, without which it is skipped.
VERSION_TESTS := tests/megatron/test_seams.py tests/cpu/test_backend.py tests/megatron/test_routing.py \
	tests/megatron/test_training.py tests/optimizer/test_exactness.py tests/test_launch.py tests/cpu/test_pretrain.py
MEGATRON_020 ?= $(firstword $(wildcard ../shared/sources/megatron-lm-0.20-*.tar.xz))

test-versions: $(STAMP)
	$(BIN)/python tests/make_version.py .venv-0.18 0.18.2
	.venv-0.18/bin/python -m pytest -n $(WORKERS) --dist loadscope -m "not exhaustive" $(VERSION_TESTS)
	.venv-0.18/bin/python -m pytest tests/megatron/test_training_checkpoints.py -k "resumed and (dp_reshardable or legacy)"
ifeq ($(MEGATRON_020),)
	@echo "test-versions: 0.20 is skipped, for want of megatron-lm-0.20-*.tar.xz in ../shared/sources; give MEGATRON_020=PATH"
else
	$(BIN)/python tests/make_version.py .venv-0.20 $(MEGATRON_020)
	.venv-0.20/bin/python -m pytest -n $(WORKERS) --dist loadscope -m "not exhaustive" $(VERSION_TESTS)
endif

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On every GPU of this node: one page with tables and pictures. Without a GPU it is skipped with the reason.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

bench: $(STAMP)
	$(BIN)/python benchmarks/newton_schulz.py
	$(BIN)/python benchmarks/plans.py
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --growth
	$(BIN)/python benchmarks/profile_overhead.py

# A documentation site in site/. Once the packages are installed, nothing is fetched.
$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf site $(VENV) $(TE_VENV) .venv-0.18 .venv-0.20 runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
