# The interface of the artifact; `make` alone lists the targets that most users need, `make help-all` all and what variables mean.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# -- variables: a default, and what it means; which target reads it stands in braces behind the target --------------------
TESTBED ?= auto##    auto (this machine's), or a name in experiments/spec/testbeds
REPLICATES ?=##      sessions per model, each with its own seed; default: the testbed's
TRACE ?=##           requests: a trace, a result of a benchmark, or 512/128 for all alike; default: what make trace fetched, else synthetic
OUT ?= artifacts/runs##    where runs go
BAG ?=##             an archive made elsewhere
MODEL ?=##           mistral-7b or yi-34b; in recommend, or with GPU, a folder with a config.json, or a Hugging Face id
GPU ?=##             a GPU that is not here, by kernel tables: h100_sxm, ...; GPU=help lists them
TP ?=##              beside MODEL, the tensor parallel size: 1, 2, 4, 8; default: 1, or the fewest GPUs here that hold it
MAX_LEN ?=##         beside MODEL, tokens of prompt and output together; default: 8192, or what the model has
DTYPE ?=##           beside MODEL: bfloat16, float16, fp8 or, on the CPU, float32; default: fp8 where the model is, else what the testbed has
TTFT_P99 ?=##        a target: at most so much P99 TTFT, in seconds or as 300ms; also _P50, _P90, _P95
TBT_P99 ?=##         the same of the time between tokens
TPOT_P99 ?=##        the same of the time per output token, a request's mean time between tokens
E2E_P99 ?=##         the same of a request's whole time
GOODPUT ?=##         the share of requests that are to keep each their targets, such as 0.95
QPS ?=##             a load that is given, requests per second; then the best latency is looked for
CONCURRENCY ?=##     a load that is given: so many users, each of whom asks again when served
ARRIVALS ?=##        poisson, trace (as recorded, scaled), gamma:CV or closed:N; default: trace where TRACE has times
HIT ?=##             the share of prompt tokens that prefix caching finds, such as 0.4
BENCH ?=##           results of vllm bench serve --save-detailed at two or more loads, with commas: advice for that server
SERVED ?=##          with BENCH, the server's chunk size and most requests in a step, such as 2048/256
QUIET ?=##           1: errors only; the exit status tells the rest
JSON ?=##            1: the result as one line of JSON, and nothing else
ALL ?=##             1: a claim that was not run counts as INCONCLUSIVE
FIGURE ?= fig9a##    a figure's name, or a YAML file
TRIAL ?=##           a trial's folder, .../trials/SESSION/TRIAL
PYTHON ?= python3##  the Python that makes the virtual environment; 3.11 or 3.12
IN ?= $(if $(and $(HAS_GPU),$(HAS_DOCKER),$(if $(HAS_PYTHON),$(and $(MEASURING),$(filter cuda,$(ENGINE))),1)),docker,host)##     docker or host: where targets run; default: docker for an engine on a GPU where docker is there, and without Python
DOCKER ?= docker##   docker or podman
TARGET ?= $(if $(filter cpu,$(PLATFORM)),cpu,cuda)##   the image: cuda or cpu; default: what TESTBED needs
GPU_FLAGS ?= $(if $(filter cuda,$(TARGET)),--gpus all)##     how a container gets the GPUs; CDI and podman: --device nvidia.com/gpu=all
SHM ?= $(if $(filter cuda,$(TARGET)),--ipc=host,--shm-size=1g)##      its shared memory
ULIMITS ?= $(if $(filter cuda,$(TARGET)),--ulimit memlock=-1 --ulimit stack=67108864)##  its limits
NETWORK ?= $(if $(RAY_ADDRESS),host,none)##  its network; default: none, host with RAY_ADDRESS
SOURCE ?= unpublished##  URL of the repository, for the image's labels
USER_FLAGS ?= --user $(shell id -u):$(shell id -g)##  its user, who owns the outputs; rootless podman: --userns=keep-id
RAY_ADDRESS ?=##  a Ray cluster to join, HOST:6379; default: one of its own, on this machine
RAY_AUTH_TOKEN ?=##  the token that make node printed
NODE_IP ?=##     this machine's address in the cluster; default: what Ray finds
RUN_FLAGS ?=##    more flags for docker run, such as a mount with weights
BUILD_FLAGS ?=##  more flags for docker build
IMAGE_DISK ?= $(if $(filter cuda,$(TARGET)),40,10)##  GiB that must be free before the image is built for the first time
PYTEST ?=##    arguments for pytest
KILLS ?= 200##  how many
FULL ?=##      1: the cuda image with its real wheels; 16 GiB of disk, about 12 min, not in CI
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu##  where torch for the CPU comes from, unless pip knows such a build already
TORCH_LINKS ?= $(or $(PIP_FIND_LINKS),$(TORCH_INDEX)/torch/)##  the same for make lock, a page of links
# What is asked of make recommend alone.
QUESTION := $(foreach kind,TTFT TBT TPOT E2E,$(foreach p,50 90 95 99,$(kind)_P$p)) GOODPUT QPS CONCURRENCY ARRIVALS HIT

