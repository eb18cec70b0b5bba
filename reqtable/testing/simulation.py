"""`simulate` runs a server and its clients on a simulated network. One seed decides the interleaving and the faults."""

from __future__ import annotations

import inspect
import logging
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any
from unittest import mock

from reqtable.dispatch import is_resumable
from reqtable.net.outgoing import OutgoingDatagrams
from reqtable.net.poll_only import PollOnly
from reqtable.net.stream import Stream
from reqtable.server.base import LoopServer
from reqtable.server.engine import Engine
from reqtable.server.invariants import Invariants
from reqtable.table.errors import PeerError
from reqtable.table.parts import OVER
from reqtable.table.states import INTEREST, RESET, Event, State
from reqtable.table.table import Entry
from reqtable.table.tracebacks import account_of
from reqtable.testing.client import Client, Peer
from reqtable.testing.faults import Faults
from reqtable.testing.kernel import StreamEnd
from reqtable.testing.network import SimNetwork
from reqtable.testing.upstream import Upstream, UpstreamPeer

log = logging.getLogger("reqtable")

__tracebackhide__ = True  # pytest shows the test's line, and not this module

_LATENCY_S = 0.0001
_STILL_PASSES_MAX = 2000
_THREADS = 8  # for the calls of a server


@dataclass
class Report:
    """Describes what happened in a simulation."""

    seed: int
    clients: list[Peer] = field(default_factory=list)  # the clients, with `received`, `datagrams` and `ended`
    upstreams: list[UpstreamPeer] = field(default_factory=list)  # the connections of upstreams, with the same
    trace: str = ""  # a line for each transition of an entry and for each fault; the same seed gives the same trace
    faults: list[str] = field(default_factory=list)  # the names of the injected faults
    faults_by_kind: Counter[str] = field(default_factory=Counter)  # the number of injected faults of each kind
    errors: list[BaseException] = field(default_factory=list)  # the errors of handlers that handle_error got
    problems: list[str] = field(default_factory=list)  # the reasons why the simulation failed
    requests: int = 0  # the number of requests, and of their outgoing connections
    were_upstreams_hit: bool = False  # true: a fault of the second group hit an upstream, so no expectation is checked
    passes: int = 0  # the passes of the loop
    steps: int = 0  # the steps of all requests
    transitions: int = 0  # the transitions of all requests
    bytes_in: int = 0  # the bytes that requests and their connections have received
    bytes_out: int = 0  # the bytes that requests and their connections have sent
    simulated_s: float = 0.0  # the simulated time, in seconds


class SimulationFailed(AssertionError):
    """A simulation has failed, for one of the reasons that `simulate` lists. `report` has the details."""

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"seed {report.seed}: {report.problems[0]}", *report.problems[1:]]
        if report.faults:
            lines.append(f"{len(report.faults)} faults were injected: {', '.join(report.faults[:20])}")
        super().__init__("\n".join(lines))


def simulate(
    server_factory: Callable[[], Any],
    clients: Sequence[Client],
    *,
    upstreams: Sequence[Upstream] = (),
    names: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    faults: Faults | None = None,
    passes_max: int = 200_000,
    executor: Callable[[Callable[..., None]], Executor] | None = None,
) -> Report:
    """Make a server with `server_factory()`, and have it serve `clients` on a simulated network.

    The server can connect to `upstreams`. `names` has the addresses of each name that it can look up.

    The server is an ordinary server under policy inline, greenlet or pool. Its sockets, clock, selector and executors
    are simulated, and `seed` decides all that is left to chance: the same arguments give the same trace, byte for byte.
    The simulation ends when the clients are done and the table is empty.

    `executor(after)` makes what runs every `call`, such as a model of a cluster. `after(seconds, function, *args)` has
    the function called when so much simulated time has passed. Without `executor`, eight threads run the calls, and
    each call takes a time that the seed decides. The simulation fails if it has not ended after `passes_max` passes of
    the loop.

    Raises TypeError or ValueError if the arguments can't be simulated. Raises SimulationFailed if a client's
    expectation is not met, a handler raises an error that is not the peer's fault, a client or request waits for ever,
    anything is left over, or an invariant of the engine is broken.
    """
    simulation = _Simulation(seed, faults, passes_max, names, executor)
    report = simulation.run(server_factory, clients, upstreams)
    if report.problems:
        raise SimulationFailed(report)
    return report


def _check_factory(given: Any) -> None:
    """Raise TypeError for a handler class, a server, or a class of servers that needs arguments."""
    is_factory = callable(given) and (not isinstance(given, type) or issubclass(given, LoopServer))
    if is_factory:
        try:
            inspect.signature(given).bind()
        except ValueError:  # perhaps a function written in C
            return
        except TypeError:
            is_factory = False
    if not is_factory:
        raise TypeError(
            "simulate takes a function that makes a server: "
            f"simulate(lambda: TCPServer((…), {_handler_name(given)}), …), not {given!r}"
        )


