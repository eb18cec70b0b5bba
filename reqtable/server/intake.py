"""The one door: how a request enters the table.

A request passes through these methods, in this order:

1. `accept` calls the server's `get_request`, which returns a request: a connection, or a datagram.
2. `arrived` checks whether the request begins with a preamble: a PROXY header, a TLS handshake. If it does, the request
   waits in the table, in the state OPENING, until its preamble is complete.
3. `offer` passes the request to the server's hooks, `verify_request` and then `process_request`.
4. `admit`, which `process_request` calls, asks the admission for room. Then it makes the transport and the entry, has
   the policy attach what runs the handler, and runs the first step.

A request that fails on the way is turned away. Other requests are not affected. A hook may fork. If the child comes
back here, `end_if_copy` ends it, because the loop is its parent's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.policy import Policy
from reqtable.loop.freezing import Freezer
from reqtable.loop.loop import Loop
from reqtable.loop.process import Process
from reqtable.loop.step import Steps
from reqtable.net.connect import Connector
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
from reqtable.table.errors import ReqtableError
from reqtable.table.moved_files import close_files, open_file
from reqtable.table.parts import OVER, RELEASED, Server, Transport
from reqtable.table.record import restore
from reqtable.table.saving import Attachments, Head, read
from reqtable.table.snapshot import unwrapped
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import NOTHING

log = logging.getLogger("reqtable")

StreamMaker = Callable[[Hosted, Steps, Any], Stream]

_WILDCARDS = ("", "0.0.0.0", "::")


class Intake:
    """Brings the new requests of one engine's servers into its table.

    `on_exhausted(server, error)` is called if `get_request` fails because descriptors or memory have run out.
    """

    def __init__(
        self, loop: Loop, admission: Admission, connector: Connector, on_exhausted: Callable[[Hosted, OSError], None]
    ) -> None:
        self._loop = loop
        self._connector = connector
        self._freezer = Freezer(loop.steps)
        self._steps = loop.steps
        self._admission = admission
        self._on_exhausted = on_exhausted
        self.sessions = Sessions(self._steps, self._take_again)
        self.make_stream: StreamMaker = _stream  # makes the transports of resumable handlers' connections
        # Complete preambles, by the id() of their request, while the request is with the hooks.
        self._opened: dict[int, Preamble] = {}

    def accept(self, server: Hosted) -> bool:
        """Accept one waiting request of `server`. Returns whether another one may be waiting."""
        poller, table = self._steps.poller, self._steps.table
        if poller.forks != Process.forks and poller.is_copy:
            self._loop.start_over()  # this is a forked child that serves by itself
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
        last_id_before = table.last_id
        try:
            self.arrived(server, request, peer)
        except BaseException as error:
            self._turn_away(server, request, peer, error, self._newer(last_id_before))
        if poller.forks != Process.forks:
            poller.end_if_copy()
        return True

    def arrived(self, server: Hosted, request: Any, peer: Any) -> None:
        """Read the preamble of a new request if it has one; otherwise pass the request to the hooks."""
        spec = server._preamble
        if spec is not None and spec.comes_first(request, peer):
            self._begin_preamble(server, spec, request, peer)
        else:
            self.offer(server, request, peer)

    def offer(self, server: Hosted, request: Any, peer: Any) -> None:
        """Ask the hook `verify_request`, then pass the request to `process_request` or `shutdown_request`."""
        failures, poller = self._steps.failures, self._steps.poller
        try:
            is_welcome = server.verify_request(request, peer)
        except BaseException as error:
            poller.end_if_copy(error)
            if failures.hooks_raise:
                failures.unwinding = error  # as in `socketserver`, the caller gets it, and no other hook is called
            raise
        if poller.forks != Process.forks:
            poller.end_if_copy()
        if is_welcome:
            server.process_request(request, peer)
        else:
            server.shutdown_request(request)

    def admit(self, server: Hosted, request: Any, peer: Any) -> None:
        """Enter a request into the table, and run its first step. If there is no room, shut the request down.

        Raises what the handler's constructor raises.
        """
        preamble = self._opened.get(id(request)) if self._opened else None
        if preamble is None:
            entry = self._new_row(server, request, peer)
        else:
            entry = self._opened_row(preamble, server, request, peer)
        if entry is None:
            server.shutdown_request(request)
        else:
            entry.policy.begin(entry)  # type: ignore[attr-defined]

    def resume(self, server: Hosted, head: Head, attached: Sequence[Any], made_at: float) -> Entry:
        """Enter a request that comes from another process, with what goes with its record. It is MOVING until thawed.

        The record was made at `made_at`, by the clock of this table.

        Raises ReqtableError if the record can't be used. Then what was attached is the caller's, as it was. The
        descriptors of files are the caller's in any case: they are duplicated.
        """
        try:
            request, others = self._moved_request(server, head, attached)
            transport = self._transport(server, server._policies.chosen, request)
            entry = Entry(self._steps.table, server, server._policies.chosen, head.peer, head.local, transport)
            transport.entry = entry
        except Exception as error:
            raise ReqtableError(f"request {head.id} can't go on with its socket: {error!r}") from error
        entry.resumable = OVER
        if isinstance(transport, Session):
            transport.resume(entry)
        self._enter(entry, server, head.id)
        try:
            self._fill(entry, head, others, made_at)
        except BaseException as error:
            self.give_back(entry)
            if isinstance(error, ReqtableError) or not isinstance(error, Exception):
                raise
            raise ReqtableError(f"request {head.id} can't go on: {error!r}") from error
        return entry

    def give_back(self, entry: Entry) -> None:
        """Take a resumed request, which is MOVING still, out of the table. Its sockets are the caller's again."""
        if isinstance(entry.transport, Session):
            self.sessions.discard(entry.transport)
        if entry.reach is not None:
            for row in entry.reach.connections:
                row.transport = RELEASED  # type: ignore[attr-defined]
        entry.transport = RELEASED
        if entry.state is State.OPENING:
            entry.advance(Event.FROZEN)
        self._freezer.let_go(entry)

    def _fill(self, entry: Entry, head: Head, others: Sequence[Any], made_at: float) -> None:
        """Fill a new row with the request of a record, whose connections and files are `others`."""
        opened: list[Any] = []
        try:
            count = len(head.connections)
            rows = [
                self._connector.resume(entry, saved, own, made_at)
                for saved, own in zip(head.connections, others[:count], strict=True)
            ]
            for saved, own in zip(head.files, others[count:], strict=True):
                opened.append(open_file(saved, self._steps.system.dup(own)))
            handler_class = unwrapped(entry.server.RequestHandlerClass)
            record = read(head, handler_class, made_at, Attachments(rows, opened))
            entry.policy.attach(entry)  # type: ignore[attr-defined]
            restore(record, entry, entry.handler, made_at)
        except BaseException:
            close_files(opened)
            raise
        table = self._steps.table
        table.moves[entry] = record.moves + 1
        table.hold(entry, len(entry.input) + entry.output.held)

    def _moved_request(self, server: Hosted, head: Head, attached: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Return the request of a record, as `get_request` returned it in the first process, and its other sockets."""
        if head.control is None:
            return attached[0], attached[1:]
        if head.control:
            return Datagram.made(b"", server.socket, head.local, list(map(tuple, head.control))), attached
        return (b"", server.socket), attached

    # -- the row ------------------------------------------------------------------------------------------------------

    def _new_row(self, server: Hosted, request: Any, peer: Any) -> Entry | None:
        """Put a request into the table; None if there is no room for it."""
        if not self._admission.has_room(server, request, peer):
            return None
        policy = server._policies.chosen
        transport = self._transport(server, policy, request)
        entry = self._row(server, policy, request, peer, transport)
        self._attach(entry, policy, transport)
        self._enter(entry, server)
        return entry

    def _opened_row(self, preamble: Preamble, server: Hosted, request: Any, peer: Any) -> Entry | None:
        """Go on with the row of a request whose preamble has come; None if the proxied client may have no other."""
        entry = preamble.entry
        if preamble.is_proxied and not self._admission.has_room_for_peer(server, request, peer, entry):
            return None
        policy = entry.policy
        assert isinstance(policy, Policy)
        entry.transport = transport = self._transport(server, policy, request)
        entry.want = NOTHING
        self._attach(entry, policy, transport)
        return entry

    def _transport(self, server: Hosted, policy: Policy, request: Any) -> Session | Stream | PollOnly:
        if not is_resumable(server.RequestHandlerClass):
            return policy.transport_for(request)
        if isinstance(request, tuple):
            return Session(self.sessions, request)
        return self.make_stream(server, self._steps, request)

    def _row(self, server: Hosted, policy: Policy, request: Any, peer: Any, transport: Transport) -> Entry:
        """Make the entry of a request. To save memory, entries share equal hosts of IPv6 and equal local addresses."""
        local = server.server_address
        if isinstance(local, tuple) and local[0] in _WILDCARDS:  # on which of this machine's addresses?
            if type(request) is Datagram:
                local = request.local
            elif not isinstance(request, tuple):
                local = _same(transport.request.getsockname())
        if isinstance(peer, tuple) and peer and isinstance(peer[0], str) and ":" in peer[0]:
            peer = (_same(peer[0]), *peer[1:])
        return Entry(self._steps.table, server, policy, peer, local, transport)

    def _attach(self, entry: Entry, policy: Policy, transport: Session | Stream | PollOnly) -> None:
        """Connect the entry to its transport, and have the policy attach what runs its handler."""
        transport.entry = entry
        policy.attach(entry)
        if isinstance(transport, Session):
            transport.attach(entry)

    def _enter(self, entry: Entry, server: Hosted, id: int | None = None) -> None:
        self._steps.table.add(entry, id)
        server._counts.policies[entry.policy.name].accepted += 1
        entry.policy.admitted()

    # -- the preamble -------------------------------------------------------------------------------------------------

    def _begin_preamble(self, server: Hosted, spec: PreambleSpec, request: Any, peer: Any) -> None:
        """Enter a request into the table, in the state OPENING, and begin to read its preamble."""
        is_proxied = spec.is_proxy(peer)  # then only the header says who the client is
        if not self._admission.has_room(server, request, peer, peer_is_known=not is_proxied):
            server.shutdown_request(request)
            return
        steps = self._steps
        preamble = Preamble(steps, request, spec, self._preamble_done)
        preamble.is_proxied = is_proxied
        policy = server._policies.chosen
        entry = preamble.entry = self._row(server, policy, request, peer, preamble)
        entry.resumable = OVER
        self._enter(entry, server)
        steps.deadlines.arm(entry, steps.table.now + steps.table.limits.handshake_timeout_s)
        preamble.begin()

    def _preamble_done(self, preamble: Preamble) -> None:
        """Pass the request to the hooks as if it had just arrived: from the client's address, by the secured socket."""
        entry, request = preamble.entry, preamble.request
        server = hosted(entry.server)
        self._opened[id(request)] = preamble
        try:
            self.offer(server, request, entry.peer)
        except BaseException as error:
            if entry.state is State.OPENING:
                entry.ending = Ending.ERROR
                self._turn_away(server, request, entry.peer, error, entry)
            else:  # its handler has begun
                self._steps.failures.outside_step(entry, error)
        finally:
            self._opened.pop(id(request), None)
            if entry.state is State.OPENING:  # a hook has refused the request, or serves it elsewhere
                entry.transport = RELEASED
                self._steps.end(entry, Event.RELEASED)

    # -- failures -----------------------------------------------------------------------------------------------------

    def _not_had(self, server: Hosted, error: OSError) -> bool:
        """Handle an `error` of `get_request`. Returns whether the next call may succeed at once."""
        if isinstance(error, BlockingIOError):
            return False
        if error.errno in EXHAUSTED:
            self._on_exhausted(server, error)
            return False
        here = address_text(server.server_address)
        # Logged as text: the error's traceback refers to the connection, and a record that is kept would hold it open.
        log.info("%s: get_request raised %s: %s", here, type(error).__name__, printable(error))
        return True

    def _turn_away(self, server: Hosted, request: Any, peer: Any, error: BaseException, entry: Entry | None) -> None:
        """Report `error`, which a hook raised, and end the request. Raises an error that must end the loop.

        `entry` is the row of the request; None: it has none.
        """
        failures = self._steps.failures
        ends_loop: BaseException | None = None
        try:
            if error is failures.unwinding:
                raise error
            if entry is not None:
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
            del error, ends_loop  # the traceback refers to this frame: a cycle would keep the request's socket open

    def _take_again(self, server: Server, request: Any, peer: Any) -> None:
        """Begin a request with a datagram that waited for a session which never began."""
        last_id_before = self._steps.table.last_id
        try:
            server.process_request(request, peer)
        except BaseException as error:
            self._turn_away(hosted(server), request, peer, error, self._newer(last_id_before))

    def _newer(self, last_id: int) -> Entry | None:
        """Return the first row that was entered after the row `last_id`; None if there is none."""
        table = self._steps.table
        newer = map(table.get, range(last_id + 1, table.last_id + 1))
        return next((entry for entry in newer if entry is not None), None)


def _stream(server: Hosted, steps: Steps, request: Any) -> Stream:
    return stream_over(steps, request)


@lru_cache(maxsize=4096)
def _same(thing: Any) -> Any:
    """Return the first object that was equal to `thing`, so that entries with equal addresses share one object."""
    return thing
