"""`Engine`: one loop, one table, and the servers that share them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from reqtable.loop.loop import UNATTENDED, Loop
from reqtable.loop.mailbox import Timer
from reqtable.loop.platform import SYSTEM, System
from reqtable.loop.poller import abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.connect import Connector
from reqtable.server.access_log import access, log_access
from reqtable.server.admission import Admission
from reqtable.server.hosted import Hosted, hosted
from reqtable.server.intake import Intake
from reqtable.server.invariants import Invariants, are_checked
from reqtable.server.listeners import Listeners
from reqtable.server.mover import Mover
from reqtable.server.serving import Serving
from reqtable.table.limits import Limits
from reqtable.table.snapshot import unwrapped
from reqtable.table.states import Ending, Event
from reqtable.table.table import Entry, RequestTable

# Functions that are called with each engine that begins to serve. Each returns a context that surrounds the passes.
COMPANIONS: list[Callable[[Engine], AbstractContextManager[Any]]] = []


class Engine:
    """Serves one server or several (`add`) with one loop and one table.

    `system` gives the engine its clock and its kind of selector: `Engine(system=System(selector=SelectSelector))`.
    """

    def __init__(
        self, *, limits: Limits | None = None, system: System | None = None, steps: type[Steps] = Steps
    ) -> None:
        self.system = SYSTEM.get() if system is None else system
        self.steps = steps(limits, self.system)
        self.loop = Loop(self.steps)
        self.connector = Connector(self.steps)
        self.servers: list[Hosted] = []
        self.listeners = Listeners(self.loop)
        self.admission = Admission(self.steps)
        self.intake = Intake(self.loop, self.admission, self.connector, self.listeners.pause)
        self.mover = self.table.mover = Mover(self.steps, self.servers, self.intake)
        self.serving = Serving(self.loop, self.servers, self.listeners, self._end_bound)
        self.taken_over = 0  # requests of a worker that has crashed
        self.stopping = False  # `serve` is to return
        self._stopped = threading.Event()
        self._ran_in: int | None = None  # the thread that last ran the loop
        self.steps.relieve = self.admission.relieve
        self.steps.on_release += [_leave_policy, _count, _log]
        self.loop.on_start_over.append(self._start_over)
        self.loop.after_pass.append(self._after_pass)
        if are_checked():
            self.loop.after_pass.append(self.invariants().check)

    def invariants(self, kind: type[Invariants] = Invariants) -> Invariants:
        """Return a checker of what must hold after each pass of this engine."""
        return kind(self.loop, self.listeners, self.intake.sessions.known.values())

    @property
    def table(self) -> RequestTable:
        """Every unfinished request."""
        return self.steps.table

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self.table.limits

    # -- hosting ------------------------------------------------------------------------------------------------------

    def add(self, server: Any) -> Engine:
        """Host `server` in this engine, over this table. Call it before the server serves. Returns the engine."""
        server._join(self)
        return self

    def discard(self, server: Hosted) -> None:
        """End every request of `server`, and host it no more. Close the loop's descriptors if no server is left."""
        self.listeners.unlisten(server)  # at once: the caller closes the descriptor next
        if self.steps.in_other_thread:
            self.post(self.discard, server)
            return
        self.end_requests(server)
        if server in self.servers:
            self.servers.remove(server)
        if self.serving.has_started(server):
            self.post(self.serving.stop, server)  # in the next pass, when its requests have been released
        if not self.steps.running and not self.servers:
            self.close()

    def end_requests(self, server: Hosted) -> None:
        """End every request of `server`. For the loop's own thread, or while no loop runs."""
        self._leave_parent()
        for entry in self.table:
            if entry.server is server:
                self.steps.end(entry, Event.CANCELLED)
        if not self.steps.running:
            self.steps.reap()

    def has_requests(self, server: Hosted) -> bool:
        """Return whether any request of `server` is unfinished."""
        return self.table.census.count_of(server) > 0

    def close(self) -> None:
        """End every request, cancel every timer, close the loop's descriptors. The servers close their own sockets."""
        self._leave_parent()
        self.loop.mailbox.cancel_timers()
        self.listeners.close()
        for entry in self.table:
            self.steps.end(entry, Event.CANCELLED)
        self.connector.close()
        self.steps.reap()
        self.loop.poller.close()

    def abandon(self, own: Entry | None) -> None:
        """In a forked child: close this process's copies of all descriptors except the socket of `own`."""
        self.loop.poller.close()
        for server in self.servers:
            if own is None or server is not own.server or not isinstance(own.transport.request, tuple):
                abandon_socket(getattr(server, "socket", None))
        self.steps.abandon(own)
        for server in self.servers:
            server._abandon_policies()

    def _leave_parent(self) -> None:
        """In a forked child: start over, because the requests and the loop's descriptors are the parent's."""
        if self.loop.poller.is_copy:
            self.loop.start_over()

    def _start_over(self) -> None:
        self.intake.sessions.known.clear()
        self.connector.start_over()
        self.listeners.forget()
        self._ran_in = None
        self.serving.forget()
        for server in self.servers:
            server._abandon_policies()

    def _after_pass(self, now: float, freed: bool) -> None:
        for listener in self.listeners.all:
            if not listener.watched:
                listener.listen_again_if_room(now, freed)
        for server in tuple(self.servers):
            server.service_actions()

    # -- serving ------------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve every server of this engine until `shutdown()`. Calls their hooks `on_start` and `on_stop`.

        The loop waits for events, not for `poll_interval` (seconds). Timers and posted functions do not make it go on.
        """
        self.serve(lambda: self.stopping or not self.servers, poll_interval)

    def serve(self, stop: Callable[[], Any], poll_interval: float) -> None:
        """Listen for every server, and run the loop until `stop()` is true. `stop()` must look at `stopping` too."""
        self.loop.must_be_idle()
        self._stopped.clear()
        try:
            self.run(stop, poll_interval, around=self._around_passes())
        finally:
            self.stopping = False
            self._stopped.set()

    @contextmanager
    def _around_passes(self) -> Iterator[None]:
        with self.serving.around_passes(), ExitStack() as companions:
            for attend in COMPANIONS:
                companions.enter_context(attend(self))
            yield

    def run(
        self,
        stop: Callable[[], Any],
        most_s: float | None = None,
        until: float | None = None,
        around: AbstractContextManager[Any] = UNATTENDED,
    ) -> None:
        """Run the loop until `stop()` is true, as `Loop.run` does. Unlike `serve`, do not listen for the servers."""
        self._leave_parent()
        ident = threading.get_ident()
        if self._ran_in not in (None, ident):
            self._end_bound()  # another thread ran the loop before: its stacks can't go on here
        self._ran_in = ident
        try:
            self.loop.run(stop, most_s, until, around)
        finally:
            if not self.servers:
                self.close()

    def shutdown(self) -> None:
        """Stop `serve_forever` at once. Wait until it has returned, unless this is the thread that runs it."""
        self.stop()
        if not self.steps.in_loop_thread:
            self._stopped.wait()

    def stop(self) -> None:
        """Stop `serve_forever` without waiting: a signal handler runs in the very thread that it would wait for."""
        self.stopping = True
        self.loop.poller.wake()

    def _end_bound(self) -> None:
        """End the requests whose stacks can't go on in another thread."""
        for entry in self.table:
            if entry.resumable.bound_to_thread:
                self.steps.end(entry, Event.CANCELLED)
        self.steps.reap()

    # -- from outside the loop ----------------------------------------------------------------------------------------

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self.loop.mailbox.post(function, *args)

    def call_later(self, seconds: float, fn: Callable[..., Any], *args: Any) -> Timer:
        """Have the loop call `fn(*args)` once, in `seconds`. Callable from any thread, even before the loop runs.

        An exception of `fn` is logged. The timer waits while no loop runs, does not keep `serve_forever` going, and is
        cancelled when the engine closes, as it does when its last server is closed. In a child that is forked after the
        engine has run, the timer is the parent's. Raises TypeError or ValueError for a wrong argument.
        """
        return self.loop.mailbox.new_timer(seconds, False, fn, args)

    def every(self, seconds: float, fn: Callable[..., Any], *args: Any) -> Timer:
        """Have the loop call `fn(*args)` every `seconds`, for the first time in `seconds`. As `call_later` otherwise.

        The calls do not drift: each is due `seconds` after the one before was due. A call that is more than `seconds`
        late, because `fn` or something else has held up the loop, stands for all that were due meanwhile.
        """
        return self.loop.mailbox.new_timer(seconds, True, fn, args)

    def next_at(self) -> float:
        """Return when, on its clock, the loop must next do something by itself; infinity if nothing is due."""
        return self.loop.next_at()


def _leave_policy(entry: Entry) -> None:
    entry.policy.released()


def _count(entry: Entry) -> None:
    tally = hosted(entry.server)._counts.policies[entry.policy.name]
    tally.finished[entry.ending or Ending.DONE] += 1
    if entry.ending is Ending.MOVED:
        return  # the process that goes on with the request counts its bytes and steps
    tally.bytes_in += entry.bytes_in
    tally.bytes_out += entry.bytes_out
    tally.steps += entry.steps


def _log(entry: Entry) -> None:
    if entry.ending is Ending.MOVED:
        return
    if access.isEnabledFor(logging.INFO) and not getattr(unwrapped(entry.handler), "_logs_requests", False):
        log_access(entry)
