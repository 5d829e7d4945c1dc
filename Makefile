SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
# RLlib and BenchMARL ask for other versions of Gymnasium and TorchRL than the rest.
FRAMEWORKS ?= $(VENV)-frameworks
PYTHON ?= python3
# The newest Python that is promised, for a part of the tests; empty where there is none.
NEXT := python3.13
PYTHON_NEXT ?= $(firstword $(foreach path,$(shell command -v $(NEXT)) $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/$(NEXT)),$(shell $(path) -c 'print("$(path)")' 2>/dev/null)))
# An index to take torch from first, such as PyTorch's own of CPU wheels, which saves gigabytes of CUDA libraries.
TORCH_INDEX ?=
SCENARIO ?= heterogeneous
SECONDS ?= 60
# A worker takes a half of the files, and then of what the other has left, so that both seldom need the same fixture.
PARALLEL := -n 2 --dist worksteal
PYTEST_ARGS ?= $(PARALLEL) --durations 15
# For tests that have run before, now on another Python, with other versions or another clock: fewer examples.
AGAIN := $(PARALLEL) --hypothesis-profile again

BIN := $(VENV)/bin
# Python compiles what it imports, by itself; most of what is installed is never imported.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(INSTALL) -c constraints.txt
# Learning curves take hours, and need both environments: make curves. So does the laboratory, which needs root.
BENCHMARKS := $(filter-out __init__ common lab_fidelity lab_fit learning_curves marl_training node_loss proxy_connections vpp_connections vpp_cost,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)))
SOURCES := $(shell find src -name '*.py' 2>/dev/null)
# Parallelism is over processes and Numba threads; a second torch or BLAS thread only competes with them.
export OMP_NUM_THREADS ?= 1
# Ray would put its workers behind every other process of the machine, for which its tests, the longest, would wait.
export RAY_worker_niceness := 0
# pip leaves compiling to the first import, which would otherwise be that of every process: torch's takes seconds more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"lbgym needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@test -z "$(TORCH_INDEX)" || $(PIP) --no-deps --index-url "$(TORCH_INDEX)" torch
	@touch $@

$(VENV)/.all: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing into $(VENV), about a minute ..."
	$(PIP) -e '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing into $(VENV), about a minute ..."
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.all

$(FRAMEWORKS)/.dev: pyproject.toml constraints.txt constraints-frameworks.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	@echo "installing RLlib and BenchMARL into $(FRAMEWORKS), about two minutes ..."
	@test -z "$(TORCH_INDEX)" || $(FRAMEWORKS)/bin/python $(INSTALL) -c constraints.txt --no-deps --index-url "$(TORCH_INDEX)" torch
	$(FRAMEWORKS)/bin/python $(INSTALL) -c constraints-frameworks.txt -e '.[frameworks]'
	@touch $@

.PHONY: venv
venv: $(VENV)/.dev ## a virtual environment with everything for development in $(VENV)

out/demo/agent.pt: $(SOURCES) | $(VENV)/.all
	@mkdir -p out/demo
	$(BIN)/lbgym train --scenario $(SCENARIO) --seconds $(SECONDS) --out $@

.PHONY: demo
demo: $(VENV)/.all out/demo/agent.pt ## install, train for a minute, compare with the heuristics: table and plots in out/demo
	$(BIN)/lbgym compare --scenario $(SCENARIO) \
		--policies ecmp,wcmp-uniform,wcmp,maglev,lsq,sed,p2c,adaptive,out/demo/agent.pt --out out/demo

