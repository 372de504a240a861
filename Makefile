PYTHON ?= python3
BIN := .venv/bin
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
# Prints an error unless the interpreter is one that the package supports.
SUPPORTED := -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python 3.11 to 3.13 is needed, %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, v[0], v[1]))'

.PHONY: demo test test-quick lint types docs setup same-python clean

demo: setup  ## the whole method on handwritten digits: 4 to 6 minutes on two cores
	$(BIN)/tinymim demo --workdir runs/demo

# --dist loadfile: all tests of a file go to one worker, so that its fixtures are made once.
test: lint  ## lint and the whole suite, on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-quick: lint  ## the same without the tests that are marked slow
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## pyright; it fetches Node.js where there is none
	$(BIN)/pyright

docs: setup  ## the documentation as a site, in build/site; broken links are errors
	$(BIN)/mkdocs build --strict --quiet

setup: same-python .venv/installed  ## .venv with the locked versions and this package

# A .venv of another Python than the one that was asked for is not overwritten.
same-python:
ifneq ($(origin PYTHON),file)
	@[ ! -e $(BIN)/python ] || [ "$$($(BIN)/python $(VERSION))" = "$$($(PYTHON) $(VERSION))" ] || { echo ".venv was made with Python $$($(BIN)/python $(VERSION)), but PYTHON=$(PYTHON) is Python $$($(PYTHON) $(VERSION)): run make clean first, which deletes .venv, or leave PYTHON out" >&2; exit 1; }
endif

.venv/installed: requirements.txt pyproject.toml setup.py | same-python
	@if $(BIN)/python -c '' 2>/dev/null; then $(BIN)/python $(SUPPORTED); else $(PYTHON) $(SUPPORTED) && $(PYTHON) -m venv --clear .venv; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

requirements.txt.new:  ## a fresh lock, to be compared with the old one before it replaces it
	uv pip compile --universal --python-version 3.11 pyproject.toml --extra demo --extra dev --extra docs --no-annotate --no-header -o $@

clean:
	rm -rf .venv build dist *.egg-info
