"""The simulation finds each deliberate bug within 500 seeds. If it found none, it would prove nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from reqtable.loop.loop import Loop
from reqtable.testing import SimulationFailed
from reqtable.testing.simulation import Report
from tests.mutations import MUTATIONS, RARE, SEEDS, Mutation, first_failure, likely_seeds
from tests.mutations.handover import HANDOVER_MUTATIONS
from tests.mutations.takeover import TAKEOVER_MUTATIONS
from tests.simulation.handover.workloads import run as run_handover
from tests.simulation.takeover.workloads import run as run_takeover
from tests.simulation.workloads import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_is_found(mutation: Mutation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "reqtable")
    found = first_failure(mutation, likely_seeds(mutation))
    assert found is not None, f"{SEEDS} seeds have not found it"
    print(f"{mutation.name}: seed {found[0]}: {found[1]}")


@pytest.mark.parametrize(("seed", "mutation"), RARE, ids=[mutation.name for _, mutation in RARE])
def test_what_was_found_once_would_be_found_again(
    seed: int, mutation: Mutation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "reqtable")
    run(seed)
    assert first_failure(mutation, [seed]) is not None


def test_a_mutation_is_undone() -> None:
    for mutation in [*MUTATIONS, *(mutation for _, mutation in RARE)]:
        original = vars(mutation.owner)[mutation.where]
        with mutation.applied():
            assert vars(mutation.owner)[mutation.where] is not original
        assert vars(mutation.owner)[mutation.where] is original


@pytest.mark.parametrize(
    ("mutation", "simulated"),
    [(MUTATIONS[0], run), (HANDOVER_MUTATIONS[0], run_handover), (TAKEOVER_MUTATIONS[0], run_takeover)],
    ids=["one process", "handover", "takeover"],
)
def test_a_test_that_takes_too_long_has_found_nothing(
    mutation: Mutation, simulated: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_test(loop: Loop, most_s: float | None = None) -> None:
        pytest.fail("too long")  # as pytest-timeout does

    monkeypatch.setattr(Loop, "run_once", end_test)
    with pytest.raises(pytest.fail.Exception, match="too long"):
        first_failure(mutation, [0], simulated)


def test_what_a_seed_finds_only_once_is_no_bug() -> None:
    seen: list[int] = []

    def simulated(seed: int) -> None:
        seen.append(seed)
        if seen == [0, 1]:
            raise SimulationFailed(Report(1, problems=["the time limit of a test"]))

    with pytest.raises(AssertionError, match="seed 1 has found this only once: the time limit of a test"):
        first_failure(MUTATIONS[0], range(3), simulated)
