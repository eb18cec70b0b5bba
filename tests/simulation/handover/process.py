"""Simulated processes that hand their requests over, and the world that runs them one after the other.

Each process has an engine, its servers, and descriptors of its own. The code that moves requests is the real one:
`Restart`, `Giver`, `Taker`, `Channel`. Only what starts a process is simulated (`SimSuccessor`).
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import reqtable
from reqtable.handover import channel, messages, taker
from reqtable.handover.channel import Channel
from reqtable.handover.taker import Taker
from reqtable.loop.process import Process
from reqtable.run import restarting
from reqtable.run.restarting import Restart
from reqtable.run.systemd import Notifier
from reqtable.server.operator import Operator
from reqtable.table.errors import ConnectFailed, PeerError, ReqtableError
from reqtable.table.states import TRANSITIONS, Ending, Event, State
from reqtable.table.table import Entry
from reqtable.testing import Peer, SimulationFailed, UpstreamPeer
from reqtable.testing.datagrams import DatagramEnd
from reqtable.testing.kernel import Listening
from reqtable.testing.simulation import Report, _SimInvariants
from tests.simulation.handover.kernel import Machine, PairEnd, only_in
from tests.simulation.shared import Killed

_LATENCY_S = 0.0001
_ROUNDS_MAX = 200_000
_PASSES_MAX = 400_000


@dataclass
class Blow:
    """Says what happens to a process, and at which message: before or after it sends or receives one of a kind."""

    generation: int
    when: str  # "before send", "after send", "before receive", "after receive"
    message: str  # the name of its class
    number: int  # 0: the first message of that kind
    hang_s: float | None  # for how long the process stands still; None: it is killed

    def __str__(self) -> str:
        what = "killed" if self.hang_s is None else f"stopped for {self.hang_s:g} s"
        return f"process {self.generation} {what} {self.when} {self.message} {self.number}"


@dataclass
class Plan:
    """Says what happens in a simulation beside its clients and the faults of its network."""

    restarts_at: list[float]
    blows: list[Blow] = field(default_factory=list)
    refuses: bool = False  # the first new process can't start
    lacks_room: int | None = None  # how many descriptors more than it has the first new process may open
    ends_at: float | None = None  # when the first process is told to end
    cancels: int = 0  # how many requests an operator cancels
    slice_rows: int = 250
    unmovable: str = "drain"
    lateness: float = 0.0  # how often a process that could run is held up for some milliseconds
    packet_bytes: int = 32_768  # of the pair
    packet_descriptors: int = 250
    start_s: float = 0.3  # how long a new process takes to begin


class SimChannel(Channel):
    """Tells its process of each message, which may be the process's last."""

    __slots__ = ("_own_process",)

    def __init__(
        self, process: SimProcess, own: Any, on_message: Any, on_end: Any, on_problem: Callable[[str], Any]
    ) -> None:
        def receive(message: Any, descriptors: Any) -> None:
            process.reaches("before receive", message)
            on_message(message, descriptors)
            process.reaches("after receive", message)

        super().__init__(process.engine.loop.poller, own, receive, on_end, on_problem)
        self._own_process = process
        process.channel = self

    def send(self, message: Any, holders: Any = (), then: Any = None) -> None:
        self._own_process.reaches("before send", message)
        super().send(message, holders, then)
        self._own_process.reaches("after send", message)


