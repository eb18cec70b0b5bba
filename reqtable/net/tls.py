"""TLS: contexts from a configuration, the socket of a request, and the stream transport over it.

The handshake takes place while the request is OPENING (see `preamble`), so these sockets are secured already. OpenSSL
reads and writes the descriptor itself, a record at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import ssl
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from reqtable.config import Certificate, TLSOptions
from reqtable.net.stream import Stream
from reqtable.table.errors import ConfigurationError
from reqtable.table.output import FileSlice
from reqtable.table.states import READ, WRITE, Event, State

RECORD_BYTES = 16_384  # the largest record (RFC 8446, 5.1)
_GOODBYE_S = 2.0  # how long a blocking socket waits for room for its close_notify
_GIVE_PEM = "give PEM files, the key without a passphrase"
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TLSSocket(ssl.SSLSocket):
    """Secures a request's socket. It ends with close_notify (RFC 8446, 6.1), so the peer knows nothing was cut."""

    def send(self, data: Any, flags: int = 0) -> int:
        """Send; if non-blocking, a record at most: OpenSSL takes all or nothing, and the loop counts what was taken."""
        if len(data) > RECORD_BYTES and self.gettimeout() == 0:
            data = memoryview(data)[:RECORD_BYTES]
        return super().send(data, flags)

    def say_goodbye(self) -> bool:
        """Send close_notify on a non-blocking socket, without waiting; False if the kernel has no room for it."""
        try:
            self.unwrap()
        except ssl.SSLWantWriteError:
            return False
        except (OSError, ValueError):
            pass  # it was sent, but the peer has not sent its own; or the peer has gone
        return True

    def end_politely(self) -> None:
        """Send close_notify; a blocking socket waits up to `_GOODBYE_S` for room."""
        before = self.gettimeout()
        self.settimeout(0)
        until = monotonic() + (0 if before == 0 else _GOODBYE_S)
        while not self.say_goodbye() and self._wait_for_room(until - monotonic()):
            pass
        self.settimeout(before)

    def forget(self) -> None:
        """Drop the TLS state: a child process has the connection, so this copy is out of date."""
        self._sslobj = None

    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_RD:
            self.end_politely()
        super().shutdown(how)

    def _wait_for_room(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return seconds > 0 and bool(poll.poll(seconds * 1000))


class TLSStream(Stream):
    """Receives and sends for one secured connection.

    If the connection ends without close_notify, somebody may have cut it. That counts as the end of input only while
    nothing is unread; otherwise the connection is lost.
    """

    __slots__ = ()

    immovable: ClassVar[str | None] = "its connection is encrypted (TLS), and the keys stay in this process"

    def on_ready(self, mask: int) -> None:
        if self.entry.state is State.LINGERING and self.watched == WRITE:
            self._go_on_ending()
        else:
            super().on_ready(mask)

    def finish(self) -> None:
        if self.request.say_goodbye():
            super().finish()
        else:
            self.steps.linger(self.entry)
            self.watch(WRITE)

    def leave(self) -> None:
        self.request.forget()

    def _go_on_ending(self) -> None:
        if self.request.say_goodbye():
            with contextlib.suppress(OSError):  # the peer may have gone
                self.request.shutdown(socket.SHUT_WR)
            self.watch(READ)

    def _unreadable(self, error: OSError) -> None:
        if self._waits(error):
            return
        if isinstance(error, ssl.SSLEOFError) and not len(self.entry.input):
            self.entry.own_input().ended = True
            self._ask_again(Event.INPUT_ENDED)
        else:
            super()._unreadable(error)

    def _ask_again(self, event: Event) -> None:
        """Have the request look at its input again."""
        if self.entry.state is State.WAITING:
            self.steps.waiting.wake(self.entry, event)
        elif self.entry.state is State.READING:
            self.steps.step(self.entry, event)

    def _unwritable(self, error: OSError) -> None:
        if not self._waits(error):
            super()._unwritable(error)

    def _waits(self, error: OSError) -> bool:
        """Return whether OpenSSL only has to read or write first; the selector then watches for that."""
        if isinstance(error, ssl.SSLWantReadError):
            needed = READ
        elif isinstance(error, ssl.SSLWantWriteError):
            needed = WRITE
        else:
            return False
        # A WAITING request may be waiting for the other direction too.
        self.watch(self.watched | needed if self.entry.state is State.WAITING else needed)
        return True

    def _end_output(self) -> None:
        self._take_what_came()
        try:
            self.request.unwrap()
        except (ssl.SSLWantReadError, ValueError):
            pass  # close_notify is sent, and the peer goes on; or the peer has ended first
        except ssl.SSLError as error:
            if error.reason == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
                raise ConnectionResetError("input came while close_notify was sent, and OpenSSL dropped it") from None
            raise
        socket.socket.shutdown(self.request, socket.SHUT_WR)

    def _take_what_came(self) -> None:
        """Take all input that has come: Python's `unwrap` reads on after close_notify, and drops what it finds."""
        entry = self.entry
        before = entry.bytes_in
        with contextlib.suppress(OSError):  # no more has come; any other error comes again
            while not entry.input.ended:
                data = self.request.recv(self.steps.table.limits.recv_bytes)
                entry.bytes_in += len(data)
                entry.own_input().feed(data)
                entry.own_input().ended = not data
        if entry.bytes_in > before or entry.input.ended:
            self.steps.mailbox.post(self._ask_again, Event.INPUT_ARRIVED)

    def _send_file(self, piece: FileSlice, most: int) -> int:
        return int(self.request.send(piece.read(RECORD_BYTES)))


def server_context(options: TLSOptions, where: str = "tls.") -> ssl.SSLContext:
    """Make a server's context. Raises ConfigurationError, which names the key, the file and the mend.

    `where` stands before the names of the certificate and of its key.
    """
    assert options.cert is not None
    context = _context(options, where, Certificate(options.cert, options.key))
    others = {
        name.lower(): _context(options, f"tls.names.{name}.", certificate)
        for name, certificate in options.names.items()
    }
    if others:
        context.sni_callback = lambda connection, name, _: _choose(others, connection, name)
    return context


def _context(options: TLSOptions, where: str, certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = TLSSocket
    context.minimum_version = _VERSIONS[options.min_version]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if options.ciphers is not None:
        try:
            context.set_ciphers(options.ciphers)
        except ssl.SSLError:
            raise ConfigurationError(f"tls.ciphers: OpenSSL has none of {options.ciphers!r}: see ciphers(1)") from None
    if options.alpn:
        context.set_alpn_protocols(list(options.alpn))
    _load(context, where, certificate)
    if options.client_ca is not None:
        try:
            context.load_verify_locations(options.client_ca)
        except OSError as error:
            reason = reason_of(error)
            raise ConfigurationError(f"tls.client_ca {options.client_ca}: {reason}: give certificates as PEM") from None
        context.verify_mode = ssl.CERT_REQUIRED if options.client_cert_required else ssl.CERT_OPTIONAL
    return context


def _load(context: ssl.SSLContext, where: str, certificate: Certificate) -> None:
    cert, own = certificate.cert, certificate.key
    try:
        # without `password`, OpenSSL would ask for the passphrase of a key on the terminal
        context.load_cert_chain(cert, own, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"is not the certificate of the key in {own or cert}: give a certificate and its key"
        else:
            problem = _lack(where, cert, own) or f"or its key {own or cert}: {reason_of(error)}: {_GIVE_PEM}"
    except OSError as error:
        if own and _is_readable(cert) and not _is_readable(own):
            raise ConfigurationError(f"{where}key {own} can't be used: {reason_of(error)}") from None
        problem = f"can't be used: {reason_of(error)}"
    else:
        return
    raise ConfigurationError(f"{where}cert {cert} {problem}")


def _lack(where: str, cert: str, own: str | None) -> str | None:
    """Describe the part that the files lack; None if they lack nothing. OpenSSL doesn't say."""
    if not _has(cert, b"CERTIFICATE"):
        return f"has no certificate in it: {_GIVE_PEM}"
    if _has(own or cert, b"PRIVATE KEY"):
        return None
    if own is None:
        return f"has no private key in it: name the file that has the key, as {where}key"
    return f"can't be used: its key {own} has no private key in it: name the file that has the key, as PEM"


def _has(path: str, label: bytes) -> bool:
    """Return whether a PEM file has a part whose label ends with `label` (RFC 7468, 2)."""
    return re.search(rb"^-----BEGIN [A-Z ]*" + label + b"-----", Path(path).read_bytes(), re.MULTILINE) is not None


def _is_readable(path: str) -> bool:
    return os.access(path, os.R_OK) and not os.path.isdir(path)


def reason_of(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not what it should be").lower().replace("_", " ")
    return (error.strerror or str(error)).lower()


def _choose(others: dict[str, ssl.SSLContext], connection: Any, name: str | None) -> None:
    """Serve with the certificate of `name`, else with its domain's wildcard certificate, else with the default."""
    asked = (name or "").lower()
    chosen = others.get(asked) or others.get("*." + asked.partition(".")[2])
    if chosen is not None:
        connection.context = chosen
