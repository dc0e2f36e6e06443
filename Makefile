# make lab    install into .venv, run three labs, write results.json and results.html; LABS="NAME ...": others,
#             LABS=: all of them, in some fifteen minutes
# make model  train the small GPT whose quality the labs judge, once, in minutes; kept with the calibration
# make test   what CI runs: lint, types, tests
# make proof  slow proofs: A/A statistics, fresh clone, kill loops
# make gpu    tests and benchmarks that need CUDA

PYTHON ?= python3
BIN := .venv/bin
LABS ?= roofline concurrency vectorization
# A GPU machine may bring its own torch: `make gpu BIN=$(dirname $(which python3))`. There torch, triton, numba,
# numpy, pytest and pytest-benchmark are enough, and perflab need not be installed.

# Each of the hundreds of processes that the tests start would compile our own text anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: lab model test proof gpu lint lanes format

# The stamp is newer than what decides the installation, so that a second call costs nothing. pip would compile
# 14,000 files one after the other; some are of a newer Python than this one, which is no failure.
.venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

lab: .venv/installed
	$(BIN)/perflab run $(LABS) --quick --output results.json

model: .venv/installed
	$(BIN)/python -m labs.precision.training

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lint is beside the tests, but not beside those that time something.
test: .venv/installed
	$(MAKE) -j2 lint lanes
	$(BIN)/python -m pytest -m 'alone and not proof and not gpu'

lanes: .venv/installed
	$(BIN)/python -m pytest -m 'not proof and not gpu and not alone' -n 3 --dist loadfile --no-loadscope-reorder

proof: .venv/installed
	$(BIN)/python -m pytest -m proof -s

gpu:
	$(BIN)/python -m pytest -m gpu -rs tests/kernels tests/parallel tests/labs
	$(BIN)/python -m pytest -q bench/suites/test_kernels.py --device cuda --quick --benchmark-json=results-gpu.json
