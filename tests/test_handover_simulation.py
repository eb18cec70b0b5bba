"""Requests move between simulated processes that are killed, stopped and refused at any message."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import SEEDS, Mutation, first_failure, likely_seeds
from tests.mutations.handover import HANDOVER_MUTATIONS, HANDOVER_RARE
from tests.simulation.handover.workloads import run
from tests.support import slow_but

ROOT = Path(__file__).parent.parent
PART = 40


@pytest.mark.parametrize("first", slow_but(range(0, 15 * PART, PART), 0))
def test_seeds(first: int, caplog: pytest.LogCaptureFixture) -> None:
    """`make simulate OF=handover SEEDS=10000` runs more."""
    caplog.set_level(logging.CRITICAL, "reqtable")
    for seed in range(first, first + PART):
        run(seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_same_seed_gives_the_same_trace(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """The traces are equal byte for byte, also in a process with other string hashes."""
    caplog.set_level(logging.CRITICAL, "reqtable")
    _, report = run(seed)
    program = (
        "import logging, sys; logging.disable(); from tests.simulation.handover.workloads import run;"
        f"sys.stdout.write(run({seed})[1].trace)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert other.stdout.decode() == report.trace
    assert "process 2" in report.trace


@pytest.mark.slow
@pytest.mark.parametrize("mutation", HANDOVER_MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_deliberate_bug_is_found(mutation: Mutation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "reqtable")
    found = first_failure(mutation, likely_seeds(mutation), run)
    assert found is not None, f"{SEEDS} seeds have not found it"


@pytest.mark.parametrize(("seed", "mutation"), HANDOVER_RARE, ids=[mutation.name for _, mutation in HANDOVER_RARE])
def test_what_was_found_once_would_be_found_again(
    seed: int, mutation: Mutation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "reqtable")
    run(seed)
    assert first_failure(mutation, [seed], run) is not None


def test_the_deliberate_bugs_can_be_applied() -> None:
    for mutation in [*HANDOVER_MUTATIONS, *(mutation for _, mutation in HANDOVER_RARE)]:
        original = vars(mutation.owner)[mutation.where]
        with mutation.applied():
            assert vars(mutation.owner)[mutation.where] is not original
        assert vars(mutation.owner)[mutation.where] is original
