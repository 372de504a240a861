PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test types setup clean

demo: setup  ## the whole method on handwritten digits: 4 to 6 minutes on two cores
	$(BIN)/tinymim demo --workdir runs/demo

test: setup  ## lint and the whole suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2

types: setup  ## pyright fetches Node.js when there is none
	$(BIN)/pyright

setup: .venv/installed  ## .venv with the locked versions and this package

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

requirements.txt.new:  ## a fresh lock; look at the difference before it replaces the old one
	uv pip compile --universal --python-version 3.11 pyproject.toml --extra demo --extra dev --no-annotate --no-header -o $@

clean:
	rm -rf .venv build dist *.egg-info