# -- what is given, checked before anything is run -----------------------------------------------------------------
# No value is ever part of a command's text: make takes it as it is, a $$ in it too, and recipes read it from the environment.
ifneq ($(patsubst ./%,%,$(firstword $(MAKEFILE_LIST))),Makefile)
$(error make: run it in the folder of its Makefile, as by make -C FOLDER)
endif
KNOWN := $(shell sed -n 's/^\([A-Z0-9_]*\) ?=.*/\1/p' Makefile)
KNOWN += $(filter-out $(KNOWN),$(QUESTION))
QUOTED = '$(subst ','\'',$1)'
# At most three whose first three letters are the same, else whose first letter is.
NEAR = $(wordlist 1,3,$(shell printf '%s\n' $(KNOWN) | name=$(call QUOTED,$1) awk '{ n = ENVIRON["name"] } \
	index($$0, substr(n, 1, 3)) == 1 { three = three " " $$0 } index($$0, substr(n, 1, 1)) == 1 { one = one " " $$0 } END { print three ? three : one }'))
UNKNOWN := $(filter-out $(KNOWN),$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v)))
$(foreach v,$(UNKNOWN),$(error $v: no variable of this Makefile; near it: $(or $(call NEAR,$v),none); make help-all lists all. For a program that make starts write it in front: $v=... make ...))
define NEWLINE


endef
GIVEN := $(foreach v,$(KNOWN),$(if $(filter-out file undefined,$(origin $v)),$v))
SILENT := $(foreach v,$(GIVEN),$(if $(and $(filter environment,$(origin $v)),$(value $v)),$v))
$(foreach v,$(GIVEN),$(if $(findstring $(NEWLINE),$(value $v)),$(error $v: got more than one line; allowed: one)))
$(foreach v,$(GIVEN),$(eval override $v := $$(value $v)))
SPACE := $(subst ,, )
TAB := $(shell printf '\t')
ONE_OF = $(if $(filter $2,$(subst $(TAB),_,$(subst $(SPACE),_,$3))),,$(error $1: got '$($1)'; allowed: $2))
ON := 1 yes true on
IS_ON = $(filter $(ON),$($1))
$(foreach v,QUIET JSON ALL FULL,$(if $($v),$(call ONE_OF,$v,$(ON) 0 no false off,$($v))))
$(foreach v,TESTBED OUT FIGURE PYTHON KILLS TORCH_INDEX,$(if $(strip $($v)),,$(error $v: got nothing; without it the default holds)))
$(call ONE_OF,TARGET,cuda cpu,$(TARGET))
$(call ONE_OF,DOCKER,docker podman,$(notdir $(subst $(SPACE),_,$(DOCKER))))
SECRET := RAY_AUTH_TOKEN
$(if $(call IS_ON,QUIET)$(MAKE_RESTARTS),,$(foreach v,$(SILENT),$(warning $v: taken from the environment$(if $(filter-out $(SECRET),$v),: $($v)))))

HAS_GPU := $(filter-out 0,$(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU || true))
HAS_DOCKER := $(shell command -v $(call QUOTED,$(DOCKER)) 2>/dev/null)
HAS_PYTHON := $(if $(HAS_GPU),$(shell $(call QUOTED,$(PYTHON)) -c 'import sys; print(*[1] * (sys.version_info >= (3, 11)))' 2>/dev/null))
# What may start an engine. All else runs in .venv on this host, as a simulation does, whatever GPUs are here.
MEASURING := $(filter setup preflight smoke fig9a fig9b node calibrate validate $(if $(GPU)$(BENCH),,recommend) gpu-check check-advice bench $(if $(RAY_ADDRESS),plan),$(MAKECMDGOALS))
ASKED := $(if $(filter IN,$(GIVEN)),$(IN))
# Where there is a GPU doctor says what auto stands for, before anything else is set up: make reads its answer and starts anew.
ifneq ($(and $(MEASURING),$(HAS_GPU),$(filter auto,$(TESTBED)),$(if $(filter docker,$(ASKED)),,1),$(or $(HAS_PYTHON),$(if $(HAS_DOCKER),,1))),)
include .venv/chosen.mk
ifdef MAKE_RESTARTS
override TESTBED := $(CHOSEN)
else
CHOOSING := 1
.venv/chosen.mk: .venv/core.stamp FORCE
	@.venv/bin/python -m experiments.machine.doctor --choose $(if $(filter recommend,$(MAKECMDGOALS)),--model="$$MODEL") \
		$(if $(call IS_ON,QUIET),--quiet) >$@