class SimSuccessor:
    """Stands in for `Successor`: starts a simulated process with the other end of a pair."""

    def __init__(
        self,
        world: World,
        engine: Any,
        command: object,
        notifier: object,
        on_message: Any,
        on_problem: Callable[[str], None],
        on_end: Callable[[str | None], None],
    ) -> None:
        self._engine = engine
        self._on_end = on_end
        network = world.network
        ours, theirs = network.pair_of(1 + network.dice.draw("packets", "pair", 6))
        parent = world.running
        assert parent is not None
        self.channel = SimChannel(
            parent, network.socket(fileno=network.open(ours)), on_message, self._closed, on_problem
        )
        Process.has_forked = True
        self._parent = parent
        self._process = world.spawn(theirs, self)
        self.pid = self._process.generation
        self.is_there = True

    def end(self) -> None:
        self._engine.call_later(1.0, self._kill)

    def _kill(self) -> None:
        if self._process.is_alive:
            self._process.world.kill(self._process)

    def _closed(self) -> None:
        self._engine.call_later(1.0, self._ended, "has closed its end of the pair")

    def stop(self, is_needed: bool) -> None:
        if is_needed:
            self._process.end()
        else:
            self._kill()

    def exited(self) -> None:
        """Tell the parent that the process has exited."""
        if self._parent.is_alive:
            self._engine.post(self._collected)

    def _collected(self) -> None:
        self.is_there = False
        self.channel.read_rest()
        self.channel.close()
        self._ended("was killed" if self._process.was_killed else None)

    def _ended(self, how: str | None) -> None:
        on_end, self._on_end = self._on_end, bool
        on_end(how)


class _ProcessInvariants(_SimInvariants):
    """Knows that a channel holds the descriptors of a message that is not whole."""

    def _known_descriptors(self) -> set[Any]:
        known = super()._known_descriptors()
        for key in self._loop.poller.selector.get_map().values():
            if isinstance(key.data, Channel):
                known |= set(key.data._assembler._descriptors)
                known.update(*(each.descriptors for each in key.data._waiting))
        return known