# Half an hour on two cores; killed, it goes on where it was. Training begins near an optimum, so with small steps.
PRETRAIN_STEPS ?= 1990656
PRETRAIN_STEP_SIZE ?= 0.15
PRETRAIN_SEEDS ?= 1 2 3
.PHONY: pretrain
pretrain: $(VENV)/.all ## train the policy adaptive from nothing, put it into the package, and measure it: out/pretrain
	@mkdir -p out/pretrain
	for seed in $(PRETRAIN_SEEDS); do \
		file=out/pretrain/seed$$seed.pt; \
		$(BIN)/lbgym train --algo cma-es --seed $$seed --steps $(PRETRAIN_STEPS) \
			--set learning_rate=$(PRETRAIN_STEP_SIZE) --out $$file \
			$$(test ! -e $$file || echo --resume $$file) || exit; \
	done
	$(BIN)/python -m benchmarks.pretraining --publish $(PRETRAIN_SEEDS:%=out/pretrain/seed%.pt)
	$(BIN)/lbgym suite run --seeds 4 --out out/pretrain/suite \
		--policies adaptive,sed,sed_scaled,sed+latency,marginal+core-latency,marginal+field+core-latency
	$(BIN)/python -m benchmarks.pretraining --suite out/pretrain/suite

.PHONY: lint
lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: cc
cc: # the tests of the C headers need a compiler; where there is none and none can be had, they are skipped
	@command -v cc >/dev/null || { apt-get update -qq && apt-get install -qq -y gcc g++ libc6-dev; } || \
		echo "no C compiler, and no right to install one: the tests of the C headers will be skipped"

# Debian starts what it installs, unless this file says no.
POLICY := /usr/sbin/policy-rc.d
# Install the packages $(1), and start nothing; where that cannot be, say that there is no $(2), and that $(3) will be skipped,
# but not in CI.
debian = ( \
		test -e $(POLICY) || { printf '\#!/bin/sh\nexit 101\n' > $(POLICY) && chmod 755 $(POLICY) && trap 'rm $(POLICY)' EXIT; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(1) ) || { \
		echo "no $(2), and no right to install it: $(3) will be skipped"; test -z "$(CI)"; }

.PHONY: xdp
xdp: # for the tests of XDP, which also need root
	@command -v clang >/dev/null && command -v llvm-strip >/dev/null && test -e /usr/include/bpf/bpf_helpers.h && \
		command -v ip >/dev/null && command -v ethtool >/dev/null && command -v nsenter >/dev/null || \
		$(call debian,clang llvm libbpf-dev libbpf1 iproute2 ethtool util-linux procps,clang or libbpf,the tests of XDP)

.PHONY: core
core: cc # libFuzzer's library, for a test of the balancer core
	@command -v clang >/dev/null && echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return 0; }' | \
		clang -fsanitize=fuzzer,address -x c -o /dev/null - 2>/dev/null || \
		$(call debian,clang libclang-rt-dev,clang with libFuzzer,a test of the balancer core)

.PHONY: chromium
chromium: # for the tests of pages
	@command -v chromium >/dev/null || $(call debian,chromium,Chromium,the tests of pages)

.PHONY: haproxy
haproxy: # for the tests of HAProxy
	@command -v haproxy >/dev/null && command -v curl >/dev/null || $(call debian,haproxy curl,haproxy,its tests)

LAB_PACKAGES := apache2 libapache2-mod-php nginx-light iproute2 ethtool util-linux procps
.PHONY: lab-packages
lab-packages: # for the tests of the laboratory, which runs servers of its own and needs root
	@command -v apache2 >/dev/null && ls /usr/lib/apache2/modules/libphp*.so >/dev/null 2>&1 && command -v nginx >/dev/null && \
		command -v ip >/dev/null && command -v ethtool >/dev/null && command -v setpriv >/dev/null && command -v sysctl >/dev/null || \
		$(call debian,$(LAB_PACKAGES),Apache or NGINX,the tests of the laboratory)

.PHONY: promtool
promtool: # checks the alert rules of deploy/; Debian's package has it beside a server that nobody wants started
	@command -v promtool >/dev/null || test -x build/promtool || { mkdir -p build && cd build && \
		apt-get download -qq prometheus && dpkg --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool > promtool && \
		chmod +x promtool && rm prometheus_*.deb; } || { rm -f build/promtool; \
		echo "no promtool to be had: the test of the alert rules will be skipped"; test -z "$(CI)"; }