FORCE:
endif
endif
# What a testbed needs goes by what it is, not by its name; one that is not there needs nothing.
TESTBED_FILE := $(if $(filter %.yaml,$(lastword $(TESTBED))),$(TESTBED),experiments/spec/testbeds/$(TESTBED).yaml)
PLATFORM := $(shell test ! -f $(call QUOTED,$(TESTBED_FILE)) || \
	sed -n 's/^platform: *["'\'']*\([a-z]*\).*/\1/p' -- $(call QUOTED,$(TESTBED_FILE)) 2>/dev/null)
# Without a GPU the engine of a cuda testbed runs on other nodes of the cluster; the driver needs Ray, not CUDA.
ENGINE := $(if $(CHOOSING),core,$(or $(filter cpu cuda,$(PLATFORM)),$(if $(filter auto,$(TESTBED)),$(if $(HAS_GPU),cuda,cpu),core)))
ENGINE := $(if $(and $(RAY_ADDRESS),$(if $(HAS_GPU),,1)),$(ENGINE:cuda=cpu),$(ENGINE))
$(call ONE_OF,IN,docker host,$(IN))
SAY = $(strip $(if $(call IS_ON,QUIET),--quiet) $(if $(call IS_ON,JSON),--json))
# A GPU that is not here, by its kernel tables; what is asked of an engine here as well.
ON_TABLES := GPU TP MAX_LEN DTYPE
ON_SERVER := BENCH SERVED
# What is given to a target that does not read it is told. What setup and image read holds for every target.
READERS := $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\# .*{\(.*\)}$$/\1 \2/p' Makefile | awk '{ for (i = 2; i <= NF; i++) { \
	print $$i ":" $$1; if (sub("_P99", "", $$i)) print $$i "_P50:" $$1, $$i "_P90:" $$1, $$i "_P95:" $$1 } }')
UNREAD = $(if $(and $($1),$2,$(if $(filter setup image $(MAKECMDGOALS),$2),,1)),$(warning $1: read by make $(subst $(SPACE), or ,$2) alone))
$(if $(call IS_ON,QUIET)$(MAKE_RESTARTS),,$(foreach v,$(filter-out $(SILENT),$(GIVEN)),$(call UNREAD,$v,$(patsubst $v:%,%,$(filter $v:%,$(READERS))))))
WITH_TRACE = $(if $(TRACE),--trace="$$TRACE")
RUN = -m experiments.run --testbed="$$TESTBED" --out="$$OUT" $(SAY)
PLANNED = $(if $(REPLICATES),--replicates="$$REPLICATES") $(WITH_TRACE)
# The testbed that auto stands for is chosen once, by the run: the table is that of its bags.
define MEASURE
@mkdir -p artifacts/report; bags=$$(mktemp artifacts/report/.bags-XXXXXX); trap 'rm -f "$$bags"' EXIT; \
$(ENGINE_PY) $(RUN) $(PLANNED) --bags="$$bags" -- $@; $(ENGINE_PY) -m analysis.show.summary --runs="$$OUT" --bags="$$bags" $(SAY) -- $@
endef

