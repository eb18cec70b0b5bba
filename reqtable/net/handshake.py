"""TLS handshakes of outgoing connections, and of connections that are encrypted later (STARTTLS).

Needs the module ssl.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

from reqtable.config import TLSOptions
from reqtable.loop.poller import Poller, Selectable, abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.outgoing import Outgoing
from reqtable.net.sockets import is_tls
from reqtable.net.stream import Stream
from reqtable.net.tls import RECORD_BYTES, TLSSocket, TLSStream, reason_of, server_context
from reqtable.table.connecting import ClientTLS, ServerTLS, StartTLS
from reqtable.table.connection import ConnectionRow
from reqtable.table.errors import ConfigurationError, ConnectFailed, HandlerError, PeerError
from reqtable.table.input import MISSING, Missing
from reqtable.table.reaching import Reaching, failure_of, not_own
from reqtable.table.states import READ, WRITE, Event
from reqtable.table.table import Entry
from reqtable.table.tracebacks import blame
from reqtable.table.want import Waiting


class OutgoingTLS(Outgoing, TLSStream):
    """Receives and sends for one secured outgoing connection."""

    __slots__ = ()

    def _ask_again(self, event: Event) -> None:
        request = self.entry.parent
        if request is not None:
            self.steps.waiting.wake(request, event)
            self.steps.waiting.sides.count_input(self.entry)


@lru_cache(maxsize=64)
def client_context(options: ClientTLS) -> ssl.SSLContext:
    """Return the context of an outgoing connection. Raises ConfigurationError, which names the option and the file."""
    if options.context is not None:
        context: ssl.SSLContext = options.context
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = TLSSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        if options.ca is not None:
            context.load_verify_locations(options.ca)
        elif options.verify:
            context.load_default_certs()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"ca {options.ca!r}: {_reason_of(error)}: give certificates as PEM") from None
    if options.cert is not None:
        try:
            context.load_cert_chain(options.cert, options.key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cert {options.cert!r}: {_reason_of(error)}: give PEM files") from None
    if options.alpn:
        context.set_alpn_protocols(list(options.alpn))
    return context


@lru_cache(maxsize=64)
def _served_context(cert: str, key: str | None) -> ssl.SSLContext:
    try:
        return server_context(TLSOptions(cert=cert, key=key), "")
    except ConfigurationError as error:
        raise ConfigurationError(f"start_tls(): {error}") from None


class Handshake(Selectable):
    """Secures a connected socket. Calls `secured(tls_socket)` or `failed(reason)`.

    `server_name` is the name that the peer's certificate must have; None: we are the server.
    """

    __slots__ = ("_context", "_failed", "_secured", "_server_name", "fd", "request", "steps")

    fd: int

    def __init__(
        self,
        steps: Steps,
        own: Any,
        context: ssl.SSLContext,
        secured: Callable[[Any], None],
        failed: Callable[[str], None],
        server_name: str | None,
    ) -> None:
        super().__init__()
        self.steps = steps
        self._context = context
        self._secured = secured
        self._failed = failed
        self._server_name = server_name
        self.fd = own.fileno()
        self.request = own

    @property
    def poller(self) -> Poller:
        return self.steps.poller

    def begin(self) -> None:
        """Do as much as possible at once."""
        most = self.steps.table.limits.recv_bytes
        if most < RECORD_BYTES:  # what OpenSSL holds back, the poll would not report
            self._failed(f"limits.recv_bytes is {most}: TLS needs at least {RECORD_BYTES}")
            return
        before = self._context.sslsocket_class
        self._context.sslsocket_class = TLSSocket  # also if the context is the program's
        try:
            self.request.getpeername()  # raises if the peer has gone; `wrap_socket` would leave a socket behind
            self.request = self._context.wrap_socket(
                self.request,
                server_side=self._server_name is None,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,  # TLSStream tells an end that was cut off
                server_hostname=self._server_name,
            )
        except Exception as error:  # the context may be the program's
            self._failed(_why(error))
            return
        finally:
            self._context.sslsocket_class = before
        self.on_ready(READ)

    def on_ready(self, mask: int) -> None:
        try:
            ssl.SSLSocket.do_handshake(self.request)
        except ssl.SSLWantReadError:
            self.watch(READ)
        except ssl.SSLWantWriteError:
            self.watch(WRITE)
        except Exception as error:
            self.watch(0)
            self._failed(_why(error))
        else:
            self.watch(0)
            self._secured(self.request)

    def release(self) -> None:
        self.watch(0)
        self.request.close()

    def abandon(self) -> None:
        self.watched = 0
        abandon_socket(self.request)


class _Securing:
    """The transport of a connection during its handshake, which polls for itself.

    If the handshake fails, the connection is of no more use. The handler then sees the end of its input, and what it
    sends is dropped.
    """

    timeout_s: float | None = None
    immovable: ClassVar[str | None] = "its TLS handshake is in flight"

    def __init__(self, before: Any) -> None:
        self._before = before
        self.handshake: Handshake
        self.entry: Entry = before.entry
        self._is_broken = False

    @property
    def request(self) -> Any:
        return self.handshake.request

    def break_off(self) -> None:
        """Note that the handshake has failed, or has been given up."""
        self._is_broken = True
        self.handshake.watch(0)
        self.entry.own_input().ended = True

    def watch(self, interest: int) -> None:
        """Do nothing: the handshake polls."""

    def flush(self) -> bool:
        if self._is_broken:
            self.entry.output.clear()
        return self.entry.output.first is None  # what is sent meanwhile waits for the end of the handshake

    def finish(self) -> None:
        self._before.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.handshake.watch(0)
        self._before.request = self.handshake.request
        self._before.release()

    def shut(self) -> None:
        """Do nothing: no thread and no child has the connection."""

    def on_reset(self) -> None:
        """Do nothing: the handshake meets the reset."""

    def end_input(self) -> None:
        """Do nothing: the handshake goes on."""

    def leave(self) -> None:
        """Do nothing: no child gets a connection during its handshake."""

    def abandon(self) -> None:
        self.handshake.abandon()


class BegunTLS(Reaching[None]):
    """Waits until a connection is encrypted. The handshake begins once the kernel has taken all output."""

    __slots__ = ("_is_done", "_problem", "_request", "_securing", "_side", "_steps", "_want")

    def __init__(self, steps: Steps, request: Entry, want: StartTLS) -> None:
        self._steps = steps
        self._request = request
        self._want = want
        self._side: Entry = request if want.row is None else want.row
        self._securing: _Securing | None = None  # None: the handshake has not begun
        self._is_done = False
        self._problem: Exception | None = None

    def take(self, entry: Waiting) -> Missing | None:
        side = self._side
        if isinstance(side, ConnectionRow) and side.parent_id != entry.id:
            raise HandlerError(not_own(side, side.parent_id is None))
        if isinstance(side, ConnectionRow) and side.failure is not None:
            raise failure_of(side)  # it ended before the handshake or during it
        if self._securing is None and self._problem is None and not self._is_done:
            assert entry.reach is not None
            if side.output.first is not None:
                entry.reach.held_back = True  # asked again when the output is taken
                return MISSING
            try:
                self._begin(side)
            except Exception as problem:
                blame(problem, self._want.place)
                self._problem = problem  # nothing was begun, so there is nothing to give up
            else:
                self._bound(entry)
        if self._problem is not None:
            raise self._problem
        return None if self._is_done else MISSING

    def _bound(self, entry: Waiting) -> None:
        """Bound the time of a handshake whose wait has no timeout of its own."""
        if self._request.want is self and entry.reach is not None and entry.reach.until is None:
            limits = self._steps.table.limits
            limit_s = limits.handshake_timeout_s if self._side is entry else limits.connect_timeout_s
            entry.reach.until = self._steps.table.now + limit_s

    def give_up(self) -> None:
        """End the connection if its handshake is under way: half of it can't be taken back."""
        if self._securing is not None and not self._is_done and self._problem is None:
            self._fail("it was given up")

    def _begin(self, side: Entry) -> None:
        """Begin the handshake. Raises an error of the handler's or of the peer's: the connection stays as it is."""
        if self.is_encrypted(side):
            raise HandlerError("start_tls(): the connection is encrypted already")
        if len(side.input):
            raise PeerError("input came before the TLS handshake: somebody may have slipped it in (RFC 3207, 4.2)")
        self.shake_hands(side)

    def is_encrypted(self, side: Entry) -> bool:
        """Return whether the connection of `side` is encrypted already."""
        before: Any = side.transport
        return isinstance(before, Stream) and is_tls(before.request)

    def shake_hands(self, side: Entry) -> None:
        """Begin the handshake of `side`, whose output is taken and whose input is empty."""
        before: Any = side.transport
        if not (isinstance(before, Stream) and before.may_encrypt):
            raise HandlerError("start_tls() is for streams whose handler runs on the loop, not in a thread or a child")
        tls = self._want.tls
        name = None
        if isinstance(tls, ServerTLS):
            context = tls.context or _served_context(tls.cert or "", tls.key)
        else:
            context = client_context(tls)
            name = tls.server_name or _host_of(side)
        before.give_to_tls()
        self._securing = _Securing(before)
        self._securing.handshake = Handshake(self._steps, before.request, context, self._secured, self._failed, name)
        side.transport = self._securing  # type: ignore[assignment]  # nobody sets its `request`
        self._securing.handshake.begin()

    def _secured(self, own: Any) -> None:
        side = self._side
        kind = TLSStream
        if isinstance(side, ConnectionRow):
            kind = OutgoingTLS
            side.key = None  # it is no longer what `connect` made, so no other `connect` may take it
        transport = kind(self._steps, own)
        transport.entry = side
        side.transport = transport
        self._is_done = True
        self._wake()

    def _failed(self, reason: str) -> None:
        self._fail(reason)
        self._wake()

    def _fail(self, reason: str) -> None:
        side = self._side
        if isinstance(side, ConnectionRow):
            self._problem = ConnectFailed(side.address, reason)
            self._steps.waiting.fail(side, self._problem)
        else:
            self._problem = ConnectionError(f"the TLS handshake failed: {reason}")
            if self._securing is not None:
                self._securing.break_off()

    def _wake(self) -> None:
        # Posted: some handshakes fail at once, in the step of the request that has begun them.
        self._steps.post(self._steps.waiting.wake, self._request, Event.RESULT_POSTED)

    def __repr__(self) -> str:
        return repr(self._want)


def _host_of(side: Entry) -> str:
    assert isinstance(side, ConnectionRow)
    return side.target.name


def _why(error: Exception) -> str:
    """Return why a handshake failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate can't be trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "the connection ended before the TLS handshake was complete"
    return f"TLS handshake: {_reason_of(error)}"


def _reason_of(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error)
