# Two commands: `make serve` and `make test`. Each does all the set-up it needs, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= etc/dp.toml
PREFIX ?= run
# An import tree with the names that the installed package has, for mypy.
TYPES  := .cache/types

.PHONY: help serve model test check mypy format bench-serve clean

help:
	@echo "make serve        set up everything and serve the demo model: eight replicas, one router"
	@echo "make test         set up everything and run all tests"
	@echo "make check        ruff and mypy"
	@echo "make format       ruff, writing"
	@echo "make parity       compare the network with transformers on random models (installs torch)"
	@echo "make bench-serve  start-up time, memory and tokens/s of the whole system"
	@echo "make install      install as a systemd service (as root)"

serve: $(VENV)/installed model
	@exec $(BIN)/fd-dp --config $(CONFIG) --prefix $(PREFIX)

test: $(VENV)/installed model
	@$(BIN)/pytest

# The stamp is newer than what decides which packages have to be there.
$(VENV)/installed: setup.cfg setup.py pyproject.toml
	@echo "fd-dp: installing into $(VENV); the first time a few hundred MB are fetched"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[test,check]'
	@touch $@

# Returns at once when the model is there.
model: $(VENV)/installed
	@$(BIN)/python -m fastdeploy.demo_model

check: $(VENV)/installed mypy
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

mypy: $(VENV)/installed
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fastdeploy
	@ln -s $(CURDIR)/engine/* $(CURDIR)/daemon $(CURDIR)/custom_ops $(TYPES)/fastdeploy/
	@MYPYPATH=$(TYPES) $(BIN)/mypy -p fastdeploy

format: $(VENV)/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench-serve: $(VENV)/installed model
	@$(BIN)/python benchmarks/serve.py

clean:
	@rm -rf $(VENV) .cache build *.egg-info