.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\# .*/\1/p' Makefile) # what help lists is no file
# Targets, or those named, each with the variables that it reads; then what variables mean. In 80 columns.
SHOW = awk -v only=" $1 " 'function told(name, text,   n, words, i, line) { \
		n = split(text, words, " "); line = sprintf("%-20s", name); for (i = 1; i <= n; i++) { \
			if (length(line words[i]) > 79) { print line; line = sprintf("%20s", "") } \
			line = line " " words[i] } print line } \
	/^[A-Z0-9_]+ [?]=.*\#\#/ { name[++known] = "  " $$1; sub(/.*\#\# */, ""); means[known] = $$0 } \
	/^[a-z0-9-]+:.*\#\# / && (only ~ /^ *$$/ || index(only, " " substr($$1, 1, length($$1) - 1) " ")) { \
		target = "  make " substr($$1, 1, length($$1) - 1); sub(/.*\#\# /, ""); at = index($$0 " {", " {"); \
		told(target, substr($$0, 1, at - 1)); if (at < length($$0)) told("", substr($$0, at + 1)) } \
	END { if (only ~ /^ *$$/) { print "\nvariables"; for (i = 1; i <= known; i++) told(name[i], means[i]) } }' Makefile
help: ## the ten targets that most users need
	@for each in smoke doctor fig9a fig9b verify report recommend capacity image test; do $(call SHOW,$$each); done
	@printf '\n%s\n%s\n' 'In braces, the variables that a target reads; QUIET=1 and JSON=1 go with all.' 'make help-all lists every target, and says what each variable means.'
help-all: ## every target, and what each variable means
	@$(call SHOW)

# How an environment is made in its folder: $(@D). The second of two makes at once waits, and says so.
MADE = test -x $(@D)/bin/python || "$$PYTHON" -m venv $(@D)
PIP = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes --only-binary :all:
# Compiled as pip does it, but on two cores and without what is hardly ever imported: 25 s less.
DONE = { $(@D)/bin/python -m compileall -q -j 2 -x '/tests?/|transformers/models/' $(@D)/lib >/dev/null 2>&1 || true; }; \
	touch $@; echo "setup: done in $$SECONDS s" >&2
LOCK = exec 9>.setup.lock; flock -n 9 || { \
	echo "setup: another make is setting up here; waiting for it" >&2; flock 9; test ! $@ -nt $< || exit 0; };

# -- image ---------------------------------------------------------------------------------------------------------
IMAGE := chunked-prefill:$(TARGET)
BUILT := .image/$(TARGET).built
export DOCKER_BUILDKIT = 1
export PYTHONPATH := .

define BUILD
@docker/preflight.sh build
@read -ra flags <<<"$$BUILD_FLAGS"; "$$DOCKER" build --target $(TARGET) --tag $(IMAGE) \
	--build-arg TORCH_INDEX="$$TORCH_INDEX" --build-arg SOURCE="$$SOURCE" \
	--build-arg REVISION="$$(git describe --always --abbrev=40 --exclude '*' --dirty 2>/dev/null || echo unknown)" \
	--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" "$${flags[@]}" -f docker/Dockerfile .
@mkdir -p .image && touch $(BUILT)
endef

image: ## build the image of TARGET: cuda (10 GB beside its base) or cpu {IN TARGET DOCKER IMAGE_DISK BUILD_FLAGS SOURCE TORCH_INDEX GPU_FLAGS SHM ULIMITS NETWORK USER_FLAGS RUN_FLAGS}
	$(BUILD)

$(BUILT): docker/Dockerfile docker/install-system.sh docker/install-python.sh docker/entrypoint.sh \
	docker/core.lock docker/$(TARGET).lock
	@docker/preflight.sh host
	$(BUILD)

preflight: $(BUILT)
	@docker/preflight.sh run

# Tables of GPUs that are not here are read on the host.
ifneq ($(and $(strip $(GPU)),$(filter recommend capacity,$(MAKECMDGOALS))),)
override IN := host
endif
# In the image the environment is there already; tests and linting stay on the host, and what they start gets no settings.
ifneq ($(filter test test-cluster test-docs coverage test-image torture torture-nodes flips fuzz conformance verify-study lint lock lock-check tables,$(MAKECMDGOALS)),)
override IN := host
else
export TESTBED REPLICATES OUT BAG MODEL $(ON_TABLES) $(QUESTION) $(ON_SERVER) FIGURE TRIAL
export DOCKER IMAGE TARGET GPU_FLAGS SHM ULIMITS NETWORK USER_FLAGS RUN_FLAGS BUILD_FLAGS IMAGE_DISK SOURCE NODE_IP
export $(foreach v,RAY_ADDRESS RAY_AUTH_TOKEN,$(if $($v),$v))
# Where an engine on a GPU would run: doctor asks nothing of this host that the image brings.
export ARTIFACT_ENGINE := $(if $(and $(HAS_GPU),$(HAS_DOCKER),$(if $(filter host,$(ASKED)),,1)),image)
endif
export PYTHON TORCH_INDEX TORCH_LINKS KILLS PYTEST TRACE
ifeq ($(IN),docker)
PY := docker/in-image.sh python
ENGINE_PY := $(PY)
VENV := .image
SETUP := .image/$(ENGINE).stamp
.PHONY: .image/core.stamp .image/cpu.stamp .image/cuda.stamp
.image/core.stamp: $(BUILT)
.image/cpu.stamp .image/cuda.stamp: preflight
trace: NETWORK := host
else
# -- environments: .venv for all but CUDA, .venv-cuda for that, as vLLM for the CPU and for CUDA are one module -----------
VENV := .venv
PY := $(VENV)/bin/python
SETUP := $(if $(filter cuda,$(ENGINE)),.venv-cuda,.venv)/$(ENGINE).stamp
ENGINE_PY := $(dir $(SETUP))bin/python

