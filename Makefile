# make quickstart   train a Switch Transformer on this machine, from nothing but this checkout
# make test         all tests but the slow ones and those for GPUs
# make test-slow    the slow ones
# make check        format, lint, types, import ladder
# make docs         the documentation as a site, build/docs/index.html
# make drills       kills, full disks, damage, hostile files, random settings: docs/reliability.md
# make setup        only the environment

PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: tests that start processes wait for them.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Tests start hundreds of processes: each should find its modules compiled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup quickstart test test-slow drills check docs format clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11. Use: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/pip || { echo "making .venv ..."; $(PYTHON) -m venv .venv; }
	@echo "installing switchworks (the first time takes a few minutes) ..."
	@$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the test tools ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	@echo "installing the tools for the documentation ..."
	@$(PIP) --editable '.[docs]'
	@touch $@

quickstart: .venv/installed
	$(BIN)/switchworks train quickstart --run-dir runs/quickstart $(if $(wildcard runs/quickstart/experiment.toml),--resume)

# One thread each: there are more processes than cores, and a thread that waits for work burns time.
test: export OMP_NUM_THREADS := 1
test: .venv/installed-dev
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses $(WORKERS) --dist worksteal $(ARGS)

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

drills: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python experiments/drills/everything.py --share 0.1 $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed-docs
	$(BIN)/python -m sphinx --builder html --conf-dir docs --fail-on-warning --quiet . build/docs
	@echo "build/docs/index.html"

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
