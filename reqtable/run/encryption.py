"""TLS for a client, without its socket.

`ssl.SSLSocket` can't end one half of a connection and go on with the other: its `unwrap` drops what has come.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

_SIZE = 65536


class Encryption:
    """Encrypts what is sent, and decrypts what has come. No method waits, but for `shake_hands`."""

    def __init__(self, server_name: str, trusts_all: bool) -> None:
        context = ssl.create_default_context()
        if trusts_all:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)

    def shake_hands(self, own: socket.socket) -> None:
        """Agree with the server on keys, over the socket `own`, which blocks. Raises OSError, such as ssl.SSLError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                own.sendall(self._outgoing.read())
                self._feed(own.recv(_SIZE))
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the server learns why, if it is there
                    own.sendall(self._outgoing.read())
                raise
            else:
                own.sendall(self._outgoing.read())
                return

    def seal(self, data: bytes) -> bytes:
        """Return what has to be sent so that the server gets `data`."""
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        return self._outgoing.read()

    def open(self, data: bytes) -> list[bytes]:
        """Return what the server has sent, in pieces. `b""` is the end, as is no `data`. Raises ssl.SSLError."""
        self._feed(data)
        pieces: list[bytes] = []
        try:
            while b"" not in pieces[-1:]:  # read() returns b"" for the server's end, unless our own end is sent
                pieces.append(self._tls.read(_SIZE))
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pieces.append(b"")  # the server has said that it ends, or has closed without a word
        return pieces

    def end(self) -> bytes:
        """Return what has to be sent so that the server gets the end. The server may go on."""
        with contextlib.suppress(ssl.SSLWantReadError):  # the server has not said that it ends
            self._tls.unwrap()
        return self._outgoing.read()

    def _feed(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
