# `make demo` and `make test` are complete on a bare machine: Debian (as root, or with sudo) or
# macOS with Python >= 3.11, a C++20 compiler and CMake. Everything lands in $(VENV).
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
BIN := $(VENV)/bin
# In the order of tests/conftest.py: what is long comes first, what waits beside what computes.
SIDE_BY_SIDE := -n auto --dist loadfile --no-loadscope-reorder
RUN := PATH="$(abspath $(BIN)):$$PATH" scripts/with_openblas.sh

.DEFAULT_GOAL := help
.PHONY: help install native demo test chaos real lint format bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## virtual environment, native build, redis-server, OpenBLAS; quick when nothing changed
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/bootstrap.sh

native: ## build the native module again, with the compiler's output; fails where it does not build
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/bootstrap.sh --native

demo: install ## eight jobs side by side out of one batch, through a real Redis
	@$(RUN) mlx-serving demo

test: install ## the whole test suite, in two processes a core
	@$(RUN) python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

chaos: install ## kills, stops, Redis restarts, lost replies: nothing lost, nothing twice
	@$(RUN) python -m tests.chaos $(CHAOS_ARGS)
	@$(RUN) python -m tests.chaos --forgetting $(CHAOS_ARGS)
	@$(RUN) python -m pytest -m chaos -s $(PYTEST_ARGS)

real: install ## a real model (SmolLM2-135M, made once in ~/.cache) on this machine, default settings
	@$(RUN) python -m pytest -m real -n0 -s $(PYTEST_ARGS)

lint: install ## ruff, its formatter and mypy --strict
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: install ## let ruff rewrite what it can
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

bench: install ## every benchmark: a table and a JSON file
	@$(RUN) python -m benchmarks $(BENCH_ARGS)
