"""The control API of a supervisor: it asks all workers, each over its line, and joins what they answer.

A worker that does not answer in time is stuck: it is left out of the answer, and `/v1/workers` shows where it is stuck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from typing import Any

from reqtable.control.jobs import END, Failed, Then
from reqtable.control.line import Line
from reqtable.control.query import Conflict, QueryError
from reqtable.server.engine import Engine
from reqtable.table.errors import ConfigurationError, ReqtableError

_NOT_ASKED = -1
ANSWER_S = 1.0  # how long a worker may take for a batch

_ERRORS: dict[str, type[ReqtableError]] = {each.__name__: each for each in (QueryError, Conflict, ConfigurationError)}


class Stuck:
    """Stands in for a batch: the worker has not answered in time, or has ended."""


STUCK = Stuck()


class Caller:
    """The supervisor's end of the line to one worker."""

    def __init__(self, engine: Engine, own: Any) -> None:
        self._engine = engine
        self._numbers = count(1)
        self._waiting: dict[int, Then] = {}  # what each pull waits for, by the number of its asking
        self.last_words: Any = None  # what the worker has said at its end: the figures of its metrics
        self.line = Line(engine.loop.poller, own, self._hear, self._gone)

    def ask(self, operation: str, arguments: Mapping[str, Any]) -> RemoteAsking:
        """Ask the worker for an operation. One that does not read what it was asked before is asked nothing more."""
        if self.line.is_full:
            return RemoteAsking(self, _NOT_ASKED)
        number = next(self._numbers)
        self.line.say([number, "ask", operation, dict(arguments)])
        return RemoteAsking(self, number)

    def pull(self, number: int, then: Then, patient: bool) -> None:
        """Ask for the next batch. `then` gets STUCK if it does not come in time, or if the worker ends."""
        if not self.line.is_open or number == _NOT_ASKED:
            self._engine.post(then, STUCK)
            return
        self._waiting[number] = then
        self.line.say([number, "pull"])
        if not patient:
            self._engine.call_later(ANSWER_S, self._late, number, then)

    def close(self, number: int) -> None:
        self._waiting.pop(number, None)
        if number != _NOT_ASKED:
            self.line.say([number, "close"])

    def _late(self, number: int, then: Then) -> None:
        if self._waiting.get(number) is then:
            self.close(number)
            then(STUCK)

    def _gone(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for then in waiting.values():
            then(STUCK)

    def _hear(self, message: list[Any]) -> None:
        number, verb, *rest = message
        if verb == "last":
            [self.last_words] = rest
        then = self._waiting.pop(number, None)
        if then is None:
            return  # it came too late, or nobody has asked
        if verb == "batch":
            then(rest[0])
        elif verb == "end":
            then(END)
        else:
            kind, text = rest
            then(Failed(_ERRORS.get(kind, ReqtableError)(text)))


class RemoteAsking:
    """An operation that a worker runs."""

    def __init__(self, caller: Caller, number: int) -> None:
        self._caller = caller
        self._number = number

    def pull(self, then: Then, patient: bool = False) -> None:
        """Ask for the next batch. A patient asking may wait for it for ever."""
        self._caller.pull(self._number, then, patient)

    def close(self) -> None:
        self._caller.close(self._number)


class Gathered:
    """Asks several workers at once, and gives one batch: what `combine` makes of all their batches.

    `combine` gets a list for each worker that has answered: its batches. If `is_enough` is true of a batch, no other
    worker is waited for.
    """

    def __init__(
        self,
        askings: Iterable[RemoteAsking],
        combine: Callable[[list[list[Any]]], Any],
        is_enough: Callable[[Any], bool] | None = None,
    ) -> None:
        self._askings = list(askings)
        self._combine = combine
        self._is_enough = is_enough
        self._batches: list[list[Any]] = [[] for _ in self._askings]
        self._left = 0
        self._then: Then | None = None
        self._is_done = False

    def pull(self, then: Then) -> None:
        self._then = then
        if self._is_done:
            self._give(END)
            return
        self._left = len(self._askings)
        for place, asking in enumerate(self._askings):
            asking.pull(partial(self._came, place))
        if not self._askings:
            self._finish()

    def close(self) -> None:
        self._then = None
        for asking in self._askings:
            asking.close()

    def _came(self, place: int, batch: Any) -> None:
        if self._then is None:
            return
        if isinstance(batch, Failed):
            self._give(batch)
        elif batch is END or batch is STUCK:
            self._left -= 1
            if not self._left:
                self._finish()
        else:
            self._batches[place].append(batch)
            if self._is_enough is not None and self._is_enough(batch):
                for asking in self._askings:
                    asking.close()
                self._finish()
                return
            self._askings[place].pull(partial(self._came, place))

    def _finish(self) -> None:
        self._is_done = True
        try:
            whole = self._combine([each for each in self._batches if each])
        except Exception as error:
            whole = Failed(error)
        self._give(whole)

    def _give(self, batch: Any) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(batch)


class Chained:
    """Gives the batches of one worker after another: rows in no order, as far as `limit` goes.

    The first batch is asked of all workers at once, so that several stuck ones take no longer than one.
    """

    def __init__(self, askings: Iterable[RemoteAsking], limit: int | None) -> None:
        self._askings = list(askings)
        self._left = limit
        self._then: Then | None = None
        self._first: dict[RemoteAsking, Any] = {}  # the first batches, until they are given
        self._late = len(self._askings)  # how many first batches have not come

    def pull(self, then: Then) -> None:
        self._then = then
        if self._late:
            for asking in self._askings:
                asking.pull(partial(self._came_first, asking))
        else:
            self._next()

    def close(self) -> None:
        self._then = None
        for asking in self._askings:
            asking.close()
        self._askings.clear()

    def _came_first(self, asking: RemoteAsking, batch: Any) -> None:
        self._first[asking] = batch
        self._late -= 1
        if not self._late and self._then is not None:
            self._next()

    def _next(self) -> None:
        """Give the next batch, or have it come."""
        if not self._askings or self._left == 0:
            self._give(END)
            self.close()
        elif self._askings[0] in self._first:
            self._came(self._first.pop(self._askings[0]))
        else:
            self._askings[0].pull(self._came)

    def _came(self, batch: Any) -> None:
        if self._then is None:
            return
        if batch is END or batch is STUCK:
            del self._askings[:1]
            self._next()
            return
        if isinstance(batch, list) and self._left is not None:
            batch = batch[: self._left]
            self._left -= len(batch)
        self._give(batch)

    def _give(self, batch: Any) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(batch)


class Merged:
    """Gives the batches of all workers as they come, for ever."""

    def __init__(
        self,
        engine: Engine,
        askings: Iterable[RemoteAsking],
        ask: Callable[[Any], RemoteAsking],
        on_worker: list[Callable[[Any], Any]],
    ) -> None:
        self._engine = engine
        self._askings = set(askings)
        self._ask = ask
        self._on_worker = on_worker  # called with each worker that starts later
        on_worker.append(self._join)
        self._idle = set(self._askings)  # those that wait for no batch
        self._beginning = set(self._askings)  # those that have not begun: nothing is given before
        self._arrived: list[Any] = []
        self._then: Then | None = None

    def _join(self, worker: Any) -> None:
        """Have another worker's batches, too."""
        asking = self._ask(worker)
        self._askings.add(asking)
        self._pull(asking)

    def pull(self, then: Then) -> None:
        self._then = then
        if self._arrived:
            self._give(self._arrived.pop(0))
            return
        if self._beginning:
            self._engine.call_later(ANSWER_S, self._begin_without_the_stuck)
        for asking in tuple(self._idle):
            self._pull(asking)

    def _begin_without_the_stuck(self) -> None:
        """Give what the others tell. A worker that is stuck joins them when it goes on."""
        if self._beginning:
            self._beginning.clear()
            self._give([])

    def close(self) -> None:
        self._then = None
        if self._join in self._on_worker:
            self._on_worker.remove(self._join)
        for asking in self._askings:
            asking.close()
        self._askings.clear()

    def _pull(self, asking: RemoteAsking) -> None:
        self._idle.discard(asking)
        asking.pull(partial(self._came, asking), patient=True)

    def _came(self, asking: RemoteAsking, batch: Any) -> None:
        has_ended = batch is END or batch is STUCK or isinstance(batch, Failed)
        if has_ended:
            self._askings.discard(asking)
        else:
            self._idle.add(asking)
        if asking in self._beginning:
            self._beginning.discard(asking)
            if not self._beginning:
                self._give([])
        elif has_ended:
            pass
        elif not batch:  # a worker that has started later has begun
            if self._then is not None:
                self._pull(asking)
        elif self._then is None:
            self._arrived.append(batch)
        else:
            self._give(batch)

    def _give(self, batch: Any) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(batch)