def _handler_name(given: Any) -> str:
    """Return the name of the handler class that was given, alone or in a server."""
    own = getattr(given, "RequestHandlerClass", given)
    is_handler = isinstance(own, type) and not issubclass(own, LoopServer)
    return own.__name__ if is_handler else "Handler"


def _check_clients(clients: Any) -> None:
    if isinstance(clients, Client) or not isinstance(clients, Sequence):
        raise TypeError(f"clients must be a list of scripts, such as [Client().send(…)], not {clients!r}")
    if not clients:
        raise ValueError("there are no clients: nothing would be simulated")
    for client in clients:
        if not isinstance(client, Client):
            raise TypeError(f"a client must be a script, such as Client().send(…), not {client!r}")


def _check_upstreams(upstreams: Any) -> None:
    if not isinstance(upstreams, Sequence) or not all(isinstance(each, Upstream) for each in upstreams):
        raise TypeError(f"upstreams must be a list, such as [Upstream('tcp://192.0.2.1:80')], not {upstreams!r}")
    if len({each.where for each in upstreams}) < len(upstreams):
        raise ValueError(f"two upstreams can't listen at the same address: {upstreams!r}")


class _Simulation:
    def __init__(
        self,
        seed: int,
        faults: Faults | None,
        passes_max: int,
        names: Mapping[str, Sequence[str]] | None,
        executor: Callable[[Callable[..., None]], Executor] | None,
    ) -> None:
        self.network = SimNetwork(seed, faults, latency_s=_LATENCY_S, names=names)
        self.report = Report(seed, faults=self.network.dice.injected, faults_by_kind=self.network.dice.by_kind)
        self._passes_max = passes_max
        self._executor = executor
        self._states: dict[int, State] = {}

    def run(
        self, server_factory: Callable[[], Any], clients: Sequence[Client], upstreams: Sequence[Upstream]
    ) -> Report:
        network, report = self.network, self.report
        network.on_quiet = self._on_quiet
        _check_factory(server_factory)
        _check_clients(clients)
        _check_upstreams(upstreams)
        for upstream in upstreams:
            upstream.listen(network, report.upstreams.append)
        with network.installed():
            self.server = server = self._make(server_factory)
            server.handle_error = self._reporting(server.handle_error)
            engine = server._host
            network.is_over = partial(self._is_over, engine)
            engine.table.on_transition = self._on_transition
            engine.loop.after_pass.append(self._invariants(engine).check)
            for number, script in enumerate(clients):
                peer = Peer(network, number, script)
                report.clients.append(peer)
                network.after(0, peer.connect, server.server_address, server.socket_type, server.address_family)
            try:
                server.serve_forever(poll_interval=inf)
            except Exception as error:
                log.debug("the loop ended", exc_info=error)
                report.problems.append(f"the loop ended with {type(error).__name__}: {error}")
            finally:
                server.server_close()
        self._sum_up()
        return report

    def _invariants(self, engine: Engine) -> Invariants:
        invariants = engine.invariants(_SimInvariants)
        assert isinstance(invariants, _SimInvariants)
        invariants.watch(self, engine.servers)
        return invariants

    def _make(self, server_factory: Callable[[], Any]) -> Any:
        # a server class from outside reqtable makes its socket by `socket.socket`
        with mock.patch.object(socket, "socket", self.network.socket):
            server = server_factory()
        if not isinstance(server, LoopServer):
            raise TypeError(
                f"server_factory() must make a server of reqtable's, or one with TableMixIn, not {server!r}"
            )
        try:
            self._check(server)
        except BaseException:
            server.server_close()
            raise
        server._policies.executors.run_calls_by(self._calls)
        return server

    def _calls(self, name: str) -> Executor:
        """Make the executor of that name."""
        if self._executor is not None:
            return self._executor(self.network.after)
        return self.network.system.executor(_THREADS, name, bool)

    def _check(self, server: LoopServer) -> None:
        if server._host.system is not self.network.system:
            raise ValueError("the server was made before the simulation: make it in server_factory()")
        if not server._policies.chosen.steps_on_loop and not is_resumable(server.RequestHandlerClass):
            raise ValueError("a blocking handler has a thread under 'pool': simulate it under 'greenlet' or 'inline'")

    def _reporting(self, handle_error: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def report_and_handle(request: Any, client_address: Any) -> None:
            error = sys.exc_info()[1]
            assert error is not None
            self.report.errors.append(error)
            if not isinstance(error, PeerError | ConnectionError | TimeoutError):
                self.report.problems.append(f"a handler raised {account_of(error)}")
            handle_error(request, client_address)

        return report_and_handle

    def _on_transition(self, entry: Entry, before: State, event: Event) -> None:
        report = self.report
        known = self._states.get(entry.id, State.OPENING if entry.kind == "client" else State.CONNECTING)
        if known is not before:
            report.problems.append(f"{entry!r} left {before}, but it was in {known}")
        self._states[entry.id] = entry.state
        report.transitions += 1
        self.network.note(f"#{entry.id} {before.name} -{event.value}-> {entry.state.name}")
        if entry.state is State.CLOSED:
            # A connection may have had no descriptor yet, but listeners whose accept has failed try again all the same.
            self.network.closed += entry.kind == "connection"
            del self._states[entry.id]
            report.steps += entry.steps
            report.bytes_in += entry.bytes_in
            report.bytes_out += entry.bytes_out

    @staticmethod
    def _is_over(engine: Engine) -> bool:
        """Return whether only timers of the program are left: `engine.every` would go on for ever."""
        listens = all(listener.watched for listener in engine.listeners)
        return listens and not len(engine.table) and any(each.active for each in engine.loop.mailbox.program_timers())

    def _on_quiet(self) -> None:
        """End the simulation: nothing will ever happen again, so everything should be done."""
        for peer in self._peers():
            peer.give_up()
        table = self.server._host.table
        left = [*self.server.table, *table.connections.values()]
        self.report.problems += [f"{entry!r} waits for something that never comes" for entry in left]
        self.server.shutdown()

    def _peers(self) -> Iterator[Peer]:
        yield from self.report.clients
        yield from self.report.upstreams

    def _sum_up(self) -> None:
        report, network, engine = self.report, self.network, self.server._host
        report.simulated_s = network.clock.now - network.began_at
        network.settle()  # the clients may have something left to do after the loop's end
        for peer in self._peers():
            peer.give_up()
        report.were_upstreams_hit = (
            network.resolver.has_failed
            or any(end.was_hit for end in network.outgoing)
            or any(peer.was_hit for peer in report.upstreams)
        )
        held = [peer for peer in self._peers() if not (peer.was_hit or peer.may_fail)]
        if report.were_upstreams_hit:
            held = []
        report.problems[:0] = [f"{peer}: {peer.unmet}" for peer in held if peer.unmet] + network.complaints
        sessions = engine.intake.sessions
        for left, what in (
            (network.files, "descriptors"),
            (engine.table, "requests"),
            (engine.table.connections, "connections"),
            (sessions, "sessions"),
        ):
            if len(left):
                report.problems.append(f"left over: {len(left)} {what}")
        report.requests = engine.table.last_id
        report.trace = "\n".join(network.trace) + "\n"


class _SimInvariants(Invariants):
    """Checks the invariants of every loop, and those that concern the simulated kernel."""

    def watch(self, simulation: _Simulation, servers: list[Any]) -> None:
        self._simulation = simulation
        self._servers = servers
        # How many bytes of input each READY entry has taken, and for how many passes it has taken no more.
        self._still: dict[Entry, tuple[int, int]] = {}

    def check(self, now: float = 0.0, freed: bool = False) -> None:
        super().check()
        simulation, loop = self._simulation, self._loop
        files = simulation.network.files
        report = simulation.report
        report.passes += 1
        if report.passes > simulation._passes_max:
            raise RuntimeError(f"the simulation has not ended after {simulation._passes_max} passes of the loop")
        self._check_standing_still()
        known = self._known_descriptors()
        lends = False
        for entry in (*loop.table, *loop.table.connections.values()):
            transport = entry.transport
            lends = lends or isinstance(transport, PollOnly)
            if isinstance(transport, OutgoingDatagrams):
                known.add(transport.fd)
            if isinstance(transport, Stream):
                known.add(transport.fd)
                end = files.get(transport.fd)
                if not isinstance(end, StreamEnd):
                    self._must(False, entry, "has a descriptor that is not open")
                    continue
                if entry.kind == "client" and INTEREST[entry.state] == RESET and not transport.watched:
                    self._must(end.is_lost, entry, "would not learn of a reset")
                    self._must(not end.error, entry, "was reset, but goes on")
                if State.MOVING in (entry.state, getattr(getattr(entry, "parent", None), "state", None)):
                    continue  # another process may go on with it
                self._must(entry.bytes_out == end.bytes_out, entry, f"sent {end.bytes_out} bytes")
                # a lingering connection throws its input away
                came_in = entry.bytes_in == end.bytes_in or entry.resumable is OVER
                self._must(came_in, entry, f"received {end.bytes_in} bytes")
        if not lends:  # a handler with its own socket may have duplicated it
            self._must(set(files) == known, sorted(set(files) ^ known), "are open but unowned, or owned but not open")

    def _known_descriptors(self) -> set[Any]:
        """Return the descriptors that are not of requests."""
        servers = {server.fileno() for server in self._servers if server.fileno() >= 0}
        return servers | set(self._loop.poller.selector.get_map())

    def _check_standing_still(self) -> None:
        """Raise RuntimeError for a handler that takes step after step without taking input: it would never end."""
        before, self._still = self._still, {}
        for entry in self._loop.table:
            if entry.state is State.READY:
                taken = entry.bytes_in - len(entry.input)
                last, passes = before.get(entry, (taken, 0))
                passes = passes + 1 if last == taken else 0
                self._still[entry] = taken, passes
                if passes > _STILL_PASSES_MAX:
                    raise RuntimeError(f"{entry!r} goes on and on: {entry.steps} steps, and it waits for nothing")
