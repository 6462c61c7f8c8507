# make env    build .venv from the pinned requirements       make test       every test
# make demo   the main job on real photographs               make test-fast  all but the slow ones
# make lint   ruff and mypy

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
DONE := $(VENV)/.installed
SUITS := 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do $$p -c $(SUITS) 2>/dev/null && { echo $$p; break; }; done)

.PHONY: env demo test test-fast lint clean

env: $(DONE)

$(DONE): requirements.txt requirements-basicsr.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or 3.12 found; give one: make env PYTHON=/path/to/python' >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-build-isolation --no-deps -r requirements-basicsr.txt
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $(DONE)

demo: env
	$(PY) tools/demo.py

test: env
	$(PY) -m pytest

test-fast: env
	$(PY) -m pytest -m 'not slow'

lint: env
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo_run
