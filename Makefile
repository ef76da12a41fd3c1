# Set-up, demo, tests and benchmarks, each in one command from a fresh clone; `make help` lists them.

PYTHON ?= python3
export PYTHON

INSTALL := ./.ci/install
VENV := .venv
TEST_VENV := .venv-test
TEST_BIN := $(TEST_VENV)/bin
LINT_VENV := .venv-lint
QUICK_VENV ?= .venv-quick
BENCH_VENV := .venv-bench
DEMO := .demo
WHEELS := build/wheels
FRAMEWORKS := agent-framework,autogen,chroma,haystack,langchain,llama-index,sentence-transformers

# What `make quick` runs: tests that need no server and no optional library, or say so.
QUICK_TESTS := tests/core tests/cli tests/test_architecture.py tests/test_development.py

# More for pytest and for the benchmarks: make test PYTEST="-k frames"; make bench BENCH="--quick"
PYTEST ?=
BENCH ?=
# Two workers per core, because a test waits half of the time: for a server to start, for a timeout to pass.
WORKERS ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))

.PHONY: help install demo quick test lint types format wheel servers pytest bench bench-networked clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    embed the project's own documents, cold and then warm"
	@echo "make quick   test the core and the command line in under two minutes, without optional libraries"
	@echo "make test    lint, types, and all tests against the built wheel"
	@echo "make pytest  tests alone, against the built wheel: make pytest PYTEST=tests/backends/test_disk.py"
	@echo "make lint    ruff alone"
	@echo "make types   mypy and pyright alone, against the built wheel"
	@echo "make format  let ruff put the sources in order"
	@echo "make bench   print the table of benchmarks"
	@echo "make bench-networked  print that of Redis, Postgres and memcached, which it starts on loopback"
	@echo "make clean   remove what these commands have made"

install:
	@$(INSTALL) $(VENV) --editable .

demo: install
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh examples/demo/run.sh $(DEMO)

# Runs against the tree, so that a change is seen without a build, and leaves out the slow tests. It keeps no cache of
# packages, because it should take little disk.
quick:
	@UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 $(INSTALL) $(QUICK_VENV) --editable . --group test
	QUICK=1 $(QUICK_VENV)/bin/python -P -m pytest --numprocesses=$(WORKERS) --dist=worksteal -m "not slow" \
	    $(QUICK_TESTS) $(PYTEST)

# What the tests run against is what a user gets: the wheel, not the tree.
wheel:
	@$(INSTALL) $(TEST_VENV) --group dev --group frameworks
	@rm -rf $(WHEELS)
	@$(TEST_BIN)/hatchling build --target wheel --directory $(WHEELS)
	@$(INSTALL) $(TEST_VENV) "$$(echo $(WHEELS)/*.whl)[all,$(FRAMEWORKS)]"

lint:
	@$(INSTALL) $(LINT_VENV) --group lint
	$(LINT_VENV)/bin/ruff check .
	$(LINT_VENV)/bin/ruff format --check .

types: wheel
	$(TEST_BIN)/mypy
	$(TEST_BIN)/pyright --pythonpath $(TEST_BIN)/python

format:
	@$(INSTALL) $(LINT_VENV) --group lint
	$(LINT_VENV)/bin/ruff check --fix .
	$(LINT_VENV)/bin/ruff format .

servers:
	@./.ci/servers

# -P keeps the current folder off the path, so that nothing but the wheel can be imported.
pytest: wheel servers
	WHEEL_UNDER_TEST=1 $(TEST_BIN)/python -P -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST)

test: lint types
	@$(MAKE) --no-print-directory pytest

bench:
	@$(INSTALL) $(BENCH_VENV) --editable '.[memcached,postgres,redis]' --group bench
	@$(BENCH_VENV)/bin/python benchmarks/run.py $(BENCH)

bench-networked:
	@$(INSTALL) $(BENCH_VENV) --editable '.[memcached,postgres,redis]' --group bench
	@$(BENCH_VENV)/bin/python benchmarks/networked.py $(BENCH)

clean:
	rm -rf $(VENV) $(TEST_VENV) $(LINT_VENV) .venv-quick* $(BENCH_VENV) $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
