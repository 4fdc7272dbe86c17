# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL_CHECK := build/wheel-check
JOBS ?= 2

export CUDA_VISIBLE_DEVICES =
export TF_CPP_MIN_LOG_LEVEL = 3

.PHONY: demo test lint types bench crash golden clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/move.py

test: $(STAMP) lint types
	$(BIN)/pytest -n $(JOBS) --dist loadscope

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Types are checked as users see them: on the wheel, not on the source tree.
types: $(STAMP)
	rm -rf $(WHEEL_CHECK) build/lib
	$(BIN)/python -m build --quiet --wheel --outdir $(WHEEL_CHECK)/dist
	$(BIN)/pip install --quiet --no-deps --target $(WHEEL_CHECK)/site $(WHEEL_CHECK)/dist/*.whl
	cd $(WHEEL_CHECK)/site && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p polyckpt

# A lent GPU is to be seen here, and only here.
bench: $(STAMP)
	env -u CUDA_VISIBLE_DEVICES $(BIN)/python -m benchmarks.peers --write

# The long forms of what `make test` proves in short ones.
crash: $(STAMP)
	$(BIN)/python -m tests.crash --kills 1000
	$(BIN)/python -m tests.faults

golden: $(STAMP)
	$(BIN)/python tests/golden/make.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
