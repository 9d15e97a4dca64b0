# `make help` lists the targets. Everything runs in .venv, which `make install` creates.

PYTHON ?= python3
# A folder or page of wheels to take torch from, where the package index would give an unwanted
# CUDA build, for example https://download.pytorch.org/whl/cpu/torch/
TORCH_WHEELS ?=
# Steps of the demo. Empty: as many as fit into its time.
DEMO_STEPS ?=
# Numbers of the experiments, for example 1,4. Empty: all of them.
EXPERIMENTS ?=

BIN := .venv/bin
# With loadfile, pytest-xdist waits for ever once it has replaced a worker that died; so it ends.
XDIST := --dist loadfile --max-worker-restart 0
WHEELS := $(if $(TORCH_WHEELS),--find-links $(TORCH_WHEELS))

.DEFAULT_GOAL := help
.PHONY: help install demo experiments models test test-runs test-cluster test-vllm chaos style docs lock gpu-check clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed  ## create .venv with the pinned dependencies; compile DeepSpeed's ops

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
		|| { echo "packhorse needs Python 3.10 to 3.12: make install PYTHON=python3.11"; exit 2; }
	@command -v c++ >/dev/null || { echo "DeepSpeed compiles C++ ops: apt-get install g++ python3-dev"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WHEELS) -c constraints.txt -e '.[dev,demo,bench]'
	$(BIN)/python -m packhorse.trainer.engine.compile_ops
	@touch $@

demo: install  ## fine-tune a real model on two processes, about ten minutes on two cores
	$(BIN)/python recipes/quickstart/demo.py $(if $(DEMO_STEPS),--steps $(DEMO_STEPS))

experiments: install  ## seven comparisons on the demo's model, about 1.5 hours on two cores
	$(BIN)/python recipes/experiments/run.py $(if $(EXPERIMENTS),--only $(EXPERIMENTS))

models: install  ## every causal architecture of transformers, tiny; writes docs/models_sweep.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.sweep build/models.json
	$(BIN)/python -m tests.models.table build/models.json docs/models_sweep.md
	@rm build/models.json  # which a sweep that was stopped would go on with

test: install  ## run every test that needs no GPU and no root, 10 to 15 minutes on two cores
	@echo '#include <libaio.h>' | c++ -E -x c++ - >/dev/null 2>&1 \
		|| { echo "the tests of NVMe offload need libaio: apt-get install libaio-dev"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not runs and not cluster and not vllm' -n 2 $(XDIST)

test-runs: install  ## whole training runs, minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'runs and not gpu' -n 3 $(XDIST)

test-cluster: install  ## hosts, Slurm, pods, the image, on this machine; as root, after .ci/run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster -n 2 $(XDIST)

test-vllm: install .venv-vllm/installed  ## answers of a real vLLM on the CPU, in .venv-vllm (3 GB)
	PACKHORSE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm

.venv-vllm/installed: tests/vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(WHEELS) -r $<
	@touch $@

chaos: install  ## fuzz what is read, flip bits, kill runs: FUZZ=10000 FLIPS=2500 of each, KILLS=1000
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	PACKHORSE_FUZZ=$(or $(FUZZ),10000) PACKHORSE_FLIPS=$(or $(FLIPS),2500) \
		$(BIN)/python -m pytest -q --timeout 0 tests/unit/test_fuzz_inputs.py tests/unit/test_flips.py
	$(BIN)/python -m tests.fuzz --runs $(or $(FUZZ),10000)
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),1000)

style: install  ## ruff, pyright and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck .ci/run launch/*.sh slurm/*.sh

docs: install  ## the site of docs/, in build/site; a broken link stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: install  ## write docker/requirements/, the image's packages with hashes; needs the package index
	$(BIN)/python docker/lock.py

gpu-check: install  ## where a GPU's time goes, beside TRL; its kernels' tests; 8 minutes
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove .venv and the tools' caches
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache .hypothesis *.egg-info
