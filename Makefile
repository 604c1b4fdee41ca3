# Two commands do everything: `make demo` and `make test`. The rest are their parts.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ballast-set-up

.PHONY: demo test setup proto lint format clean help

demo: $(STAMP)  ## migrate a guest four times on this machine and show what the hints saved
	@$(BIN)/ballast demo

test: $(STAMP)  ## the whole test suite, two files side by side; JOBS=0: one test after the other
	@$(BIN)/python -m pytest -n $(JOBS)

setup: $(STAMP)  ## only the environment: leaves .venv/bin/ballast

lint: $(STAMP)  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff lay the code out
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

proto: $(STAMP)  ## generate migration/pb/ from proto/
	@$(BIN)/python proto/generate.py

clean:  ## forget the environment
	rm -rf $(VENV)

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

# Redone when pyproject.toml changes; the stamp is written last, so a set-up that broke off is repeated.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ballast needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "ballast needs Python's venv module. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group dev --editable .
	@touch $@