class SimProcess:
    """Runs the servers of one generation of the program."""

    def __init__(self, world: World, generation: int, pair: PairEnd | None, successor: SimSuccessor | None) -> None:
        self.world = world
        self.generation = generation
        self.files: dict[int, Any] = {}
        self.descriptors_max: int | None = None
        self.channel: SimChannel | None = None  # the newest
        self.is_alive = True
        self.hangs_until = -inf
        self.migrates: Callable[[int], None] = bool  # type: ignore[assignment]  # called for each record that it reads
        self.restart: Restart | None = None
        self.was_told_to_end = False
        self.was_killed = False
        self.taker: Taker | None = None
        self._successor = successor
        self._pair = -1  # the descriptor of its end of the pair with the process before
        self._pair_end = pair
        if pair is not None:
            with self.entered():
                self._pair = world.network.open(pair)
        self._offer: tuple[Any, list[int]] | None = None
        self._points: Counter[tuple[str, str]] = Counter()
        self._states: dict[Entry, State] = {}
        self.engine: Any = None

    def __repr__(self) -> str:
        return f"process {self.generation}"

    # -- its start ----------------------------------------------------------------------------------------------------

    def begin_first(self) -> None:
        """Start without a process before."""
        with self.entered():
            self._serve({})
            for server in self.engine.servers:
                self.engine.listeners.listen(server)

    def begin(self) -> None:
        """Say hello to the process before, and wait for its offer."""
        if not self.is_alive:
            return
        with self.entered():
            self.engine = reqtable.Engine(limits=self.world.limits, system=self.world.network.system)
            self.engine.loop.open()
            self._early = SimChannel(
                self, self._pair_socket().dup(), self._offered, self.engine.stop, lambda _: self.engine.stop()
            )
            with suppress(Killed):
                self._early.send(messages.Hello([messages.FORMAT], self.generation))

    def _pair_socket(self) -> Any:
        return self.world.network.socket(fileno=self._pair)

    def _offered(self, offer: Any, descriptors: list[int]) -> None:
        if not isinstance(offer, messages.Offer):
            self.engine.stop()
            return
        self._offer = offer, descriptors

    def _take_offer(self) -> None:
        """Take the listening sockets, and start the servers."""
        assert self._offer is not None
        (offer, descriptors), self._offer = self._offer, None
        if self.world.plan.refuses and self.generation == 2:
            with suppress(Killed):
                self._early.send(messages.Refuse("a file is missing"))
                for each in descriptors:
                    self.world.network.close(each)
                self.leave()
            return
        self._early.close()
        self.engine.close()
        self._serve(dict(zip(offer.sockets, descriptors, strict=True)))
        engine = self.engine
        self.taker = own = Taker(engine, engine.serving.listen, self._over, True)
        engine.serving.is_held = True
        engine.table.last_id = max(engine.table.last_id, offer.first_id)
        pair = SimChannel(self, self._pair_socket(), own.receive, own.ended, own.give_up)
        own.channel = pair
        engine.post(pair.send, messages.Ready(offer.sockets))
        room = self.world.plan.lacks_room
        if room is not None and self.generation == 2:
            self.descriptors_max = len(self.files) + room
            self.world.network.after(30, self._have_room)

    def _have_room(self) -> None:
        self.descriptors_max = None

    def _over(self, reason: str | None) -> None:
        if reason is not None:
            self.engine.stop()

    def _serve(self, sockets: dict[str, int]) -> None:
        world = self.world
        self.engine = engine = reqtable.Engine(limits=world.limits, system=world.network.system)
        for server in world.make_servers(self, sockets):
            engine.add(server)
            server.handle_error = partial(self._report, server.handle_error)
        engine.table.on_transition = self._on_transition
        invariants = engine.invariants(_ProcessInvariants)
        assert isinstance(invariants, _ProcessInvariants)
        invariants.watch(world, engine.servers)
        engine.loop.after_pass.append(invariants.check)
        operator = Operator(engine, world.config)
        operator.restart = self.restart = Restart(engine, operator, Notifier(engine))
        self.operator = operator
        engine.loop.open()

    # -- its passes ---------------------------------------------------------------------------------------------------

    def entered(self) -> Any:
        """Run this process inside the block."""
        return self.world.entered(self)

    @property
    def gives(self) -> bool:
        """Whether the process gives its requests to another one."""
        giver = self.restart._giver if self.restart is not None else None
        return giver is not None and not giver.outcome.is_over

    @property
    def is_due(self) -> bool:
        """Whether the process has something to do now."""
        with self.entered():
            selector = self.engine.loop.poller.selector
            return bool(selector._ready()) or self.engine.next_at() <= self.world.network.clock.now

    @property
    def next_at(self) -> float:
        """When the process next has something to do by itself."""
        now = self.world.network.clock.now
        return self.hangs_until if self.hangs_until > now else float(self.engine.next_at())

    def run_pass(self) -> None:
        with self.entered():
            try:
                self.engine.loop.run_inside()
            except Killed:
                pass
            except Exception as error:
                if self.is_alive:
                    self.world.complain(f"the loop of {self} ended with {type(error).__name__}: {error}")
                    self.world.kill(self)
            if self.is_alive and self.engine.stopping:
                self.leave()
            elif self.is_alive and self._offer is not None:
                self._take_offer()

    def reaches(self, when: str, message: Any) -> None:
        """Tell that the process comes to a point at which it may be killed or stopped."""
        name = type(message).__name__
        number = self._points[when, name]
        self._points[when, name] += 1
        world = self.world
        world.network.note(f"{self} {when} {name} {number}")
        if (when, name) == ("after send", "Abort") and self.restart._giver.outcome.moved:  # type: ignore[union-attr]
            world.has_lost_sessions = True  # this process receives their datagrams again
        if (when, name) == ("after send", "Send") and world.plan.cancels:
            world.network.after(0, world.cancel)
        for blow in world.plan.blows:
            if (blow.generation, blow.when, blow.message, blow.number) == (self.generation, when, name, number):
                if blow.hang_s is None:
                    world.kill(self)
                    raise Killed
                self.hangs_until = world.network.clock.now + blow.hang_s
                world.hung_s += blow.hang_s

    # -- its end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Exit as the program does when its loop has ended."""
        with self.entered():
            self.world.network.note(f"{self} exits")
            if self.taker is not None:
                self.taker.leave()
            for key in list(self.engine.loop.poller.selector.get_map().values()):
                if isinstance(key.data, Channel):
                    key.data.close()  # the kernel does
            for server in self.engine.servers:
                self.engine.listeners.unlisten(server)
            for entry in self.engine.table:
                if entry.state is State.MOVING:
                    continue
                self.world.excuse(entry)
            for file in self.files.values():
                self.world.excuse_queue(file)
            for server in list(self.engine.servers):
                server.server_close()
            self.engine.close()
            for fd in [fd for fd, file in self.files.items() if isinstance(file, PairEnd)]:
                self.world.network.close(fd)
            self.world.exited(self)

    def end(self) -> None:
        """Do what SIGTERM makes the program do."""
        if self.restart is None or self.was_told_to_end or not self.is_alive:
            self.engine.stop()
            return
        with self.entered(), suppress(Killed):
            self.was_told_to_end = True
            if self.taker is not None:
                for entry in self.engine.table:
                    if entry.state is State.MOVING:
                        self.world.excuse(entry)  # its Commit may be unread
                self.taker.give_up("the new process was told to end")
            if not self.restart.stop():
                self.operator.drain()

    # -- what is recorded ---------------------------------------------------------------------------------------------

    def _report(self, handle_error: Callable[[Any, Any], None], request: Any, peer: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, ConnectFailed) and self.descriptors_max is not None:
            request.file.other.was_hit = True  # no descriptor was free
        elif not isinstance(error, PeerError | ConnectionError | TimeoutError | Killed):
            self.world.complain(f"a handler in {self} raised {type(error).__name__}: {error}")

    def _on_transition(self, entry: Entry, before: State, event: Event) -> None:
        if not self.is_alive:
            return
        world = self.world
        known = self._states.get(entry, State.OPENING if entry.kind == "client" else State.CONNECTING)
        if known is not before or TRANSITIONS[before].get(event) is not entry.state:
            world.complain(f"{entry!r} left {before} for {entry.state} by {event}, but it was in {known}")
        self._states[entry] = entry.state
        world.report.transitions += 1
        world.network.note(f"{self} #{entry.id} {before.name} -{event.value}-> {entry.state.name}")
        if entry.state is State.CLOSED:
            del self._states[entry]
            if event is not Event.MOVED:  # else the process that goes on counts them
                world.report.steps += entry.steps
                world.report.bytes_in += entry.bytes_in
                world.report.bytes_out += entry.bytes_out
        is_ended_by_drain = entry.ending is Ending.DRAINED or any(each._is_draining for each in self.engine.servers)
        if entry.state in (State.CLOSED, State.LINGERING) and event is not Event.MOVED and is_ended_by_drain:
            world.excuse(entry)


