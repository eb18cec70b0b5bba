"""The blocking classics of `socketserver`: `BaseRequestHandler`, `StreamRequestHandler`, `DatagramRequestHandler`.

They read and write their own socket and know nothing of the table. Policy `inline` runs each to its end on the loop;
policy `greenlet` suspends a handler when its socket would block.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
from typing import Any, BinaryIO, cast

from reqtable.net.stream import send_at_once
from reqtable.table.errors import HandlerError


class HandedOff(BaseException):
    """Unwinds `handle()` in the parent once a child has the request. It is no error, so error handlers let it pass."""


class BaseRequestHandler:
    """Serves one request: the constructor calls `setup()`, `handle()`, `finish()`.

    `request` is the socket of a stream server, or the pair `(data, socket)` of a datagram server. `finish()` is called
    even if `handle()` raised, but not if `setup()` did.
    """

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        self.request = request
        self.client_address = client_address
        self.server = server
        self.setup()
        try:
            self.handle()
        except HandedOff:
            raise  # the child calls `finish`
        except BaseException:
            self.finish()
            raise
        self.finish()

    @classmethod
    def on_start(cls, server: Any) -> None:
        """Called once when `server` begins to serve, before its first request; the default does nothing."""

    @classmethod
    def on_stop(cls, server: Any) -> None:
        """Called once when `server` stops serving, after its last request; the default does nothing."""

    def hand_off(self, policy: str) -> None:
        """Run the rest of `handle()` under `policy`: `"fork"`, in a forked child.

        Returns in the child only. In the parent, `handle()` is unwound from here without `finish()`, and the loop goes
        on at once; the connection stays open until the child has ended. Raises HandlerError for another policy: a
        stack can be copied, but not moved to a thread.
        """
        if policy != "fork":
            raise HandlerError(
                f"a blocking handler can be handed off only to 'fork', not to {policy!r}: choose that policy for the "
                "whole request, or write a state or async handler"
            )
        if not hasattr(os, "fork"):
            raise HandlerError("hand_off('fork'): this platform has no fork()")
        self._flush()
        if os.fork():
            raise HandedOff

    def _flush(self) -> None:
        """Write what is buffered: else the parent and the child would both write it."""

    def setup(self) -> None:
        """Prepare; the default does nothing."""

    def handle(self) -> None:
        """Serve; the default does nothing."""

    def finish(self) -> None:
        """Clean up; the default does nothing."""


class StreamRequestHandler(BaseRequestHandler):
    """Serves a request of a stream server: read from `rfile`, write to `wfile`.

    `rbufsize` and `wbufsize` are those of `socket.makefile`; with `wbufsize = 0` a write sends all of its data at once.
    `timeout`, in seconds, is set on the socket; `disable_nagle_algorithm` sets TCP_NODELAY (tcp(7)), only on internet
    sockets.
    """

    rbufsize: int = -1  # bytes of the buffer of `rfile`; -1: as Python chooses
    wbufsize: int = 0  # bytes of the buffer of `wfile`; 0: none
    timeout: float | None = None  # seconds for each read and write; None: no bound
    disable_nagle_algorithm: bool = False  # send small pieces at once (TCP_NODELAY in tcp(7))

    rfile: BinaryIO  # the input
    wfile: BinaryIO  # the output

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        if self.disable_nagle_algorithm:
            send_at_once(self.connection)
        self.rfile = cast(BinaryIO, self.connection.makefile("rb", self.rbufsize))
        if self.wbufsize == 0:
            self.wfile = cast(BinaryIO, _SocketWriter(self.connection))
        else:
            self.wfile = cast(BinaryIO, self.connection.makefile("wb", self.wbufsize))

    def _flush(self) -> None:
        self.wfile.flush()

    def finish(self) -> None:
        if not self.wfile.closed:
            with contextlib.suppress(OSError):  # the peer may have gone
                self.wfile.flush()
        self.wfile.close()
        self.rfile.close()


class DatagramRequestHandler(BaseRequestHandler):
    """Serves a request of a datagram server: `rfile` holds the datagram; `finish()` sends `wfile` as one datagram."""

    rfile: BinaryIO  # the input
    wfile: BinaryIO  # the output

    def setup(self) -> None:
        self.packet, self.socket = self.request
        self.rfile = io.BytesIO(self.packet)
        self.wfile = io.BytesIO()

    def finish(self) -> None:
        self.socket.sendto(cast(io.BytesIO, self.wfile).getvalue(), self.client_address)


class _SocketWriter(io.BufferedIOBase):
    """Writes to a connection without a buffer: `write` sends all of its data."""

    __slots__ = ("_connection",)

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._connection.sendall(data)
        return len(data) if type(data) is bytes else memoryview(data).nbytes

    def fileno(self) -> int:
        return self._connection.fileno()