# What the engine is locked for; 3.13 has all that simulation and analysis need.
ENGINE_PYTHON = $(PY) -c 'import sys; v = sys.version_info[:2]; sys.exit(v > (3, 12) and "error: PYTHON: got %d.%d; the engine is locked for 3.11 and 3.12: make clean, then PYTHON=python3.12; simulation works as it is" % v)'

$(VENV)/core.stamp: docker/core.lock
	@"$$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "error: PYTHON: got %d.%d; 3.11 or newer is needed" % v)'
	@$(LOCK) $(MADE); echo "setup: what simulation and analysis need (about 20 s)" >&2; $(PIP) -r $<; $(DONE)

# torch comes first: its CPU build is not on the ordinary index. The hashes are in the lock either way.
$(VENV)/cpu.stamp: docker/cpu.lock docker/torch-cpu.lock $(VENV)/core.stamp
	@$(ENGINE_PYTHON)
	@$(LOCK) echo "setup: torch and vLLM for the CPU (about 90 s, 1.5 GB of disk)" >&2; \
	$(PIP) -r docker/torch-cpu.lock 2>/dev/null || $(PIP) --index-url "$$TORCH_INDEX" -r docker/torch-cpu.lock 2>/dev/null || \
	{ echo "error: TORCH_INDEX: $$TORCH_INDEX has no $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' docker/torch-cpu.lock) for this Python, or cannot be reached" >&2; exit 2; }; \
	$(PIP) -r $<; $(DONE)

.venv-cuda/cuda.stamp: docker/cuda.lock $(VENV)/core.stamp
	@test -f $@ || $(PY) -m experiments.machine.doctor --before -- "$$TESTBED"
	@$(LOCK) $(MADE); echo "setup: torch and vLLM for CUDA (about 5 min, 10 GB of disk)" >&2; $(PIP) -r $<; $(DONE)

$(VENV)/dev.stamp: docker/dev.lock $(VENV)/cpu.stamp
	@$(LOCK) echo "setup: tools for tests and lint (about 20 s)" >&2; $(PIP) -r $<; $(DONE)
endif

setup: $(SETUP) ## virtual environment with everything pinned; a second call does nothing {TESTBED PYTHON TORCH_INDEX}

# -- running -------------------------------------------------------------------------------------------------------
doctor: $(VENV)/core.stamp ## each testbed: can this machine run it, and if not, what is missing {TESTBED OUT}
	@$(PY) $(RUN) doctor
	@if said=$$(docker/preflight.sh run 2>&1); then echo "image      ready: $(IMAGE)"; \
	else echo "image      not ready, which IN=docker alone needs: $${said//preflight: /}" >&2; fi

plan: $(if $(RAY_ADDRESS),$(SETUP),$(VENV)/core.stamp) ## sessions, trials, schedule, minutes and disk of FIGURE; starts nothing {FIGURE TESTBED REPLICATES TRACE OUT RAY_ADDRESS RAY_AUTH_TOKEN}
	@$(if $(RAY_ADDRESS),$(ENGINE_PY),$(PY)) $(RUN) $(PLANNED) --plan -- "$$FIGURE"
	@$(if $(call IS_ON,JSON),:,$(PY) -m analysis.advise.power --testbed="$$TESTBED" --out="$$OUT" $(PLANNED) $(SAY) -- "$$FIGURE")

power: $(VENV)/core.stamp ## which replicates and seconds make all claims of fig9b PASS on this machine, by simulation {TESTBED TRACE OUT}
	@$(PY) -m analysis.advise.power --search --testbed="$$TESTBED" --out="$$OUT" $(WITH_TRACE) $(SAY) -- fig9b

