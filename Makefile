# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
STAMP := $(VENV)/.installed

.PHONY: demo test check clean

# The environment; made again when what it is made from changes.
$(STAMP): pyproject.toml constraints.txt
	@command -v c++ >/dev/null || { echo "no C++ compiler, which links compiled models: apt-get install g++" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11, for instance" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,check]"
	@touch $(STAMP)

# The main job on the embedded data set: search, report, export the best model, check and time it.
demo: $(STAMP)
	$(BIN)/planish search runs/digits.toml --out $(DEMO)
	$(BIN)/planish report $(DEMO)
	@test -d $(DEMO)/exported || $(BIN)/planish export $(DEMO) --pick "latency<=0.5x" --out $(DEMO)/exported
	$(BIN)/planish bench $(DEMO)/exported
	$(BIN)/python -m planish.search.picture $(DEMO) $(DEMO)/front.svg
	@echo "picture: $(DEMO)/front.svg    report: $(DEMO)/report.html    compiled model: $(DEMO)/exported"

# Whoever only computes shares the cores; what measures, or runs searches of its own, comes after, alone. Where
# PYTEST_ARGS select tests, one of the two may have none (5).
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not alone" -n 2 $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m "not slow and alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
