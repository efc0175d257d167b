# make demo       set up, train a small model on text that is already here, show what its experts do
# make test       set up, then everything that CI runs
# make test-slow  the tests behind every promise, large counts included, kept as records
# make lint       format, lint, import contract and types only
# make bench      the benchmarks, resumable
# make clean      remove the environment and caches; runs/ stays
#
# PYTHON=python3.12       another interpreter (3.11 or newer)
# VENV=path               another environment
# TORCH_INDEX=url         where torch comes from, such as https://download.pytorch.org/whl/cpu
# DEMO="--minutes 1"      options for consilium demo
# PYTEST="-k router"      options for pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PARTS = format rules imports types units

.PHONY: demo test test-slow lint bench clean environment $(PARTS)

demo: $(VENV)/.stamp-run
	$(BIN)/consilium demo $(DEMO)

environment: $(VENV)/.stamp-test

# Each part prints its time, and the first failure ends the run.
test lint: $(VENV)/.stamp-test
	@for part in $(if $(filter lint,$@),$(filter-out units,$(PARTS)),$(PARTS)); do \
	  start=$$(date +%s); \
	  $(MAKE) --no-print-directory $$part || exit 1; \
	  echo "== $$part: $$(( $$(date +%s) - start )) s"; \
	done

format: $(VENV)/.stamp-test
	$(BIN)/ruff format --quiet --check .

rules: $(VENV)/.stamp-test
	$(BIN)/ruff check --quiet .

imports: $(VENV)/.stamp-test
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.stamp-test
	$(BIN)/pyright --pythonpath $(BIN)/python

units: $(VENV)/.stamp-test
	$(BIN)/python -m pytest --quiet $(PYTEST)

test-slow: $(VENV)/.stamp-slow
	$(BIN)/python bench/promises.py $(if $(PYTEST),-- $(PYTEST))

bench: $(VENV)/.stamp-test
	$(BIN)/consilium bench

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is as new as the last install; pyproject.toml alone makes it old.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Consilium needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "No virtual environment could be made in $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	@$(BIN)/python -c 'import importlib.metadata as m; v = m.version("torch").split("."); \
	  raise SystemExit(not (2, 11) <= (int(v[0]), int(v[1])) < (2, 14))' 2>/dev/null \
	  || { echo "Installing torch $(TORCH)"; $(PIP) install torch==$(TORCH) $(TORCH_FROM); }
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing Consilium"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing Consilium with its test tools"
	@$(PIP) install --editable '.[test]'
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-slow: $(VENV)/.stamp-test
	@echo "Installing what the slow tests ask as well"
	@$(PIP) install --editable '.[test,slow]'
	@touch $@
