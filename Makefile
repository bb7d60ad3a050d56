# make train   set up, then run both LDO stages on the sandbox: runs/sandbox/report.html
# make test    set up, then run the test suite
# make lint    formatting and lint
# PYTHON=...   the interpreter to build .venv with (3.10 or newer); ARGS=... is passed on

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test lint setup clean
setup: $(READY)

train: $(READY)
	$(BIN)/python -m ldo.train recipes/sandbox.yaml $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(READY): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"ldo needs Python 3.10 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) (a minute or two, and about 2 GB; torch is the largest part)"
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -e '.[dev]'
	@$(BIN)/python -c "from ldo.ops import extension; print('C++/CUDA extension:', extension.load()[1])"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
