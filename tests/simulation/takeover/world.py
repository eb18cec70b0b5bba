"""Runs workers that die one after the other, each of which takes over from the one before.

The code that writes the journal and takes over is the real one. Only the supervisor, the sleeper and the kernel are
simulated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import inf
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import reqtable
from reqtable.handover import journal, totals
from reqtable.handover.journal import new_memory
from reqtable.handover.journalled_steps import JournalledSteps
from reqtable.handover.taking_over import Result, TakingOver
from reqtable.run import standby
from reqtable.table.errors import PeerError
from reqtable.table.states import State
from reqtable.table.table import Entry
from reqtable.testing import Faults, Peer, SimulationFailed
from reqtable.testing.kernel import StreamEnd
from reqtable.testing.simulation import Report, _SimInvariants
from tests.simulation.shared import ADDRESS, Killed, Unchecked
from tests.simulation.takeover.kernel import MortalJournal, MortalNetwork

_LATENCY_S = 0.0001
_ROUNDS_MAX = 60_000
_WORKERS_MAX = 40


class _Server(Unchecked, reqtable.TCPServer):
    pass


class World:
    """Runs workers and clients on one network, as a seed decides. `deaths` says after how many points each dies."""

    def __init__(self, seed: int, faults: Faults, config: Any, deaths: list[int], segment_bytes: int) -> None:
        self.network = MortalNetwork(seed, faults, _LATENCY_S)
        self.report = Report(seed, faults=self.network.dice.injected, faults_by_kind=self.network.dice.by_kind)
        self.config = config
        self.results: list[Result] = []
        self.takeovers = 0
        self.engine: Any = None
        self._deaths = deaths
        self._segment_bytes = segment_bytes
        self._passes_max = 400_000
        self._rng = Random(seed)
        self._listening: Any = None

    def run(self, handler: type, peers: list[tuple[float, Peer]]) -> Report:
        """Run until nothing is left to do, and return what has happened."""
        network = self.network
        with ExitStack() as stack:
            stack.enter_context(network.installed())
            stack.enter_context(mock.patch.object(totals, "fcntl", SimpleNamespace(ioctl=network.ioctl)))
            stack.enter_context(mock.patch.object(journal, "_SEGMENT_BYTES", self._segment_bytes))
            try:
                self._serve(handler, peers)
            finally:
                if network.journal is not None:
                    network.drop_journal()  # the simulation has failed
                if network.memory >= 0:
                    os.close(network.memory)  # nothing has taken over
        return self.report

    def _serve(self, handler: type, peers: list[tuple[float, Peer]]) -> None:
        network = self.network
        server = self._new_server(handler)
        self._listening = server.socket.file
        self._listening.descriptors += 1  # that of the supervisor
        for at, peer in peers:
            self.report.clients.append(peer)
            network.after(at, peer.connect, server.server_address, server.socket_type, server.address_family)
        memory, ends = new_memory(), []
        while not self._lives_on(server, memory, ends):
            memory, network.memory = network.memory, -1
            ends = network.bury()
            self._pass_time(self._rng.choice([0.0, 0.01, 0.3]))
            server = self._new_server(handler)
        self._finish(server)

    def _lives_on(self, server: Any, memory: int, ends: list[StreamEnd]) -> bool:
        """Run a worker until nothing is left to do. Returns False if it dies before that."""
        if self._deaths:
            self.network.points_left = self._deaths.pop(0)
        try:
            self._begin(server, memory, ends)
            self._go()
        except Killed:
            if self.takeovers > _WORKERS_MAX:
                raise self._failed(f"the step of a request has killed {self.takeovers} workers") from None
            return False
        return True

    def _new_server(self, handler: type) -> Any:
        if self._listening is None:
            return _Server(ADDRESS, handler, config=self.config)
        server = _Server(ADDRESS, handler, bind_and_activate=False, config=self.config)
        server.socket.close()
        server.socket = self.network.socket(fileno=self.network.open(self._listening))
        server.server_address = ADDRESS
        return server

    def _begin(self, server: Any, memory: int, ends: list[StreamEnd]) -> None:
        """Start a worker, which takes over from the worker before."""
        network, limits = self.network, self.config.limits
        self.engine = engine = reqtable.Engine(limits=limits, system=network.system, steps=JournalledSteps)
        network.note(f"a worker starts, with {len(ends)} connections")
        own = MortalJournal(network, memory, limits.recv_bytes)
        sockets = [network.inherit(end) for end in ends]
        engine.add(server)
        server.handle_error = partial(self._report, server.handle_error)
        standby._journal(engine, own)
        engine.table.on_transition = self._on_transition
        invariants = engine.invariants(_SimInvariants)
        assert isinstance(invariants, _SimInvariants)
        invariants.watch(self, engine.servers)  # type: ignore[arg-type]
        engine.loop.after_pass.append(invariants.check)
        engine.loop.open()
        if self.takeovers or ends:
            taking_over = TakingOver(engine, own, sockets, self.config.takeover_attempts, self.results.append)
            taking_over.restore()
            engine.post(taking_over.go_on)
        self.takeovers += 1
        engine.listeners.listen(server)

    def _go(self) -> None:
        network, engine = self.network, self.engine
        selector = engine.loop.poller.selector
        for _ in range(_ROUNDS_MAX):
            network.happen()
            now = network.clock.now
            if selector._ready() or engine.next_at() <= now:
                try:
                    engine.loop.run_inside()
                except Exception as error:
                    if network.is_dead:
                        raise Killed from None
                    raise self._failed(f"the loop ended with {type(error).__name__}: {error}") from error
                if network.is_dead:
                    raise Killed
                continue
            at = min(network.next_at(), engine.next_at())
            if at == inf:
                return
            network.clock.now = max(now, at)
        raise self._failed(f"the simulation has not ended after {_ROUNDS_MAX} rounds")

    def _pass_time(self, seconds: float) -> None:
        network = self.network
        until = network.clock.now + seconds
        while network.next_at() <= until:
            network.clock.now = max(network.clock.now, network.next_at())
            network.happen()
        network.clock.now = until

    def _finish(self, server: Any) -> None:
        network, report = self.network, self.report
        network.points_left = None
        for peer in report.clients:
            peer.give_up()
        self._go()
        for entry in self.engine.table:
            self._complain(f"{entry!r} waits for something that never comes")
        server.server_close()
        self.engine.close()
        network.settle()
        if network.files and not report.problems:
            self._complain(f"left over: {len(network.files)} descriptors")
        assert network.journal is not None
        records = len(network.journal.read())
        if records and not report.problems:
            self._complain(f"left over: {records} records in the journal")
        network.drop_journal()
        report.problems[:0] = [f"{peer}: {peer.unmet}" for peer in report.clients if peer.unmet and not peer.may_fail]
        report.problems += network.complaints
        self._sum_up()

    # -- what is recorded ---------------------------------------------------------------------------------------------

    def _report(self, handle_error: Callable[[Any, Any], None], request: Any, peer: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, PeerError | ConnectionError | TimeoutError | Killed):
            self._complain(f"a handler raised {type(error).__name__}: {error}")

    def _on_transition(self, entry: Entry, before: State, event: Any) -> None:
        if self.network.is_dead:
            return
        report = self.report
        report.transitions += 1
        self.network.note(f"#{entry.id} {before.name} -{event.value}-> {entry.state.name}")
        if entry.state is State.CLOSED:
            self.network.closed += 1
            report.steps += entry.steps
            report.bytes_in += entry.bytes_in
            report.bytes_out += entry.bytes_out

    def _sum_up(self) -> None:
        report, network = self.report, self.network
        report.requests = len(report.clients)
        report.simulated_s = network.clock.now - network.began_at
        report.trace = "\n".join(network.trace) + "\n"

    def _failed(self, problem: str) -> SimulationFailed:
        self._complain(problem)
        self._sum_up()
        return SimulationFailed(self.report)

    def _complain(self, problem: str) -> None:
        self.network.note(f"problem: {problem}")
        self.report.problems.append(problem)