smoke: setup ## set up, then the smallest real run of the whole path, under 2 minutes {TESTBED REPLICATES TRACE OUT RAY_ADDRESS RAY_AUTH_TOKEN}
fig9a: setup ## Figure 9a, chunking overhead: run or resume, seal, print the table {TESTBED REPLICATES TRACE OUT RAY_ADDRESS RAY_AUTH_TOKEN}
fig9b: setup ## Figure 9b, latency against throughput: run or resume, seal, print the table {TESTBED REPLICATES TRACE OUT RAY_ADDRESS RAY_AUTH_TOKEN}
smoke fig9a fig9b:
	$(MEASURE)

trace: $(VENV)/core.stamp ## fetch the original's ShareGPT trace for fig9b; without it a synthetic one is used
	@$(PY) -m experiments.spec.workload $(SAY)

verify: $(VENV)/core.stamp ## integrity, gates, claims: a verdict for each claim, the overall verdict on the last line {OUT BAG ALL}
	@$(PY) -m analysis.judge.verify $(if $(BAG),--bag="$$BAG",--runs="$$OUT") $(if $(call IS_ON,ALL),--all) $(SAY)

package: $(VENV)/core.stamp ## artifacts/package.zip: runs, report and reference with a manifest; make verify BAG=it checks it {OUT}
	@$(PY) -m analysis.judge.archive --runs="$$OUT" $(SAY)

verify-study: $(VENV)/core.stamp ## the decision rule on synthetic experiments with known truth; renews docs/verdicts.md
	@$(PY) tests/bench/study.py $(SAY)

report: $(VENV)/core.stamp ## artifacts/report/index.html: verdicts, figures, tables, provenance on one page {OUT}
	@$(PY) -m analysis.show.report --runs="$$OUT" $(SAY)

node: NETWORK := host
node: setup ## make this machine a node of a Ray cluster: the first, or one of that at RAY_ADDRESS; docs/cluster.md {RAY_ADDRESS RAY_AUTH_TOKEN NODE_IP}
	@$(ENGINE_PY) -m experiments.cluster.local_ray $(SAY)

export: $(VENV)/core.stamp ## one trial of fig9b in the result format of vllm bench serve {TRIAL}
	@$(PY) -m analysis.show.export $(SAY) -- "$$TRIAL"

calibrate: setup ## fit the simulator to this machine's engine, about a minute per model, with a held-out error {TESTBED OUT}
	@$(ENGINE_PY) -m experiments.calibrate.here --testbed="$$TESTBED" --out="$$OUT" $(SAY)

gpu-check: setup ## the first 15 minutes on a GPU: does all of it work, and how fast; one file to send back; TESTBED=cpu: in small {TESTBED OUT}
	@$(ENGINE_PY) -m analysis.advise.gpu_check --testbed="$$TESTBED" --out="$$OUT" $(SAY)

# Kernel tables need an environment of their own: nothing else may come to rest on them.
TABLES := .venv-tables
$(TABLES)/tables.stamp: docker/tables.lock
	@$(LOCK) $(MADE); echo "setup: kernel tables (about 30 s, 600 MB of disk)" >&2; $(PIP) -r $<; $(DONE)

tables: $(TABLES)/tables.stamp ## the calibrations of the paper's scale anew, from kernel tables and published steps; needs make trace {TRACE}
	@$(TABLES)/bin/python -m experiments.calibrate.tables $(if $(SAY),--quiet)
	@$(TABLES)/bin/python -m experiments.calibrate.end_to_end $(WITH_TRACE) $(SAY)

pictures: $(VENV)/core.stamp $(TABLES)/tables.stamp ## the pictures, screenshots and ten answers of docs/ anew, from the last runs; headless Chromium
	@$(PY) tests/ten_answers.py $(SAY) && $(PY) tests/screenshots.py $(SAY)

validate: setup ## what the simulator predicts for the finished fig9a and fig9b of this machine, against what was measured {TESTBED OUT}
	@$(ENGINE_PY) -m analysis.advise.validate --testbed="$$TESTBED" --runs="$$OUT" $(SAY)

# Tables of GPUs that are not here need their own environment, which holds all that simulation needs.
LOWER = $(shell printf %s '$1' | tr A-Z_ a-z-)
ON_GPU = $(foreach v,$(ON_TABLES),$(if $($v),--$(call LOWER,$v)="$$$v"))
BY_TABLES := $(if $(strip $(GPU)),$(TABLES)/tables.stamp)
TABLES_PY = $(if $(BY_TABLES),$(TABLES)/bin/python,$1)

