# `make run` and `make test` need Python (3.11 or later), git and make; they do all other set-up themselves.

PYTHON ?= python3
PORT ?= 7000
# where the virtual environment is made: one for each interpreter
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# COMPILED=1: what is tested or measured is the compiled wheel
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

# the tests but the slow ones, in less than two minutes on two cores; ARGS="tests/test_table.py -k cancel" for some of them
test: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) compileall -q reqtable examples  # once, and not in each of the processes that the tests start
	$(RUN) pytest -n auto --dist worksteal -m "not slow" $(ARGS)

# those that `make test` leaves out: thousands of requests, every combination
test-slow: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) compileall -q reqtable examples
	$(RUN) pytest -n auto --dist worksteal -m slow $(ARGS)

# SEEDS=10000 how many, FIRST=0 the first, BUDGET=60 at most so many seconds, FIGURES=docs/simulation.md to write them there;
# SEED=7 one, and all of it, FAULTS="..." with no faults but these
simulate: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(filter undefined,$(origin FAULTS)),,--faults '$(FAULTS)') \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST)) $(if $(BUDGET),--budget $(BUDGET)) \
	    $(if $(FIGURES),--figures $(FIGURES))

# what a server must hold that faces a network, at full size; ARGS="loris drain" for some of it
faults: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.faults $(ARGS)

# bytes that no client should send; SEEDS=10000 how many, FIRST=0 the first
fuzz: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.fuzz $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST))

# CPython's own suites with socketserver replaced; ARGS="test_httpservers" for some of them
compat: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.compat $(ARGS)

# workers under load: killed 20 times, reloaded 100 times, drained
reloads: $(VENV)/test.stamp $(COMPILED_STAMP)
	@$(RUN) tests.reloads $(ARGS)

# servers that do the same work, measured in turn; QUICK=1 in minutes, ARGS="echo-* reqtable-state uvloop-*" for some of it
bench: $(VENV)/bench.stamp build/compiled.stamp
	@$(BIN)/python -m tests.benchmarks run $(if $(QUICK),--quick) $(ARGS)

# docs/performance.md and its plots, of docs/performance/figures.json; FIGURES=build/bench.json of the last `make bench`
bench-page: $(VENV)/bench.stamp
	@$(BIN)/python -m tests.benchmarks page $(FIGURES)

# build/reqtable-*.whl, in which what every request passes through is compiled: it takes a C compiler, and half a minute
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

# In a copy, because compiling leaves its results beside the sources. The tests lie beside the wheel's own files, and find those.
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
