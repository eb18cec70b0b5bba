"""Simulated workers die at any call to the kernel and at any store into the journal, and others take over."""

from __future__ import annotations

import gc
import logging
import os

import pytest

from tests.mutations import SEEDS, Mutation, first_failure, likely_seeds
from tests.mutations.takeover import TAKEOVER_MUTATIONS, TAKEOVER_RARE
from tests.simulation.takeover.workloads import run
from tests.support import slow_but

PART = 40


@pytest.mark.parametrize("first", slow_but(range(0, 15 * PART, PART), 0))
def test_seeds(first: int, caplog: pytest.LogCaptureFixture) -> None:
    """`make simulate OF=takeover SEEDS=10000` runs more."""
    caplog.set_level(logging.CRITICAL, "reqtable")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(first, first + PART):
        run(seed)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_same_seed_gives_the_same_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "reqtable")
    trace = run(0)[1].trace
    assert run(0)[1].trace == trace
    assert "the process is killed" in trace


# Bugs of the engine that the simulation has found, each with a seed that finds it.
FOUND = {
    "a blocked row lost its output, if its worker died between the opening and the closing of its page": 66,
    "a connection that was reset before its request began had totals below 0": 29,
    "a row whose connection was reset went on with totals that lacked a byte": 73,
    "a record had the want of before the step, because the lean path stored the next one after the flush": 2166,
    "a row that waited for the first of several wants was lost": 8,
}


@pytest.mark.parametrize("seed", FOUND.values(), ids=list(FOUND))
def test_what_was_found(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "reqtable")
    run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", TAKEOVER_MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_deliberate_bug_is_found(mutation: Mutation, caplog: pytest.LogCaptureFixture) -> None:
    # Nothing at all: a captured record has the exception, whose frames have the journal of the simulation that failed.
    caplog.set_level(logging.CRITICAL + 1, "reqtable")
    found = first_failure(mutation, likely_seeds(mutation), run)
    assert found is not None, f"{SEEDS} seeds have not found it"


@pytest.mark.parametrize(("seed", "mutation"), TAKEOVER_RARE, ids=[mutation.name for _, mutation in TAKEOVER_RARE])
def test_what_was_found_once_would_be_found_again(
    seed: int, mutation: Mutation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "reqtable")
    run(seed)
    assert first_failure(mutation, [seed], run) is not None


def test_the_deliberate_bugs_can_be_applied() -> None:
    for mutation in [*TAKEOVER_MUTATIONS, *(mutation for _, mutation in TAKEOVER_RARE)]:
        original = vars(mutation.owner)[mutation.where]
        with mutation.applied():
            assert vars(mutation.owner)[mutation.where] is not original
        assert vars(mutation.owner)[mutation.where] is original
