"""Whole servers on a simulated network: seeds of every workload; the seed alone determines a simulation."""

from __future__ import annotations

import logging
import os
import re
import socketserver
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.echo import BlockingEcho, StateEcho
from examples.notes import Notes
from reqtable import Transition, line, sleep, state
from reqtable.server.invariants import InvariantBroken, Invariants
from reqtable.table.states import TRANSITIONS, Event, State
from reqtable.testing import Client, FakeClock, Faults, SimulationFailed, Upstream, shrink, simulate
from reqtable.testing.faults import KINDS
from tests.mutations import MUTATIONS, RARE, SEEDS
from tests.simulation.reaching import Forward
from tests.simulation.upstreams import with_target
from tests.simulation.workloads import PROTOCOLS, run, workload_of
from tests.support import slow_but

ROOT = Path(__file__).parent.parent
ANY = ("127.0.0.1", 0)
HERE = ("127.0.0.1", 7000)
PART = 100


def notes() -> reqtable.TCPServer:
    return reqtable.TCPServer(ANY, Notes)


class Table(reqtable.TableMixIn, socketserver.TCPServer):
    """Puts our table behind the standard library's server."""


COUNTING = Client().send(b"put 5\n").pause(3).send(b"a b c").send(b"count\n").expect(b"3\n").end().expect_end()


@pytest.mark.parametrize("first", slow_but(range(0, 8 * PART, PART), 0))
def test_seeds(first: int, caplog: pytest.LogCaptureFixture) -> None:
    """`make simulate SEEDS=10000` runs more."""
    caplog.set_level(logging.CRITICAL, "reqtable")
    for seed in range(first, first + PART):
        run(seed)


# -- a seed is all there is to it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed",
    slow_but([*range(len(PROTOCOLS)), 306], 0, 4, 8, 306),  # 306 says of which function a client is done
)
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    """The traces are equal byte for byte, also in a process with other string hashes."""
    _, report = run(seed)
    program = f"import sys; from tests.simulation.workloads import run; sys.stdout.write(run({seed})[1].trace)"
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert other.stdout.decode() == report.trace
    assert report.trace.count("\n") > 5


