"""Records events of requests, and their ways through the states of their handlers, only while somebody looks.

Nothing of this is in the way of a request while nobody looks: `Watch` puts its hooks in place when the first one begins
to look, and takes them away after the last one.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary, proxy

from reqtable.control.figures import BUCKETS_S
from reqtable.control.jobs import PAUSE, WAIT, Job
from reqtable.control.query import LOOK_EVERY
from reqtable.handlers.state import StateRequestHandler
from reqtable.server.engine import Engine
from reqtable.table.addresses import address_text
from reqtable.table.places import place_of
from reqtable.table.snapshot import handler_name, unwrapped, where
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry

QUEUE_MAX = 10_000  # events that wait for one who looks; then the oldest are dropped, and counted
BATCH_EVENTS = 100
KEPT_S = 300.0  # how long the machine is recorded after somebody has looked at it

_watches: WeakKeyDictionary[Engine, Watch] = WeakKeyDictionary()


def watch_of(engine: Engine) -> Watch:
    """Return the watch of an engine."""
    return _watches.setdefault(engine, Watch(engine))


class Watch:
    """Tells those who look what happens to the requests of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine = proxy(engine)  # the engine is the key of `_watches`
        self._lookers: list[Callable[[dict[str, Any]], Any]] = []
        self._before: Callable[[Entry, State, Event], Any] | None = None

    def add(self, looker: Callable[[dict[str, Any]], Any]) -> None:
        """Call `looker` with each event, in the loop's thread."""
        if not self._lookers:
            table = self._engine.table
            self._before, table.on_transition = table.on_transition, self._moved
            self._engine.steps.on_release.append(self._ended)
        self._lookers.append(looker)

    def remove(self, looker: Callable[[dict[str, Any]], Any]) -> None:
        self._lookers.remove(looker)
        if not self._lookers:
            self._engine.table.on_transition = self._before
            self._engine.steps.on_release.remove(self._ended)

    def tell(self, event: str, **fields: Any) -> None:
        """Tell an event that belongs to no request."""
        self._tell({"event": event, "at": time.time(), **fields})

    def _moved(self, entry: Entry, before: State, event: Event) -> None:
        if self._before is not None:
            self._before(entry, before, event)
        kind = "begun" if before in (State.OPENING, State.CONNECTING) else "state"
        if entry.state is not State.CLOSED:
            move = {"from": before.name, "to": entry.state.name, "by": event.value}
            taken = {"taken": entry.state is State.MOVING} if kind == "begun" else {}  # from another process
            self._tell(self._of(entry, kind) | move | taken)

    def _ended(self, entry: Entry) -> None:
        ending = (entry.ending or Ending.DONE).value
        age_s = self._engine.table.clock() - entry.created_at
        counts = {"bytes_in": entry.bytes_in, "bytes_out": entry.bytes_out, "steps": entry.steps}
        self._tell(self._of(entry, "ended") | {"ending": ending, "age_s": age_s, **counts})

    def _of(self, entry: Entry, event: str) -> dict[str, Any]:
        return {
            "event": event,
            "at": time.time(),
            "id": entry.id,
            "kind": entry.kind,
            "peer": address_text(entry.peer),
            "handler": handler_name(entry.handler),
            "handler_state": where(entry)[0],
            "policy": entry.policy.name,
        }

    def _tell(self, event: dict[str, Any]) -> None:
        for looker in tuple(self._lookers):
            looker(event)


