# One command each for set-up, demo, tests and benchmarks in a new clone; `make help` lists them.

PYTHON ?= python3
export PYTHON
# Container images often set this variable. The tests start hundreds of processes, and without bytecode files each
# process would compile every module that it imports.
unexport PYTHONDONTWRITEBYTECODE

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

# The tests that `make quick` runs. They need no server; those that need an optional library are marked.
QUICK_TESTS := tests/core tests/cli tests/test_architecture.py tests/test_development.py

# More arguments for pytest and for the benchmarks: make test PYTEST="-k frames"; make bench BENCH="--quick"
PYTEST ?=
BENCH ?=
# More arguments for the soak test: make soak SOAK="--minutes 1"
SOAK ?=
# Two workers per core, because a test spends half of its time waiting for servers and timeouts.
WORKERS ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))

.PHONY: help install demo quick test lint types mypy pyright bytecode format wheel servers pytest bench bench-networked soak clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    embed the project's own documents, cold and then warm"
	@echo "make quick   test the core and the command line in a few minutes, without optional libraries"
	@echo "make test    lint, types, and all tests against the built wheel"
	@echo "make pytest  only the tests, against the built wheel: make pytest PYTEST=tests/backends/test_disk.py"
	@echo "make lint    only ruff"
	@echo "make types   only mypy and pyright, against the built wheel"
	@echo "make format  format and fix the sources with ruff"
	@echo "make bench   print the tables of benchmarks"
	@echo "make bench-networked  start Redis, Postgres and memcached on loopback, and print their tables"
	@echo "make soak    use a chain for ten minutes while processes and servers fail, and check every answer"
	@echo "make clean   remove the files that these commands have created"

install:
	@$(INSTALL) $(VENV) --editable .

demo: install
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh examples/demo/run.sh $(DEMO)

# Runs against the source tree, so that changes need no build, and skips the slow tests. It keeps no package cache, to
# save disk space.
quick:
	@UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 $(INSTALL) $(QUICK_VENV) --editable . --group test
	QUICK=1 $(QUICK_VENV)/bin/python -P -m pytest --numprocesses=$(WORKERS) --dist=worksteal -m "not slow" \
	    $(QUICK_TESTS) $(PYTEST)

# The tests run against the wheel, as users install it, not against the source tree.
wheel:
	@$(INSTALL) $(TEST_VENV) --group dev --group frameworks
	@# It asks for an older redis than embedonce needs, and works with the newer one.
	@$(INSTALL) $(TEST_VENV) --no-deps llama-index-storage-kvstore-redis
	@rm -rf $(WHEELS)
	@$(TEST_BIN)/hatchling build --target wheel --directory $(WHEELS)
	@$(INSTALL) $(TEST_VENV) "$$(echo $(WHEELS)/*.whl)[all,$(FRAMEWORKS)]"

lint:
	@$(INSTALL) $(LINT_VENV) --group lint
	$(LINT_VENV)/bin/ruff check .
	$(LINT_VENV)/bin/ruff format --check .

types: wheel
	@$(MAKE) --no-print-directory --jobs=2 mypy pyright

mypy:
	$(TEST_BIN)/mypy

pyright:
	$(TEST_BIN)/pyright --pythonpath $(TEST_BIN)/python

# Imports everything that the tests import, so that Python writes the bytecode files. The workers of pytest start
# together; in a new environment, each of them would compile every library.
bytecode:
	@mkdir -p build
	@WHEEL_UNDER_TEST=1 $(TEST_BIN)/python -P -m pytest --collect-only -qq >build/collected || (cat build/collected; exit 1)

format:
	@$(INSTALL) $(LINT_VENV) --group lint
	$(LINT_VENV)/bin/ruff check --fix .
	$(LINT_VENV)/bin/ruff format .

servers:
	@./.ci/servers

# -P keeps the current folder off the import path, so that the tests can import only the wheel.
pytest: wheel servers
	@./.ci/node $(TEST_BIN)/python
	WHEEL_UNDER_TEST=1 $(TEST_BIN)/python -P -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST)

test: lint wheel
	@$(MAKE) --no-print-directory --jobs=3 mypy pyright bytecode
	@$(MAKE) --no-print-directory pytest

bench:
	@$(INSTALL) $(BENCH_VENV) --editable '.[memcached,postgres,redis]' --group bench
	@$(BENCH_VENV)/bin/python benchmarks/run.py $(BENCH)

bench-networked:
	@$(INSTALL) $(BENCH_VENV) --editable '.[memcached,postgres,redis]' --group bench
	@$(BENCH_VENV)/bin/python benchmarks/networked.py $(BENCH)

soak:
	@$(INSTALL) $(BENCH_VENV) --editable '.[memcached,postgres,redis]' --group bench
	@$(BENCH_VENV)/bin/python benchmarks/soak.py $(SOAK)

clean:
	rm -rf tests/server/node/node_modules
	rm -rf $(VENV) $(TEST_VENV) $(LINT_VENV) .venv-quick* $(BENCH_VENV) $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
