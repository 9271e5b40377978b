# make demo       fine-tune arms from the bundled base, evaluate each, and write a report
# make test       fast tests            make test-slow   the long ones
# make lint       ruff and mypy         make clean       environment and caches, never checkpoints
# make mutants    hours: do the tests see MUTANTS small faults that are put into distill/?

PYTHON ?= python3
VENV ?= .venv
# Installed first: a plain `torch` may bring a build of several GB for CUDA. On a GPU machine any torch >= 2.4 will do.
TORCH ?= torch==2.13.0
# A file of pinned versions for pip, such as .ci/constraints.txt; empty takes the newest that pyproject.toml admits.
CONSTRAINTS ?=
DEMO_CONFIG ?= recipes/configs/phantom/tradeoff_quick.yaml
DEMO_ARGS ?=
# Processes of `make test`, one thread each.
WORKERS ?= 2
# Faults of `make mutants`; the first so many are the same every time.
MUTANTS ?= 300

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# As many threads as cores are free: more are several times slower. accelerate gives one unless told.
THREADS := $(or $(OMP_NUM_THREADS),$(shell $(PYTHON) distill/processes.py))
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS)

.PHONY: demo test test-slow lint mutants clean

demo: $(VENV)/.installed
	@echo "The demo fine-tunes four models and compares them: about 8 minutes on two CPU cores. Each bar shows the time left."
	$(LAUNCH) recipes/tradeoff.py --config $(DEMO_CONFIG) $(DEMO_ARGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy distill recipes

mutants: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/driver.py --count $(MUTANTS)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed, and '$(PYTHON)' is not; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	$(INSTALL) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mutants .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find distill recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
