# `make run` and `make test` need Python (3.11 or later), git and make. They do all other set-up themselves.

PYTHON ?= python3
PORT ?= 7000
# the folder of the virtual environment; use another folder for each interpreter
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# COMPILED=1 tests or measures the compiled wheel
RUN := $(if $(COMPILED),cd build/compiled && PYTHONPATH=$(CURDIR)/build/compiled )$(BIN)/python -m
COMPILED_STAMP := $(if $(COMPILED),build/compiled.stamp)

.PHONY: run test test-slow simulate faults fuzz compat reloads bench bench-page wheel-compiled check static format clean

CONNECT = import socket; s = socket.create_connection(("127.0.0.1", $(PORT)))
TALK = s.sendall(b"put 12\none two two\ncount\nrank\n"); s.shutdown(1); print(s.makefile().read(), end="")

run: $(VENV)/run.stamp
	@echo "In another terminal (it answers 3, then rank 9):"
	@printf '%s\n' '    $(PYTHON) -c '\''$(CONNECT); $(TALK)'\'
	@echo "With a client connected, see the table of unfinished requests:"
	@printf '%s\n' '    $(PYTHON) -i -c '\''$(CONNECT)'\'
	@echo "    kill -USR1 $$$$"; echo "Ctrl-C stops."; \
	    exec $(BIN)/reqtable serve examples/notes.py:Notes --bind tcp://127.0.0.1:$(PORT)

# run all but the slow tests, in less than two minutes on two cores; ARGS="tests/test_table.py -k cancel": only these
test: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) compileall -q reqtable examples  # once here, instead of in each process that the tests start
	$(RUN) pytest -n auto --dist worksteal -m "not slow" $(ARGS)

# run the slow tests, which `make test` leaves out: thousands of requests, every combination
test-slow: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) compileall -q reqtable examples
	$(RUN) pytest -n auto --dist worksteal -m slow $(ARGS)

# run simulations. SEEDS=10000: how many; FIRST=0: the first; BUDGET=60: at most so many seconds;
# FIGURES=docs/simulation.md: write the figures there. SEED=7: run only this seed, and show its details;
# FAULTS="...": allow only these faults
simulate: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(filter undefined,$(origin FAULTS)),,--faults '$(FAULTS)') \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST)) $(if $(BUDGET),--budget $(BUDGET)) \
	    $(if $(FIGURES),--figures $(FIGURES))

# attack servers as hostile clients would, at full size; ARGS="loris drain": only these attacks
faults: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.faults $(ARGS)

# send bytes that no client should send; SEEDS=10000: how many seeds; FIRST=0: the first
fuzz: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.fuzz $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST))

# run CPython's own tests with socketserver replaced; ARGS="test_httpservers": only these
compat: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.compat $(ARGS)

# test workers under load: kill them 20 times, reload them 100 times, drain them
reloads: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.reloads $(ARGS)

# measure servers that do the same work, in turn; QUICK=1: in minutes; ARGS="echo-* reqtable-state uvloop-*": only these
bench: $(VENV)/bench.stamp build/compiled.stamp
	@$(BIN)/python -m tests.benchmarks run $(if $(QUICK),--quick) $(ARGS)

# write docs/performance.md and its plots from docs/performance/figures.json; FIGURES=build/bench.json: of `make bench`;
# ADD=build/bench.json: add the works of a `make bench ARGS=...` to the page
bench-page: $(VENV)/bench.stamp
	@$(BIN)/python -m tests.benchmarks $(if $(ADD),add $(ADD),page $(FIGURES))

# make build/reqtable-*.whl, in which the hot path is compiled; this needs a C compiler and half a minute
wheel-compiled: build/compiled.stamp

check: static test

static: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info *.so reqtable/*/*.so

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("reqtable needs Python 3.11 or later: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,cluster]'
	@touch $@

# Compile in a copy, because the compiler writes beside the sources. The tests are copied into the unpacked wheel.
build/compiled.stamp: $(BIN)/python pyproject.toml $(shell find reqtable tests examples docs -name '*.py' -o -name '*.md')
	rm -rf build/compiled build/source build/*.whl
	mkdir -p build/source
	cp -r reqtable pyproject.toml README.md LICENSE build/source
	HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build build/source
	$(BIN)/python -m zipfile -e build/reqtable-*.whl build/compiled
	cp -r tests examples docs pyproject.toml Makefile LICENSE *.md build/compiled
	cd build/compiled && $(BIN)/python -c 'import reqtable.loop.loop as loop; assert not loop.__file__.endswith(".py")'
	@touch $@

$(VENV)/bench.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,cluster,dev]'
	@touch $@
