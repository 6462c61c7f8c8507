# make env    build .venv from the pinned requirements       make test       every test
# make demo   the main job on real photographs               make test-fast  all but the slow ones
# make lint   ruff and mypy                                  make env-mmagic, test-mmagic   the same for MMagic

WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
DONE := $(VENV)/.installed
MM_VENV := .venv-mmagic
MM_PY := $(MM_VENV)/bin/python
MM_PIP := $(MM_PY) -m pip --disable-pip-version-check install
MM_DONE := $(MM_VENV)/.installed
SUITS := 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do $$p -c $(SUITS) 2>/dev/null && { echo $$p; break; }; done)

.PHONY: env env-mmagic demo test test-fast test-mmagic lint clean

env: $(DONE)

$(DONE): requirements.txt requirements-basicsr.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or 3.12 found; give one: make env PYTHON=/path/to/python' >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-build-isolation --no-deps -r requirements-basicsr.txt
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $(DONE)

# An environment of its own: MMagic needs older packages. Its tools import MMagic before they read a config, so what
# stands in their way on this torch is mended by a .pth file (see basicsr_quant/compat/openmmlab.py).
env-mmagic: $(MM_DONE)

$(MM_DONE): requirements-mmagic.txt constraints-mmagic.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or 3.12 found; give one: make env-mmagic PYTHON=/path/to/python' >&2; exit 2; }
	test -x $(MM_PY) || $(PYTHON) -m venv $(MM_VENV)
	$(MM_PIP) -c constraints-mmagic.txt -r requirements-mmagic.txt
	$(MM_PIP) -c constraints-mmagic.txt --no-deps mmagic
	$(MM_PIP) --no-build-isolation --no-deps -e .
	echo 'import basicsr_quant.compat.openmmlab' > "$$($(MM_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/basicsr_quant_openmmlab.pth"
	@touch $(MM_DONE)

demo: env
	$(PY) tools/demo.py

test: env env-mmagic
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(MM_PY) -m pytest tests/mmagic

test-fast: env
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow'

test-mmagic: env-mmagic
	$(MM_PY) -m pytest tests/mmagic

lint: env
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) $(MM_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo_run
