"""The pytest plugin: the tools of this package as fixtures, and one seed for the whole test run.

The header shows the seed, and so does every simulation that fails. `--reqtable-seed=N` repeats the run.
"""

from __future__ import annotations

from functools import partial
from random import SystemRandom
from typing import Any

import pytest

import reqtable.testing as testing

_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reqtable", "reqtable: simulated servers")
    group.addoption("--reqtable-seed", type=int, metavar="N", help="the seed of simulations; default: random each run")


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--reqtable-seed")
    if seed is None:
        worker = getattr(config, "workerinput", {})  # set in a worker of pytest-xdist: all workers share one seed
        seed = worker.get("reqtable_seed", SystemRandom().randrange(2**32))
    config.stash[_SEED] = seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["reqtable_seed"] = node.config.stash[_SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"reqtable: simulations run with --reqtable-seed={config.stash[_SEED]}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Add the seed to the report of every failed test that uses it."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and "reqtable_seed" in getattr(item, "fixturenames", ()):
        report.sections.append(("reqtable", f"run it again with --reqtable-seed={item.config.stash[_SEED]}"))


@pytest.fixture
def reqtable_seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of this test run."""
    return request.config.stash[_SEED]


@pytest.fixture
def fake_clock() -> testing.FakeClock:
    """Return a clock that only the test moves."""
    return testing.FakeClock()


@pytest.fixture
def sim_network(reqtable_seed: int, fake_clock: testing.FakeClock) -> testing.SimNetwork:
    """Return a simulated network on `fake_clock`, with this run's seed."""
    return testing.SimNetwork(reqtable_seed, clock=fake_clock)


@pytest.fixture
def simulate(reqtable_seed: int) -> Any:
    """Return `reqtable.testing.simulate` with this run's seed."""
    return partial(testing.simulate, seed=reqtable_seed)


@pytest.fixture
def exercise() -> Any:
    """Return `reqtable.testing.exercise`."""
    return testing.exercise
