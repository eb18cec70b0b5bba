"""A small client: sends what a source gives, and shows at once what the server answers."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from reqtable.run.encryption import Encryption

CONNECT_S = 10.0
_SIZE = 65536
_AGAIN_S = 0.2
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Where(NamedTuple):
    """Says where a server is. `address` is `(host, port)`, or the path of a Unix socket."""

    scheme: str
    address: Any

    @classmethod
    def read(cls, text: str) -> Where:
        """Read `tcp://host:port`, `tls://host:port`, `unix:///path` or `host:port`. Raises ValueError."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = ("unix" if text.startswith("/") else "tcp"), text
        if scheme == "unix" and rest:
            return cls(scheme, "\0" + rest[1:] if rest.startswith("@") else rest)
        try:
            parts = urlsplit(f"//{rest}")
            host, port = parts.hostname, parts.port
        except ValueError:  # a bracket is missing, or the port is too large
            port = None
        if scheme not in ("tcp", "tls") or port is None:
            raise ValueError(f"{text!r}: write tcp://HOST:PORT, tls://HOST:PORT, unix:///PATH or HOST:PORT")
        return cls(scheme, (host or "127.0.0.1", port))

    def connect(self, trusts_all: bool) -> tuple[socket.socket, Encryption | None]:
        """Connect, by TLS if the scheme says so. With `trusts_all`, no certificate is checked.

        Raises OSError, or UnicodeError for a host that no name service can have.
        """
        if self.scheme == "unix":
            own = socket.socket(socket.AF_UNIX)
            own.settimeout(CONNECT_S)
            try:
                own.connect(self.address)
            except BaseException:
                own.close()
                raise
        else:
            own = socket.create_connection(self.address, CONNECT_S)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = None
        if self.scheme == "tls":
            try:
                tls = Encryption(self.address[0], trusts_all)
                tls.shake_hands(own)
            except BaseException:
                own.close()
                raise
        own.setblocking(False)
        return own, tls


class Talk:
    """Carries bytes from the descriptor `source` to a connection, and gives `show` what comes back.

    At the end of the source it ends its half of the connection, and goes on until the server closes. `encode` makes
    what is sent of what was read. At the end of the source, `encode` gets `b""`; at the server's end, `show` does.
    """

    def __init__(
        self,
        own: socket.socket,
        source: int,
        encode: Callable[[bytes], bytes],
        show: Callable[[bytes], None],
        tls: Encryption | None = None,
    ) -> None:
        self._own = own
        self._tls = tls
        self._source: int | None = source
        self._encode = encode
        self._show = show
        self._unsent = b""
        self._has_ended = False  # our half of the connection

    def run(self) -> None:
        """Talk until the server closes. Raises OSError if the connection breaks."""
        with selectors.SelectSelector() as selector:  # which takes files, as epoll doesn't
            selector.register(self._own, _READ)
            while True:
                self._watch_source(selector)
                ready = [key.fileobj for key, _ in selector.select()]
                if self._source in ready:
                    self._take()
                for data in self._received() if self._own in ready else ():
                    self._show(data)
                    if not data:
                        return
                self._flush()
                if self._source is None and not self._unsent and not self._has_ended:
                    self._end_half()
                selector.modify(self._own, _READ | (_WRITE if self._unsent else 0))

    def _watch_source(self, selector: selectors.BaseSelector) -> None:
        """Watch the source while the server takes what it gave."""
        watched = [key.fileobj for key in selector.get_map().values() if key.fileobj is not self._own]
        wanted = [] if self._source is None or self._unsent else [self._source]
        if watched != wanted:
            for each in watched:
                selector.unregister(each)
            for each in wanted:
                selector.register(each, _READ)

    def _take(self) -> None:
        assert self._source is not None
        data = os.read(self._source, _SIZE)
        encoded = self._encode(data)
        self._unsent += encoded if self._tls is None else self._tls.seal(encoded)
        if not data:
            self._source = None
            if self._tls is not None:
                self._unsent += self._tls.end()

    def _received(self) -> list[bytes]:
        """Return some of what has come, so that the source has its turn between. `b""` is the end."""
        try:
            data = self._own.recv(_SIZE)
        except BlockingIOError:
            return []
        if self._tls is None:
            return [data]
        pieces = self._tls.open(data)
        if self._source is not None:
            self._unsent += self._tls.seal(b"")  # TLS may have an answer of its own, such as a new key
        return pieces

    def _flush(self) -> None:
        """Send what can be sent now."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._own.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # the server takes no more, but may have answered
            self._unsent, self._source, self._has_ended = b"", None, True

    def _end_half(self) -> None:
        """End our half of the connection. With TLS, its last record has done so, and TCP stays open for the server."""
        self._has_ended = True
        if self._tls is None:
            with contextlib.suppress(OSError):  # the server is gone, but may have answered
                self._own.shutdown(socket.SHUT_WR)


def in_lines(encode_line: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Return an `encode` that calls `encode_line` with each line, without its end."""
    rest = b""

    def encode(data: bytes) -> bytes:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        if not data and rest:
            lines, rest = [rest], b""
        return b"".join(map(encode_line, lines))

    return encode


class _Listener(threading.Thread):
    """Talks in a thread of its own, and interrupts the person who types once the connection has ended."""

    def __init__(self, talk: Talk) -> None:
        super().__init__(name="reqtable-talk", daemon=True)
        self._talk = talk
        self._person = threading.get_ident()
        self.has_ended = False
        self.left = threading.Event()  # the person has left
        self.failure: OSError | None = None

    def run(self) -> None:
        try:
            self._talk.run()
        except OSError as error:
            self.failure = error
        finally:
            self.has_ended = True
            while not self.left.is_set():  # input() waits for the person, and misses a signal that comes as it begins
                signal.pthread_kill(self._person, signal.SIGINT)
                self.left.wait(_AGAIN_S)


def talk_to_person(
    own: socket.socket,
    encode_line: Callable[[bytes], bytes],
    show: Callable[[bytes], None],
    tls: Encryption | None = None,
) -> None:
    """Send each line that a person types, with the history of readline if Python has that, until the server closes.

    Raises KeyboardInterrupt if the person ends it, ValueError for a line that can't be sent, OSError if the connection
    breaks.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # it gives input() its history
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    source, typed = os.pipe()
    listener = _Listener(Talk(own, source, bytes, show, tls))
    listener.start()
    try:
        with open(typed, "wb", buffering=0) as end, contextlib.suppress(EOFError):
            try:
                while True:
                    end.write(encode_line(input().encode(sys.stdin.encoding or "utf-8", "surrogateescape")))
            except ValueError:
                listener.left.set()  # before the pipe ends, and the connection with it: no signal may come any more
                raise
        listener.join()
        threading.Event().wait()  # for its signal
    except KeyboardInterrupt:
        listener.left.set()
        if not listener.has_ended:
            raise
    finally:
        listener.left.set()
        with contextlib.suppress(OSError):  # the connection has ended already
            own.shutdown(socket.SHUT_RDWR)
        listener.join(_AGAIN_S)  # or it would use a socket that the caller closes
        if listener.has_ended:
            os.close(source)
    if listener.failure is not None:
        raise listener.failure