def events(engine: Engine, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield an empty batch, then batches of events, for ever: those of the named `kinds`, or all but "state"."""
    waiting: deque[dict[str, Any]] = deque()
    dropped = 0
    kinds = arguments.get("kinds")

    def look(event: dict[str, Any]) -> None:
        nonlocal dropped
        if (event["event"] in kinds) if kinds else event["event"] != "state":
            if len(waiting) >= QUEUE_MAX:
                waiting.popleft()
                dropped += 1
            waiting.append(event)
            job.wake()

    watch = watch_of(engine)
    watch.add(look)
    try:
        yield []  # from here on, nothing is missed
        while True:
            if dropped:
                waiting.append({"event": "dropped", "at": time.time(), "count": dropped})
                dropped = 0
            if waiting:
                yield [waiting.popleft() for _ in range(min(BATCH_EVENTS, len(waiting)))]
            else:
                yield WAIT
    finally:
        watch.remove(look)


# -- the machine ------------------------------------------------------------------------------------------------------


class Machine:
    """Counts how the requests of one handler class move through its states, and how long they stay in each."""

    def __init__(self, handler: type[StateRequestHandler]) -> None:
        self.handler = handler
        self.moves: Counter[tuple[str, str | None]] = Counter()  # None: the request ended
        self.stays: dict[str, list[int]] = {}  # for each state, how many stays were within each of BUCKETS_S, or longer
        self.seconds: Counter[str] = Counter()  # the sums of the stays
        self._lock = Lock()  # the steps of a pool run in several threads
        self._began_at = 0.0
        self._plain = handler._resume
        self._is_own = "_resume" in vars(handler)

    def begin(self) -> None:
        """Count from now on, to what was counted before."""
        self._began_at = time.monotonic()
        plain, count = self._plain, self._count

        def _resume(handler: Any, item: Any) -> Any:
            before = handler._state.name
            want = plain(handler, item)
            count(handler, before, None if want is None else handler._state.name)
            return want

        self.handler._resume = _resume  # type: ignore[method-assign, assignment]  # counts around the plain one

    def end(self) -> None:
        """Count no more."""
        if self._is_own:
            self.handler._resume = self._plain  # type: ignore[method-assign]  # as before `begin`
        else:
            with suppress(AttributeError):
                del self.handler._resume

    def _count(self, handler: Any, before: str, after: str | None) -> None:
        now = time.monotonic()
        with self._lock:
            self.moves[before, after] += 1
            since = handler.__dict__.get("_entered_at")
            handler._entered_at = now
            if since is not None and since >= self._began_at:  # else moves in between were not counted
                stays = self.stays.setdefault(before, [0] * (len(BUCKETS_S) + 1))
                stays[bisect.bisect_left(BUCKETS_S, now - since)] += 1
                self.seconds[before] += now - since


class Recording(Protocol):
    """Describes what records something else while the machines are recorded."""

    def begin(self) -> None:
        """Record from now on. This is called again whenever somebody looks."""

    def end(self) -> None:
        """Record no more."""


class Machines:
    """Records the machines of one engine while somebody looks at them."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine = proxy(engine)  # the engine is the key of `_machines`
        self.known: dict[type, Machine] = {}
        self.also: list[Recording] = []  # what is recorded in the same time
        self._is_recording = False
        self._until = 0.0
        self._is_kept = False  # metrics need them for ever

    def look(self, for_ever: bool = False) -> list[Machine]:
        """Record for some more time, or for ever. Returns the machines."""
        clock = self._engine.table.clock
        begins = not self._is_recording
        if begins:
            self._engine.call_later(KEPT_S, self._end_if_over)
        self._is_recording = True
        self._until, self._is_kept = clock() + KEPT_S, self._is_kept or for_ever
        for machine in self.known.values() if begins else ():
            machine.begin()
        for each in self.also:
            each.begin()
        for server in self._engine.servers:
            handler = unwrapped(server.RequestHandlerClass)
            is_machine = isinstance(handler, type) and issubclass(handler, StateRequestHandler)
            if is_machine and handler not in self.known:
                self.known[handler] = Machine(handler)
                self.known[handler].begin()
        return list(self.known.values())

    def close(self) -> None:
        """Record no more."""
        if self._is_recording:
            for recording in (*self.known.values(), *self.also):
                recording.end()
        self._is_recording = self._is_kept = False

    def _end_if_over(self) -> None:
        left = self._until - self._engine.table.clock()
        if self._is_kept:
            return
        if left > 0:
            self._engine.call_later(left, self._end_if_over)
        else:
            self.close()


_machines: WeakKeyDictionary[Engine, Machines] = WeakKeyDictionary()


def machines_of(engine: Engine) -> Machines:
    """Return what records the machines of an engine."""
    known = _machines.get(engine)
    if known is None:
        known = _machines[engine] = Machines(engine)
    return known


def forget(engine: Engine) -> None:
    """Record nothing of an engine from now on: nobody can look. Keep the records so far."""
    if engine in _machines:
        _machines[engine].close()


def machine(engine: Engine, job: Job) -> Iterator[Any]:
    """Yield PAUSE in between, then each handler that is a state machine: its states, and what was recorded of them."""
    machines = machines_of(engine).look()
    now: Counter[tuple[str, str | None]] = Counter()
    for place, entry in enumerate(engine.table):
        if place % LOOK_EVERY == 0 and job.is_spent:
            yield PAUSE
        now[handler_name(entry.handler), where(entry)[0]] += 1
    yield [_shown(each, now) for each in machines]


def _shown(machine: Machine, now: Mapping[tuple[str, str | None], int]) -> dict[str, Any]:
    name = handler_name(machine.handler)
    states = []
    for info in machine.handler.states():
        states.append(
            {
                **info._asdict(),
                "source": place_of(getattr(machine.handler, info.name)),
                "now": now.get((name, info.name), 0),
                "stays": machine.stays.get(info.name, [0] * (len(BUCKETS_S) + 1)),
                "seconds": machine.seconds[info.name],
            }
        )
    moves = [{"from": before, "to": after, "count": count} for (before, after), count in machine.moves.items()]
    return {"handler": name, "states": states, "moves": moves, "buckets_s": list(BUCKETS_S)}