# What the tests need of Debian; apt works alone, so one after the other.
TOOLS := cc xdp core chromium promtool haproxy lab-packages
.PHONY: tools
tools:
	@for tool in $(TOOLS); do $(MAKE) --no-print-directory $$tool || exit; done

# Or else every process of the tests compiles the simulator at the same time.
WARM := -c 'import lbgym; from lbgym.sharedmemory import seqlock; seqlock.warm_up(); \
	[(env.reset(seed=0), env.step(env.action_space.sample())) for env in (lbgym.LoadBalanceEnv(), lbgym.FlowDispatchEnv())]'

.PHONY: warm warm-next
warm: $(VENV)/.dev
	$(BIN)/python $(WARM)

warm-next: $(VENV)-next/.dev
	$(VENV)-next/bin/python $(WARM)

# Tests of live data planes wait for a part of their time: with their like, so that there is room for a third process. Of
# the last, the longest comes first; the others follow each other beside it.
.PHONY: test
test: ## lint, then the tests, also those of the frameworks
	$(MAKE) -j 4 --output-sync lint warm $(if $(PYTHON_NEXT),warm-next) $(FRAMEWORKS)/.dev tools
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(LIVE_TESTS:%=--ignore=%)
	$(MAKE) test-live test-young-clock
	$(MAKE) -j 2 --output-sync test-frameworks test-next test-contract test-frameworks-docs

.PHONY: coverage
coverage: tools $(VENV)/.dev $(FRAMEWORKS)/.dev ## what the tests reach; tracing doubles their time, so apart from them
	$(BIN)/python -m pytest $(PYTEST_ARGS) --cov --cov-report=
	$(MAKE) test-frameworks COVERAGE='--cov --cov-append --cov-report=term'

# What talks through shared memory, whose clocks begin at the machine's start.
LIVE_TESTS := tests/sharedmemory tests/dataplanes tests/drivers tests/controller tests/lab tests/test_recording.py tests/test_cli_shm.py
UPTIME := $$(cut -d. -f1 /proc/uptime)

# Root needs no user namespace, in which nobody else could be changed to.
UNSHARE := unshare $$(test "$$(id -u)" = 0 || echo --map-root-user) --time --monotonic

.PHONY: test-live
test-live: $(VENV)/.dev ## the tests of live data planes
	$(BIN)/python -m pytest $(PYTEST_ARGS) -n 3 $(LIVE_TESTS)

# But for XDP, whose clock no namespace moves, and for what reads no clock.
TIMELESS := $(addprefix tests/sharedmemory/test_,c_header.py generated.py mutations.py tearing.py)

.PHONY: test-young-clock
test-young-clock: $(VENV)/.dev ## the live tests as on a machine that has been up for a minute
	@$(UNSHARE) 0 true 2>/dev/null || { \
		echo "no time namespace to be had here (unshare --time): live tests with a young clock are skipped"; \
		test -z "$(CI)"; }
	@! $(UNSHARE) 0 true 2>/dev/null || \
		$(UNSHARE) $$((60 - $(UPTIME))) --boottime $$((60 - $(UPTIME))) \
		$(BIN)/python -m pytest -q $(AGAIN) -n 3 --durations 5 -m "not slow and not xdp and not lab" \
		$(TIMELESS:%=--ignore=%) $(LIVE_TESTS)

# VPP is in no registry of packages: its own documentation says how to build and install it.
VPP_PREFIX ?=
.PHONY: vpp-plugin
vpp-plugin: cc ## the VPP plugin, in out/vpp, for the VPP installed in VPP_PREFIX
	@test -x "$(VPP_PREFIX)/bin/vpp" || echo "no VPP in '$(VPP_PREFIX)': the plugin is not built (make vpp-plugin VPP_PREFIX=...)"
	@test ! -x "$(VPP_PREFIX)/bin/vpp" || { \
		cmake -S plugins/vpp -B out/vpp -DCMAKE_PREFIX_PATH="$(VPP_PREFIX)" -DCMAKE_BUILD_TYPE=Release && \
		PATH=/usr/bin:$$PATH cmake --build out/vpp && ls out/vpp/lib/vpp_plugins/lbgym_plugin.so; }

