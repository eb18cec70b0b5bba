"""Certificates of an authority of the tests' own, and clients that speak TLS."""

from __future__ import annotations

import functools
import socket
import ssl
from pathlib import Path
from typing import Any

import trustme

from tests.support import WAIT_S, Client

AUTHORITY = trustme.CA()  # here, because a server's thread and a client's may both be the first to ask for it


@functools.cache
def server_context(client_certificate: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    if client_certificate:
        AUTHORITY.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@functools.cache
def client_context(certificate: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    if certificate:
        AUTHORITY.issue_cert("ann@example.org").configure_cert(context)
    return context


def write_certificate(folder: Path, *names: str) -> str:
    """The path of a new certificate for those names, with its key; the authority's is `ca.pem` beside it."""
    names = names or ("127.0.0.1", "::1", "localhost")
    path = folder / f"{names[0].replace('*', '_').replace(':', '_')}.pem"
    AUTHORITY.issue_cert(*names).private_key_and_cert_chain_pem.write_to_path(str(path))
    AUTHORITY.cert_pem.write_to_path(str(folder / "ca.pem"))
    return str(path)


class TLSClient(Client):
    def __init__(self, address: Any, certificate: bool = False) -> None:
        super().__init__(address)
        begin_tls(self, certificate)


def begin_tls(client: Client, certificate: bool = False) -> None:
    client.socket = client_context(certificate).wrap_socket(client.socket, server_hostname="127.0.0.1")


class TLSStream:
    """As much of a socket as a dialogue needs, over TLS. Unlike an `ssl.SSLSocket` it can end its own side alone.

    An end of the server's without close_notify raises.
    """

    def __init__(self, address: Any, context: ssl.SSLContext | None = None, name: str = "127.0.0.1") -> None:
        self.plain = socket.create_connection(address, timeout=WAIT_S)
        self.plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.came, self.goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or client_context()).wrap_bio(self.came, self.goes, server_hostname=name)
        try:
            self._do(self.tls.do_handshake)
        except BaseException:
            self.plain.close()
            raise

    def sendall(self, data: bytes) -> None:
        self.tls.write(data)
        self._flush()

    def recv(self, count: int) -> bytes:
        try:
            return bytes(self._do(lambda: self.tls.read(count)))
        except ssl.SSLZeroReturnError:
            return b""

    def shutdown(self, how: int) -> None:
        """Say that this side has ended; the other one may go on."""
        if how == socket.SHUT_WR:
            try:
                self.tls.unwrap()
            except ssl.SSLError:
                self._flush()
        else:
            self.plain.shutdown(how)

    def leavings(self) -> bytes:
        """What came after the close_notify."""
        left = self.came.read()
        while more := self.plain.recv(65536):
            left += more
        return left

    def setsockopt(self, *args: Any) -> None:
        self.plain.setsockopt(*args)

    def settimeout(self, seconds: float) -> None:
        self.plain.settimeout(seconds)

    def close(self) -> None:
        self.plain.close()

    def _do(self, operation: Any) -> Any:
        while True:
            try:
                done = operation()
            except ssl.SSLWantReadError:
                self._flush()
                data = self.plain.recv(65536)
                if data:
                    self.came.write(data)
                else:
                    self.came.write_eof()
            else:
                self._flush()
                return done

    def _flush(self) -> None:
        while data := self.goes.read():
            self.plain.sendall(data)
