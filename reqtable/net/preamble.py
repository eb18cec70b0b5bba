"""What comes before a request: a PROXY protocol header, a TLS handshake. It is in the table meanwhile, OPENING.

Neither is done in accept, so a client that sends nothing holds up nobody; `handshake_timeout_s` ends it. When both are
over the server's hooks `verify_request` and `process_request` take the request as if it had just come: from the real
client's address, by a secured socket.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from reqtable.config import Config
from reqtable.net.proxy_protocol import HEADER_BYTES_MAX, header_end, parse
from reqtable.net.stream import Stream, send_at_once
from reqtable.net.transports import Polled, abandon, discarded_all, end_request, is_tls
from reqtable.table.addresses import address_text, printable
from reqtable.table.errors import ConfigurationError, PeerError, ending_of
from reqtable.table.states import READ, WRITE, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import HANDSHAKE, PROXY_HEADER

try:  # with the package: a program's tests may have patched `socket.socket` when the first server is made
    import ssl

    from reqtable.net import tls
except ImportError:  # there is no ssl
    tls = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from reqtable.server.engine import Engine

log = logging.getLogger("reqtable")


class Preface:
    """What the connections of a server begin with. Raises ConfigurationError for certificates that can't be used."""

    def __init__(self, config: Config) -> None:
        self.context: Any = None
        if config.tls.cert is not None:
            if tls is None:
                raise ConfigurationError(
                    "tls.cert: this Python has no module ssl: install one that has, or leave tls.cert out"
                )
            if config.limits.recv_bytes < tls.RECORD_BYTES:  # no selector tells of what is left of a record in OpenSSL
                raise ConfigurationError(
                    f"limits.recv_bytes is {config.limits.recv_bytes}: TLS needs {tls.RECORD_BYTES}"
                )
            self.context = tls.server_context(config.tls)
        self._networks = config.proxy.networks()
        self._trusts_unix = "unix" in config.proxy.trusted

    def comes_first(self, request: Any, client_address: Any) -> bool:
        """Whether anything comes before the request itself."""
        if not isinstance(request, socket.socket) or request.type != socket.SOCK_STREAM:
            return False
        return self.context is not None or self.is_proxy(client_address)

    def is_proxy(self, client_address: Any) -> bool:
        """Whether whoever connects from there is trusted to say for whom."""
        if not isinstance(client_address, tuple):
            return self._trusts_unix
        if not self._networks:
            return False
        host = ip_address(client_address[0].partition("%")[0])
        host = getattr(host, "ipv4_mapped", None) or host
        return any(host in network for network in self._networks)


def stream_over(engine: Engine, request: Any) -> Stream:
    """The transport of a resumable handler's connection."""
    if is_tls(request):
        return tls.TLSStream(engine, request)
    return Stream(engine, request)


class Opening(Polled):
    """A connection that is being opened. `request` is its socket, non-blocking meanwhile."""

    __slots__ = ("_preface", "_progress", "_timeout", "entry", "request")

    engine: Engine

    timeout_s: float | None = None

    def __init__(self, engine: Engine, request: Any, preface: Preface) -> None:
        super().__init__(engine, request.fileno())
        self.request = request
        self.entry: Entry
        self._preface = preface
        self._timeout = request.gettimeout()
        request.setblocking(False)
        self._progress = self._open()

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        entry.active_at = self.engine.table.now
        if entry.state is State.LINGERING:
            if discarded_all(self.request, self.engine.limits.recv_bytes):
                self.engine.end(entry, Event.INPUT_ENDED)
            return
        try:
            interest = next(self._progress, 0)
        except (PeerError, OSError) as error:
            self._give_up(error)
            return
        self.poll(interest)
        if not interest and entry.state is State.OPENING:
            self.request.settimeout(self._timeout)
            self.engine.opened(self)

    def _open(self) -> Iterator[int]:
        """Do all of it; yields what to wait for."""
        entry = self.entry
        if self._preface.is_proxy(entry.peer):
            entry.want = PROXY_HEADER
            yield from self._read_header()
        if self._preface.context is not None:
            entry.want = HANDSHAKE
            yield from self._shake_hands()

    def _read_header(self) -> Iterator[int]:
        """Take the header, and no byte of what follows it."""
        data = b""
        while (end := header_end(data)) is None or len(data) < end:
            try:
                more = self.request.recv(HEADER_BYTES_MAX - len(data), socket.MSG_PEEK)
                if not more:
                    raise ConnectionError("the connection ended before it was over")
                end = header_end(data + more)
                taken = self.request.recv(len(more) if end is None else min(len(more), end - len(data)))
            except (BlockingIOError, InterruptedError):
                yield READ
                continue
            self.entry.bytes_in += len(taken)
            data += taken
        header = parse(data)
        if header.source is not None:
            self.engine.table.rename(self.entry, header.source)
            self.entry.local = header.destination

    def _shake_hands(self) -> Iterator[int]:
        send_at_once(self.request)  # a handler's first answer comes after OpenSSL's session tickets
        self.request = self.entry.policy.secured(self.entry, self.request, self._preface.context)
        while True:
            try:
                ssl.SSLSocket.do_handshake(self.request)  # not as a cooperative socket does it
            except ssl.SSLWantReadError:
                yield READ
            except ssl.SSLWantWriteError:
                yield WRITE
            except ssl.SSLEOFError:
                raise ConnectionError("the connection ended before it was over") from None
            else:
                return

    def _give_up(self, error: Exception) -> None:
        """No request comes of it. An alert that says so (RFC 8446, 6.2) is not to be cut off."""
        what = "TLS handshake" if self.entry.want is HANDSHAKE else "PROXY header"
        log.info("%s: its %s failed: %s", address_text(self.entry.peer), what, printable(error))
        self.entry.ending = ending_of(error)
        try:
            self.request.shutdown(socket.SHUT_WR)
        except OSError:
            self.engine.end(self.entry, Event.LOST)
        else:
            self.engine.linger(self.entry)

    # -- as a transport -----------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def shut(self) -> None:
        pass

    def end_input(self) -> None:
        """It has begun: its request may still be served."""

    def release(self) -> None:
        self.poll(0)
        end_request(self.entry.server.shutdown_request, self.request)

    def abandon(self) -> None:
        self.watched = 0
        abandon(self.request)
