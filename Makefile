# Everything here builds .venv first if it is missing or out of date; nothing needs a network after that.
#   make C=constraints/none.txt ...   takes whatever torch the platform offers instead of the pinned CPU build

PYTHON ?= python3
C ?= constraints/cpu.txt
WORKERS ?= 2
BIN := .venv/bin
FULL := .venv-full/bin
INSTALLED := .venv/.installed-$(basename $(notdir $(C)))
FULL_INSTALLED := .venv-full/.installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup demo test test-slow test-docs test-eval test-full exactness check format ci env-full lock clean

help:
	@echo "make setup      build .venv (pinned, hashed)"
	@echo "make demo       train and sample on the embedded digits"
	@echo "make test       the tests, with coverage"
	@echo "make test-slow  the slow tests: the wheel in a fresh environment, long runs"
	@echo "make test-docs  every bash block of README.md and docs/, the slow ones too"
	@echo "make exactness  write docs/exactness.md and .json: every component against its oracles"
	@echo "make check      ruff, mypy --strict, import-linter, codespell"
	@echo "make format     let ruff put the code in order"
	@echo "make ci         what CI runs"
	@echo "make env-full   build .venv-full: any torch, torchvision, torch-fidelity (several GB)"
	@echo "make test-eval  the evaluation's tests that need .venv-full: torch-fidelity's own features, FID and IS"
	@echo "make test-full  the tests that need .venv-full"
	@echo "make lock       renew requirements.lock from pyproject.toml (needs uv)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.lock $(C)
	$(PYTHON) -m venv .venv
	rm -f .venv/.installed-*
	$(BIN)/python $(PIP_INSTALL) --constraint $(C) "torch>=2.10"
	$(BIN)/python $(PIP_INSTALL) --require-hashes --no-deps -r requirements.lock
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/ddpm demo

test: setup
	$(PYTEST) -n $(WORKERS) --cov --cov-report=term

exactness: setup
	$(PYTEST) -n $(WORKERS) --exactness-out=docs tests

test-slow: setup
	$(PYTEST) -m slow --timeout 900

test-docs: setup
	$(PYTEST) -m docs --timeout 0

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci:
	bash .ci/run

env-full: $(FULL_INSTALLED)

$(FULL_INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv-full
	$(FULL)/python $(PIP_INSTALL) "torch>=2.10" torchvision
	$(FULL)/python $(PIP_INSTALL) --require-hashes --no-deps -r requirements.lock
	$(FULL)/python $(PIP_INSTALL) --no-build-isolation -e ".[eval]"
	touch $@

test-eval: env-full
	$(FULL)/python -m pytest -m full tests/evaluation --timeout 1800

test-full: env-full
	$(FULL)/python -m pytest -m full --timeout 1800

lock:
	(echo "# Pinned, hashed core and dev packages for make; torch comes by constraints/. Renew with: make lock"; \
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --constraint constraints/cpu.txt \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --upgrade \
	| awk '/^[a-z]/ { keep = /^nvidia-ml-py==/ || !/^((torch|triton|setuptools)==|(nvidia|cuda)-)/ } keep') > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv build dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
