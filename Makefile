# Each target makes .venv from requirements.lock first, if it is missing or the lock file has changed.
PYTHON ?= python3
export PROMPT ?= a small red circle moves to the left
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: venv demo test lint bench

venv: $(STAMP)

demo: $(STAMP)  ## make demo PROMPT="..." draws another
	$(BIN)/python sample.py runs/shapes-cpu/checkpoint --prompt "$$PROMPT" --out out/demo.mp4 --scale 8

# Single-threaded kernels and two workers: quicker than the reverse for many small tests, and sums keep one order.
test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	@set -e; for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python "$$program"; done

# torch comes first and with its own dependencies, because a GPU build needs CUDA libraries that the lock file does not
# list. All else is pinned, so that nothing more is pulled in.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --constraint requirements.lock torch setuptools
	$(BIN)/python -m pip install --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@
