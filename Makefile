# Two commands: `make serve` and `make test`. Each does all the set-up it needs, once.

# The system's, where it is new enough: distributions build theirs with optimisations that others often lack. It
# makes the router a fifth faster.
PYTHON ?= $(shell for each in /usr/bin/python3 python3; do \
            $$each -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && exit; \
            done; echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= etc/dp.toml
PREFIX ?= run
PARITY := .cache/parity-venv
PIP    := $(BIN)/python -m pip --disable-pip-version-check
COMPILED := $(wildcard $(foreach folder,include paddle cpu cpu/*,$(foreach kind,cc h inl,custom_ops/$(folder)/*.$(kind))) \
              daemon/router/http/*.cc)
# An import tree with the names that the installed package has, for mypy.
TYPES  := .cache/types
# Or each of the thousands of processes that the tests start would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help serve model test test-fast check mypy format docs parity soak fuzz bench-serve bench-engine bench-context bench-replicas \
        bench-long-prompt bench-ep bench-recovery bench-router bench-router-policies chaos profile perplexity install \
        uninstall clean check-cuda test-gpu bench-gpu-product bench-gpu-attention bench-gpu-step

help:
	@echo "make serve              set up everything and serve the demo model: eight replicas, one router"
	@echo "make test               set up everything and run all tests"
	@echo "make test-fast          the tests that start no processes: minutes"
	@echo "make check              ruff, mypy and codespell"
	@echo "make format             ruff, writing"
	@echo "make docs               write docs/configuration.md and etc/grafana/fd-dp.json anew"
	@echo "make parity             compare the network with transformers on random models (installs torch)"
	@echo "make soak               random traffic, every logit compared; a router whose replicas die; the whole system"
	@echo "                        reloaded and killed under load; FD_SOAK_MINUTES=3"
	@echo "make fuzz               any bytes for whatever reads those of others: libFuzzer (needs clang) and property"
	@echo "                        tests; FD_FUZZ_MINUTES=5"
	@echo "make bench-serve        start-up time, memory and tokens/s of the whole system"
	@echo "make bench-engine       the CPU engine against transformers and the hardware's limits (installs torch)"
	@echo "make bench-context      decode speed against context and batch, as a plot in docs/"
	@echo "make bench-replicas     eight engines against one on the same cores"
	@echo "make bench-long-prompt  what a long prompt does to those who are reading"
	@echo "make bench-ep           expert parallelism: what travels, throughput, memory, recovery from a kill"
	@echo "make bench-recovery     time to be well again after kill -9, beside supervisor alone; rolling reload; what fd-dp takes"
	@echo "make bench-router       our router beside sglang's, vLLM's and nginx (needs wrk; installs the first two)"
	@echo "make bench-router-policies  which of the router's policies for which traffic, simulated, as a plot in docs/"
	@echo "make chaos              ranks of an expert group killed at every point of a step"
	@echo "make profile            where the time of a decode step goes"
	@echo "make perplexity         the demo model's perplexity in each weight format"
	@echo "make check-cuda         compile the kernels for Hopper and look for spilled registers (needs nvcc, no GPU)"
	@echo "make test-gpu           test the kernels on a Hopper GPU (needs nvcc and a python3 with torch)"
	@echo "make bench-gpu-product  the products beside cuBLAS; bench-gpu-attention; bench-gpu-step: whole decode steps"
	@echo "make install            install as a systemd service (as root); again: upgrade"
	@echo "make uninstall          take it away again; configuration, models and logs stay"

serve: $(VENV)/installed model
	@exec $(BIN)/fd-dp --config $(CONFIG) --prefix $(PREFIX)

# Three files at a time, because most tests wait for half of their time; those of the whole system keep all cores busy.
test: $(VENV)/installed model
	@$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/e2e --durations=20
	@$(BIN)/pytest tests/e2e --durations=10

# Most of what can break, in minutes.
test-fast: $(VENV)/installed
	@$(BIN)/pytest -n 2 --dist loadfile --ignore tests/e2e --ignore tests/systemd --ignore tests/fuzz \
	    -m 'not processes and not slow and not chaos' --durations=20

# The stamp is newer than what decides which packages have to be there, and than what is compiled. Against the
# very Paddle that will load it: hence no isolated environment for the build.
$(VENV)/installed: setup.cfg setup.py pyproject.toml $(COMPILED)
	@echo "fd-dp: installing into $(VENV); the first time a few hundred MB are fetched"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@etc/build_requires.sh | $(PIP) install -r /dev/stdin
	@echo "fd-dp: compiling the operations and the router's fast path, about half a minute on two cores"
	@$(PIP) install --no-build-isolation -e '.[test,check]'
	@touch $@

# Returns at once when the model is there and packed as etc/dp.toml wants it, so that no replica has to do it.
model: $(VENV)/installed
	@$(BIN)/python -m fastdeploy.demo_model
	@$(BIN)/python -m fastdeploy.weight_cache demo >/dev/null

check: $(VENV)/installed mypy
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/codespell

mypy: $(VENV)/installed
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fastdeploy
	@ln -s $(CURDIR)/engine/* $(CURDIR)/daemon $(CURDIR)/custom_ops $(TYPES)/fastdeploy/
	@MYPYPATH=$(TYPES) $(BIN)/mypy -p fastdeploy

docs: $(VENV)/installed
	@$(BIN)/python -m fastdeploy.daemon.config.loader > docs/configuration.md
	@$(BIN)/python etc/grafana/dashboard.py > etc/grafana/fd-dp.json

# As root; PREFIX_DIR, PYTHON and DESTDIR as etc/install.sh says.
install:
	@etc/install.sh

uninstall:
	@etc/install.sh --uninstall

format: $(VENV)/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Two environments, so that torch and Paddle never meet in one process; SEED=n repeats a run. pip's usual
# index brings torch with CUDA (gigabytes); PIP_INDEX_URL or PIP_FIND_LINKS can name one with CPU builds.
parity: $(VENV)/installed $(PARITY)/installed
	@$(PARITY)/bin/python -m tests.parity.draw --seed $${SEED:-$$(date +%s)} --out .cache/parity
	@$(BIN)/python -m tests.parity.compare .cache/parity

$(PARITY)/installed: Makefile
	@echo "fd-dp: installing torch and transformers into $(PARITY)"
	@test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --disable-pip-version-check --progress-bar on \
	    torch==2.13.0 'transformers>=5.23' numpy
	@touch $@

# FD_SOAK_SEED=n begins with the traffic that a failure named.
soak: $(VENV)/installed
	@$(BIN)/pytest -q -m slow tests/engine/test_soak.py tests/custom_ops/test_expert_group.py tests/router \
	    tests/e2e/test_unbroken.py

# In seconds it is part of `make test`. What it finds lies in .cache/fuzz.
fuzz: $(VENV)/installed
	@$(BIN)/python -m tests.fuzz

bench-serve: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.serve

bench-engine: $(VENV)/installed $(PARITY)/installed
	@$(BIN)/python -m benchmarks.engine

bench-context: $(VENV)/bench-installed
	@$(BIN)/python -m benchmarks.context

bench-replicas: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.eight_replicas

bench-long-prompt: $(VENV)/installed
	@$(BIN)/python -m benchmarks.long_prompt

profile: $(VENV)/installed
	@$(BIN)/python -m benchmarks.profile_step

bench-ep: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.expert_parallel

bench-recovery: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.recovery

# ARGS="--quick --only unary" and the like: see python -m benchmarks.router --help.
bench-router: $(VENV)/installed
	@$(BIN)/python -m benchmarks.router $(ARGS)

bench-router-policies: $(VENV)/bench-installed
	@$(BIN)/python -m benchmarks.router_policies

# Kills and stops at every point of a step, a second loss during the first; some of it is in `make test` already.
chaos: $(VENV)/installed
	@$(BIN)/pytest -q -m chaos

perplexity: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.perplexity

check-cuda:
	@custom_ops/cuda/check.sh

# With the system's Python, which has torch where there is a GPU; without tests/conftest.py, which wants the engine.
test-gpu:
	@custom_ops/cuda/build.sh
	@python3 -m pytest -q --confcutdir=tests/device tests/device

bench-gpu-product bench-gpu-attention bench-gpu-step: bench-gpu-%:
	@custom_ops/cuda/build.sh --bench
	@python3 -m benchmarks.cuda_$* $(ARGS)

$(VENV)/bench-installed: $(VENV)/installed
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[bench]'
	@touch $@

clean:
	@rm -rf $(VENV) .cache build *.egg-info
