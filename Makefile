# Everything runs in .venv, which each target makes when it is missing and brings up to date when
# pyproject.toml or constraints.txt has changed. Another Python: `make test PYTHON=python3.12`.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
RELEASE := .venv-release
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint docs release-check clean
.NOTPARALLEL:         # two pip processes must never write to one environment
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed-dev  ## make .venv with everything that development needs

demo: $(VENV)/.installed-base  ## find and verify a circuit of the bundled model; ends with a page to open, in out/demo
	$(BIN)/circuitvit demo --out out/demo

# One thread per worker: two workers with two threads each would fight for two cores. The `ci` profile
# makes the random examples the same on every run; plain `pytest` draws new ones.
test: $(VENV)/.installed-test  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --hypothesis-profile=ci

bench: $(VENV)/.installed-test  ## measure speed and memory against their floors; `python -m bench NAME` for others
	$(BIN)/python -m bench

lint: $(VENV)/.installed-dev  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict circuitvit

docs: $(VENV)/.installed-docs  ## build the documentation into site/
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tools have an environment of their own: what they require must not decide what the library is tried with.
# The lowest versions are only resolved here (by uv: pip would download gigabytes for it); CONTRIBUTING.md says how to run the tests with them.
release-check: $(VENV)/.installed-test $(RELEASE)/.installed  ## build what would be published into dist/ and check it
	rm -rf dist
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/cffconvert --validate
	mkdir -p build && $(BIN)/python .ci/lowest.py > build/lowest.txt
	$(RELEASE)/bin/uv pip compile --quiet --no-header --only-binary :all: --python-version 3.10 --extra test \
		--constraint build/lowest.txt pyproject.toml --output-file build/resolved.txt
	$(BIN)/python -m pytest -q tests/testing/test_wheel.py

clean:  ## delete what the other targets made, but keep .venv
	rm -rf out/demo site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find circuitvit tests bench examples -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# One stamp per set of extras. The environment itself is an order-only prerequisite: it must exist, but
# its age says nothing about what is installed in it.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[test]'
	@touch $(VENV)/.installed-base $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed-base $(VENV)/.installed-test $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[docs]'
	@touch $(VENV)/.installed-base $@

$(RELEASE)/.installed: Makefile
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet build cffconvert twine uv
	@touch $@
