# Everything that people and CI call. `make demo` and `make test` work on a machine with nothing but Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo ui test test-long test-machines lint format lock clean
help:
	@echo 'make setup    install the pinned set and this project into .venv (skipped when nothing changed)'
	@echo 'make demo     distil a small student on this machine, end to end'
	@echo 'make ui       open the runs in MLflow, on loopback'
	@echo 'make test     run the tests (PYTEST_ARGS="-k alignment" narrows them)'
	@echo 'make test-long   kill processes of searches, scoring, generation and training again and again'
	@echo 'make test-machines   ray up to ray down on machines inside this one (root, iproute2, rsync, openssh-server)'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   let ruff rewrite the files'
	@echo 'make lock     rewrite requirements/cpu.txt and requirements/gpu.txt'
	@echo 'make clean    remove .venv and caches'

setup:
	@$(PYTHON) scripts/setup.py

demo: setup
	$(BIN)/cdm demo

ui: setup
	$(BIN)/cdm ui

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m 'not long and not machines' $(PYTEST_ARGS)

test-long: setup
	$(PYTEST) -m long $(PYTEST_ARGS)

test-machines: setup
	$(BIN)/python -m pytest -m machines $(PYTEST_ARGS)

lint: setup
	@status=0; for tool in 'ruff check .' 'ruff format --check .' mypy; do \
		echo "$(BIN)/$$tool"; $(BIN)/$$tool || status=1; done; exit $$status

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(PYTHON) scripts/lock.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
