# megagrow: `make quickstart` shows it, `make test` checks it, `make help` lists the rest.
#
# Settings, each with its default:
#   PYTHON      the first of python3 and python3.14 to python3.10 that is 3.10 or newer
#   TORCH_ARGS  further pip arguments for PyTorch alone (empty), for instance an
#               --index-url of CPU-only builds, which are smaller by gigabytes
#   EXTRAS      extras of setup.py to install (dev)
#   WORKERS     processes that run the tests, a file at a time (one for each core, at most 8);
#               many tests are jobs of 2 to 4 processes themselves
#   RANKS       processes of the quickstart (2 on a machine without GPU, else every GPU)

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

FITS := import sys; sys.exit(sys.version_info < (3, 10))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(FITS)' 2>/dev/null && command -v "$$p" && break; done)
endif
TORCH_ARGS ?=
EXTRAS     ?= dev
RANKS      ?=
WORKERS    ?= auto --maxprocesses 8

VENV   := .venv
STAMP  := $(VENV)/.megagrow-setup
# DeepSpeed looks for ninja on PATH when it compiles, and starts ranks with its own Python.
INSIDE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PIP    := $(INSIDE) $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
CODE   := megagrow launch benchmarks examples tests docs setup.py

.PHONY: help setup quickstart check test docs coverage test-slow test-cluster cluster-tools faults clean \
	kernels kernels-check kernels-sanitize gpu-check

help:
	@echo 'make quickstart  install, prepare data, train a small model that grows; some minutes'
	@echo 'make test        install, check the code, run the tests'
	@echo 'make docs        build the documentation into build/site'
	@echo 'make coverage    the tests again, with the share of lines that they run'
	@echo 'make test-slow   the tests that take minutes each'
	@echo 'make faults      kills, full disks and the like in every command that writes; about 40 minutes'
	@echo 'make test-cluster  jobs on several hosts (network namespaces): faults, cut cables'
	@echo 'make cluster-tools installs what that needs (Debian, Ubuntu; as root)'
	@echo 'make check       lint, formatting and types only'
	@echo 'make setup       make $(VENV) and install into it'
	@echo 'make kernels     compile the CUDA kernels for the GPUs of this machine (needs nvcc)'
	@echo 'make kernels-check     compile them for sm_80, sm_90a, sm_100; registers and spills'
	@echo 'make kernels-sanitize  their tests on the CPU under ASan and UBSan; some minutes'
	@echo 'make gpu-check   build, tests, benchmarks on a GPU, no network needed; below 8 minutes'
	@echo 'make clean       remove caches and build products; $(VENV), data/ and runs/ stay'

setup: $(STAMP)

