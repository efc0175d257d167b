# make demo       set up, train a small model on text that is already here, show what its experts do
# make test       set up, then everything that CI runs
# make test-slow  the tests behind every promise, large counts included, kept as records
# make lint       format, lint, import contract and types only
# make bench      the benchmarks, one after the other; stopped, it goes on where it was
# make clean      remove the environment and caches; runs/ stays
#
# PYTHON=python3.12       another interpreter (3.11 or newer)
# VENV=path               another environment
# TORCH_INDEX=url         where torch comes from, such as https://download.pytorch.org/whl/cpu
# DEMO="--minutes 1"      options for consilium demo
# PYTEST="-k router"      options for pytest
# BENCH="decode-tiny"     benchmarks to run, or --again for those that are on record for this commit

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN = $(VENV)/bin
# On a terminal pip shows what it downloads; in a log it says nothing but mistakes.
PIP = $(BIN)/python -m pip --disable-pip-version-check $(shell test -t 2 || echo --quiet)
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PARTS = format rules imports types units

.PHONY: demo test test-slow lint bench clean environment $(PARTS)

demo: $(VENV)/.stamp-run
	$(BIN)/consilium demo $(DEMO)

environment: $(VENV)/.stamp-test

# Each part prints its time, and the first failure ends the run. Tests spread over the cores, a file at a time.
test lint: $(VENV)/.stamp-test
	@begun=$$(date +%s); \
	for part in $(if $(filter lint,$@),$(filter-out units,$(PARTS)),$(PARTS)); do \
	  start=$$(date +%s); \
	  $(MAKE) --no-print-directory $$part || { echo "== $$part FAILED; nothing after it was run"; exit 1; }; \
	  echo "== $$part: $$(( $$(date +%s) - start )) s"; \
	done; \
	echo "== $@ passed in $$(( $$(date +%s) - begun )) s"

format: $(VENV)/.stamp-test
	$(BIN)/ruff format --quiet --check .

rules: $(VENV)/.stamp-test
	$(BIN)/ruff check --quiet .

imports: $(VENV)/.stamp-test
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.stamp-test
	$(BIN)/pyright --pythonpath $(BIN)/python

units: $(VENV)/.stamp-test
	$(BIN)/python -m pytest --quiet -n auto --dist loadfile $(PYTEST)

test-slow: $(VENV)/.stamp-slow
	$(BIN)/python bench/promises.py $(if $(PYTEST),-- $(PYTEST))

bench: $(VENV)/.stamp-test
	$(BIN)/python bench/run_all.py $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is as new as the last install; pyproject.toml alone makes it old.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Consilium needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@echo "Making the environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "No virtual environment could be made in $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	@$(BIN)/python -c 'import importlib.metadata as m; v = m.version("torch").split("."); \
	  raise SystemExit(not (2, 11) <= (int(v[0]), int(v[1])) < (2, 14))' 2>/dev/null \
	  || { echo "Installing torch $(TORCH): some hundred megabytes, minutes on a slow line"; $(PIP) install torch==$(TORCH) $(TORCH_FROM); }
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing Consilium and what it needs: about a minute"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing Consilium with its test tools: some minutes the first time"
	@$(PIP) install --editable '.[test]'
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-slow: $(VENV)/.stamp-test
	@echo "Installing what the slow tests ask as well: some minutes the first time"
	@$(PIP) install --editable '.[test,slow]'
	@touch $@
