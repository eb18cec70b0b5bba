# `make run` and `make test` need Python (3.11 or later), git and make. They do all other set-up themselves.

PYTHON ?= python3
PORT ?= 7000
# the folder of the virtual environment; use another folder for each interpreter
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
RUN := $(BIN)/python -m
# With REQTABLE_PURE=1 the tests run without the C module. It is built nevertheless.
INSTALL := REQTABLE_PURE= $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
# what an installation is made from
BUILT_FROM := pyproject.toml setup.py reqtable/lean.c

.PHONY: run test test-slow simulate faults fuzz http-suites compat reloads moving bench bench-page docs check dist static format clean

# serve an example, and show its table in the last line of the terminal; PORT=7001: at another port
run: $(VENV)/run.stamp
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null || \
	    { echo "Port $(PORT) is in use by another program. Choose another one: make run PORT=7001"; exit 1; }
	@echo "In another terminal, talk to the server. Type put 12, one two two, count, then rank; Ctrl-D ends:"
	@echo "    $(VENV)/bin/reqtable talk 127.0.0.1:$(PORT)"
	@echo "Meanwhile, see the table of unfinished requests below, or in a third terminal:"
	@echo "    $(VENV)/bin/reqtable ps"
	@echo "Ctrl-C stops."; exec $(BIN)/reqtable serve examples/notes.py:Notes --bind tcp://127.0.0.1:$(PORT)

# run all but the slow tests, in eight minutes on two cores; ARGS="tests/test_table.py -k cancel": only these
test: $(VENV)/test.stamp
	@$(RUN) compileall -q reqtable examples  # once here, instead of in each process that the tests start
	$(RUN) pytest -n auto --dist worksteal -m "not slow" $(ARGS)

# run the slow tests, which `make test` leaves out: thousands of requests, every combination
test-slow: $(VENV)/test.stamp
	@$(RUN) compileall -q reqtable examples
	$(RUN) pytest -n auto --dist worksteal -m slow $(ARGS)

# run simulations. SEEDS=10000: how many; FIRST=0: the first; BUDGET=60: at most so many seconds;
# FIGURES=docs/explanation/tested.md: write the figures there. SEED=7: run only this seed, and show its details;
# FAULTS="...": allow only these faults; OF=handover: simulate processes that hand their requests over;
# OF=takeover: simulate processes that are killed at any call, and those that take over
simulate: $(VENV)/test.stamp
	@$(RUN) tests.simulation $(if $(OF),--of $(OF)) $(if $(SEED),--seed $(SEED)) $(if $(filter undefined,$(origin FAULTS)),,--faults '$(FAULTS)') \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST)) $(if $(BUDGET),--budget $(BUDGET)) \
	    $(if $(FIGURES),--figures $(FIGURES))

# attack servers as hostile clients would, at full size; ARGS="loris drain": only these attacks
faults: $(VENV)/test.stamp
	@$(RUN) tests.faults $(ARGS)

# send bytes that no client should send; SEEDS=10000: how many seeds; FIRST=0: the first
fuzz: $(VENV)/test.stamp
	@$(RUN) tests.fuzz $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST))
	@$(RUN) tests.fuzz_records $(if $(SEEDS),--seeds $$(( ($(SEEDS) + 9) / 10 ))) $(if $(FIRST),--first $(FIRST))
	@$(RUN) tests.fuzz_control $(if $(SEEDS),--seeds $$(( ($(SEEDS) + 12) / 13 ))) $(if $(FIRST),--first $(FIRST))

# run HTTP suites that others wrote; QUICK=1: in minutes; ARGS="curl load": only these; NGINX=... HAPROXY=...: other builds
http-suites: $(VENV)/http-suites.stamp
	@$(RUN) tests.http_suites $(if $(QUICK),--quick) $(ARGS)

# run CPython's own tests with socketserver replaced; ARGS="test_httpservers": only these
compat: $(VENV)/test.stamp
	@$(RUN) tests.compat $(ARGS)

# test workers under load: kill them 20 times, reload them 100 times, drain them
reloads: $(VENV)/test.stamp
	@$(RUN) tests.reloads $(ARGS)

# restart servers under load: reqtable's and others'; QUICK=1: in minutes; ARGS="restarts peers": only these; SEED=7
moving: $(VENV)/test.stamp
	@$(RUN) tests.moving $(if $(QUICK),--quick) $(if $(SEED),--seed $(SEED)) $(ARGS)

# measure servers that do the same work, in turn; QUICK=1: in minutes; ARGS="echo-* reqtable-state uvloop-*": only these
bench: $(VENV)/bench.stamp
	@$(BIN)/python -m tests.benchmarks run $(if $(QUICK),--quick) $(ARGS)

# write docs/explanation/performance.md and its chart from docs/explanation/performance/figures.json; FIGURES=build/bench.json: of `make bench`;
# ADD=build/bench.json: add the works of a `make bench ARGS=...` to the page
bench-page: $(VENV)/bench.stamp
	@$(BIN)/python -m tests.benchmarks $(if $(ADD),add $(ADD),page $(FIGURES))

# build what an index gets into dist/: the sources, a wheel for this platform, and a wheel in pure Python
dist: $(VENV)/dev.stamp
	rm -rf dist build/dist
	REQTABLE_PURE= $(RUN) build --outdir build/dist .
	REQTABLE_PURE=1 $(RUN) build --wheel --outdir dist .
	PATH="$(BIN):$$PATH" $(RUN) auditwheel repair --wheel-dir dist build/dist/*-linux_*.whl
	mv build/dist/*.tar.gz dist
	$(RUN) twine --no-color check --strict dist/*

# build the site of the documentation in build/site; SERVE=1: serve it instead, and build it again after a change
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs $(if $(SERVE),serve,build)

check: static test

static: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info reqtable/*.so

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("reqtable needs Python 3.11 or later: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(BIN)/python $(BUILT_FROM)
	$(INSTALL) .
	@touch $@

$(VENV)/test.stamp: $(BIN)/python $(BUILT_FROM)
	$(INSTALL) '.[test,docs]'
	@touch $@

$(VENV)/http-suites.stamp: $(BIN)/python $(BUILT_FROM)
	$(INSTALL) '.[test,http-suites]'
	@touch $@

$(VENV)/bench.stamp: $(BIN)/python $(BUILT_FROM)
	$(INSTALL) '.[bench]'
	@touch $@

$(VENV)/docs.stamp: $(BIN)/python $(BUILT_FROM)
	$(INSTALL) '.[docs]'
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python $(BUILT_FROM)
	$(INSTALL) '.[test,docs,dev]'
	@touch $@
