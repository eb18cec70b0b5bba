"""The pytest plugin: what this package has, as fixtures, and one seed for a whole run.

The seed is printed in the header, and by every simulation that fails: `--reqtable-seed=N` runs it again.
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
    group.addoption("--reqtable-seed", type=int, metavar="N", help="the seed of simulations; default: another each run")


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--reqtable-seed")
    if seed is None:
        worker = getattr(config, "workerinput", {})  # of pytest-xdist, whose workers share one seed
        seed = worker.get("reqtable_seed", SystemRandom().randrange(2**32))
    config.stash[_SEED] = seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["reqtable_seed"] = node.config.stash[_SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"reqtable: simulations run with --reqtable-seed={config.stash[_SEED]}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Tell the seed with every failure of a test that has it."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and "reqtable_seed" in getattr(item, "fixturenames", ()):
        report.sections.append(("reqtable", f"run it again with --reqtable-seed={item.config.stash[_SEED]}"))


@pytest.fixture
def reqtable_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run."""
    return request.config.stash[_SEED]


@pytest.fixture
def fake_clock() -> testing.FakeClock:
    """A clock that moves when it is told to."""
    return testing.FakeClock()


@pytest.fixture
def sim_network(reqtable_seed: int, fake_clock: testing.FakeClock) -> testing.SimNetwork:
    """A simulated network on `fake_clock`, made of this run's seed."""
    return testing.SimNetwork(reqtable_seed, clock=fake_clock)


@pytest.fixture
def simulate(reqtable_seed: int) -> Any:
    """`reqtable.testing.simulate` with this run's seed."""
    return partial(testing.simulate, seed=reqtable_seed)


@pytest.fixture
def exercise() -> Any:
    """`reqtable.testing.exercise`."""
    return testing.exercise
