"""The handlers of the simulated hand-over, and the ledger of what they do in all processes."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, ClassVar

import reqtable
from reqtable import (
    Connection,
    StateRequestHandler,
    Transition,
    connect,
    datagram,
    either,
    exactly,
    line,
    sleep,
    state,
    told,
)
from reqtable.table.states import State
from tests.simulation.handlers import blob
from tests.simulation.handover.process import SimProcess, World

UPSTREAM = "tcp://192.0.2.1:7"


class Ledger:
    """Notes what the requests of all processes do, and complains if one does what it must not."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.steps_in: dict[Any, int] = {}  # the process that ran the last step of a client
        self.closed: set[Any] = set()  # the clients whose on_close has been called
        self.ids: dict[int, Any] = {}  # which client each id belongs to
        self.taken: dict[bytes, list[bytes]] = defaultdict(list)  # what each client was told, and `tell` took
        self.heard: Counter[bytes] = Counter()  # how many of these it has heard
        self.poked: dict[bytes, list[bytes]] = defaultdict(list)  # what other requests have sent to each client

    def step(self, handler: Any) -> None:
        """Note a step of a request."""
        process, entry = handler.process, handler.entry
        if not process.is_alive:
            return
        who = _client_of(entry)
        before = self.steps_in.get(who, 0)
        if entry.state is State.MOVING:
            self.world.complain(f"{entry!r} of {process} ran a step while it was being moved")
        if before > process.generation:
            self.world.complain(f"{entry!r} ran in process {before}, and then in {process}")
        if who in self.closed:
            self.world.complain(f"{entry!r} of {process} ran a step after on_close")
        if entry.input.is_stream and entry.peer in self.world.cancelled and not self.world.deaths:
            self.world.complain(f"{entry!r} of {process} ran a step after it was cancelled")
        if self.ids.setdefault(entry.id, who) != who:
            self.world.complain(f"{entry!r} of {process} has the id of {self.ids[entry.id]}")
        self.steps_in[who] = process.generation

    def close(self, handler: Any) -> None:
        """Note a call of on_close."""
        process, entry = handler.process, handler.entry
        if not process.is_alive:
            return
        who = _client_of(entry)
        if who in self.closed:
            self.world.complain(f"{entry!r} of {process} was closed twice")
        if self.steps_in.get(who, 0) > process.generation:
            self.world.complain(f"{entry!r} was closed in {process}, but runs in process {self.steps_in[who]}")
        self.closed.add(who)

    def hear(self, name: bytes, text: bytes) -> None:
        """Note that a request has taken an item that it was told."""
        known = self.taken[name]
        place = self.heard[name]
        if name in self.world.lossy:
            while place < len(known) and known[place] != text:
                place += 1
        if place >= len(known) or known[place] != text:
            self.world.complain(f"{name!r} heard {text!r} after {place} of {known}")
        self.heard[name] = place + 1


def _client_of(entry: Any) -> Any:
    """Return what names a request's client in every process."""
    return entry.peer if entry.input.is_stream else (entry.peer, entry.id)