.PHONY: test-vpp
test-vpp: vpp-plugin $(VENV)/.dev ## the end-to-end tests of the VPP plugin: real TCP through a VPP that is installed in VPP_PREFIX
	VPP_PREFIX="$(VPP_PREFIX)" $(BIN)/python -m pytest -q -m vpp tests/vpp

.PHONY: test-next
test-next: pyproject.toml constraints.txt ## a part of the tests on the newest Python that is promised, where it is installed
	@test -n "$(PYTHON_NEXT)" || echo "no $(NEXT) here: the tests on it are skipped"
	@test -z "$(PYTHON_NEXT)" || $(MAKE) warm-next
	@test -z "$(PYTHON_NEXT)" || $(VENV)-next/bin/python -m pytest -q $(AGAIN) --durations 5 -m "not slow" \
		tests/features tests/simulator tests/scenarios tests/test_env_contract.py tests/policies tests/dataplanes

$(VENV)-next/.dev: pyproject.toml constraints.txt
	$(PYTHON_NEXT) -m venv $(VENV)-next
	$(VENV)-next/bin/python $(INSTALL) -c constraints.txt -e '.[eval,marl,offline,run,test]'
	@touch $@

# What waits for processes of Ray comes first, so that what only computes fills the gaps.
RAY_TESTS := $(addprefix tests/frameworks/test_,cluster.py rllib.py)

.PHONY: test-frameworks
test-frameworks: $(FRAMEWORKS)/.dev ## the tests of RLlib, BenchMARL and Ray
	$(FRAMEWORKS)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 $(COVERAGE) \
		$(RAY_TESTS) $(filter-out $(RAY_TESTS),$(wildcard tests/frameworks/test_*.py)) tests/training/test_recipes.py

# RLlib by itself would join whatever Ray runs here, such as that of the tests beside it.
.PHONY: test-frameworks-docs
test-frameworks-docs: $(FRAMEWORKS)/.dev ## the pages and examples of RLlib, BenchMARL and Ray
	RAY_ADDRESS=local $(FRAMEWORKS)/bin/python -m pytest -q $(PARALLEL) tests/test_docs.py tests/test_examples.py \
		-k "rllib or benchmarl or clusters"

.PHONY: test-contract
test-contract: $(FRAMEWORKS)/.dev ## the contract of the environments on the Gymnasium that the frameworks pin
	$(FRAMEWORKS)/bin/python -m pytest -q $(AGAIN) -m contract $$(grep -rl 'mark\.contract' tests --include='test_*.py')

.PHONY: docs
docs: $(VENV)/.dev ## the documentation site, in site/
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs site

.PHONY: bench
bench: $(VENV)/.dev $(FRAMEWORKS)/.dev ## every benchmark, with what it must reach
	@failed=; for name in $(BENCHMARKS); do \
		echo "python -m benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name --out out/bench || failed="$$failed $$name"; \
	done; \
	for name in marl_training node_loss; do \
		echo "python -m benchmarks.$$name"; \
		$(FRAMEWORKS)/bin/python -m benchmarks.$$name --out out/bench || failed="$$failed $$name"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

.PHONY: curves
curves: $(VENV)/.dev $(FRAMEWORKS)/.dev ## every algorithm, five seeds: out/curves
	$(FRAMEWORKS)/bin/python -m benchmarks.learning_curves --out out/curves --train-only
	$(BIN)/python -m benchmarks.learning_curves --out out/curves

.PHONY: clean
clean: ## remove what was made, also the virtual environment
	rm -rf $(VENV) $(VENV)-next $(FRAMEWORKS) out site dist build .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -exec rm -rf {} +
