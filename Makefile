# `make help` lists what there is to do. Everything runs in .venv, which `make install` makes.

PYTHON ?= python3
# A folder or page of wheels to take torch from, as https://download.pytorch.org/whl/cpu/torch/, where the package
# index would give a CUDA build that is not wanted.
TORCH_WHEELS ?=
# Steps of the demo; as many as fit into its time where this is empty.
DEMO_STEPS ?=
# Numbers of the experiments, as 1,4; all of them where this is empty.
EXPERIMENTS ?=

BIN := .venv/bin
WHEELS := $(if $(TORCH_WHEELS),--find-links $(TORCH_WHEELS))

.DEFAULT_GOAL := help
.PHONY: help install demo experiments test test-runs test-cluster test-vllm style gpu-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed  ## .venv with the pinned dependencies

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
		|| { echo "packhorse needs Python 3.10 to 3.12: make install PYTHON=python3.11"; exit 2; }
	@command -v c++ >/dev/null || { echo "DeepSpeed compiles parts of itself: apt-get install g++ python3-dev"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WHEELS) -c constraints.txt -e '.[dev,demo,bench]'
	@touch $@

demo: install  ## fine-tune a real model on two processes, about ten minutes on two cores
	$(BIN)/python recipes/quickstart/demo.py $(if $(DEMO_STEPS),--steps $(DEMO_STEPS))

experiments: install  ## seven comparisons on the demo's model, in about 1.5 hours on two cores; docs/experiments.md
	$(BIN)/python recipes/experiments/run.py $(if $(EXPERIMENTS),--only $(EXPERIMENTS))

test: install  ## everything that needs no GPU and no root, at most 15 minutes
	@echo '#include <libaio.h>' | c++ -E -x c++ - >/dev/null 2>&1 \
		|| { echo "offload to an NVMe is tested, too, through libaio: apt-get install libaio-dev"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not runs and not cluster and not vllm' -n 2 --dist loadfile

test-runs: install  ## whole runs, minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'runs and not gpu' -n 2 --dist loadfile  # they wait more than they work

test-cluster: install  ## hosts, Slurm, pods and the image, all on this machine; needs root and what .ci/run installs
	$(BIN)/python -m pytest -m cluster

test-vllm: install .venv-vllm/installed  ## answers of a real vLLM, on the CPU; it gets an environment of its own, 3 GB
	PACKHORSE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm

.venv-vllm/installed: tests/vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(WHEELS) -r $<
	@touch $@

style: install  ## ruff, pyright and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck .ci/run launch/*.sh slurm/*.sh

gpu-check: install  ## kernels against their twins and the GPU benchmark, at most 8 minutes
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove .venv and what tools left
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache .hypothesis *.egg-info
