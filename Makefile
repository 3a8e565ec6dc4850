# Start with `make serve` or `make test`: each first does the set-up that it needs. `make help` lists the rest.

# Prefer the system's Python if it is new enough: distributions build it with optimisations that other builds often
# lack, which makes the router a fifth faster.
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
# Links that give the folders the names of the installed packages, for mypy and where nothing is installed.
TYPES  := .cache/types
FAST_PATH := daemon/router/http/libfd_fast_path.so
# Otherwise each of the thousands of processes that the tests start would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help serve model test test-fast test-clients coverage check mypy format docs parity soak fuzz bench-serve bench-engine bench-grammar bench-context bench-replicas \
        bench-long-prompt bench-ep bench-recovery bench-router bench-router-policies chaos profile perplexity install \
        uninstall clean check-cuda test-gpu gpu import-tree bench-gpu-engine bench-gpu-product \
        bench-gpu-attention bench-gpu-step bench-api

help:
	@echo "make serve              set up everything and serve the demo model with eight replicas and a router"
	@echo "make test               set up everything and run all tests"
	@echo "make test-fast          run the tests that start no processes (minutes)"
	@echo "make test-clients       run the tests of clients that are large packages, and longer tests of /openapi.json"
	@echo "make coverage           run all tests except the end-to-end tests, and list the lines that did not run"
	@echo "make check              run ruff, mypy and codespell"
	@echo "make format             format the code and apply ruff's fixes"
	@echo "make docs               generate docs/configuration.md and etc/grafana/fd-dp.json"
	@echo "make install            install or upgrade the systemd service (as root)"
	@echo "make uninstall          remove the service; configuration, models and logs stay"
	@echo
	@echo "Long tests:"
	@echo "make parity             compare the network with transformers on random models (installs torch)"
	@echo "make soak               run random traffic against engine, router and the whole system while processes are"
	@echo "                        killed, and compare every answer; FD_SOAK_MINUTES=3"
	@echo "make fuzz               feed arbitrary bytes to every reader of untrusted input: property tests, and"
	@echo "                        libFuzzer (needs clang); FD_FUZZ_MINUTES=5"
	@echo "make chaos              kill ranks of an expert group at every point of a step"
	@echo "make check-cuda         compile the Hopper kernels and reject spilled registers (needs nvcc, no GPU)"
	@echo "make gpu                build the kernels for H100, H200 and H20 (needs nvcc)"
	@echo "make test-gpu           test the Hopper kernels on a GPU (needs nvcc and a python3 with torch)"
	@echo
	@echo "Benchmarks:"
	@echo "make bench-serve        start time, memory and tokens/s of the whole system"
	@echo "make bench-engine       the CPU engine against transformers and the hardware limits (installs torch)"
	@echo "make bench-grammar      structured against free output, and the time to compile schemas"
	@echo "make bench-context      decode speed by context and batch; writes docs/decode-speed.svg"
	@echo "make bench-replicas     eight engines against one on the same cores"
	@echo "make bench-long-prompt  effect of a long prompt on running streams"
	@echo "make bench-ep           expert parallelism: exchange, throughput, memory, recovery after a kill"
	@echo "make bench-recovery     recovery after kill -9, compared with supervisord alone; reload; cost of fd-dp"
	@echo "make bench-api          cost of the HTTP API for a request and a token, beside other servers' libraries"
	@echo "make bench-router       our router against sglang's, vLLM's and nginx (needs wrk; installs the first two)"
	@echo "make bench-router-policies  simulated routing policies by traffic; writes docs/router-policies.svg"
	@echo "make bench-gpu          a GPU with a random 21B: engine beside transformers, then through the router"
	@echo "make bench-gpu-product  matrix products against cuBLAS; also bench-gpu-attention and bench-gpu-step"
	@echo "make profile            profile of a decode step"
	@echo "make perplexity         perplexity of the demo model in each weight format"

serve: $(VENV)/installed model
	@exec $(BIN)/fd-dp --config $(CONFIG) --prefix $(PREFIX)

# Run three files at a time, because most tests spend half of their time waiting. The end-to-end tests run alone,
# because they keep all cores busy.
test: $(VENV)/installed model
	@$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/e2e --durations=20
	@$(BIN)/pytest tests/e2e --durations=10

test-fast: $(VENV)/installed
	@$(BIN)/pytest -n 2 --dist loadfile --ignore tests/e2e --ignore tests/systemd --ignore tests/fuzz \
	    -m 'not processes and not slow and not chaos' --durations=20

# litellm alone has 29 dependencies.
test-clients: $(VENV)/installed
	@$(PIP) install -q -e '.[clients]' --no-build-isolation
	@$(BIN)/pytest -m 'clients or slow' tests/clients

# Processes that tests start are measured too, except those that a test kills. Tests that fail because the measurement
# slows processes or loads modules do not prevent the report.
coverage: $(VENV)/installed model
	@rm -rf .cache/coverage && mkdir -p .cache/coverage
	-@$(BIN)/coverage run -m pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/e2e
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report --skip-covered --sort=cover

# Install again when the list of packages or a compiled source has changed. The build is not isolated, because the
# operations must be compiled against the Paddle that will load them.
$(VENV)/installed: setup.cfg setup.py pyproject.toml $(COMPILED)
	@echo "fd-dp: installing into $(VENV); the first time this downloads a few hundred MB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@etc/build_requires.sh | $(PIP) install -r /dev/stdin
	@echo "fd-dp: compiling the operations and the router's fast path, about half a minute on two cores"
	@$(PIP) install --no-build-isolation -e '.[test,check]'
	@touch $@

