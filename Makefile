PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint

test: .venv/ready
	$(BIN)/python -m pytest -q -n 2

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/mypy

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
