"""TLS for blocking handlers: handshakes, reads and writes suspend the request instead of blocking the loop.

`wrap_socket` of an SSLContext makes a socket of the class `ssl.SSLContext.sslsocket_class`. Every policy but `inline`
replaces that class (`install`) with one that picks the kind of socket by its caller:

* A handler that wraps its request's cooperative socket gets a cooperative TLS socket.
* A server's `get_request` gets a socket whose handshake is still due, whether the listening socket is a TLS socket or
  the hook wraps what it accepted. The handshake is part of the request, or a silent client would freeze the server.
* Any other caller gets a socket of the replaced class.

A context keeps an `sslsocket_class` that the program has set on it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import Any, TypeVar

from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.green.handler import can_suspend
from reqtable.dispatch.green.socket import CooperativeSocket
from reqtable.dispatch.green.transport import GreenTransport
from reqtable.loop.process import LOOPS
from reqtable.loop.step import Steps
from reqtable.net.tls import TLSSocket
from reqtable.table.engine_wants import READABLE, WRITABLE

T = TypeVar("T")
_BLOCKED = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class CooperativeTLSSocket(ssl.SSLSocket, CooperativeSocket):  # type: ignore[misc]
    """Suspends the request when a TLS call would block. OpenSSL does the I/O, so the descriptor is non-blocking."""

    handshake_due = False  # if so, the first use of the socket does the handshake

    @classmethod
    def within(cls, sock: CooperativeSocket, *, do_handshake_on_connect: bool, **options: Any) -> CooperativeTLSSocket:
        """Wrap the socket of a request that is being served."""
        made = cls._over(sock, do_handshake_on_connect, **options)
        made.transport = sock.transport
        if made.handshake_due:
            try:
                if made.gettimeout() == 0:
                    raise ValueError("do_handshake_on_connect should not be specified for non-blocking sockets")
                made.do_handshake()
            except BaseException:  # the request may end meanwhile
                made.close()
                raise
        return made

    @classmethod
    def accepted(cls, sock: Any, steps: Steps, *, do_handshake_on_connect: bool, **options: Any) -> Any:
        """Wrap the socket of a connection that is being accepted."""
        made = cls._over(sock, do_handshake_on_connect, **options)
        made.transport = GreenTransport(steps, made)
        made.transport.request = (
            None  # until `transport_for`: a cycle would keep a connection open that `get_request` drops
        )
        made.transport.share = 0  # until then nothing is counted
        return made

    @classmethod
    def _over(cls, sock: Any, do_handshake_on_connect: bool, **options: Any) -> CooperativeTLSSocket:
        made: CooperativeTLSSocket = cls._create(  # type: ignore[attr-defined]
            sock=sock, do_handshake_on_connect=False, **options
        )
        CooperativeSocket.plain.setblocking(made, False)
        made.do_handshake_on_connect = do_handshake_on_connect  # type: ignore[attr-defined]
        made.handshake_due = do_handshake_on_connect and made._connected  # type: ignore[attr-defined]
        return made

    def _when_ready(self, operation: Callable[..., T], *args: Any) -> T:
        """Call `operation`, and again whenever the socket is ready for what OpenSSL wants of it, until it succeeds."""
        if self.handshake_due:
            self.do_handshake()
        until: float | None = None
        while True:
            try:
                return operation(*args)
            except _BLOCKED as blocked:
                if self.gettimeout() == 0:
                    raise
                want = READABLE if isinstance(blocked, ssl.SSLWantReadError) else WRITABLE
            until = self._wait(want, until)

    def do_handshake(self, block: bool = False) -> None:
        self.handshake_due = False
        self._when_ready(super().do_handshake, block)

    def read(self, *args: Any, **kwargs: Any) -> Any:
        data = self._when_ready(partial(super().read, *args, **kwargs))
        self._came_in(data if isinstance(data, int) else len(data), 0)
        return data

    def write(self, data: Any) -> int:
        return self._went_out(self._when_ready(super().write, data))

    def send(self, data: Any, flags: int = 0) -> int:
        if self._sslobj is None:  # type: ignore[attr-defined]
            return CooperativeSocket.send(self, data, flags)
        return self._went_out(self._when_ready(super().send, data, flags))

    def unwrap(self) -> Any:
        return self._when_ready(super().unwrap)

    def getpeercert(self, binary_form: bool = False) -> Any:
        return self._when_ready(super().getpeercert, binary_form)

    def version(self) -> Any:
        return self._when_ready(super().version)

    def cipher(self) -> Any:
        return self._when_ready(super().cipher)

    def shared_ciphers(self) -> Any:
        return self._when_ready(super().shared_ciphers)

    def selected_alpn_protocol(self) -> Any:
        return self._when_ready(super().selected_alpn_protocol)

    def get_channel_binding(self, cb_type: str = "tls-unique") -> Any:
        return self._when_ready(super().get_channel_binding, cb_type)

    # -- before the connection has an entry ---------------------------------------------------------------------------

    def _came_in(self, count: int, flags: int) -> None:
        if self._is_admitted:
            super()._came_in(count, flags)

    def _went_out(self, count: int) -> int:
        return super()._went_out(count) if self._is_admitted else count

    @property
    def _is_admitted(self) -> bool:
        return hasattr(getattr(self, "transport", None), "entry")

    def _forget(self) -> bool:
        return self._is_admitted and super()._forget()


class ServedTLSSocket(TLSSocket, CooperativeTLSSocket):  # type: ignore[misc]
    """Leaves its handshake to the engine."""

    def _wait_for_room(self, seconds: float) -> bool:
        if seconds <= 0 or not can_suspend():
            return False  # this is the loop, which must not wait
        with suppress(TimeoutError):
            self._wait(WRITABLE, self.transport.steps.table.clock() + seconds)
        return True


def secured(steps: Steps, request: Any, context: ssl.SSLContext) -> ServedTLSSocket:
    """Make the cooperative TLS socket of a request. The engine does the handshake afterwards."""
    made: ServedTLSSocket = ServedTLSSocket.accepted(
        request, steps, server_side=True, do_handshake_on_connect=False, context=context
    )
    return made


class _Chooser(ssl.SSLSocket):
    """Stands in for `ssl.SSLSocket` and picks the class of the socket to make, which is never its own."""

    before: type[ssl.SSLSocket]

    @classmethod
    def _create(cls, sock: Any, *, server_side: bool = False, **options: Any) -> Any:
        if isinstance(sock, CooperativeSocket):
            return CooperativeTLSSocket.within(sock, server_side=server_side, **options)
        steps = _accepting() if server_side else None
        if steps is not None:
            return CooperativeTLSSocket.accepted(sock, steps, server_side=server_side, **options)
        return cls.before._create(sock, server_side=server_side, **options)  # type: ignore[attr-defined]


def _accepting() -> Steps | None:
    """Return the steps of this thread's loop while it accepts a connection for a blocking handler, else None."""
    loop = LOOPS.get(get_ident())
    if loop is None:
        return None
    server, steps = loop.table.accepting, loop.table.owner
    return steps if server is not None and not is_resumable(server.RequestHandlerClass) else None  # type: ignore[return-value]


def install() -> None:
    """Have every SSLContext make sockets by `_Chooser`."""
    if ssl.SSLContext.sslsocket_class is not _Chooser:
        _Chooser.before = ssl.SSLContext.sslsocket_class
        ssl.SSLContext.sslsocket_class = _Chooser
