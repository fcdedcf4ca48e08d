PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: help quickstart test test-fast lint format typecheck docs clean
help:
	@echo "make quickstart   make scenes, train oracle and LM, evaluate, draw runs/quickstart/report.html"
	@echo "make test         run all tests"
	@echo "make test-fast    run the tests that are neither slow nor start several processes"
	@echo "make docs         build the documentation as a site, build/site/index.html"
	@echo "make lint | format | typecheck | clean"

# Done once; again only when a dependency changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed ($(PYTHON) is `$(PYTHON) --version`); try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (once, a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/uvim-fsq quickstart

# One thread per test process: two processes share the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not multi"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP)
	$(BIN)/pyright

$(DOCS_STAMP): $(STAMP)
	@echo "installing what builds the documentation into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

# Once installed, it needs no network; broken links are errors. The variable silences an advertisement.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html; search needs a server: $(BIN)/python -m http.server -d build/site"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache runs/quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
