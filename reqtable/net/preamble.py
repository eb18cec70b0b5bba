"""Preambles: the PROXY protocol header and the TLS handshake before a request, whose entry is OPENING meanwhile.

The loop reads them, not accept, so a client that sends nothing holds up nobody; `handshake_timeout_s` ends it. After
the preamble, the server's hooks `verify_request` and `process_request` get the request as if it had just arrived: from
the real client's address, over a secured socket.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any, ClassVar

from reqtable.config import Config
from reqtable.loop.poller import Poller, Selectable, abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.proxy_protocol import HEADER_BYTES_MAX, header_end, parse
from reqtable.net.sockets import discarded_all, end_request, is_tls
from reqtable.net.stream import Stream, send_at_once
from reqtable.table.addresses import address_text, printable
from reqtable.table.engine_wants import HANDSHAKE, PROXY_HEADER
from reqtable.table.errors import ConfigurationError, PeerError, ending_of
from reqtable.table.states import READ, WRITE, Event, State
from reqtable.table.table import Entry

try:  # now, not with the first server: by then a program's tests may have patched `socket.socket`
    import ssl

    from reqtable.net import tls
except ImportError:  # this Python has no ssl
    tls = None  # type: ignore[assignment]

log = logging.getLogger("reqtable")


class PreambleSpec:
    """Says which preamble a server's connections have. Raises ConfigurationError for unusable certificates."""

    def __init__(self, config: Config) -> None:
        self.context: Any = None
        if config.tls.cert is not None:
            if tls is None:
                raise ConfigurationError(
                    "tls.cert: this Python has no module ssl: install a Python with ssl, or leave tls.cert out"
                )
            if config.limits.recv_bytes < tls.RECORD_BYTES:  # no selector reports bytes that OpenSSL holds
                raise ConfigurationError(
                    f"limits.recv_bytes is {config.limits.recv_bytes}: TLS needs at least {tls.RECORD_BYTES}"
                )
            self.context = tls.server_context(config.tls)
        self._networks = config.proxy.networks()
        self._trusts_unix = "unix" in config.proxy.trusted

    def comes_first(self, request: Any, client_address: Any) -> bool:
        """Return whether the connection begins with a preamble."""
        if not isinstance(request, socket.socket) or request.type != socket.SOCK_STREAM:
            return False
        return self.context is not None or self.is_proxy(client_address)

    def is_proxy(self, client_address: Any) -> bool:
        """Return whether `client_address` is a trusted proxy's, which names the real client."""
        if not isinstance(client_address, tuple):
            return self._trusts_unix
        if not self._networks or not isinstance(client_address[0], str):
            return False  # only addresses of IP are in a network
        host = ip_address(client_address[0].partition("%")[0])
        host = getattr(host, "ipv4_mapped", None) or host
        return any(host in network for network in self._networks)


def stream_over(steps: Steps, request: Any) -> Stream:
    """Return a transport for the connection of a resumable handler."""
    if is_tls(request):
        return tls.TLSStream(steps, request)
    return Stream(steps, request)


class Preamble(Selectable):
    """Reads the preamble of a connection, whose transport it is meanwhile. `request` is the socket, non-blocking.

    `on_done(preamble)` is called once the preamble is complete. `is_proxied` says that a trusted proxy has
    opened the connection.
    """

    __slots__ = ("_on_done", "_progress", "_spec", "_timeout", "entry", "fd", "is_proxied", "request", "steps")

    timeout_s: float | None = None
    immovable: ClassVar[str | None] = "its preamble has not come"
    fd: int

    def __init__(
        self,
        steps: Steps,
        request: Any,
        spec: PreambleSpec,
        on_done: Callable[[Preamble], None],
    ) -> None:
        super().__init__()
        self.steps = steps
        self.fd = request.fileno()
        self.request = request
        self.entry: Entry
        self._spec = spec
        self._on_done = on_done
        self.is_proxied = False
        self._timeout = request.gettimeout()
        request.setblocking(False)
        self._progress = self._open()

    @property
    def poller(self) -> Poller:
        return self.steps.poller

    def begin(self) -> None:
        """Do as much as possible at once. The entry is in the table, and its deadline is set."""
        self.on_ready(READ)

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        entry.active_at = self.steps.table.now
        if entry.state is State.LINGERING:
            if discarded_all(self.request, self.steps.table.limits.recv_bytes):
                self.steps.end(entry, Event.INPUT_ENDED)
            return
        try:
            interest = next(self._progress, 0)
        except (PeerError, OSError) as error:
            self._give_up(error)
            return
        self.watch(interest)
        if not interest and entry.state is State.OPENING:
            self.request.settimeout(self._timeout)
            self._on_done(self)

    def _open(self) -> Iterator[int]:
        """Go through the whole preamble; yields the interest to wait for."""
        entry = self.entry
        if self._spec.is_proxy(entry.peer):
            entry.want = PROXY_HEADER
            yield from self._read_header()
        if self._spec.context is not None:
            entry.want = HANDSHAKE
            yield from self._shake_hands()

    def _read_header(self) -> Iterator[int]:
        """Read the header, and no byte beyond it."""
        data = b""
        while (end := header_end(data)) is None or len(data) < end:
            try:
                more = self.request.recv(HEADER_BYTES_MAX - len(data), socket.MSG_PEEK)
                if not more:
                    raise ConnectionError("the connection ended before the header was complete")
                end = header_end(data + more)
                taken = self.request.recv(len(more) if end is None else min(len(more), end - len(data)))
            except (BlockingIOError, InterruptedError):
                yield READ
                continue
            self.entry.bytes_in += len(taken)
            data += taken
        header = parse(data)
        if header.source is not None:
            self.steps.table.set_peer(self.entry, header.source)
            self.entry.local = header.destination

    def _shake_hands(self) -> Iterator[int]:
        send_at_once(self.request)  # else the handler's first answer is held back behind OpenSSL's session tickets
        self.request = self.entry.policy.secured(self.entry, self.request, self._spec.context)
        while True:
            try:
                ssl.SSLSocket.do_handshake(self.request)  # a cooperative socket's method would wait
            except ssl.SSLWantReadError:
                yield READ
            except ssl.SSLWantWriteError:
                yield WRITE
            except ssl.SSLEOFError:
                raise ConnectionError("the connection ended before the handshake was complete") from None
            else:
                return

    def _give_up(self, error: Exception) -> None:
        """End the connection without a request. Linger, so that a TLS alert (RFC 8446, 6.2) is not cut off."""
        what = "TLS handshake" if self.entry.want is HANDSHAKE else "PROXY header"
        log.info("%s: its %s failed: %s", address_text(self.entry.peer), what, printable(error))
        self.entry.ending = ending_of(error)
        try:
            self.request.shutdown(socket.SHUT_WR)
        except OSError:
            self.steps.end(self.entry, Event.LOST)
        else:
            self.steps.linger(self.entry)

    # -- as a transport -----------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def shut(self) -> None:
        pass

    def on_reset(self) -> None:
        """Do nothing: the preamble's own reads and writes meet the reset."""

    def end_input(self) -> None:
        """Do nothing: the connection has begun, so its request may still be served."""

    def leave(self) -> None:
        """Do nothing: no child gets a connection before its request begins."""

    def release(self) -> None:
        self.watch(0)
        end_request(self.entry.server.shutdown_request, self.request)

    def abandon(self) -> None:
        self.watched = 0
        abandon_socket(self.request)
