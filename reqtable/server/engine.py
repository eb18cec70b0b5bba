"""`Engine`: a loop that hosts servers: their listeners, their requests, their descriptors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

from reqtable.loop.loop import Loop
from reqtable.loop.platform import SYSTEM, System
from reqtable.net.datagram import Session, session_key
from reqtable.net.listener import EXHAUSTED, Listener
from reqtable.net.preamble import Opening
from reqtable.net.transports import OVER, RELEASED
from reqtable.server.access_log import access, log_access
from reqtable.server.admission import Admission
from reqtable.table.addresses import address_text, printable
from reqtable.table.limits import Limits
from reqtable.table.states import READ, Event, State
from reqtable.table.table import Entry, Server

log = logging.getLogger("reqtable")


class Engine(Loop):
    """One loop and one table, for one server or for several (`add`).

    `system` has its clock and its kind of selector, for one: `Engine(system=System(selector=SelectSelector))`.
    """

    def __init__(self, *, limits: Limits | None = None, system: System | None = None) -> None:
        super().__init__(limits, SYSTEM.get() if system is None else system)
        self.sessions: dict[tuple[Server, Any, Any], Session] = {}
        self.admission = Admission(self)
        self._opened: Opening | None = None  # whose hooks are being called
        self.accepting: Server | None = None  # whose `get_request` may be running
        self._stopping = False
        self._stopped = threading.Event()
        self._ran_in: int | None = None  # the thread that last ran the loop

    def run(self, stop: Callable[[], Any], most_s: float | None = None, until: float | None = None) -> None:
        if self.is_copy:
            self.start_over()
        ident = threading.get_ident()
        if self._ran_in not in (None, ident):
            self._end_bound()  # in the thread that they were bound to, which has left them
        self._ran_in = ident
        try:
            super().run(stop, most_s, until)
        finally:
            if not self.servers:
                self.close()

    def start_over(self) -> None:
        super().start_over()
        self.sessions.clear()
        self._listeners.clear()
        self._ran_in = None
        for server in self.servers:
            server._abandon_dispatchers()

    # -- hosting ------------------------------------------------------------------------------------------------------

    def add(self, server: Any) -> Engine:
        """Host `server` in this engine, over this table; to be called before it serves. Returns the engine."""
        server._join(self)
        return self

    def discard(self, server: Server) -> None:
        """End every request of `server` and host it no more. The last one's descriptors go with it."""
        self.unlisten(server)  # here and now: the descriptor is closed next
        if self.in_other_thread:
            self.post(self.discard, server)
            return
        self.end_requests(server)
        if server in self.servers:
            self.servers.remove(server)
        if self.table.thread is None and not self.servers:
            self.close()

    def end_requests(self, server: Server) -> None:
        """End every request of `server`. Only for the loop's own thread, or while no loop runs."""
        if self.is_copy:
            self.start_over()  # the requests are the parent's
        for entry in self.table:
            if entry.server is server:
                self.end(entry, Event.CANCELLED)
        if self.table.thread is None:
            self._reap()

    def has_requests(self, server: Server) -> bool:
        """Whether any request of `server` is unfinished."""
        return any(entry.server is server for entry in self.table)

    def session_of(self, server: Server, request: Any, peer: Any) -> Session | None:
        """The session that a datagram is for, or what may yet become it, or None."""
        session = self.sessions.get(session_key(server, request, peer)) if peer else None
        if session is None or session.entry.state is State.CLOSED:
            return None
        return session if session.inbox.is_session or not session.inbox.asked else None

    def close(self) -> None:
        """End every request and give the descriptors back. The servers' own sockets are theirs to close."""
        if self.is_copy:
            self.start_over()  # the requests are the parent's
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for entry in self.table:
            self.end(entry, Event.CANCELLED)
        self._reap()
        self.close_descriptors()

    def settle(self) -> None:
        """Take what was posted, where no loop runs that would."""
        if self.table.thread is None and not self.is_copy:
            while self._posts:
                post, args = self._posts.popleft()
                post(*args)
            self._reap()

    def enter(self, entry: Entry) -> None:
        super().enter(entry)
        entry.server._counts.policies[entry.policy.name].accepted += 1
        entry.policy.admitted()

    def relieve(self) -> None:
        self.admission.relieve()

    def released(self, entry: Entry) -> None:
        ends_loop = self._free(entry, None, entry.policy.released)
        tally = entry.server._counts.policies[entry.policy.name]
        tally.finished[entry.ending or "done"] += 1
        tally.bytes_in += entry.bytes_in
        tally.bytes_out += entry.bytes_out
        tally.steps += entry.steps
        if access.isEnabledFor(logging.INFO):
            ends_loop = self._free(entry, None, log_access, entry) or ends_loop
        if ends_loop is not None:
            try:
                raise ends_loop
            finally:
                ends_loop = None  # see Failures.outside_step

    # -- opening them -------------------------------------------------------------------------------------------------

    def open_request(self, opening: Opening) -> None:
        """Admit to the table what something has to come before."""
        entry = opening.entry
        entry.resumable = OVER
        self.enter(entry)
        self.deadlines.arm(entry, self.table.now + self.limits.handshake_timeout_s)
        opening.on_ready(READ)

    def opened(self, opening: Opening) -> None:
        """All that comes before has come: have the server's hooks take the request."""
        entry = opening.entry
        self._opened = opening
        try:
            entry.server._take(opening.request, entry.peer)
        except BaseException as error:
            if entry.state is State.OPENING:
                entry.ending = "error"
                entry.server._turn_away(opening.request, entry.peer, error, self.table.last_id)
            else:  # its handler has begun
                self.failures.outside_step(entry, error)
        finally:
            self._opened = None
            if entry.state is State.OPENING:  # a hook has refused it, or has taken it elsewhere
                entry.transport = RELEASED
                self.end(entry, Event.RELEASED)

    def entry_of(self, request: Any) -> Entry | None:
        """The entry of a request that has just been opened."""
        opening = self._opened
        return opening.entry if opening is not None and opening.request is request else None

    # -- taking requests ----------------------------------------------------------------------------------------------

    def listen(self, server: Server, most: int | None = None) -> Listener:
        """Take new requests for `server` while the loop runs, at most `most` a pass."""
        self.open()
        self.unlisten(server)
        server._prepare()
        listener = Listener(self, server, most or self.limits.accepts_per_pass)
        self._listeners.append(listener)
        return listener

    def unlisten(self, server: Server) -> None:
        """Take no more requests for `server`; the kernel's queue holds those who connect."""
        for listener in [each for each in self._listeners if each.server is server]:
            self._listeners.remove(listener)
            listener.close()

    def unlisten_for_good(self, server: Server) -> None:
        """Take those who have connected to `server`, and let nobody else."""
        for listener in self._listeners:
            if listener.server is server:
                listener.take_the_last()
        self.unlisten(server)

    def refused(self, server: Server, error: OSError) -> bool:
        """`get_request` raised `error`. True where the next one may fare better at once."""
        if isinstance(error, BlockingIOError):
            return False
        if error.errno in EXHAUSTED:
            for listener in self._listeners:
                if listener.server is server:
                    listener.rest(error)
            return False
        here = address_text(server.server_address)
        # as text: a record that is kept would keep the connection open, by the error's traceback
        log.info("%s: get_request raised %s: %s", here, type(error).__name__, printable(error))
        return True

    # -- serving all of them ------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve every server of this engine until `shutdown()`."""
        self.must_be_idle()
        self._stopped.clear()
        try:
            for server in self.servers:
                self.listen(server)
            with self.watched():
                self.run(lambda: self._stopping or not self.servers, poll_interval)
        finally:
            self.leave()
            self._stopping = False
            self._stopped.set()

    def watched(self) -> AbstractContextManager[Any]:
        """For as long as it is entered, steps that hold up the loop are warned of, where there can be any."""
        if self.limits.loop_stall_s < inf and any(server._steps_on_loop for server in self.servers):
            return self.system.watch(self)
        return nullcontext()

    def leave(self) -> None:
        """After serving: take nothing new. What is bound to a thread that may end now ends with it."""
        for server in self.servers:
            self.unlisten(server)
        if threading.current_thread() is not threading.main_thread():
            self._end_bound()

    def _end_bound(self) -> None:
        """End the requests whose stacks can't go on in another thread."""
        for entry in self.table:
            if entry.resumable.bound_to_thread:
                self.end(entry, Event.CANCELLED)
        self._reap()

    def shutdown(self) -> None:
        """End `serve_forever`, at once; wait until it has ended, unless it is this thread that is in it."""
        self.stop()
        if self.table.thread != threading.get_ident():
            self._stopped.wait()

    def stop(self) -> None:
        """The same without waiting: for a signal handler, which runs in the thread that it would wait for."""
        self._stopping = True
        self.wake()
