"""`Recorder`: what the metrics say of past requests: how long they lasted, and how HTTP requests were answered.

It records only while somebody looks, like the machines of `watch`: before that, a request costs no instruction more.
A record stays, so no figure ever becomes smaller.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, proxy

from reqtable.control.figures import BUCKETS_S, Figures, Value
from reqtable.control.watch import machines_of
from reqtable.http import HTTPRequestHandler
from reqtable.http.messages import Request
from reqtable.server.engine import Engine
from reqtable.server.hosted import Hosted
from reqtable.server.stats import Counts
from reqtable.table.snapshot import handler_name, unwrapped
from reqtable.table.table import Entry

OTHER = "other"  # stands for every value of a label beyond its bound
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")
HANDLERS_MAX = 100  # different names of handlers: a program may make classes as it goes


class Durations:
    """Counts durations by the buckets of a histogram, and adds them up."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, ...], list[float]] = {}

    def add(self, labels: tuple[str, ...], seconds: float) -> None:
        value = self._values.setdefault(labels, [0] * (len(BUCKETS_S) + 2))
        value[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        value[-1] += seconds

    def values(self) -> dict[tuple[str, ...], Value]:
        return {labels: list(value) for labels, value in self._values.items()}


class Recorder:
    """Records what the metrics of one engine need."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine = proxy(engine)
        self._machines = machines_of(engine)
        self._machines.also.append(self)
        self._names: set[str] = set()  # of handlers
        self._known: list[Counts] = []  # of servers, those that are closed included: their figures stay
        self._requests = Durations()
        self._exchanges = Durations()  # HTTP requests
        self._responses: Counter[tuple[str, ...]] = Counter()
        self._lock = Lock()  # the steps of a pool run in several threads
        self._put_back: dict[type, list[Callable[[], None]]] = {}  # what ends the recording of each HTTP handler

    def look(self, for_ever: bool = False) -> None:
        """Record for some minutes more, or for ever."""
        self._machines.look(for_ever)

    def name_of(self, handler: Any) -> str:
        """Return the name of a handler's class as the value of a label, of which there are not too many."""
        name = handler_name(handler)
        if name not in self._names and len(self._names) >= HANDLERS_MAX:
            return OTHER
        self._names.add(name)
        return name

    def counts_of(self, servers: Iterable[Hosted]) -> list[Counts]:
        """Return the counts of the servers, and of those that this was asked for earlier."""
        self._known += [each._counts for each in servers if not any(each._counts is known for known in self._known)]
        return self._known

    def figures(self) -> Figures:
        """Return what was recorded."""
        stays: dict[tuple[str, ...], Value] = {
            (self.name_of(machine.handler), name): [*machine.stays[name], machine.seconds[name]]
            for machine in self._machines.known.values()
            for name in list(machine.stays)
        }
        return {
            "reqtable_request_duration_seconds": self._requests.values(),
            "reqtable_state_duration_seconds": stays,
            "reqtable_http_responses_total": {**self._responses},
            "reqtable_http_request_duration_seconds": self._exchanges.values(),
        }

    # -- what the machines call ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Record from now on; called again when there may be another handler."""
        on_release = self._engine.steps.on_release
        if self._ended not in on_release:
            on_release.append(self._ended)
        for server in self._engine.servers:
            handler = unwrapped(server.RequestHandlerClass)
            if isinstance(handler, type) and issubclass(handler, HTTPRequestHandler) and handler not in self._put_back:
                self._put_back[handler] = self._begin_http(handler)

    def end(self) -> None:
        """Record no more."""
        if self._ended in self._engine.steps.on_release:
            self._engine.steps.on_release.remove(self._ended)
        while self._put_back:
            for put_back in self._put_back.popitem()[1]:
                put_back()

    def _ended(self, entry: Entry) -> None:
        self._requests.add((self.name_of(entry.handler),), self._engine.table.clock() - entry.created_at)

    def _begin_http(self, handler: type[HTTPRequestHandler]) -> list[Callable[[], None]]:
        """Count the answers of an HTTP handler where each of them ends: whole, at a deadline, or broken off."""
        end_answer, last_words, close = handler.end_answer, handler._last_words, handler._close

        def counted_end(own: Any) -> Any:
            request, status = own.request, own.reply.status
            transition = end_answer(own)
            self._answered(own, handler, request, status)
            return transition

        def counted_last_words(own: Any) -> bytes:
            words = last_words(own)
            if words:
                self._answered(own, handler, own.request, own.reply.status)
            return words

        def counted_close(own: Any) -> None:
            reply = getattr(own, "reply", None)
            if reply is not None and not reply.is_done and reply.status:
                self._answered(own, handler, own.request, reply.status)
            close(own)

        counted = {"end_answer": counted_end, "_last_words": counted_last_words, "_close": counted_close}
        return [replaced(handler, name, method) for name, method in counted.items()]

    def _answered(self, own: HTTPRequestHandler, handler: type, request: Request, status: int) -> None:
        if own.__class__ is not handler:
            return  # a class derived from it is recorded by itself
        code = str(status) if 100 <= status <= 599 else OTHER
        method = request.method if request.method in METHODS else OTHER
        seconds = own.entry.table.clock() - request.began_at
        with self._lock:
            self._responses[code, method] += 1
            self._exchanges.add((self.name_of(handler),), seconds)


def replaced(owner: type, name: str, method: Any) -> Callable[[], None]:
    """Replace a method of a class. Returns a function that puts the former one back."""
    former = vars(owner).get(name)
    setattr(owner, name, method)

    def put_back() -> None:
        if former is not None:
            setattr(owner, name, former)
        else:
            with suppress(AttributeError):
                delattr(owner, name)

    return put_back


_recorders: WeakKeyDictionary[Engine, Recorder] = WeakKeyDictionary()


def recorder_of(engine: Engine) -> Recorder:
    """Return the recorder of an engine."""
    known = _recorders.get(engine)
    if known is None:
        known = _recorders[engine] = Recorder(engine)
    return known
