"""Makes outgoing connections, and keeps those that were released for reuse.

A connection is made in these steps, in the state CONNECTING: the name is looked up in a thread, the addresses are tried
in turn (`Attempts`), and then comes the TLS handshake if there is one. `connect_timeout_s` bounds them together.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

from reqtable.loop.step import Steps
from reqtable.net.attempts import Attempts, numeric_address
from reqtable.net.connection import Connection
from reqtable.net.outgoing import Outgoing, OutgoingDatagrams, local_address
from reqtable.net.sockets import is_quiet
from reqtable.table.connecting import Connect, StartTLS
from reqtable.table.connection import ConnectionRow
from reqtable.table.errors import ConnectFailed, ReqtableError
from reqtable.table.input import MISSING, Missing
from reqtable.table.parts import NoTransport
from reqtable.table.reach import Reach
from reqtable.table.reaching import Reaching, failure_of
from reqtable.table.saving import fill_row, target_of
from reqtable.table.states import READ, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Waiting, Want
from reqtable.table.wants import NOTHING

try:
    from reqtable.net import handshake
except ImportError:  # this Python has no ssl
    handshake = None  # type: ignore[assignment]

_RESOLVERS_MAX = 8  # threads that look names up
_NO_SSL = "this Python has no module ssl: install a Python with ssl"


class BegunConnect(Reaching[Any]):
    """Waits for a connection that is being made."""

    __slots__ = ("_is_taken", "_row", "_steps")

    def __init__(self, steps: Steps, row: ConnectionRow) -> None:
        self._steps = steps
        self._row = row
        self._is_taken = False

    def take(self, entry: Waiting) -> Any | Missing:
        if self._row.failure is not None:
            self._is_taken = True
            raise failure_of(self._row)
        if self._row.state is not State.WAITING:
            return MISSING
        self._is_taken = True
        return self._row.connection

    def give_up(self) -> None:
        row = self._row
        if not self._is_taken and row.parent is not None and row.failure is None:
            if row.parent.reach is not None:
                row.parent.reach.connections.remove(row)
            self._steps.let_go(row)

    def __repr__(self) -> str:
        return f"connect({self._row.address!r})"


class Connector:
    """Makes the outgoing connections of the requests of one table."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._idle: dict[Any, list[ConnectionRow]] = {}  # by key, the one released last at the end
        self._resolvers: Executor | None = None
        self._begun: ConnectionRow | None = None  # the connection that is being begun at this moment
        steps.waiting.starter = self
        steps.on_connection_release.append(self._forget)

    def begin(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        """Begin a connect or a TLS handshake. Returns the want to wait for."""
        if isinstance(want, StartTLS):
            if handshake is None:
                raise ReqtableError(f"start_tls(): {_NO_SSL}")
            return handshake.BegunTLS(self._steps, entry, want)
        assert isinstance(want, Connect)
        row = self._reused(entry, want) or self._made(entry, want)
        return BegunConnect(self._steps, row)

    def close(self) -> None:
        """Close the idle connections, and end the threads that look names up."""
        for rows in list(self._idle.values()):
            for row in rows:
                self._steps.end(row, Event.RELEASED)
        if self._resolvers is not None:
            self._resolvers.shutdown(wait=False, cancel_futures=True)
            self._resolvers = None

    def start_over(self) -> None:
        """In a forked child that will serve by itself: forget the parent's idle connections and threads."""
        self._idle.clear()
        self._resolvers = None

    # -- one connection -----------------------------------------------------------------------------------------------

    def _made(self, entry: Entry, want: Connect) -> ConnectionRow:
        """Begin a new connection. If it can't be begun, its row has the failure and is not in the table."""
        steps = self._steps
        table, limits = steps.table, steps.table.limits
        row = ConnectionRow(entry, want.target)
        row.connection = Connection(row, self)
        row.key = want.key
        row.timeout = want.timeout or limits.connect_timeout_s
        row.want = want
        if self._is_full() and not self._close_idlest():
            row.failure = ConnectFailed(row.address, f"connections_max = {limits.connections_max} are open")
            table.connection_counts["failed"] += 1
            return row
        assert entry.reach is not None
        table.add_connection(row)
        entry.reach.connections.append(row)
        steps.deadlines.arm(row, table.now + row.timeout)
        self._begun = row
        try:
            self.attempt(row, want)
        finally:
            self._begun = None
        return row

    def attempt(self, row: ConnectionRow, want: Connect) -> None:
        """Begin to connect. `connected` or `fail` is called at the end, or the row's deadline passes."""
        row.transport = connecting = Connecting(self, row, want)
        try:
            connecting.begin()
        except Exception as error:  # no thread can be started, say
            connecting.failed(error)

    def connected(self, row: ConnectionRow, transport: Any) -> None:
        """Note that a connection is made. Its request goes on."""
        steps = self._steps
        if row.state is not State.CONNECTING:  # it was given up or cancelled earlier in this pass
            transport.release()
            return
        row.transport = transport
        transport.entry = row
        row.active_at = steps.table.now
        row.deadline = None
        row.want = NOTHING
        row.advance(Event.CONNECTED)
        steps.table.connection_counts["opened"] += 1
        # A Unix socket connects at once: then its request is still being settled, and is woken after that.
        if row.parent is not None and row is not self._begun:
            steps.waiting.wake(row.parent, Event.RESULT_POSTED)

    def fail(self, row: ConnectionRow, reason: str, cause: BaseException | None = None) -> None:
        """End a connection that could not be made. `cause` is the error of the system, if that is why."""
        if row.state is State.CONNECTING:
            self._steps.table.connection_counts["failed"] += 1
            has_number = isinstance(cause, OSError) and not isinstance(cause, socket.gaierror)
            error = ConnectFailed(row.address, reason, cause.errno if has_number else None)  # type: ignore[union-attr]
            error.__cause__ = cause
            self._steps.waiting.fail(row, error)

    def resolve(self, host: str, port: int, kind: int, found: Callable[[Future[Any]], None]) -> None:
        """Look a name up in a thread, and have the loop call `found(future)`."""
        system = self._steps.system
        if self._resolvers is None:
            self._resolvers = system.executor(_RESOLVERS_MAX, "reqtable-names", lambda: True)
        future = self._resolvers.submit(system.getaddrinfo, host, port, type=kind)
        future.add_done_callback(lambda done: self._steps.post(found, done))

    @property
    def steps(self) -> Steps:
        """The steps of the table whose connections these are."""
        return self._steps

    def adopt(self, origin: Entry, entry: Entry) -> None:
        """Take over what the request `origin` has beside its client: its row in this table is `entry`.

        In a forked child, the sockets are the child's own copies.
        """
        reach, origin.reach = origin.reach, None
        entry.reach = reach
        before = origin.table.owner
        for row in tuple(reach.connections) if reach is not None else ():
            assert isinstance(row, ConnectionRow)
            assert isinstance(before, Steps)
            if row.state is State.CLOSED:  # in this pass: the table that it is in will release it
                row.parent = entry
                before.waiting.note_end(row)
                if before.is_copy:
                    row.transport.abandon()
                continue
            row.watch(0)
            origin.table.remove(row)
            before.deadlines.forget(row)
            # A new transport: the pass that goes on may have found the old one ready.
            kind: Any = type(row.transport)
            row.transport = transport = kind(self._steps, row.transport.request)
            transport.entry = row
            row.table, row.parent = self._steps.table, entry
            row.connection.keeper = self
            row.table.connections[row.id] = row
            if row.output.first is not None:
                row.table.touch(row)

    def resume(self, entry: Entry, saved: Mapping[str, Any], own: socket.socket, made_at: float) -> ConnectionRow:
        """Go on with an outgoing connection of `entry` that another process has made, by its socket.

        `saved` is what it wrote of the connection at the time `made_at`.
        """
        row = ConnectionRow(entry, target_of(saved))
        row.connection = Connection(row, self)
        row.key = (row.target.text, None) if saved["is_reusable"] else None
        if row.target.scheme == "udp":
            datagrams = OutgoingDatagrams(self._steps, own)
            datagrams.attach(row)
        else:
            row.transport = stream = Outgoing(self._steps, own)
            stream.entry = row
        fill_row(row, saved, made_at)
        row.advance(Event.CONNECTED)
        row.table.add_connection(row, saved["id"])
        row.table.hold(row, len(row.input) + row.output.held)
        reach = entry.reach = entry.reach or Reach()
        reach.connections.append(row)
        return row

    # -- reuse --------------------------------------------------------------------------------------------------------

    def keep(self, row: ConnectionRow) -> None:
        """Keep a connection that its request has released, if it can be used again; else close it."""
        request = row.parent
        if request is None or request.reach is None or row not in request.reach.connections:
            return  # it has ended meanwhile
        request.reach.connections.remove(row)
        is_used_up = row.output.first is not None or row.output_ended
        if is_used_up or row.input or row.input.ended or row.state is not State.WAITING or row.key is None:
            self._steps.let_go(row)
            return
        row.parent = None
        row.wants_input = False
        row.watch(READ)  # an end of file, or anything else that comes, ends it
        self._steps.deadlines.arm(row, self._steps.table.now + self._steps.table.limits.connections_idle_s)
        self._idle.setdefault(row.key, []).append(row)

    def close_row(self, row: ConnectionRow) -> None:
        """Close a connection for its request."""
        request = row.parent
        if request is not None and request.reach is not None and row in request.reach.connections:
            request.reach.connections.remove(row)
        self._steps.let_go(row)

    def _reused(self, entry: Entry, want: Connect) -> ConnectionRow | None:
        rows = self._idle.get(want.key) if want.reuse else None
        while rows:
            row = rows.pop()
            if row.state is State.WAITING and not is_quiet(row.transport.request, self._steps.system.socket):
                self._steps.end(row, Event.RELEASED)  # an end or late input has come, which no poll has seen yet
            if row.state is State.WAITING:
                assert entry.reach is not None
                row.parent = entry
                row.server, row.policy = entry.server, entry.policy
                row.handler = type(entry.handler) if not isinstance(entry.handler, type) else entry.handler
                row.connection = Connection(row, self)
                row.deadline = None
                row.watch(0)
                entry.reach.connections.append(row)
                self._steps.table.connection_counts["reused"] += 1
                return row
        return None

    def _is_full(self) -> bool:
        connections, most = self._steps.table.connections, self._steps.table.limits.connections_max
        # Those that were closed in this pass are still in the table.
        return len(connections) >= most and sum(row.state is not State.CLOSED for row in connections.values()) >= most

    def _close_idlest(self) -> bool:
        """Close the connection that has been kept the longest. Returns False if none is kept."""
        kept = [row for rows in self._idle.values() for row in rows if row.state is State.WAITING]
        if not kept:
            return False
        self._steps.end(min(kept, key=lambda row: row.active_at), Event.RELEASED)
        return True

    def _forget(self, row: Entry) -> None:
        assert isinstance(row, ConnectionRow)
        rows = self._idle.get(row.key, [])
        if row in rows:
            rows.remove(row)
        if not rows:
            self._idle.pop(row.key, None)


class Connecting(NoTransport):
    """The transport of a connection that is being made. `request` is its socket once there is only one."""

    def __init__(self, connector: Connector, row: ConnectionRow, want: Connect) -> None:
        self._connector = connector
        self._row = row
        self._want = want
        self._attempts: Attempts | None = None
        self._handshake: Any = None

    def begin(self) -> None:
        """Look the name up, or try the address at once if it needs no look-up. Raises an error of the system."""
        target = self._want.target
        kind = socket.SOCK_DGRAM if target.scheme == "udp" else socket.SOCK_STREAM
        if target.scheme == "unix":
            self._try([(socket.AF_UNIX, kind, target.host)])
        elif (address := numeric_address(target.host, target.port)) is not None:
            self._try([(address[0], kind, address[1])])
        else:
            self._connector.resolve(target.host, target.port, kind, self._found)

    def failed(self, error: Exception) -> None:
        """End the connection because of an error of the system, or of what the program has given."""
        self._connector.fail(self._row, reason_of(error), error)

    def release(self) -> None:
        if self._attempts is not None:
            self._attempts.close()
        if self._handshake is not None:
            self._handshake.release()

    def abandon(self) -> None:
        if self._attempts is not None:
            self._attempts.abandon()
        if self._handshake is not None:
            self._handshake.abandon()

    def _found(self, done: Future[Any]) -> None:
        """Go on with the addresses that the name has."""
        if self._row.state is not State.CONNECTING or done.cancelled():
            return
        error = done.exception()
        if error is not None:
            reason = reason_of(error)
            self._connector.fail(self._row, f"{self._want.target.host} can't be looked up: {reason}", error)
        else:
            self._try([(family, kind, address) for family, kind, _, _, address in done.result()])

    def _try(self, addresses: list[tuple[int, int, Any]]) -> None:
        self._attempts = Attempts(self._connector.steps, addresses, self._reached, self._unreachable)
        self._attempts.begin()

    def _unreachable(self, reason: str, last: Exception | None) -> None:
        self._connector.fail(self._row, reason, last)

    def _reached(self, own: socket.socket, address: Any) -> None:
        """Go on with a connected socket."""
        row, steps = self._row, self._connector.steps
        self._attempts = None
        row.peer, row.local = address, local_address(own)
        if self._want.target.scheme == "udp":
            transport = OutgoingDatagrams(steps, own)
            transport.attach(row)
            self._connector.connected(row, transport)
        elif self._want.tls is None:
            self._connector.connected(row, Outgoing(steps, own))
        else:
            self._secure(own)

    def _secure(self, own: socket.socket) -> None:
        if handshake is None:
            own.close()
            self._connector.fail(self._row, _NO_SSL)
            return
        try:
            context = handshake.client_context(self._want.tls)
        except Exception as error:  # this may run in a callback of the poll, which has no other owner than this row
            own.close()
            self._connector.fail(self._row, str(error), error)
            return
        name = self._want.tls.server_name or self._want.target.name  # type: ignore[union-attr]
        self._handshake = handshake.Handshake(self._connector.steps, own, context, self._secured, self._insecure, name)
        self._handshake.begin()

    def _secured(self, own: Any) -> None:
        self._handshake = None
        self._connector.connected(self._row, handshake.OutgoingTLS(self._connector.steps, own))

    def _insecure(self, reason: str) -> None:
        self._handshake.release()
        self._handshake = None
        self._connector.fail(self._row, reason)


def reason_of(error: BaseException) -> str:
    """Return why a system call failed, in words."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    with contextlib.suppress(IndexError):
        text = text[0].lower() + text[1:]
    return str(text)
