# Every target sets up what it needs in .venv: `make demo` on a fresh machine is one command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# every other torch may bring gigabytes for GPUs; README says how to take one
TORCH := 2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# a module is compiled once, not by each of the programs that a demo and the tests start
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-newest check bench gpu hf-suite soak docs pages lint types imports recipes

demo: recipes/recipe.schema.json
	$(BIN)/lmmono run recipes/quickstart.yaml

test: $(VENV)/.installed-dev recipes/recipe.schema.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# the suite on the newest releases that pyproject.toml allows, in an environment of its own
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,lake,track]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint types imports recipes test

bench: $(VENV)/.installed-dev
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

# transformers' own common tests on CRATE; HF_TESTS=<a git checkout of transformers> adds generation
hf-suite: $(VENV)/.installed-dev
	$(PIP) parameterized
	set -e; if [ -z "$(HF_TESTS)" ]; then \
	  version=$$($(BIN)/python -c 'import transformers; print(transformers.__version__)'); \
	  mkdir -p $(VENV)/hf-suite; \
	  $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(VENV)/hf-suite \
	    transformers==$$version; \
	  tar xzf $(VENV)/hf-suite/transformers-$$version.tar.gz -C $(VENV)/hf-suite --strip-components 1; \
	  touch $(VENV)/hf-suite/tests/__init__.py; \
	fi
	LMMONO_HF_TESTS=$(or $(HF_TESTS),$(VENV)/hf-suite) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -o addopts= tests/test_hf_suite.py $(ARGS)

# the same numbers on a GPU as on the CPU, and how fast; says so where there is none
gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

# every kind of kill 50 times, at random moments; the tests alone do it a few times
soak: $(VENV)/.installed-dev
	STORE_KILLS=50 $(BIN)/python -m pytest -rP -k kill tests/test_store_*.py $(ARGS)

# the pages that are written from the code: settings, metrics, recipes, public names
pages: $(VENV)/.installed
	set -e; for page in settings metrics recipes api; do \
	  $(BIN)/lmmono schema --page $$page --out docs/$$page.md; done

# the documentation as a site that opens from disk: site/index.html
docs: pages
	$(PIP) -e '.[docs]'
	$(BIN)/zensical build --strict -f mkdocs.yml

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

recipes: $(VENV)/.installed-dev
	$(BIN)/lmmono check --no-files recipes/*.yaml

# what editors complete and check recipes with: the first line of each names this file
recipes/recipe.schema.json: $(VENV)/.installed $(wildcard lmmono/recipe/*.py lmmono/registry/*.py)
	$(BIN)/lmmono schema --out $@

# torch first and alone: pip then takes the build that the machine offers, and nothing replaces it
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("want Python >= 3.11, got %d.%d; set PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(TORCH)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev,lake,track]'
	touch $@
