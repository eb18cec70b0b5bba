"""The pytest plugin: its fixtures, and one seed for a test run."""

from __future__ import annotations

import re

import pytest

pytest_plugins = ["pytester"]

TESTS = """
    import reqtable
    from reqtable import line, state
    from reqtable.testing import Client

    class Echo(reqtable.StateRequestHandler):
        @state(line(), timeout=9)
        def echo(self, text):
            self.send(text)
            return self.echo

    def test_one(exercise):
        exercise(Echo).send(b"x\\n").expect(b"x\\n").jump(9).expect_end()

    def test_many(simulate, reqtable_seed):
        client = Client().send(b"x\\n").expect(b"x\\n")
        report = simulate(lambda: reqtable.TCPServer(("127.0.0.1", 0), Echo), [client] * 3)
        print("seed", reqtable_seed, report.seed, "trace", hash(report.trace) and len(report.trace))

    def test_network(sim_network, fake_clock):
        assert sim_network.clock is fake_clock
        fake_clock.jump(3)
"""


@pytest.fixture(autouse=True)
def quiet(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)


def test_a_seed_that_is_given_is_that_of_every_simulation(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--reqtable-seed=77", "-s", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*reqtable: simulations run with --reqtable-seed=77", "*seed 77 77 trace *"])


def test_otherwise_it_is_another_each_time_and_is_told(pytester: pytest.Pytester) -> None:
    seeds = set()
    for _ in range(3):
        result = pytester.runpytest_inprocess("-s", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=3)
        [told] = re.findall(r"--reqtable-seed=(\d+)", result.stdout.str())
        assert f"seed {told} {told} " in result.stdout.str()
        seeds.add(told)
    assert len(seeds) == 3


FAILING = """
    import reqtable
    from reqtable import line, nothing, start_tls, state
    from reqtable.testing import Client

    class Secures(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text):
            return self.secured, start_tls(cert=__file__)

        @state()
        def secured(self, _):
            return None

    def test_peer_error(exercise):
        exercise(Secures).send(b"tls\\nmore\\n")

    def test_simulation(simulate):
        simulate(lambda: reqtable.TCPServer(("127.0.0.1", 0), Secures), [Client().send(b"x\\n").expect(b"y")])
"""


def test_what_fails_is_shown_without_our_frames(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING.replace("\\\\", "\\"))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=2)
    shown = result.stdout.str()
    assert "E       reqtable.table.errors.PeerError: input came before the TLS handshake" in shown
    assert "E       reqtable.testing.simulation.SimulationFailed: seed " in shown
    assert not re.search(r"^\S*/reqtable/\S+\.py:\d+", shown, re.MULTILINE)
    assert "def simulate" not in shown


@pytest.mark.slow
def test_workers_share_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_seed="""
        import pytest

        @pytest.mark.parametrize("n", range(4))
        def test_seed(n, reqtable_seed, worker_id):
            with open(f"seed-{worker_id}-{n}", "w") as file:
                file.write(str(reqtable_seed))
        """
    )
    result = pytester.runpytest_subprocess(
        "-n", "2", "test_seed.py", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"
    )
    result.assert_outcomes(passed=4)
    seeds = {path.read_text() for path in pytester.path.glob("seed-*")}
    assert len(seeds) == 1