# A server that runs is asked by its results alone.
recommend: $(or $(BY_TABLES),$(if $(BENCH),$(VENV)/core.stamp,setup)) ## the chunk size for MODEL and latency targets, or at a given load; confirmed on this machine's engine {MODEL TESTBED GPU TP MAX_LEN DTYPE TTFT_P99 TBT_P99 TPOT_P99 E2E_P99 GOODPUT QPS CONCURRENCY ARRIVALS HIT BENCH SERVED TRACE OUT}
	@$(call TABLES_PY,$(if $(BENCH),$(PY),$(ENGINE_PY))) -m analysis.advise.recommend --testbed="$$TESTBED" --out="$$OUT" --model="$$MODEL" \
		$(ON_GPU) $(foreach v,$(ON_SERVER),$(if $($v),--$(call LOWER,$v)="$$$v")) $(WITH_TRACE) $(SAY) -- $(foreach v,$(QUESTION),$(if $($v),$v="$$$v"))

capacity: $(or $(BY_TABLES),$(VENV)/core.stamp) ## capacity by chunk size and P99 TBT target on the paper's machines, or of MODEL on GPU; the paper's choices {MODEL TESTBED GPU TP MAX_LEN DTYPE TRACE}
	@$(call TABLES_PY,$(PY)) -m analysis.advise.paper_capacity $(if $(filter-out auto,$(TESTBED)),--testbed="$$TESTBED") \
		$(if $(MODEL),--model="$$MODEL") $(ON_GPU) $(WITH_TRACE) $(SAY)

check-advice: setup ## what make recommend says against an exhaustive search on the real engine; about 20 minutes {TESTBED MODEL OUT}
	@$(ENGINE_PY) tests/bench/check_advice.py --testbed="$$TESTBED" --out="$$OUT" $(if $(MODEL),--model="$$MODEL") $(SAY)

check-server: setup ## advice from bench results, and our numbers, against a real vllm serve here; about 8 minutes, idle
	@$(ENGINE_PY) tests/bench/check_server.py $(SAY)
bench: setup ## speed and memory of the simulator; our loop against a bare loop over vLLM; switched against fresh chunk sizes {TESTBED TRACE OUT}
	@$(ENGINE_PY) tests/bench/bench_sim.py $(WITH_TRACE) $(SAY)
	@$(if $(filter core,$(ENGINE)),,$(ENGINE_PY) tests/bench/bench.py --testbed="$$TESTBED" --out="$$OUT" $(SAY))

# -- developing ----------------------------------------------------------------------------------------------------
# Engines first, then the rest beside them: a file is never split, what a module sets up is shared.
SIDE_BY_SIDE := -m "not cluster" -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/dev.stamp ## all tests but those of clusters and images, the real engine on the CPU included {PYTEST}
	@PYTEST_ADDOPTS="$$PYTEST" $(PY) -m pytest $(if $(PYTEST),,$(SIDE_BY_SIDE))
test-cluster: $(VENV)/dev.stamp ## a Ray cluster of four nodes on this machine, about 4 min {PYTEST}
	@PYTEST_ADDOPTS="$$PYTEST" $(PY) -m pytest tests/cluster/test_cluster.py
test-docs: $(VENV)/dev.stamp ## every command of README and docs that needs an engine or minutes, about an hour {PYTEST}
	@PYTEST_ADDOPTS="$$PYTEST" $(PY) -m pytest -v --timeout 3600 tests/check_docs.py

# What is compiled is counted where it runs as plain Python: what is short of the simulator's tests.
PLAIN := tests/simulator/test_simulator.py -k 'by_hand or room or phases or limit or refus or percentiles or range'

coverage: $(VENV)/dev.stamp ## branch coverage of experiments and analysis by both, about 10 min; an error below 90 %
	@$(PY) -m pytest $(SIDE_BY_SIDE) --cov --cov-report= --cov-fail-under=0
	@NUMBA_DISABLE_JIT=1 $(PY) -m pytest $(PLAIN) --cov --cov-append --cov-report= --cov-fail-under=0
	@$(PY) -m pytest -m cluster --cov --cov-append

torture: $(VENV)/dev.stamp ## random kills over short real runs, 200 in about 40 min: nothing lost, nothing left {KILLS}
	@$(PY) tests/torture.py --kills="$$KILLS" $(SAY)