# The stamp is made last: a set-up that was interrupted is done again.
$(STAMP): setup.py constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(FITS)' 2>/dev/null; then \
	  echo "megagrow needs Python 3.10 or newer." >&2; \
	  echo "  found: $$("$(or $(PYTHON),python3)" --version 2>&1 || true)" >&2; \
	  echo "  fix:  install one and give it: make setup PYTHON=/path/to/python3.11" >&2; \
	  exit 1; fi
	@if ! command -v "$${CXX:-c++}" >/dev/null; then \
	  echo "No C++ compiler ($${CXX:-c++}) on PATH: DeepSpeed compiles its communication op," >&2; \
	  echo "and the tests compile the kernels (nvcc and CUDA are optional)." >&2; \
	  echo "  fix: install one (Debian, Ubuntu: apt install g++) or set CXX" >&2; exit 1; fi
	@include=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	if [ ! -e "$$include/Python.h" ]; then \
	  echo "Python.h is not in $$include; DeepSpeed compiles against it." >&2; \
	  echo "  fix: install Python's headers (Debian, Ubuntu: apt install python3-dev)" >&2; \
	  exit 1; fi
	@rm -f $@
	@version='import sys; print(sys.version_info[:2])'; clear=; \
	if [ "$$($(VENV)/bin/python -c "$$version" 2>&1 || true)" != "$$("$(PYTHON)" -c "$$version")" ]; \
	  then clear=--clear; fi; \
	"$(PYTHON)" -m venv $$clear $(VENV) || { \
	  echo "The virtual environment could not be made." >&2; \
	  echo "  fix: install Python's venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "installing PyTorch, DeepSpeed and the rest into $(VENV) (minutes) ..."
	@$(PIP) install -c constraints.txt --upgrade pip setuptools wheel ninja
	@$(INSIDE); ninja --version >/dev/null || { echo "ninja does not run in $(VENV)" >&2; exit 1; }
	@# PyTorch comes first and alone: DeepSpeed's own set-up imports it.
	@$(PIP) install -c constraints.txt $(TORCH_ARGS) numpy torch
	@DS_BUILD_OPS=0 $(PIP) install -c constraints.txt --no-build-isolation deepspeed
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@
	@echo "installed: $$($(VENV)/bin/python --version), PyTorch" \
	  "$$($(VENV)/bin/python -c 'import torch; print(torch.__version__)')"

# prepare_data.py makes the directory by one rename at the end, so that it is whole or absent.
data/stdlib_bytes: | $(STAMP)
	@$(VENV)/bin/python launch/prepare_data.py --input stdlib --output $@ \
	  --tokenizer configs/tokenizers/bytes.json --validation-fraction 0.02 --workers 2

# A port of its own: two jobs on DeepSpeed's default port 29500 would mix their ranks.
quickstart: setup | data/stdlib_bytes
	@gpus=$$($(VENV)/bin/python -c 'import torch; print(torch.cuda.device_count())'); \
	port=$$($(VENV)/bin/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); \
	  print(s.getsockname()[1])'); \
	ranks="$(RANKS)"; \
	if [ "$$gpus" = 0 ]; then export DS_ACCELERATOR=cpu; fi; \
	if [ -z "$$ranks" ]; then if [ "$$gpus" = 0 ]; then ranks=2; else ranks=$$gpus; fi; fi; \
	$(INSIDE) deepspeed --quiet --hostfile none --num_gpus $$ranks --master_port $$port \
	  launch/pretrain.py --config configs/quickstart.yaml
	@echo "report: $(CURDIR)/runs/quickstart/report.html"

check: setup
	@$(VENV)/bin/ruff check $(CODE)
	@$(VENV)/bin/ruff format --check $(CODE)
	@$(VENV)/bin/mypy megagrow launch benchmarks examples docs $$(find tests -name '*.py' ! -name 'test_*.py')
	@$(VENV)/bin/codespell megagrow launch kernels configs docs examples benchmarks *.md setup.py Makefile

test: check
	@OMP_NUM_THREADS=1 $(INSIDE) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations=15 \
	  -m 'not slow and not cluster and not gpu' tests

# Links that lead nowhere are errors.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "documentation: $(CURDIR)/build/site/index.html"

# Apart from `test` for its time: with Python 3.11's tracer two files of tests took 12.8 s of CPU
# instead of 4.6 s, imports and report included.  Python 3.12 has sys.monitoring
# (COVERAGE_CORE=sysmon), which costs less.
coverage: setup
	@OMP_NUM_THREADS=1 $(INSIDE) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile \
	  --cov --cov-report=term -m 'not slow and not cluster and not gpu' tests

test-slow: setup
	@OMP_NUM_THREADS=1 $(INSIDE) $(VENV)/bin/python -m pytest -m slow tests

faults: setup
	$(INSIDE) $(VENV)/bin/python launch/benchmark.py faults --json benchmarks/faults.json

kernels: setup
	@$(INSIDE) $(VENV)/bin/python -m megagrow.ops --build cuda

kernels-check: setup
	@$(INSIDE) $(VENV)/bin/python -m megagrow.ops --check

# The sanitizer's library must be the first in the process, and Python leaks by design.
kernels-sanitize: setup
	@MEGAGROW_EMULATOR_FLAGS='-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined' \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 OMP_NUM_THREADS=1 \
	  $(INSIDE) $(VENV)/bin/python -m pytest -q tests/ops/test_kernels.py tests/ops/test_adamw.py \
	  -k 'not opcheck and not compiler'

# Not after `setup`: a GPU host may have no network, and has its own Python.
gpu-check:
	@kernels/gpu_check.sh

test-cluster: setup
	@OMP_NUM_THREADS=1 $(INSIDE) $(VENV)/bin/python -m pytest -m cluster tests

# What the tests of several hosts need besides root; without it they are skipped, and say so.
cluster-tools:
	apt-get update
	apt-get install -y --no-install-recommends iproute2 openssh-server pdsh

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find megagrow launch benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