class Recorded(StateRequestHandler):
    """Notes its steps in the ledger."""

    process: ClassVar[SimProcess]
    ledger: ClassVar[Ledger]
    name: bytes = b""

    def _resume(self, item: Any) -> Any:
        self.ledger.step(self)
        return super()._resume(item)

    def _throw(self, error: BaseException) -> Any:
        self.ledger.step(self)
        return super()._throw(error)

    def on_close(self) -> None:
        self.ledger.close(self)

    @classmethod
    def migrate(cls, version: int, state: str | None, fields: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        cls.process.migrates(cls.state_version - version)
        return state, fields


class Lines(Recorded):
    """Obeys the commands that its client sends as lines. The first line is `hello NAME MODE`."""

    mode: bytes = b""
    total: int = 0
    notes: list[bytes] = []  # each request has a copy
    facts: dict[str, Any] = {}
    wanted: bytes = b""
    upstream: Connection | None = None

    @state(line(), timeout=40)
    def hello(self, text: bytes) -> Transition:
        if not text.endswith(b"\n"):
            return None
        _, self.name, self.mode = text.split()
        self.send(b"hello %b\n" % self.name)
        return self._next()

    def _next(self) -> Transition:
        return (self.heard, either(line(), told())) if self.mode == b"chat" else self.plain

    @state(line(), timeout=40)
    def plain(self, text: bytes) -> Transition:
        return self._obey(text)

    @state(timeout=40)
    def heard(self, arrived: Any) -> Transition:
        if arrived.index == 1:
            self.ledger.hear(self.name, arrived.item)
            self.send(b"told %b\n" % arrived.item)
            return self._next()
        return self._obey(arrived.item)

    def _obey(self, text: bytes) -> Transition:
        if not text.endswith(b"\n"):
            return None
        verb, *words = text.split()
        self.facts[verb.decode()] = (len(self.notes), self.total)
        return getattr(self, f"_{verb.decode()}")(*words)

    def _add(self, number: bytes) -> Transition:
        self.total += int(number)
        self.notes.append(number)
        self.send(b"total %d of %d\n" % (self.total, len(self.notes)))
        return self._next()

    def _take(self, count: bytes) -> Transition:
        return self.took, exactly(int(count))

    @state(timeout=40)
    def took(self, data: bytes) -> Transition:
        self.total += sum(data)
        self.send(b"took %d, total %d\n" % (len(data), self.total))
        return self._next()

    def _big(self, count: bytes) -> Transition:
        self.send(blob(int(count)) + b"\n")
        return self._next()

    def _nap(self, tenths: bytes) -> Transition:
        return self.woke, sleep(int(tenths) / 10)

    @state()
    def woke(self, _: None) -> Transition:
        self.send(b"woke\n")
        return self._next()

    def _call(self, text: bytes) -> Transition:
        return self.called, reqtable.call(len, text, on="thread")

    @state()
    def called(self, count: int) -> Transition:
        self.send(b"called %d\n" % count)
        return self._next()

    def _ask(self, text: bytes) -> Transition:
        self.wanted = text
        if self.upstream is None:
            return self.connected, connect(UPSTREAM)
        return self._asked()

    @state()
    def connected(self, upstream: Any) -> Transition:
        self.upstream = upstream
        return self._asked()

    def _asked(self) -> Transition:
        assert self.upstream is not None
        self.upstream.send(self.wanted + b"\n")
        return self.answered, self.upstream.line()

    @state()
    def answered(self, text: bytes) -> Transition:
        self.send(text)
        return self._next()

    def _bye(self) -> Transition:
        self.send(b"bye\n")
        return None

    def _tell(self, name: bytes, text: bytes) -> Transition:
        other = self._find(name)
        answer = b"nobody\n"
        if other is not None:
            self.ledger.taken[name].append(text)
            answer = b"taken\n"
            if not other.tell(text):
                self.ledger.taken[name].pop()
                answer = b"refused\n"
        self.send(answer)
        return self._next()

    def _poke(self, name: bytes, text: bytes) -> Transition:
        other = self._find(name)
        if other is not None:
            self.ledger.poked[name].append(text)
            other.send(b"poked %b\n" % text)
        self.send(b"nobody\n" if other is None else b"poked them\n")
        return self._next()

    def _find(self, name: bytes) -> Any:
        """Return another request of this process by its name; None if there is none."""
        for entry in self.server.table:
            other = entry.handler
            if getattr(other, "name", b"") != name or other is self or other.mode != b"chat":
                continue
            if entry.state in (State.CLOSED, State.LINGERING) or other.is_leaving:
                continue
            if entry.state is State.MOVING and not self.process.gives:
                continue  # it may go on in the other process
            return other
        return None

    @property
    def is_leaving(self) -> bool:
        return self.entry.ending is not None


class SharedLines(Lines):
    """Obeys the same commands. Its requests share the counter of each server, so they move all at once."""

    @classmethod
    def save_state(cls, server: Any) -> Any:
        return {"served": server.served, "tags": {"generation", str(cls.state_version)}}

    @classmethod
    def restore_state(cls, server: Any, data: Any) -> None:
        server.served = data["served"]

    def _add(self, number: bytes) -> Transition:
        self.server.served += 1
        return super()._add(number)


class Pings(Recorded):
    """Answers each datagram of a session with its number."""

    count: int = 0

    @state(datagram(), timeout=60)
    def ping(self, data: bytes) -> Transition:
        self.count += 1
        self.send(b"%d %b" % (self.count, data))
        return self.ping