torture-nodes: $(VENV)/dev.stamp ## 20 random kills of whole nodes of a local Ray cluster, about 10 min: nothing lost or doubled
	@NODE_KILLS=20 $(PY) -m pytest tests/cluster/test_cluster.py -k killed
conformance: $(VENV)/dev.stamp ## batches against vLLM's own scheduler on 3,000 random workloads, about 5 min
	@WORKLOADS=3000 $(PY) -m pytest tests/simulator/test_scheduler.py -k vllm
flips: $(VENV)/dev.stamp ## 1,000 random bit flips over whole bags: all found
	@FLIPS=1000 $(PY) -m pytest tests/judge/test_integrity.py -k flip
fuzz: $(VENV)/dev.stamp ## 2,000 mutated bags through every command, about 20 min: no traceback, no PASS that the whole bag has not
	@FUZZ=2000 $(PY) -m pytest tests/judge/test_fuzz.py

test-image: $(VENV)/dev.stamp ## the image, built and run on a stand-in base; installs docker by apt; needs root, about 9 min {PYTEST FULL}
	@PYTEST_ADDOPTS="$$PYTEST" $(PY) -m pytest -p no:cacheprovider $(if $(call IS_ON,FULL),-s tests/image/check_full.py,-v tests/image/check_image.py)

lint: $(VENV)/dev.stamp ## ruff, mypy --strict, Makefile and shell linters
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	@$(VENV)/bin/mbake validate Makefile
	@$(VENV)/bin/shellcheck docker/*.sh .ci/run && $(VENV)/bin/hadolint --failure-threshold style docker/Dockerfile

UV_COMPILE = UV_PYTHON_DOWNLOADS=never $(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-build --no-header --no-annotate \
	--python-version 3.11 --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
# Where core.lock must have a wheel for everything: the simulator runs there.
CORE_PLATFORMS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin x86_64-apple-darwin

lock: $(VENV)/dev.stamp ## renew the locks from pyproject.toml {TORCH_INDEX TORCH_LINKS}
	$(UV_COMPILE) --find-links "$$TORCH_LINKS" --no-emit-package torch --extra cpu --extra dev pyproject.toml -o docker/dev.lock
	$(UV_COMPILE) --find-links "$$TORCH_LINKS" --no-emit-package torch --extra cpu -c docker/dev.lock pyproject.toml -o docker/cpu.lock
	$(UV_COMPILE) -c docker/dev.lock pyproject.toml -o docker/core.lock
	for platform in $(CORE_PLATFORMS); do for version in 3.11 3.14; do \
		$(VENV)/bin/uv pip compile --quiet --no-build --python-platform $$platform --python-version $$version docker/core.lock >/dev/null; done; done
	$(UV_COMPILE) -c docker/core.lock --extra cuda pyproject.toml -o docker/cuda.lock
	$(UV_COMPILE) -c docker/core.lock --extra tables pyproject.toml -o docker/tables.lock

lock-check: lock ## renew the locks; an error if that changes one that is committed {TORCH_INDEX TORCH_LINKS}
	@git diff --stat --exit-code -- 'docker/*.lock' || { echo "error: docker/*.lock: stale; commit what make lock made" >&2; exit 1; }
	@touch -c $(VENV)/core.stamp $(VENV)/cpu.stamp $(VENV)/dev.stamp .venv-cuda/cuda.stamp $(TABLES)/tables.stamp # still hold

clean: ## remove the environment, caches and unfinished trials; never a finished run {OUT}
	@case $$OUT in /*) out=$$OUT ;; *) out=./$$OUT ;; esac; [ ! -d "$$out" ] || out=$$(CDPATH='' cd "$$out" && pwd -P); \
	above=$${out%/}; for kept in "$$(pwd -P)" "$$(CDPATH='' cd && pwd -P)"; do case $$kept/ in "$$above"/*) \
		echo "error: OUT: got $$OUT; allowed: a folder of runs, not one that holds this project or your home" >&2; exit 2 ;; esac; done; \
	[ ! -d "$$out" ] || find "$$out" -mindepth 2 -maxdepth 2 -type d \
		\( -name 'open-$(HEX8)' -o -name '.seal-$(HEX8)' \) -prune -exec rm -rf {} +
	rm -rf .venv .venv-cuda .venv-tables .image .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# How a run's identity ends the names of its folders.
HEX8 := $(subst x,[0-9a-f],xxxxxxxx)
