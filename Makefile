# The interface of the artifact; `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# -- variables -----------------------------------------------------------------------------------------------------
TESTBED ?= auto##    auto (this machine's), or a name in experiments/testbeds
REPLICATES ?=##      sessions per model, each with its own seed; default: the testbed's
TRACE ?=##           CSV of request lengths for fig9b; default: what make trace fetched, else a synthetic trace
OUT ?= artifacts/runs##    where runs go
ALL ?=##             1: in make verify, a claim that was not run counts as INCONCLUSIVE
PYTHON ?= python3##  the Python that makes the virtual environment; 3.11 or 3.12
# The PyTorch project's CPU wheels: asked only where pip does not already know a CPU build of torch.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all:
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU || true)
ENGINE := $(if $(filter %-sim,$(TESTBED)),core,$(if $(filter-out 0,$(HAS_GPU)),cuda,cpu))
RUN = $(PY) -m experiments.run --testbed $(TESTBED) --out $(OUT) $(if $(REPLICATES),--replicates $(REPLICATES)) \
	$(if $(TRACE),--trace $(TRACE))

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@printf '\nvariables\n'
	@awk -F' *[?]=|## *' '/^[A-Z]+ [?]=.*##/ {printf "  %-19s %s\n", $$1, $$3}' Makefile

# -- environment ---------------------------------------------------------------------------------------------------
$(VENV)/core.stamp: docker/core.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "error: PYTHON: got %d.%d; 3.11 or newer is needed" % v)'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "setup: what simulation and analysis need (about 20 s)"
	@$(PIP) -r $<
	@touch $@

# torch comes first: its CPU build is not on the ordinary index. The hashes are in the lock either way.
$(VENV)/cpu.stamp: docker/cpu.lock docker/torch-cpu.lock $(VENV)/core.stamp
	@echo "setup: torch and vLLM for the CPU (about 90 s, 1.5 GB of disk)"
	@$(PIP) -r docker/torch-cpu.lock 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) -r docker/torch-cpu.lock
	@$(PIP) -r $<
	@touch $@

$(VENV)/cuda.stamp: docker/cuda.lock $(VENV)/core.stamp
	@echo "setup: torch and vLLM for CUDA (about 5 min, 12 GB of disk)"
	@$(PIP) -r $<
	@touch $@

$(VENV)/dev.stamp: docker/dev.lock $(VENV)/cpu.stamp
	@echo "setup: tools for tests and lint (about 20 s)"
	@$(PIP) -r $<
	@touch $@

.PHONY: setup
setup: $(VENV)/$(ENGINE).stamp ## virtual environment with everything pinned; a second call does nothing

# -- running -------------------------------------------------------------------------------------------------------
.PHONY: doctor
doctor: $(VENV)/core.stamp ## each testbed: can this machine run it, and if not, what is missing
	@$(RUN) doctor

.PHONY: plan
plan: $(VENV)/core.stamp ## sessions, trials, minutes and disk of FIGURE (default fig9a); starts nothing
	@$(RUN) --plan $(or $(FIGURE),fig9a)

.PHONY: smoke
smoke: setup ## the smallest real run of the whole path, under 2 minutes
	@$(RUN) smoke
	@$(PY) -m analysis.summary smoke --testbed $(TESTBED) --runs $(OUT)

.PHONY: fig9a
fig9a: setup ## Figure 9a, chunking overhead: run or resume, seal, print the table
	@$(RUN) fig9a
	@$(PY) -m analysis.summary fig9a --testbed $(TESTBED) --runs $(OUT)

.PHONY: fig9b
fig9b: setup ## Figure 9b, latency against throughput: run or resume, seal, print the table
	@$(RUN) fig9b
	@$(PY) -m analysis.summary fig9b --testbed $(TESTBED) --runs $(OUT)

.PHONY: trace
trace: $(VENV)/core.stamp ## fetch the original's ShareGPT trace for fig9b; without it a synthetic one is used
	@$(PY) -m experiments.workload

.PHONY: verify
verify: $(VENV)/core.stamp ## integrity, gates, claims: a verdict for each claim, the overall verdict on the last line
	@$(PY) -m analysis.verify --runs $(OUT) $(if $(ALL),--all)

.PHONY: report
report: $(VENV)/core.stamp ## artifacts/report/index.html: verdicts, figures, tables, provenance on one page
	@$(PY) -m analysis.report --runs $(OUT)

.PHONY: export
export: $(VENV)/core.stamp ## one trial of fig9b, TRIAL=its folder, in the result format of vllm bench serve
	@$(PY) -m analysis.export "$(or $(TRIAL),$(error TRIAL=: a folder .../trials/SESSION/TRIAL is needed))"

.PHONY: bench
bench: setup ## speed of our loop against a bare loop over vLLM; switched against fresh chunk sizes
	@$(PY) -m experiments.bench

# -- developing ----------------------------------------------------------------------------------------------------
.PHONY: test
test: $(VENV)/dev.stamp ## all tests, the real engine on the CPU included
	@$(PY) -m pytest $(PYTEST)

.PHONY: lint
lint: $(VENV)/dev.stamp ## ruff, mypy --strict, Makefile and shell linters
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	@$(VENV)/bin/mbake validate Makefile

UV_COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-build --no-header --no-annotate \
	--python-version 3.11 --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
TORCH_LINKS ?= $(TORCH_INDEX)/torch/

.PHONY: lock
lock: $(VENV)/dev.stamp ## renew the locks from pyproject.toml
	UV_PYTHON_DOWNLOADS=never; export UV_PYTHON_DOWNLOADS
	$(UV_COMPILE) --find-links $(TORCH_LINKS) --no-emit-package torch --extra cpu --extra dev pyproject.toml -o docker/dev.lock
	$(UV_COMPILE) --find-links $(TORCH_LINKS) --no-emit-package torch --extra cpu -c docker/dev.lock pyproject.toml -o docker/cpu.lock
	$(UV_COMPILE) -c docker/dev.lock pyproject.toml -o docker/core.lock

.PHONY: clean
clean: ## remove the environment, caches and unfinished trials; never a finished run
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(OUT)/*/open-* $(OUT)/*/.seal-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
