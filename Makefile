# Each target does its own set-up, in .venv; it needs Python 3.11 or newer with venv, and make.  `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements/constraints.txt
# what decides what is installed: the stamps are renewed when it changes
PINS := pyproject.toml requirements/constraints.txt src/eutectic/methods/_native.c src/eutectic/fusion/_products.c

.PHONY: help setup demo test parity check bench docs
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.stamp-dev ## make .venv with the package, editable, and what its tests and checks need

demo: .venv/.stamp-core ## fuse eight experts by many methods and score them all (ARGS=--all: every method)
	$(BIN)/eutectic demo $(ARGS)

test: .venv/.stamp-dev ## run the tests in two processes (ARGS="-m 'not slow'": any of pytest's options)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

parity: .venv/.stamp-dev ## compare with mergekit, installed in an environment of its own (EUTECTIC_PEERS=folder: where)
	$(BIN)/python -m pytest -q -m peer tests/parity $(ARGS)

check: .venv/.stamp-dev ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/docs.py --check

bench: .venv/.stamp-core ## list the benchmarks; RUN=name runs benchmarks/name.py (with ARGS)
ifdef RUN
	$(BIN)/python benchmarks/$(RUN).py $(ARGS)
else
	@for file in $(sort $(wildcard benchmarks/*.py)); do \
	    printf '  make bench RUN=%-16s %s\n' "$$(basename "$$file" .py)" "$$(sed -n '1s/"""//gp' "$$file")"; \
	done
endif

docs: .venv/.stamp-core ## write docs/methods.md and docs/cli.md anew from the code
	$(BIN)/python tools/docs.py

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "eutectic needs Python 3.11 or newer, and $(PYTHON) is not. Name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: its ensurepip or venv module is missing." >&2; \
	    echo "Install it (Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.stamp-core: .venv/pyvenv.cfg $(PINS)
	@echo "installing eutectic into .venv (once; a minute or two) ..."
	@$(PIP) -e .
	@touch $@

# any other stamp: the package with the extra of that name
.venv/.stamp-%: .venv/pyvenv.cfg $(PINS)
	@echo "installing eutectic[$*] into .venv (once; a minute or two) ..."
	@$(PIP) -e '.[$*]'
	@touch .venv/.stamp-core $@
