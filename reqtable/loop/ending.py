"""How requests end: an entry may linger, is marked closed, and is released.

`end` only marks an entry closed. Once a pass, `reap` releases all marked entries. In mid-pass that would be too early:
the poll may have found an event for an entry that an earlier event of the same pass has closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final

from reqtable.loop.failures import Failures
from reqtable.loop.platform import System
from reqtable.loop.poller import Poller
from reqtable.loop.process import Process
from reqtable.table.connection import ConnectionRow
from reqtable.table.deadlines import Deadlines
from reqtable.table.limits import Limits
from reqtable.table.parts import OVER, RELEASED
from reqtable.table.reach import Connected
from reqtable.table.states import INTEREST, Ending, Event, State
from reqtable.table.table import Entry, RequestTable

_ENDING = {Event.CANCELLED: Ending.CANCELLED, Event.LOST: Ending.RESET}

# Global names, as in step.py, because looking a member up in its Enum is slow.
_LINGERING: Final = State.LINGERING
_CLOSED: Final = State.CLOSED
_CANCELLED: Final = Event.CANCELLED


class Endings:
    """Ends the requests of one table, and releases what they held."""

    def __init__(self, limits: Limits | None, system: System) -> None:
        self.system = system
        self.table = RequestTable(system.clock, limits)
        self.deadlines: Deadlines[Entry] = Deadlines()
        self.poller = Poller(system)
        self.failures = Failures(self.poller, self.end)
        self.closed: list[Entry] = []  # marked closed, not yet released
        self.give_ups: dict[Entry, Callable[[], Any]] = {}  # the function that gives up the call an entry waits for
        # Called with each request, or each outgoing connection, that has left the table.
        self.on_release: list[Callable[[Entry], Any]] = []
        self.on_connection_release: list[Callable[[Entry], Any]] = []

    def end(self, entry: Entry, event: Event) -> None:
        """Mark `entry` closed by `event`, unless it is closed. The pass releases it when it reaps."""
        if entry.state is not _CLOSED:
            if entry.ending is None and not (event is _CANCELLED and entry.state is _LINGERING):
                entry.ending = _ENDING.get(event)  # a lingering request is done: only its connection ends
            self.closed.append(entry)
            entry.advance(event)

    def linger(self, entry: Entry) -> None:
        """Wait a bounded time for the peer's end of file, after our last byte: a reset could cut that byte off."""
        if entry.state is _CLOSED:
            return
        entry.advance(Event.FINISHED)
        entry.input.leftover()  # drop it: nobody will read it
        self.table.hold(entry, 0)
        entry.transport.watch(INTEREST[entry.state])
        self.deadlines.arm(entry, self.table.now + self.table.limits.linger_timeout_s)
        self.end_reach(entry)
        ends_loop = self._close_handler(entry, entry.transport.request)
        if ends_loop is not None:
            try:
                raise ends_loop
            finally:
                ends_loop = None  # see Failures.outside_step

    def reap(self) -> bool:
        """Release all closed entries. Returns whether there were any."""
        freed = bool(self.closed)
        while self.closed:
            self._release(self.closed.pop())
        return freed

    def _release(self, entry: Entry) -> None:
        self.table.remove(entry)
        self.deadlines.forget(entry)
        transport, entry.transport = entry.transport, RELEASED
        request = transport.request
        ends_loop: BaseException | None = None
        if self.give_ups or entry.reach is not None:
            ends_loop = self._free(entry, request, self.give_up_call, entry)
            self.end_reach(entry)
        ends_loop = self._close_handler(entry, request) or ends_loop
        entry.output.clear()  # not before: the access log says how much was sent
        ends_loop = self._free(entry, request, transport.release) or ends_loop
        ends_loop = self._tell(entry) or ends_loop
        self.table.moves.pop(entry, None)  # not before: the handler and those told may ask
        if ends_loop is not None:
            try:
                raise ends_loop
            finally:
                ends_loop = None  # see Failures.outside_step

    def _tell(self, entry: Entry) -> BaseException | None:
        """Call what is to be told of the release of `entry`. Returns the exception that ends the loop, or None."""
        ends_loop: BaseException | None = None
        all_told = iter(self.on_release if entry.kind == "client" else self.on_connection_release)
        while True:
            try:
                for told in all_told:
                    told(entry)
            except BaseException as problem:
                ends_loop = self._failed(entry, None, problem) or ends_loop
            else:
                break
        if self.poller.forks != Process.forks:
            self.poller.end_if_copy()
        return ends_loop

    def end_reach(self, entry: Entry) -> None:
        """End what the request of `entry` has beside its client, if there is anything."""
        reach, entry.reach = entry.reach, None
        if reach is None:
            return
        reach.give_up()
        for row in reach.connections:
            self.let_go(row)

    def let_go(self, row: Connected) -> None:
        """End an outgoing connection that its request has no use for any more."""
        assert isinstance(row, ConnectionRow)
        row.parent = None
        self.end(row, Event.RELEASED)

    def give_up_call(self, entry: Entry) -> None:
        """Give up the calls, connects and handshakes that `entry` waits for."""
        give_up = self.give_ups.pop(entry, None)
        if give_up is not None:
            give_up()
        if entry.reach is not None:
            entry.reach.give_up()

    def _close_handler(self, entry: Entry, request: Any) -> BaseException | None:
        """Close the handler; the connection may still linger. Returns the exception that ends the loop, or None."""
        resumable, entry.resumable = entry.resumable, OVER
        if entry.handler is resumable:
            entry.handler = type(resumable)
        return self._free(entry, request, resumable._close)

    def _free(self, entry: Entry, request: Any, free: Callable[..., Any], *args: Any) -> BaseException | None:
        """Call `free(*args)`, which frees something of `entry`. Report what it raises, and continue.

        Returns the exception that ends the loop, or None.
        """
        try:
            free(*args)
        except BaseException as problem:
            return self._failed(entry, request, problem)
        if self.poller.forks != Process.forks:
            self.poller.end_if_copy()
        return None

    def _failed(self, entry: Entry, request: Any, problem: BaseException) -> BaseException | None:
        self.poller.end_if_copy(problem)
        entry.ending = Ending.ERROR
        return self.failures.report(entry.server, request, entry.peer, problem, entry.id)

    @staticmethod
    def is_closed(entry: Entry) -> bool:
        """Return whether `entry` is closed. Ask again after each flush: a flush that meets a reset closes its entry."""
        return entry.state is _CLOSED

    # -- which thread runs the loop -----------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """True if some thread runs the loop."""
        return self.table.thread is not None

    @property
    def in_other_thread(self) -> bool:
        """True if the loop runs in another thread than the caller's."""
        return self.table.thread not in (None, get_ident())

    @property
    def in_loop_thread(self) -> bool:
        """True if the loop runs in the caller's thread."""
        return self.table.thread == get_ident()

    @property
    def is_copy(self) -> bool:
        """True in a forked child, if the requests are the parent's."""
        return self.poller.is_copy

    def give_way(self) -> None:
        """Let another thread run, such as the loop's."""
        time.sleep(0)  # releases the interpreter's lock, which otherwise changes hands only every 5 ms

    # -- in a forked child --------------------------------------------------------------------------------------------

    def start_over(self) -> None:
        """Abandon all unfinished requests, in a child that will serve by itself: they stay with the parent."""
        self.abandon(None)
        for entry in self.table:
            if entry.state is not _CLOSED:
                entry.advance(Event.LOST)
            entry.transport, entry.resumable = RELEASED, OVER
            self.table.remove(entry)
            self.deadlines.forget(entry)
        for row in list(self.table.connections.values()):
            row.transport = RELEASED
            self.table.remove(row)
            self.deadlines.forget(row)
        self.give_ups.clear()
        self.table.moves.clear()
        self.closed.clear()
        self.table.running = None

    def abandon(self, own: Entry | None) -> None:
        """Close this process's copies of the sockets of all requests but `own`."""
        for entry in self.table:
            # Its own request may be in two tables: a private loop's, and the table that handed the request off.
            if own is None or entry.transport.request is not own.transport.request:
                entry.transport.abandon()
        for row in self.table.connections.values():
            if own is None or row.parent_id != own.id:
                row.transport.abandon()
