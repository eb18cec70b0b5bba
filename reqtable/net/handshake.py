"""TLS handshakes of outgoing connections, and of connections that are encrypted later (STARTTLS).

Needs the module ssl.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from reqtable.config import TLSOptions
from reqtable.loop.poller import Poller, Selectable, abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.outgoing import Outgoing
from reqtable.net.tls import TLSSocket, TLSStream, reason_of, server_context
from reqtable.table.connecting import ClientTLS, ServerTLS, StartTLS
from reqtable.table.connection import ConnectionRow
from reqtable.table.errors import ConfigurationError, ConnectFailed, HandlerError, PeerError
from reqtable.table.input import MISSING, Missing
from reqtable.table.reaching import Reaching, not_own
from reqtable.table.states import READ, WRITE, Event
from reqtable.table.table import Entry
from reqtable.table.wants import Waiting


class OutgoingTLS(Outgoing, TLSStream):
    """Receives and sends for one secured outgoing connection."""

    __slots__ = ()


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
    except OSError as error:
        raise ConfigurationError(f"ca {options.ca}: {reason_of(error)}: give certificates as PEM") from None
    if options.cert is not None:
        try:
            context.load_cert_chain(options.cert, options.key, password=lambda: b"")
        except OSError as error:
            raise ConfigurationError(f"cert {options.cert}: {reason_of(error)}: give PEM files") from None
    if options.alpn:
        context.set_alpn_protocols(list(options.alpn))
    return context


@lru_cache(maxsize=64)
def _served_context(cert: str, key: str | None) -> ssl.SSLContext:
    return server_context(TLSOptions(cert=cert, key=key))


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
        before = self._context.sslsocket_class
        self._context.sslsocket_class = TLSSocket  # also if the context is the program's
        try:
            self.request = self._context.wrap_socket(
                self.request,
                server_side=self._server_name is None,
                do_handshake_on_connect=False,
                server_hostname=self._server_name,
            )
        except (OSError, ValueError) as error:
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
        except (OSError, ValueError) as error:
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
    """The transport of a connection during its handshake, which polls for itself."""

    timeout_s: float | None = None

    def __init__(self, before: Any) -> None:
        self._before = before
        self.handshake: Handshake
        self.entry = before.entry

    @property
    def request(self) -> Any:
        return self.handshake.request

    def watch(self, interest: int) -> None:
        """Do nothing: the handshake polls."""

    def flush(self) -> bool:
        return self.entry.output.first is None  # what is sent meanwhile waits for the end of the handshake

    def finish(self) -> None:
        self._before.steps.end(self.entry, Event.LOST)

    def release(self) -> None:
        self.handshake.watch(0)
        self._before.request = self.handshake.request
        self._before.release()

    def shut(self) -> None:
        """Do nothing: no thread and no child has the connection."""

    def end_input(self) -> None:
        """Do nothing: the handshake goes on."""

    def leave(self) -> None:
        """Do nothing: no child gets a connection during its handshake."""

    def abandon(self) -> None:
        self.handshake.abandon()


class BegunTLS(Reaching[None]):
    """Waits until a connection is encrypted. The handshake begins once the kernel has taken all output."""

    __slots__ = ("_is_done", "_problem", "_request", "_side", "_steps", "_want", "is_begun_now")

    def __init__(self, steps: Steps, request: Entry, want: StartTLS) -> None:
        self._steps = steps
        self._request = request
        self._want = want
        self._side: Entry = request if want.row is None else want.row
        self._is_done = False
        self._problem: Exception | None = None
        self.is_begun_now = False

    def take(self, entry: Waiting) -> Missing | None:
        if self._problem is not None:
            raise self._problem
        if self._is_done:
            return None
        side = self._side
        if isinstance(side, ConnectionRow) and side.parent_id != entry.id:
            raise HandlerError(not_own(side, side.parent_id is None))
        if not self.is_begun_now:
            if side.output.first is not None:
                assert entry.reach is not None
                entry.reach.held_back = True  # asked again when the output is taken
                return MISSING
            self._begin(side)
            if self._problem is not None:
                raise self._problem
        return None if self._is_done else MISSING

    def give_up(self) -> None:
        """End the connection if its handshake is under way: half of it can't be taken back."""
        if self.is_begun_now and not self._is_done and self._problem is None:
            self._steps.end(self._side, Event.LOST)

    def _begin(self, side: Entry) -> None:
        self.is_begun_now = True
        if len(side.input):
            raise PeerError("input came before the TLS handshake: somebody may have slipped it in (RFC 3207, 4.2)")
        self.shake_hands(side)

    def shake_hands(self, side: Entry) -> None:
        """Begin the handshake of `side`, whose output is taken and whose input is empty."""
        before: Any = side.transport
        if not isinstance(before, Outgoing | TLSStream) and type(before).__name__ != "Stream":
            raise HandlerError("start_tls() is for streams whose handler runs on the loop")
        before.watch(0)
        securing = _Securing(before)
        tls = self._want.tls
        name = None
        if isinstance(tls, ServerTLS):
            context = tls.context or _served_context(tls.cert or "", tls.key)
        else:
            context = client_context(tls)
            name = tls.server_name or _host_of(side)
        securing.handshake = Handshake(self._steps, before.request, context, self._secured, self._failed, name)
        side.transport = securing  # type: ignore[assignment]
        securing.handshake.begin()

    def _secured(self, own: Any) -> None:
        side = self._side
        kind = OutgoingTLS if isinstance(side, ConnectionRow) else TLSStream
        transport = kind(self._steps, own)
        transport.entry = side
        side.transport = transport
        self._is_done = True
        self._wake()

    def _failed(self, reason: str) -> None:
        side = self._side
        if isinstance(side, ConnectionRow):
            self._problem = ConnectFailed(side.address, reason)
            self._steps.waiting.fail(side, self._problem)
        else:
            self._problem = ConnectionError(f"the TLS handshake failed: {reason}")
        self._wake()

    def _wake(self) -> None:
        # Posted: some handshakes fail at once, in the step of the request that has begun them.
        self._steps.post(self._steps.waiting.wake, self._request, Event.RESULT_POSTED)

    def __repr__(self) -> str:
        return repr(self._want)


def _host_of(side: Entry) -> str:
    assert isinstance(side, ConnectionRow)
    return side.target.host


def _why(error: Exception) -> str:
    """Return why a handshake failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate can't be trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "the connection ended before the TLS handshake was complete"
    return f"TLS handshake: {reason_of(error) if isinstance(error, OSError) else error}"
