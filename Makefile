# Every command works from a fresh clone: it makes .venv, installs, builds, runs. Variables: PYTHON, TORCH, ARGS and
# the build switches of README.md. If PYTHON has PyTorch already (and pip), that one is used; else TORCH is installed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.PHONY: demo test test-fast bench mutants sanitize racecheck format format-check

PYTHON ?= python3
TORCH ?= torch==2.11.0
ARGS ?=
# The kernels are compiled where a GPU can run them; HBSATTN_CUDA=ON compiles them anyway.
ifndef HBSATTN_CUDA
HBSATTN_CUDA := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo AUTO || echo OFF)
endif
export HBSATTN_CUDA
export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tools that came with PYTHON's packages are found too, after everything else.
SCRIPTS := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH := $(CURDIR)/.venv/bin:$(PATH):$(SCRIPTS)

extra = $(subst $(comma),,$(shell sed -n 's/^$(1) = \[\(.*\)\]/\1/p' pyproject.toml))
comma := ,
PY := .venv/bin/python
BUILT := .venv/.built-$(HBSATTN_CUDA)-$(HBSATTN_HEAD_DIMS)-$(HBSATTN_DTYPES)
# A plain path to the checkout instead of an import hook, which a folder of the same name in the way would hide.
EDITABLE := --config-settings editable_mode=compat
CXX_FILES = $(shell find csrc tests \( -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' \))

demo: $(BUILT)
	@$(PY) -m hbsattn $(ARGS)

test: $(BUILT)
	@$(PY) -m pytest tests $(ARGS)

test-fast: $(BUILT)
	@$(PY) -m pytest tests -x -q -m "not slow" $(ARGS)

# Plants faults in a copy and expects the suite to see them; ARGS="--only NAME" tries one. Needs a GPU.
mutants: .venv/.environment
	@$(PY) tests/mutants/run.py $(ARGS)

bench: $(BUILT)
	@$(PY) benchmarks/run.py $(ARGS)

# initcheck does not see that the copy engine's stores initialize memory: it would report every copy of an output to the
# host. Without the check of copies it still watches what kernels read.
sanitize: $(BUILT) racecheck
	@for tool in memcheck synccheck "initcheck --check-api-memory-access no"; do \
	  echo "== compute-sanitizer --tool $$tool"; \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) tests/sanitize_cases.py $(ARGS); \
	done
	@echo "== compute-sanitizer --tool memcheck, hostile lengths"
	@compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) tests/sanitize_cases.py hostile

# racecheck wants a build of its own: see mbarrier_arrive_warp in csrc/kernels/common/ptx.cuh.
racecheck: $(BUILT)
	@rm -rf build/racecheck && mkdir -p build/racecheck
	@cp -r csrc hbsattn third_party CMakeLists.txt README.md pyproject.toml setup.py build/racecheck/
	@cd build/racecheck && rm -f hbsattn/_C*.so && \
	  NVCC_APPEND_FLAGS=-DHBSATTN_EVERY_LANE_ARRIVES $(abspath $(PY)) setup.py build_ext --inplace
	@PYTHONPATH=build/racecheck compute-sanitizer --tool racecheck --error-exitcode 1 $(PY) tests/sanitize_cases.py $(ARGS)

format: .venv/.formatters
	@clang-format -i $(CXX_FILES)
	@ruff check --fix .
	@ruff format .

format-check: .venv/.formatters
	@clang-format --dry-run --Werror $(CXX_FILES)
	@ruff check .
	@ruff format --check .

.venv/.formatters: .venv/.environment
	@$(PY) -m pip install -q $(call extra,format)
	@touch $@

# The interpreter's path is found before .venv/bin has one of that name.
.venv/.environment: Makefile pyproject.toml
	@python="$$(command -v $(PYTHON))"; \
	if $$python -c 'import torch' 2>/dev/null; then \
	  $$python -m pip --version >/dev/null 2>&1 || { echo "error: $$python has PyTorch but no pip"; exit 1; }; \
	  echo "== environment in .venv, with the packages of $$python"; \
	  $$python -m venv --without-pip .venv; \
	  $$python -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
	    >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_interpreter.pth"; \
	else \
	  echo "== environment in .venv, with $(TORCH)"; \
	  $$python -m venv .venv; \
	  $(PY) -m pip install $(TORCH); \
	fi
	@$(PY) -m pip install -q "setuptools>=64" wheel $(call extra,test)
	@touch $@

$(BUILT): .venv/.environment setup.py pyproject.toml $(shell find csrc third_party -type f)
	@mkdir -p build && rm -f .venv/.built-*
	@if [ $(HBSATTN_CUDA) != OFF ] && command -v nvcc >/dev/null; then \
	  $(PY) third_party/find_cutlass.py >/dev/null 2>&1 || $(PY) -m pip install -q --no-deps nvidia-cutlass==4.2.0.0; \
	fi
	@echo "== build (the whole log: build/build.log)"
	@$(PY) -m pip install -v --no-build-isolation --no-deps $(EDITABLE) -e . 2>&1 | tee build/build.log | awk '\
	  /^ *\[[0-9]+\/[0-9]+\]/ { for (i = 1; i < NF; i++) if ($$i == "-c") source = $$(i + 1); \
    print $$1, source; fflush(); next } \
	  /hbsattn: |(error|warning) ?[:#]/ { print; fflush() }' || \
	  { { grep -A 40 -m 1 FAILED: build/build.log || tail -n 60 build/build.log; } | cut -c -300; exit 1; }
	@touch $@
