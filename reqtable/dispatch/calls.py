"""`Calls`: the calls of one server that wait for a thread, run, or go on though nobody waits for them any more."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from threading import get_ident
from typing import Any

from reqtable.dispatch.policy import Host
from reqtable.table.table import Entry
from reqtable.table.wants import Call

log = logging.getLogger("reqtable")

LATE_S = 5.0  # a call that has waited for so long is worth a warning
_QUIET_S = 60.0  # between two warnings
_NAMED = 3  # functions that a warning names
PHASES = ("running", "given_up", "queued")
_KINDS = {"thread": "threads for calls", "fork": "children for calls"}


class CallUnderway:
    """Holds what is known of a call from its beginning until its function has returned."""

    __slots__ = ("_future", "began_at", "entry", "is_given_up", "on", "thread", "want")

    def __init__(self, entry: Entry, want: Call[Any], on: str) -> None:
        self.entry = entry
        self.want = want
        self.on = on  # the name of its executor
        self.began_at = entry.table.clock()
        self.thread: int | None = None  # the identifier of its thread; None: it has none in this process, or not yet
        self.is_given_up = False
        self._future: Future[Any]

    def run(self) -> Any:
        """Call the function in this thread."""
        self.thread = get_ident()
        return self.want.fn(*self.want.args, **self.want.kwargs)

    def begun(self, future: Future[Any]) -> None:
        """Note what the executor has returned."""
        self._future = future

    def give_up(self) -> None:
        """Want no result any more. A function that runs already goes on, unless it runs in a child of its own."""
        self.is_given_up = True
        self._future.cancel()

    @property
    def phase(self) -> str:
        """`queued` if the call waits for a thread, a child or a process; else `running`, or `given_up`."""
        if not self._future.running() and not self._future.done():
            return "queued"
        return "given_up" if self.is_given_up else "running"


class Calls:
    """Knows the calls of one server that are underway, and warns if all threads or all children are busy for long."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._underway: dict[tuple[Entry, int], CallUnderway] = {}  # by the request, and the number of its call
        self._most: dict[str, int] = {}  # how many calls run at a time in the executors that limits.calls_max bounds
        self._looks = False  # the loop will look whether a call waits for long
        self._quiet_until = 0.0

    def bounded(self, on: str, most: int) -> None:
        """Note how many calls run at a time in an executor."""
        self._most[on] = most

    def add(self, number: int, call: CallUnderway) -> Callable[[], Any]:
        """Keep a call that has begun. Returns the function that forgets it: call that once its function is over."""
        key = (call.entry, number)
        self._underway[key] = call
        if not self._looks and len(self._underway) > self._most.get(call.on, len(self._underway)):
            self._looks = True
            self._host.watching_steps.post(self._look_later)  # only the loop's thread may set its timers
        return lambda: self._underway.pop(key, None)

    def of(self, entry: Entry) -> list[CallUnderway]:
        """Return the calls that a request waits for."""
        numbers = [each.number for each in getattr(entry.reach, "begun", ()) if hasattr(each, "number")]
        found = [self._underway.get((entry, number)) for number in {entry.call_number, *numbers}]
        return [each for each in found if each is not None and not each.is_given_up]

    def handed_off(self, entry: Entry) -> list[CallUnderway]:
        """Return the calls that a request waits for, of which a thread has the rest."""
        request = entry.transport.request
        found = [each for each in list(self._underway.values()) if each.entry.transport.request is request]
        return [each for each in found if not each.is_given_up]

    def counts(self) -> dict[str, dict[str, int | None]]:
        """Return how many calls are in each phase, and how many can run at a time, by the executor."""
        found = Counter((each.on, each.phase) for each in list(self._underway.values()))
        return {
            on: {"most": self._most.get(on), **{phase: found[on, phase] for phase in PHASES}}
            for on in sorted({*self._most, *(on for on, _ in found)})
        }

    def abandon(self) -> None:
        """In a forked child: forget the calls, which are the parent's."""
        self._underway.clear()
        self._looks = False

    def _look_later(self) -> None:
        self._host.watching_steps.mailbox.call_later(self._look, LATE_S)

    def _look(self) -> None:
        """Warn of a call that waits for long. Look again while any call waits."""
        self._looks = False
        now = self._host.steps.table.clock()
        underway = list(self._underway.values())
        queued = [each for each in underway if each.on in self._most and each.phase == "queued"]
        if not queued:
            return
        self._looks = True
        self._look_later()
        oldest = min(queued, key=lambda each: each.began_at)
        if now - oldest.began_at >= LATE_S * 0.9 and now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            busy = [each for each in underway if each.on == oldest.on and each.phase != "queued"]
            log.warning(
                "%r has waited for %.0f s: all %d %s (limits.calls_max) are busy with %s",
                oldest.want,
                now - oldest.began_at,
                self._most[oldest.on],
                _KINDS[oldest.on],
                _named(busy),
            )


def _named(calls: list[CallUnderway]) -> str:
    """Return the functions that calls run, each with how often; and how many of the calls were given up."""
    functions = Counter(repr(each.want) for each in calls)
    words = [f"{name} ×{count}" for name, count in functions.most_common(_NAMED)]
    if len(functions) > _NAMED:
        words.append(f"{len(functions) - _NAMED} more functions")
    given_up = sum(each.is_given_up for each in calls)
    return ", ".join(words) + (f"; {given_up} of these calls were given up, but still run" if given_up else "")
