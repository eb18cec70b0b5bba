"""What comes before a request: a PROXY protocol header, a TLS handshake. It is in the table meanwhile, OPENING.

Neither is done in accept, so a client that sends nothing holds up nobody; `handshake_timeout_s` ends it. When both are
over the server's hooks `verify_request` and `process_request` take the request as if it had just come: from the real
client's address, by a secured socket.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

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

try:  # with the package: a program's tests may have patched `socket.socket` when the first server is made
    import ssl

    from reqtable.net import tls
except ImportError:  # there is no ssl
    tls = None  # type: ignore[assignment]

log = logging.getLogger("reqtable")


class PreambleSpec:
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


def stream_over(steps: Steps, request: Any) -> Stream:
    """The transport of a resumable handler's connection."""
    if is_tls(request):
        return tls.TLSStream(steps, request)
    return Stream(steps, request)


class Preamble(Selectable):
    """The transport of a connection that is being opened. `request` is its socket, non-blocking meanwhile.

    `on_done(preamble)` is called once all of it has come. `is_proxied` says that a proxy has named the entry's peer.
    """

    __slots__ = ("_on_done", "_progress", "_spec", "_timeout", "entry", "fd", "is_proxied", "request", "steps")

    timeout_s: float | None = None
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
        """Do what can be done at once. The entry is in the table, and its deadline is set."""
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
        """Do all of it; yields what to wait for."""
        entry = self.entry
        if self._spec.is_proxy(entry.peer):
            entry.want = PROXY_HEADER
            yield from self._read_header()
        if self._spec.context is not None:
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
            self.steps.table.rename(self.entry, header.source)
            self.entry.local = header.destination
            self.is_proxied = True

    def _shake_hands(self) -> Iterator[int]:
        send_at_once(self.request)  # a handler's first answer comes after OpenSSL's session tickets
        self.request = self.entry.policy.secured(self.entry, self.request, self._spec.context)
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

    def end_input(self) -> None:
        """It has begun: its request may still be served."""

    def leave(self) -> None:
        """No child has what has not begun."""

    def release(self) -> None:
        self.watch(0)
        end_request(self.entry.server.shutdown_request, self.request)

    def abandon(self) -> None:
        self.watched = 0
        abandon_socket(self.request)
