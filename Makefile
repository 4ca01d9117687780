# Everything runs in .venv, which any target creates and keeps up to date by itself.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo study test test-slow test-browser test-arviz1 lint notebooks docs format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## install, then fit a text whose truth is known and a real one, and score them (minutes)
	$(BIN)/ltm-pyro fit --preset mixture --out runs/demo-mixture --overwrite
	$(BIN)/ltm-pyro fit --preset nano --out runs/demo --overwrite

study: $(STAMP)  ## NAME=... [DATA=folder] [SMOKE=1]: run a study of studies/, or go on with it
	$(BIN)/python -m studies $(NAME) $(if $(DATA),--data $(DATA)) $(if $(SMOKE),--smoke)

test: $(STAMP)  ## all but the slow tests, with coverage, and the notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" --cov --nbmake --nbmake-timeout=300 tests notebooks

test-slow: $(STAMP)  ## the slow, statistical tests
	$(BIN)/python -m pytest -m slow tests

test-browser: $(STAMP)  ## the report in a real browser; installs what it needs, where it can
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@command -v chromium >/dev/null || { apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends chromium; } || \
	  $(BIN)/playwright install chromium || true
	$(BIN)/python -m pytest tests/test_report_browser.py

ARVIZ1 := .venv-arviz1/bin/python
test-arviz1:  ## export, figures and notebook 04 on ArviZ 1.x, in a Python 3.12 of its own
	@for python in "$(PYTHON312)" python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python3.12; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "skipped: ArviZ 1.x is tested on Python 3.12, which is not here (PYTHON312=/path/to/it)"; \
	  exit 0; \
	fi; \
	set -e; \
	$(ARVIZ1) -c 'import pip' 2>/dev/null || "$$python" -m venv --clear .venv-arviz1; \
	$(ARVIZ1) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	: the test left out ends h5py 3.16 on Python 3.12 in a crash, when what failed is collected; \
	$(ARVIZ1) -m pytest tests/test_export.py tests/test_plots.py \
	  --deselect tests/test_export.py::test_a_write_that_fails_leaves_the_old_file; \
	$(ARVIZ1) -m pytest --nbmake --nbmake-timeout=300 notebooks/04_which_posterior.ipynb

lint: $(STAMP)  ## style, types and the floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: $(STAMP)  ## execute those whose outputs are older than their code
	$(BIN)/python notebooks/execute.py

docs: $(STAMP)  ## the site, into docs/_build/html; a warning is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

format: $(STAMP)  ## apply the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv, caches, build leftovers and the demo's run
	rm -rf .venv .venv-arviz1 build dist docs/_build docs/notebooks ltm_pyro.egg-info runs/demo runs/demo-mixture
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage .coverage.*
	find ltm_pyro tests notebooks benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A missing, interrupted or broken environment is made anew, a working one brought up to date.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' is not Python 3.11 or newer: run make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }; \
	  $(PYTHON) -m venv --clear .venv; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