class World:
    """Runs processes, clients and upstreams on one network, as a seed decides."""

    def __init__(
        self,
        seed: int,
        plan: Plan,
        config: Any,
        faults: Any,
        make_servers: Callable[[SimProcess, dict[str, int]], list[Any]],
    ) -> None:
        self.network = Machine(seed, faults, _LATENCY_S)
        self.plan = plan
        self.config = config
        self.limits = config.limits
        self.make_servers = make_servers
        self.report = Report(seed, faults=self.network.dice.injected, faults_by_kind=self.network.dice.by_kind)
        self.processes: list[SimProcess] = []
        self.running: SimProcess | None = None
        self.hung_s = 0.0
        self.lossy: set[Any] = set()  # names of requests that were in a process that died
        self._passes_max = _PASSES_MAX
        self._rng = Random(seed)
        self.deaths = 0
        self.has_lost_sessions = False  # of datagrams
        self.cancelled: set[Any] = set()  # the peers of the requests that an operator has cancelled

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[SimProcess]:
        return [each for each in self.processes if each.is_alive]

    def entered(self, process: SimProcess) -> Any:
        return _Entered(self, process)

    def spawn(self, pair: PairEnd, successor: SimSuccessor) -> SimProcess:
        """Start a process with one end of a pair, which it has from now on."""
        process = SimProcess(self, len(self.processes) + 1, pair, successor)
        self.processes.append(process)
        self.network.after(self.plan.start_s, process.begin)
        return process

    def kill(self, process: SimProcess) -> None:
        """End a process at once, as SIGKILL does: the kernel closes its descriptors."""
        self.network.note(f"{process} is killed")
        process.was_killed = True
        self.deaths += 1
        if process.gives and process.channel is not None and process.channel._waiting:
            for each in process.restart._giver._batch.frozen:  # type: ignore[union-attr]
                self.excuse(each.entry)  # the kernel may have only a part of the message
        for end in only_in(process.files):
            end.other.was_hit = True
        if process.engine is not None:
            for entry in process.engine.table:
                name = getattr(entry.handler, "name", b"")
                self.lossy.add(name)
                if not entry.input.is_stream:
                    self.excuse(entry)
        self._gone(process)
        while process.files:
            fd = next(iter(process.files))
            file = process.files.pop(fd)
            self.excuse_queue(file)
            file.descriptors -= 1
            if not file.descriptors:
                file.close()

    def exited(self, process: SimProcess) -> None:
        """Note that a process has exited by itself. It must have left nothing open."""
        if process.files:
            self.complain(f"{process} left {len(process.files)} descriptors open: {list(process.files.values())}")
        timers = [each for each in process.engine.loop.mailbox.program_timers() if each.active]
        if timers:
            self.complain(f"{process} left {len(timers)} timers")
        self._gone(process)

    def _gone(self, process: SimProcess) -> None:
        process.is_alive = False
        if process._successor is not None:
            assert process._pair_end is not None
            at = self.network.clock.now + self._rng.choice([0, 0.001, 0.1])
            self.network.at(max(at, process._pair_end.last_at), process._successor.exited)  # all that it sent is there

    def excuse(self, entry: Entry) -> None:
        """Let the client of a request end early: the program has ended its request on purpose."""
        self.lossy.add(getattr(entry.handler, "name", b""))
        request = entry.transport.request
        if isinstance(request, tuple):
            end = self.network.bound.get((2, entry.peer))
            if end is not None:
                end.was_hit = True  # type: ignore[attr-defined]
        elif request is not None and request.fileno() >= 0:
            request.file.other.was_hit = True

    @staticmethod
    def excuse_queue(file: Any) -> None:
        """Let the clients end early that have connected to a socket which no other process has."""
        if isinstance(file, Listening) and file.descriptors == 1:
            for end in file.queue:
                end.other.was_hit = True

    def complain(self, problem: str) -> None:
        self.network.note(f"problem: {problem}")
        self.report.problems.append(problem)

    # -- the course of things -----------------------------------------------------------------------------------------

    def run(self, peers: list[tuple[float, Peer, Any]], upstreams: list[Any]) -> Report:
        """Run until nothing is left to do, and return what has happened."""
        network = self.network
        has_forked = Process.has_forked
        try:
            with ExitStack() as stack:
                stack.enter_context(network.installed())
                stack.enter_context(mock.patch.object(restarting, "Successor", partial(SimSuccessor, self)))
                stack.enter_context(mock.patch.object(channel, "os", SimpleNamespace(close=network.close_any)))
                names = SimpleNamespace(socket=network.socket, SOCK_STREAM=socket.SOCK_STREAM)
                stack.enter_context(mock.patch.object(taker, "socket", names))
                # Small messages are cut, too.
                stack.enter_context(mock.patch.object(channel, "_PACKET_BYTES", self.plan.packet_bytes))
                stack.enter_context(mock.patch.object(channel, "_PACKET_DESCRIPTORS", self.plan.packet_descriptors))
                for upstream in upstreams:
                    upstream.listen(network, self.report.upstreams.append)
                self.processes.append(SimProcess(self, 1, None, None))
                self.processes[0].begin_first()
                for at, peer, (address, kind, family) in peers:
                    self.report.clients.append(peer)
                    network.after(at, peer.connect, address, kind, family)
                for number, at in enumerate(self.plan.restarts_at):
                    network.after(at, self._restart, number)
                for _ in range(self.plan.cancels):
                    network.after(self._rng.uniform(0, 12), self.cancel)
                if self.plan.ends_at is not None:
                    network.after(self.plan.ends_at, self._end_first)
                self._go()
                self._finish()
        finally:
            Process.has_forked = has_forked
        return self.report

    def _go(self) -> None:
        network = self.network
        for _ in range(_ROUNDS_MAX):
            network.happen()
            now = network.clock.now
            awake = [each for each in self.alive if each.engine is not None and each.hangs_until <= now]
            due = [each for each in awake if each.is_due]
            if due:
                self._rng.shuffle(due)
                for process in due[: self._rng.randrange(1, len(due) + 1)]:
                    if self._rng.random() < self.plan.lateness:
                        process.hangs_until = network.clock.now + self._rng.uniform(0, 0.03 / self.plan.lateness)
                    elif process.is_alive and process.hangs_until <= network.clock.now:
                        process.run_pass()
                continue
            at = min([network.next_at(), *(each.next_at for each in self.alive if each.engine is not None)])
            if at == inf:
                return
            network.clock.now = max(now, at)
        self.complain(f"the simulation has not ended after {_ROUNDS_MAX} rounds")

    def _restart(self, number: int) -> None:
        """Begin a restart in the newest process that serves."""
        serving = [each for each in self.alive if each.restart is not None and self._listens(each)]
        if not serving:
            return
        process = serving[-1]
        with self.entered(process):
            try:
                process.restart.begin()  # type: ignore[union-attr]
            except ReqtableError as error:
                self.network.note(f"{process} can't restart: {error}")

    @staticmethod
    def _listens(process: SimProcess) -> bool:
        return len(process.engine.listeners) > 0

    def cancel(self) -> None:
        """Cancel a request, as an operator does who sees one process or the other."""
        for process in self._rng.sample(self.alive, len(self.alive)):
            entries = [] if process.engine is None else list(process.engine.table)
            if not process.gives:
                entries = [each for each in entries if each.state is not State.MOVING]  # not its own yet
            if entries:
                entry = self._rng.choice([each for each in entries if each.state is State.MOVING] or entries)
                with self.entered(process):
                    self.excuse(entry)
                    self.cancelled.add(entry.peer)
                    self.network.note(f"{process} cancels #{entry.id}")
                    process.engine.table.cancel(entry.id)
                return

    def _end_first(self) -> None:
        if self.processes[0].is_alive:
            self.processes[0].end()

    def _finish(self) -> None:
        """Check what is left when nothing will ever happen again."""
        report = self.report
        for peer in self._peers():
            peer.give_up()
        self._go()
        listening = [each for each in self.alive if each.restart is not None and self._listens(each)]
        told = any(each.was_told_to_end for each in self.processes)
        if len(listening) > 1 or (self.alive and not listening and not told):
            self.complain(f"{listening} listen, of {self.alive}")
        for process in self.alive:
            giver = process.restart._giver if process.restart is not None else None
            if giver is not None and not giver.outcome.is_over:
                self.complain(f"the restart of {process} has not ended: it is {giver.outcome.phase.value}")
            left = [*process.engine.table, *process.engine.table.connections.values()]
            for entry in left:
                self.complain(f"{entry!r} of {process} waits for something that never comes")
            if process not in listening:
                self.complain(f"{process} has not ended")
            process.leave()
        report.simulated_s = self.network.clock.now - self.network.began_at
        self.network.settle()
        held = [each for each in self._peers() if not (each.was_hit or each.may_fail)]
        if told or not listening:
            held = [each for each in held if each.ended != "refused" and each.received]
        if told or not listening or self.has_lost_sessions:
            held = [each for each in held if not isinstance(each._end, DatagramEnd)]
        report.problems[:0] = [f"{peer}: {peer.unmet}" for peer in held if peer.unmet]
        report.problems += self.network.complaints
        report.requests = len(report.clients)
        report.trace = "\n".join(self.network.trace) + "\n"

    def _peers(self) -> Iterator[Peer | UpstreamPeer]:
        yield from self.report.clients
        yield from self.report.upstreams


class _Entered:
    """Runs one process inside the block, and then the one before."""

    def __init__(self, world: World, process: SimProcess) -> None:
        self._world = world
        self._process = process

    def __enter__(self) -> None:
        self._before = self._world.running
        self._switch(self._process)

    def __exit__(self, *error: object) -> None:
        self._switch(self._before)

    def _switch(self, process: SimProcess | None) -> None:
        self._world.running = process
        if process is not None:
            self._world.network.enter(process.files, process.descriptors_max)


def failed(report: Report) -> SimulationFailed:
    return SimulationFailed(report)