# Download and pack the model here, so that no replica has to do it. This returns at once if it is done already.
model: $(VENV)/installed
	@$(BIN)/python -m fastdeploy.demo_model
	@$(BIN)/python -m fastdeploy.weight_cache demo >/dev/null

check: $(VENV)/installed mypy
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/codespell

mypy: $(VENV)/installed import-tree
	@MYPYPATH=$(TYPES) $(BIN)/mypy -p fastdeploy -p tests -p benchmarks

import-tree:
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fastdeploy
	@ln -s $(CURDIR)/engine/* $(CURDIR)/daemon $(CURDIR)/custom_ops $(TYPES)/fastdeploy/

docs: $(VENV)/installed
	@$(BIN)/python -m fastdeploy.daemon.config.documentation > docs/configuration.md
	@$(BIN)/python etc/grafana/dashboard.py > etc/grafana/fd-dp.json

# Run as root. etc/install.sh describes the variables PREFIX_DIR, PYTHON and DESTDIR.
install:
	@etc/install.sh

uninstall:
	@etc/install.sh --uninstall

format: $(VENV)/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# torch and Paddle have separate environments, so that no process loads both. SEED=n repeats a run. From PyPI, torch
# comes with CUDA (gigabytes); PIP_INDEX_URL or PIP_FIND_LINKS can name an index with CPU builds.
parity: $(VENV)/installed $(PARITY)/installed
	@$(PARITY)/bin/python -m tests.parity.draw --seed $${SEED:-$$(date +%s)} --out .cache/parity
	@$(BIN)/python -m tests.parity.compare .cache/parity

$(PARITY)/installed: Makefile
	@echo "fd-dp: installing torch and transformers into $(PARITY)"
	@test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --disable-pip-version-check --progress-bar on \
	    torch==2.13.0 'transformers>=5.23' numpy
	@touch $@

# FD_SOAK_SEED=n repeats the traffic of a failed run, which prints its seed.
soak: $(VENV)/installed
	@$(BIN)/pytest -q -m slow tests/engine/test_soak.py tests/custom_ops/test_expert_group.py tests/router \
	    tests/e2e/test_unbroken.py

# `make test` includes some seconds of this. Findings are stored in .cache/fuzz.
fuzz: $(VENV)/installed
	@$(BIN)/python -m tests.fuzz

bench-serve: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.serve $(ARGS)

bench-engine: $(VENV)/installed $(PARITY)/installed
	@$(BIN)/python -m benchmarks.engine

bench-grammar: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.grammar

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

# Pass options in ARGS, such as ARGS="--quick --only unary"; `python -m benchmarks.router --help` lists them.
bench-router: $(VENV)/installed
	@$(BIN)/python -m benchmarks.router $(ARGS)

# ARGS can name parts: functions, process, load. Peers and the load generator get environments of their own.
bench-api: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.api $(ARGS)

bench-router-policies: $(VENV)/bench-installed
	@$(BIN)/python -m benchmarks.router_policies

# `make test` includes some of these cases.
chaos: $(VENV)/installed
	@$(BIN)/pytest -q -m chaos

perplexity: $(VENV)/installed model
	@$(BIN)/python -m benchmarks.perplexity

check-cuda:
	@custom_ops/cuda/check.sh

# Use the system's Python, because machines with a GPU usually have torch there. Leave out tests/conftest.py, which
# needs an installation.
test-gpu: import-tree $(FAST_PATH)
	@custom_ops/cuda/build.sh
	@PYTHONPATH=$(TYPES):$$PYTHONPATH python3 -m pytest -q --confcutdir=tests/device tests/device $(ARGS)

# For the router where nothing is installed.
$(FAST_PATH): daemon/router/http/fast_path.cc
	@$(CXX) -O2 -std=c++17 -Wall -shared -fPIC -pthread $< -o $@

# The engine beside transformers, then one replica behind the router. /tmp gets a checkpoint of 44 GB.
bench-gpu: import-tree $(FAST_PATH)
	@custom_ops/cuda/build.sh --bench
	@PYTHONPATH=$(TYPES):$$PYTHONPATH python3 -m benchmarks.gpu --directory $(or $(DIRECTORY),/tmp/fd-dp-21b) $(ARGS)
	@PYTHONPATH=$(TYPES):$$PYTHONPATH python3 -m benchmarks.serve --device gpu --model $(or $(DIRECTORY),/tmp/fd-dp-21b)

# DIRECTORY gets a checkpoint of 44 GB.
bench-gpu-engine: import-tree
	@custom_ops/cuda/build.sh
	@PYTHONPATH=$(TYPES):$$PYTHONPATH python3 -m benchmarks.cuda_engine --directory $(or $(DIRECTORY),/tmp/fd-dp-21b) $(ARGS)

# Beside the compiled operations, where the engine looks for it.
gpu:
	@custom_ops/cuda/build.sh
	@cp build/cuda/libfd_cuda.so custom_ops/
	@echo "fd-dp: custom_ops/libfd_cuda.so is built"

bench-gpu-product bench-gpu-attention bench-gpu-step: bench-gpu-%:
	@custom_ops/cuda/build.sh --bench
	@python3 -m benchmarks.cuda_$* $(ARGS)

$(VENV)/bench-installed: $(VENV)/installed
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[bench]'
	@touch $@

clean:
	@rm -rf $(VENV) .cache build *.egg-info
