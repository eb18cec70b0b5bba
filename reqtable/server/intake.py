"""The one door: how a request enters the table.

In this order, each a method:

1. `accept` asks the server's `get_request` for a request: a connection, or a datagram.
2. `arrived`: if the server's connections begin with a preamble (a PROXY header, a TLS handshake), that comes first. The
   request is in the table meanwhile, OPENING.
3. `offer`: the server's hooks `verify_request` and `process_request` take the request.
4. `admit`, which `process_request` calls: *admission* finds room; the row is made: its *transport*, its *entry*, and
   what runs its handler, from its *policy*; then the *first step* runs.

A request that fails on this way is turned away, and no other one notices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.policy import Policy
from reqtable.loop.loop import Loop
from reqtable.loop.process import Process
from reqtable.net.datagram import Session, Sessions
from reqtable.net.listener import EXHAUSTED
from reqtable.net.pktinfo import Datagram
from reqtable.net.poll_only import PollOnly
from reqtable.net.preamble import Preamble, PreambleSpec, stream_over
from reqtable.net.sockets import end_request
from reqtable.net.stream import Stream
from reqtable.server.admission import Admission
from reqtable.server.hosted import Hosted, hosted
from reqtable.table.addresses import address_text, printable
from reqtable.table.parts import OVER, RELEASED, Server, Transport
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import NOTHING

log = logging.getLogger("reqtable")

_WILDCARDS = ("", "0.0.0.0", "::")


class Intake:
    """Takes requests for the servers of one engine.

    `on_exhausted(server, error)` is called where no request can be had for want of descriptors or memory.
    """

    def __init__(self, loop: Loop, admission: Admission, on_exhausted: Callable[[Hosted, OSError], None]) -> None:
        self._loop = loop
        self._steps = loop.steps
        self._admission = admission
        self._on_exhausted = on_exhausted
        self.sessions = Sessions(self._steps, self._take_again)
        # By the id() of the request: those whose preamble has come, while the hooks take them.
        self._opened: dict[int, Preamble] = {}

    def accept(self, server: Hosted) -> bool:
        """Take a request that is there; True where there may be another."""
        poller, table = self._steps.poller, self._steps.table
        if poller.forks != Process.forks and poller.is_copy:
            self._loop.start_over()  # a forked child that takes requests by itself
        table.accepting = server
        try:
            request, peer = server.get_request()
        except OSError as error:
            poller.end_if_copy(error)
            return self._not_had(server, error)
        except BaseException as error:
            poller.end_if_copy(error)
            raise
        finally:
            table.accepting = None
        if poller.forks != Process.forks:
            poller.end_if_copy()
        known = table.last_id
        try:
            self.arrived(server, request, peer)
        except BaseException as error:
            self._turn_away(server, request, peer, error, known)
        if poller.forks != Process.forks:
            poller.end_if_copy()
        return True

    def arrived(self, server: Hosted, request: Any, peer: Any) -> None:
        """A request has arrived: see to what comes before it, or have the hooks take it."""
        spec = server._preamble
        if spec is not None and spec.comes_first(request, peer):
            self._begin_preamble(server, spec, request, peer)
        else:
            self.offer(server, request, peer)

    def offer(self, server: Hosted, request: Any, peer: Any) -> None:
        """Have the hooks of the server take a request."""
        failures, poller = self._steps.failures, self._steps.poller
        try:
            is_welcome = server.verify_request(request, peer)
        except BaseException as error:
            poller.end_if_copy(error)
            if failures.hooks_raise:
                failures.unwinding = error  # as in `socketserver`, nothing is called any more
            raise
        if poller.forks != Process.forks:
            poller.end_if_copy()
        if is_welcome:
            server.process_request(request, peer)
        else:
            server.shutdown_request(request)

    def admit(self, server: Hosted, request: Any, peer: Any) -> None:
        """Enter a request into the table, if there is room, and run its first step. Else the request is shut down.

        Raises what the handler's constructor raises.
        """
        preamble = self._opened.get(id(request)) if self._opened else None
        if preamble is None:
            policy = server._policies.chosen
            if not self._admission.has_room(server, request, peer):
                server.shutdown_request(request)
                return
            transport = self._transport(server, policy, request)
            entry = self._row(server, policy, request, peer, transport)
            self._attach(entry, policy, transport)
            self._enter(entry, server)
        else:
            entry = preamble.entry
            if preamble.is_proxied and not self._admission.has_room_for_peer(server, request, peer, entry):
                server.shutdown_request(request)
                return
            policy = self._policy_of(entry)
            transport = self._transport(server, policy, request)
            entry.want = NOTHING
            entry.transport = transport
            self._attach(entry, policy, transport)
        self._steps.begin(entry)

    # -- the row ------------------------------------------------------------------------------------------------------

    def _transport(self, server: Hosted, policy: Policy, request: Any) -> Session | Stream | PollOnly:
        if not is_resumable(server.RequestHandlerClass):
            return policy.transport_for(request)
        if isinstance(request, tuple):
            return Session(self.sessions, request)
        return stream_over(self._steps, request)

    def _row(self, server: Hosted, policy: Policy, request: Any, peer: Any, transport: Transport) -> Entry:
        """The entry of a request. Those of one host, and at one address of this machine, share the text of both."""
        local = server.server_address
        if isinstance(local, tuple) and local[0] in _WILDCARDS:  # which of the machine's addresses did it come to?
            if type(request) is Datagram:
                local = request.local
            elif not isinstance(request, tuple):
                local = _same(transport.request.getsockname())
        if isinstance(peer, tuple) and peer and isinstance(peer[0], str):
            peer = (_same(peer[0]), *peer[1:])
        return Entry(self._steps.table, server, policy, peer, local, transport)

    def _attach(self, entry: Entry, policy: Policy, transport: Session | Stream | PollOnly) -> None:
        """Join the entry, its transport and what runs its handler."""
        transport.entry = entry
        policy.attach(entry)
        if isinstance(transport, Session):
            transport.attach(entry)

    def _enter(self, entry: Entry, server: Hosted) -> None:
        self._steps.table.add(entry)
        server._counts.policies[entry.policy.name].accepted += 1
        entry.policy.admitted()

    @staticmethod
    def _policy_of(entry: Entry) -> Policy:
        assert isinstance(entry.policy, Policy)
        return entry.policy

    # -- the preamble -------------------------------------------------------------------------------------------------

    def _begin_preamble(self, server: Hosted, spec: PreambleSpec, request: Any, peer: Any) -> None:
        """Enter a request into the table that a preamble comes before."""
        # of a proxy's connections only the header says whose they are
        if not self._admission.has_room(server, request, None if spec.is_proxy(peer) else peer):
            server.shutdown_request(request)
            return
        steps = self._steps
        preamble = Preamble(steps, request, spec, self._preamble_done)
        policy = server._policies.chosen
        entry = preamble.entry = self._row(server, policy, request, peer, preamble)
        entry.resumable = OVER
        self._enter(entry, server)
        steps.deadlines.arm(entry, steps.table.now + steps.table.limits.handshake_timeout_s)
        preamble.begin()

    def _preamble_done(self, preamble: Preamble) -> None:
        """The hooks take the request as if it had just come: from the client's own address, by a secured socket."""
        entry, request = preamble.entry, preamble.request
        server = hosted(entry.server)
        self._opened[id(request)] = preamble
        try:
            self.offer(server, request, entry.peer)
        except BaseException as error:
            if entry.state is State.OPENING:
                entry.ending = Ending.ERROR
                self._turn_away(server, request, entry.peer, error, self._steps.table.last_id)
            else:  # its handler has begun
                self._steps.failures.outside_step(entry, error)
        finally:
            self._opened.pop(id(request), None)
            if entry.state is State.OPENING:  # a hook has refused it, or has taken it elsewhere
                entry.transport = RELEASED
                self._steps.end(entry, Event.RELEASED)

    # -- what is not taken --------------------------------------------------------------------------------------------

    def _not_had(self, server: Hosted, error: OSError) -> bool:
        """`get_request` raised `error`. True where the next one may fare better at once."""
        if isinstance(error, BlockingIOError):
            return False
        if error.errno in EXHAUSTED:
            self._on_exhausted(server, error)
            return False
        here = address_text(server.server_address)
        # as text: a record that is kept would keep the connection open, by the error's traceback
        log.info("%s: get_request raised %s: %s", here, type(error).__name__, printable(error))
        return True

    def _turn_away(self, server: Hosted, request: Any, peer: Any, error: BaseException, known: int) -> None:
        """A hook raised `error` while it took a request: report it, and end the request. Raises what ends the loop.

        `known` is the id of the last entry before: the request may have entered the table by then.
        """
        failures = self._steps.failures
        ends_loop: BaseException | None = None
        try:
            if error is failures.unwinding:
                raise error
            for entry in self._steps.table:
                if entry.id > known or entry.transport.request is request:
                    failures.outside_step(entry, error)
                    return
            ends_loop = failures.report(server, request, peer, error)
            try:
                end_request(server.shutdown_request, request)
            except BaseException as raised:
                failures.outside_step(None, raised)
            if ends_loop is not None:
                raise ends_loop
        finally:
            del error, ends_loop  # its traceback holds this frame: a cycle would keep the request's socket open

    def _take_again(self, server: Server, request: Any, peer: Any) -> None:
        """Take a datagram that has waited for a session, and belongs to none."""
        known = self._steps.table.last_id
        try:
            server.process_request(request, peer)
        except BaseException as error:
            self._turn_away(hosted(server), request, peer, error, known)


@lru_cache(maxsize=4096)
def _same(thing: Any) -> Any:
    """One for all that are equal: the entries of one host, or at one address of the machine, need not have its own."""
    return thing