def test_what_is_first_imported_in_a_simulation_is_not_of_it() -> None:
    """A past bug: ssl and the cooperative sockets kept the simulated socket class of the first simulation."""
    program = (
        "import socket; from tests.simulation.workloads import run; runs = [run(seed) for seed in range(10, 20)];"
        "import ssl; print(ssl.SSLSocket.__base__ is socket.socket)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    "child",
    [
        "p = multiprocessing.get_context('fork').Process(target=folder); p.start(); p.join()",
        "pid = os.fork(); pid or sys.exit(); os.waitpid(pid, 0)",
    ],
    ids=["multiprocessing", "os.fork"],
)
def test_the_folder_of_a_workload_lasts_as_long_as_the_process_that_made_it(child: str) -> None:
    program = (
        "import multiprocessing, os, sys; from tests.simulation.workloads import folder, tftp_files; tftp_files();"
        f"{child}; print(folder(), len(os.listdir(folder())))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    path, _, count = done.stdout.partition(" ")
    assert count == "7\n", done.stderr
    assert not Path(path).exists()


def test_a_worker_of_multiprocessing_removes_its_own_folder() -> None:
    program = (
        "import multiprocessing; from tests.simulation.workloads import folder;"
        "p = multiprocessing.get_context('fork').Process(target=lambda: print(folder())); p.start(); p.join()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "reqtable-simulation-" in done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_another_seed_gives_another_trace() -> None:
    traces = {simulate(notes, [COUNTING] * 3, seed=seed).trace for seed in range(10)}
    assert len(traces) == 10


def test_a_trace_is_legal_and_whole() -> None:
    report = simulate(notes, [COUNTING] * 5, seed=5)
    states: dict[str, State] = {}
    for number, before, event, after in re.findall(r"#(\d+) (\w+) -(.*)-> (\w+)", report.trace):
        assert states.get(number, State.OPENING) is State[before]
        assert TRANSITIONS[State[before]][Event(event)] is State[after]
        states[number] = State[after]
    assert list(states.values()) == [State.CLOSED] * 5
    assert report.requests == 5
    assert [peer.received for peer in report.clients] == [b"3\n"] * 5
    assert report.simulated_s > 3
    assert report.bytes_in == 5 * len(b"put 5\na b ccount\n")


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_comes(kind: str) -> None:
    datagrams = kind in ("lost", "repeated", "reordered", "cut")
    server = reqtable.UDPServer if datagrams else reqtable.TCPServer
    faults = Faults(**{**dict.fromkeys(KINDS, 0.0), kind: 0.5})  # type: ignore[arg-type]
    lines = Client().send(b"put 300\n" + bytes(300)).pause(1).send(b"count\ncount\n").pause(70)
    reaches_out = kind in ("slow_lookup", "misdirected", "refused", "unanswered", "unresolved")
    handler = with_target(Forward, target="tcp://up.example:7") if reaches_out else Notes
    report = simulate(
        lambda: server(ANY, handler),
        [lines] * 20,
        upstreams=[Upstream("tcp://192.0.2.1:7", Client().take_rest())],
        names={"up.example": ["192.0.2.1"]},
        seed=3,
        faults=faults,
    )
    assert set(report.faults_by_kind) == {kind}
    assert report.faults_by_kind[kind] == len(report.faults) > 1
    assert all(f" fault {name}\n" in report.trace for name in report.faults)


def test_without_faults_there_are_none() -> None:
    assert simulate(notes, [COUNTING] * 3, seed=1, faults=Faults.none()).faults == []


def test_what_a_client_can_tell_is_held_against_nobody() -> None:
    report = simulate(notes, [COUNTING] * 20, seed=1, faults=Faults(reset=0.3))
    hit = [peer for peer in report.clients if peer.was_hit]
    assert 0 < len(hit) < 20
    assert all(peer.ended == "reset" for peer in hit)
    assert all(peer.received == b"3\n" for peer in report.clients if not peer.was_hit)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match="partial must be a probability"):
        Faults(partial=rate)


def test_a_failure_shrinks_to_the_faults_that_it_takes() -> None:
    class Hasty(reqtable.StateRequestHandler):
        """Has a bug: it takes any input that has arrived for a whole command."""

        @state(reqtable.chunk(100), timeout=10)
        def command(self, data: bytes) -> Transition:
            self.send(b"yes\n" if data == b"well?\n" else b"what?\n")
            return self.command

    def attempt(faults: Faults) -> None:
        client = Client().send(b"well?\n").expect(b"yes\n")
        simulate(lambda: reqtable.TCPServer(ANY, Hasty), [client] * 5, seed=2, faults=faults)

    def fails(names: object) -> bool:
        try:
            attempt(Faults().restricted_to(names))  # type: ignore[arg-type]
        except SimulationFailed:
            return True
        return False

    with pytest.raises(SimulationFailed, match=r"expected b'yes\\n', found b'what") as failed:
        attempt(Faults())
    least = shrink(fails, failed.value.report.faults)
    assert len(least) == 1 < len(failed.value.report.faults)
    assert least[0].startswith("split@c")


def test_shrinking_finds_what_belongs_together() -> None:
    names = [str(number) for number in range(100)]
    assert shrink(lambda some: {"13", "77"} <= set(some), names) == ["13", "77"]
    assert shrink(lambda _: True, names) == []


# -- what is a failure -----------------------------------------------------------------------------------------------


def failing(client: Client, match: str, server: object = notes) -> SimulationFailed:
    with pytest.raises(SimulationFailed, match=match) as failed:
        simulate(server, [COUNTING, client], seed=11)  # type: ignore[arg-type]
    assert failed.value.report.seed == 11
    return failed.value


def test_an_expectation_that_does_not_come_true() -> None:
    failing(Client().send(b"count\n").expect(b"1\n"), r"seed 11: client 1: expected b'1\\n', found b'0\\n'")


def test_waiting_for_what_never_comes() -> None:
    failing(Client().expect(b"hello"), r"client 1: expected b'hello', found b'': the connection was ended")

    class Silent(reqtable.StateRequestHandler):
        @state(line())
        def hear(self, text: bytes) -> Transition:
            return self.hear

    with pytest.raises(SimulationFailed, match=r"client 0: expect\(b'x'\): nothing will ever come"):
        simulate(lambda: reqtable.TCPServer(ANY, Silent), [Client().expect(b"x")])


def test_a_request_that_nothing_will_end() -> None:
    class Stuck(reqtable.StateRequestHandler):
        @state(sleep(1))
        def wait(self, _: None) -> Transition:
            return self.never, reqtable.call(self.entry.table.owner.post_result)  # type: ignore[union-attr]

        @state()
        def never(self, _: object) -> Transition:
            return None

        def on_error(self, error: Exception) -> Transition:
            return self.lost

        @state(Never())
        def lost(self, _: None) -> Transition:
            return None

    with pytest.raises(SimulationFailed, match="waits for something that never comes"):
        simulate(lambda: reqtable.TCPServer(ANY, Stuck), [Client().pause(1)], faults=Faults.none())


class Never(reqtable.Want[None]):
    """Waits for an item that nobody posts."""

    awaits = Event.AWAITS_RESULT

    def take(self, entry: object) -> object:
        from reqtable.table.input import MISSING

        return MISSING


def test_a_handler_that_raises() -> None:
    class Wrong(reqtable.StateRequestHandler):
        @state(line())
        def hear(self, text: bytes) -> Transition:
            raise LookupError("as asked")

    def server() -> reqtable.TCPServer:
        return reqtable.TCPServer(ANY, Wrong)

    with pytest.raises(SimulationFailed, match="a handler raised LookupError: as asked") as failed:
        simulate(server, [Client().send(b"x\n")])
    assert [type(error) for error in failed.value.report.errors] == [LookupError]


def test_going_on_and_on() -> None:
    class Restless(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while True:
                await self.sleep(0.001)

    with pytest.raises(SimulationFailed, match="has not ended after 3000 passes"):
        simulate(lambda: reqtable.TCPServer(ANY, Restless), [Client().pause(1)], passes_max=3000)


def test_descriptors_that_a_server_forgets() -> None:
    class Forgetful(reqtable.TCPServer):
        def close_request(self, request: object) -> None:
            pass

    with pytest.raises(SimulationFailed, match="open but unowned"):
        simulate(lambda: Forgetful(ANY, Notes), [COUNTING])


def test_policies_that_need_the_real_world_are_refused() -> None:
    with pytest.raises(
        reqtable.ConfigurationError, match="policy 'fork' can't be simulated: greenlet, inline, pool can"
    ):
        simulate(lambda: reqtable.TCPServer(ANY, Notes, dispatch="fork"), [COUNTING])


def test_nobody_listens() -> None:
    class Elsewhere(reqtable.TCPServer):
        def server_activate(self) -> None:
            super().server_activate()
            self.server_address = ("127.0.0.1", 1)

    with pytest.raises(SimulationFailed, match=r"can't be sent: nobody listens"):
        simulate(lambda: Elsewhere(ANY, Notes), [COUNTING])


def test_a_server_that_ends_before_its_clients_are_served() -> None:
    class Ending(Notes):
        def on_close(self) -> None:
            self.server.shutdown()

    waiting = Client().pause(60).send(b"count\n").expect(b"0\n")
    with pytest.raises(SimulationFailed, match=r"client 1: expect"):
        simulate(lambda: reqtable.TCPServer(ANY, Ending), [COUNTING, waiting], faults=Faults.none())


def test_a_blocking_handler_that_waits_for_ever() -> None:
    class Patient(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()

    with pytest.raises(SimulationFailed, match="a blocking call waits for something that never comes"):
        simulate(lambda: reqtable.TCPServer(ANY, Patient), [Client().take_rest()])


def test_handing_off_to_what_is_not_simulated() -> None:
    class Leaving(reqtable.StateRequestHandler):
        @state(line())
        def hear(self, text: bytes) -> Transition:
            return self.hear, reqtable.hand_off("fork")

    with pytest.raises(SimulationFailed, match="ConfigurationError: policy 'fork' can't be simulated"):
        simulate(lambda: reqtable.TCPServer(ANY, Leaving), [Client().send(b"x\n")])


@pytest.mark.parametrize("server", [reqtable.TCPServer, Table])
def test_blocking_handlers_and_servers_of_the_standard_library(server: Any) -> None:
    echo = Client().send(b"one\ntw").pause(5).send(b"o\n").expect(b"one\ntwo\n").end().expect_end()
    for seed in range(20):
        report = simulate(lambda: server(ANY, BlockingEcho), [echo] * 3, seed=seed)
        assert [peer.received for peer in report.clients] == [b"one\ntwo\n"] * 3


def test_calls_of_every_kind_are_simulated() -> None:
    class Calls(reqtable.StateRequestHandler):
        @state(line())
        def hear(self, text: bytes) -> Transition:
            return self.called, reqtable.call(len, text, on=text.strip().decode())

        @state()
        def called(self, count: int) -> Transition:
            self.send(b"%d\n" % count)
            return self.hear

    client = Client().send(b"process\nfork\nthread\n").expect(b"8\n5\n7\n").end().expect_end()
    simulate(lambda: reqtable.TCPServer(ANY, Calls), [client] * 3)


@pytest.mark.parametrize(
    ("server", "address", "peer"),
    [
        (reqtable.UnixStreamServer, "/somewhere", b"''"),
        (reqtable.TCPServer, ("localhost", 0), b"('198.51.100.1', 50000)"),
    ],
)
def test_addresses(server: Any, address: Any, peer: bytes) -> None:
    class Who(reqtable.StateRequestHandler):
        @state(line())
        def hear(self, text: bytes) -> Transition:
            self.send(repr(self.client_address).encode() + b"\n")
            return self.hear

    simulate(lambda: server(address, Who), [Client().send(b"?\n").expect(peer + b"\n").end().expect_end()])


# -- upstreams -------------------------------------------------------------------------------------------------------

HELLO = Client().send(b"hello").end().expect(b"well?").expect_end()
WELL = Client().expect(b"hello").expect_end().send(b"well?")


def forwarder(address: str = "tcp://192.0.2.1:7") -> Any:
    return lambda: reqtable.TCPServer(ANY, with_target(Forward, target=address))


def test_a_server_reaches_its_upstreams() -> None:
    upstreams = [Upstream("tcp://[2001:db8::1]:7", WELL), Upstream("tcp://192.0.2.1:7", answers_after_s=None)]
    names = {"up.example": ["192.0.2.1", "2001:db8::1"]}
    for seed in range(20):
        report = simulate(forwarder("tcp://up.example:7"), [HELLO] * 3, upstreams=upstreams, names=names, seed=seed)
        assert [repr(peer) for peer in report.upstreams] == [
            f"upstream tcp://[2001:db8::1]:7, connection {number}" for number in range(3)
        ]
        assert [peer.received for peer in report.upstreams] == [b"hello"] * 3


def test_an_expectation_of_an_upstream_that_does_not_come_true() -> None:
    upstream = Upstream("tcp://192.0.2.1:7", Client().expect(b"goodbye"))
    with pytest.raises(SimulationFailed, match=r"upstream tcp://192.0.2.1:7, connection 0: expected b'goodbye'"):
        simulate(forwarder(), [Client().send(b"hello").take_rest()], upstreams=[upstream], faults=Faults.none())


def test_a_connection_that_its_request_loses() -> None:
    class Careless(Forward):
        def on_close(self) -> None:
            self.upstream.row.parent = None  # its row stays in the table, and nothing will end it

        @state()
        def connected(self, upstream: Any) -> Transition:
            self.upstream = upstream
            upstream.row.parent.reach.connections.remove(upstream.row)
            return None

    def server() -> reqtable.TCPServer:
        return reqtable.TCPServer(ANY, with_target(Careless, target="tcp://192.0.2.1:7"))

    with pytest.raises(SimulationFailed, match="is idle for longer than connections_idle_s"):
        simulate(server, [Client().send(b"x")], upstreams=[Upstream("tcp://192.0.2.1:7")], faults=Faults.none())


def test_where_no_upstream_listens_connections_are_refused() -> None:
    report = simulate(forwarder(), [Client().expect(b"-failed\n").expect_end()])
    assert report.upstreams == []
    assert not report.were_upstreams_hit


def test_what_hits_an_upstream_is_held_against_nobody() -> None:
    upstream = Upstream("tcp://192.0.2.1:7", WELL)
    for kind in ("refused", "unanswered", "reset", "aborted"):
        faults = Faults(**{kind: 0.9})  # type: ignore[arg-type]
        report = simulate(forwarder(), [HELLO], upstreams=[upstream], faults=faults, seed=2)
        assert report.were_upstreams_hit or report.clients[0].was_hit
        assert report.clients[0].received != b"well?"
    report = simulate(forwarder("tcp://up.example:7"), [HELLO], faults=Faults(unresolved=1.0))
    assert report.clients[0].received == b"-failed\n"


# -- misuse ----------------------------------------------------------------------------------------------------------


def never_begun(peer: Any) -> Any:
    peer.send(b"count\n")
    yield from peer.receive(timeout_s=1)


def wrong(peer: Any) -> Any:
    yield from peer.send({}["a"])


def bare(peer: Any) -> Any:
    if peer:
        raise AssertionError
    yield


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (never_begun, r"a script called peer.send\(\) and did not wait for it"),
        (wrong, "client 0: KeyError in then"),
        (bare, "client 0: AssertionError in then"),
    ],
)
def test_a_mistake_in_a_script_fails_and_names_its_client(script: Any, said: str) -> None:
    with pytest.raises(SimulationFailed, match=said):
        simulate(notes, [Client().then(script)])


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: Client().send("x"), r"send\(\) takes bytes, not str"),
        (lambda: Client().expect(5), r"expect\(\) takes bytes, not int"),
        (lambda: Client().pause(-1), r"pause\(\) takes seconds, 0 or more, not -1"),
        (lambda: Client().pause(float("nan")), "not nan"),
        (lambda: Client().then(len), "takes a generator function"),
        (lambda: simulate(notes, COUNTING), "clients must be a list of scripts"),
        (lambda: simulate(notes, []), "there are no clients"),
        (lambda: simulate(notes, [Client]), "a client must be a script"),
        (
            lambda: simulate(BlockingEcho, [COUNTING]),
            r"a server: simulate\(lambda: TCPServer\(\(…\), BlockingEcho\), …\)",
        ),
        (
            lambda: simulate(reqtable.TCPServer, [COUNTING]),
            r"simulate takes a function that makes a server: .* Handler",
        ),
        (lambda: simulate(5, [COUNTING]), r"simulate takes a function that makes a server: .*, not 5"),
        (lambda: simulate(lambda: None, [COUNTING]), r"server_factory\(\) must make a server"),
        (lambda: simulate(notes, [COUNTING], seed="x"), "seed must be a whole number"),
        (lambda: simulate(notes, [COUNTING], faults={}), r"faults must be Faults\(…\)"),
        (lambda: simulate(lambda: reqtable.TCPServer(ANY, BlockingEcho, dispatch="pool"), [COUNTING]), "has a thread"),
        (lambda: simulate(notes, [COUNTING], upstreams=[COUNTING]), "upstreams must be a list, such as"),
        (lambda: simulate(notes, [COUNTING], upstreams=[Upstream("udp://[::1]:7")] * 2), "at the same address"),
        (lambda: Faults(reset="a"), "reset must be a probability"),
        (lambda: Faults(delay_max_s=-1), "delay_max_s must be seconds"),
        (lambda: Faults().restricted_to("nonsense"), "'nonsense' is not the name of a fault"),
        (lambda: shrink(lambda _: False, ["a"]), "there is nothing to shrink"),
    ],
)
def test_misuse_is_told_where_it_is_done(attempt: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        attempt()


def test_a_server_that_was_made_before() -> None:
    with notes() as made, pytest.raises(ValueError, match=r"make it in server_factory\(\)"):
        simulate(lambda: made, [COUNTING])


def test_a_server_in_place_of_the_function_that_makes_it() -> None:
    said = r"simulate takes a function that makes a server: simulate\(lambda: TCPServer\(\(…\), Notes\), …\), not <"
    with notes() as made, pytest.raises(TypeError, match=said):
        simulate(made, [COUNTING])  # type: ignore[arg-type]


# -- invariants ------------------------------------------------------------------------------------------------------


def test_a_broken_invariant_ends_a_server_that_is_debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_loop import World

    monkeypatch.setenv("REQTABLE_DEBUG", "1")
    world = World(FakeClock(), StateEcho)
    _, entry = world.connect()
    world.passes()
    entry.deadline = None
    with pytest.raises(InvariantBroken, match=r"<Entry 1 READING .* should time out after 60 s, but has no deadline"):
        world.passes()
    entry.transport.watch(0)
    entry.deadline = world.clock.now + 60
    with pytest.raises(InvariantBroken, match="is polled for 0, not for 1"):
        world.passes()
    entry.transport.watch(1)
    world.passes()
    world.close()


def checks(engine: reqtable.Engine) -> bool:
    """Return whether the engine checks its invariants after each pass."""
    return any(isinstance(getattr(told, "__self__", None), Invariants) for told in engine.loop.after_pass)


def test_without_it_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQTABLE_DEBUG", raising=False)
    assert not checks(reqtable.Engine())
    monkeypatch.setenv("REQTABLE_DEBUG", "0")
    assert not checks(reqtable.Engine())
    monkeypatch.setenv("REQTABLE_DEBUG", "1")
    assert checks(reqtable.Engine())


# -- the fuzzer's command --------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tests.simulation", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_sums_up() -> None:
    result = command("--seeds", "60", "--first", "1000")
    assert result.returncode == 0, result.stderr
    assert "| seeds | 60, of which 0 failed |" in result.stdout
    assert "60/60 seeds, 0 failed" in result.stderr


def test_the_command_shows_one_seed() -> None:
    seed = next(seed for seed in range(100) if workload_of(seed).name == "echo StateEcho")
    result = command("--seed", str(seed), "--faults", "")
    assert result.returncode == 0, result.stderr
    assert "#1 OPENING -opened-> RUNNING" in result.stdout
    assert "fault" not in result.stdout.split("\n", 1)[1]
    assert result.stdout.endswith("nothing is wrong\n")


def test_the_command_explains_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.simulation.__main__ import explain, simulate_all

    [bug] = [each for each in MUTATIONS if each.name == "a partial send is forgotten"]
    with bug.applied():
        total = simulate_all(range(3))
        seed, problem = total.failed[0]
        lines = list(explain(seed, problem))
    assert lines[0].startswith(f"seed {seed}: ")
    assert lines[1].startswith("  faults needed to make it fail: ")
    assert lines[2].startswith(f'  make simulate SEED={seed} FAULTS="')


def test_the_documented_figures_are_those_of_this_tree() -> None:
    """`make simulate FIGURES=docs/explanation/tested.md` writes the figures. The names in them must still exist."""
    text = (
        (ROOT / "docs" / "explanation" / "tested.md")
        .read_text()
        .partition("\nThis table is about the simulated hand-over:")[0]
    )
    assert re.search(r"\| seeds \| 1\d,\d{3}, of which 0 failed \|", text)
    [kinds] = re.findall(r"\| faults injected \| [\d,]+: (.*) \|", text)
    assert {each.split()[0] for each in kinds.split(", ")} == set(KINDS)
    [ratio] = re.findall(r"\| simulated : real \| ([\d,]+) \|", text)
    assert int(ratio.replace(",", "")) >= 100
    found = dict(re.findall(r"^\| ([^|]+) \| (\d+) \| [^|]+ \|$", text, flags=re.MULTILINE))
    assert list(found) == [mutation.name for mutation in [*MUTATIONS, *(rare for _, rare in RARE)]]
    assert sum(int(seed) < SEEDS for seed in found.values()) == len(MUTATIONS) >= 10
