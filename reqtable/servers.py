"""The server classes of `socketserver`: five classes and the hooks that may be overridden; `hosting` has their loop."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import sys
import threading
from typing import Any, Self

from reqtable.config import Config
from reqtable.core.addresses import address_text
from reqtable.core.errors import ConfigurationError, HandlerError
from reqtable.core.places import trim
from reqtable.engine.system import SYSTEM
from reqtable.engine.transports import is_peers_doing
from reqtable.hosting import Hosted

log = logging.getLogger("reqtable")

_QUEUE_SIZE = 1024


class BaseServer(Hosted):
    """The base of the server classes: everything but the socket.

    `dispatch` names the policy, `config` gives limits; both are optional. Raises ConfigurationError for a policy that
    there isn't, or that can't run the handler, before anything is bound.
    """

    timeout: float | None = None

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Any,
        *,
        dispatch: str | None = None,
        config: Config | None = None,
    ) -> None:
        self._configure(dispatch, config)
        self._check_handler(RequestHandlerClass)
        self.server_address = server_address
        self.RequestHandlerClass = RequestHandlerClass
        self.__is_shut_down = threading.Event()
        self.__shutdown_request = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.server_close()

    def server_activate(self) -> None:
        """Called by the constructor to activate the server; may be overridden."""

    def server_close(self) -> None:
        """End every request of this server and free what serving took."""
        self._end_requests()

    def fileno(self) -> int:
        """The descriptor that requests come to; -1 when closed."""
        return -1

    def get_request(self) -> tuple[Any, Any]:
        """Take a request that is there: `(request, client_address)`. An OSError means that none could be had."""
        raise NotImplementedError(f"{type(self).__name__} must define get_request()")

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to serve it; may be overridden."""
        return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Run a blocking handler: its constructor does the work."""
        self.RequestHandlerClass(request, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        """Shut down and close a request."""
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Close a request."""

    def handle_timeout(self) -> None:
        """`handle_request()` saw no request in time; may be overridden."""

    def service_actions(self) -> None:
        """Called once every pass of the loop; may be overridden."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A request failed: log it, with a traceback that begins with the user's code.

        The doing of a peer, such as a disconnect, is one line. So is an error whose text names the place: a broken rule
        of this package, or what a call has raised in code that is not the user's.
        """
        error = sys.exc_info()[1]
        peer = address_text(client_address)
        is_rule = isinstance(error, HandlerError | ConfigurationError)
        notes = getattr(error, "__notes__", [])
        if is_peers_doing(error):
            log.info("%s: %s", peer, error)
        elif error is not None and not trim(error) and (is_rule or notes):
            said = str(error) if is_rule else f"{type(error).__name__}: {error}"
            log.error("%s: %s", peer, "; ".join([said, *notes]))
        else:
            log.error("%s: %s in its handler", peer, type(error).__name__, exc_info=error)


class TCPServer(BaseServer):
    """A server of TCP connections. `server_address` is `(host, port)`; port 0 takes any that is free.

    With `bind_and_activate=False`, call `server_bind()` and `server_activate()` before serving. A constructor that
    fails closes what it opened.
    """

    address_family: int = socket.AF_INET
    socket_type: int = socket.SOCK_STREAM
    request_queue_size: int = 5
    allow_reuse_address: bool = False
    allow_reuse_port: bool = False

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Any,
        bind_and_activate: bool = True,
        *,
        dispatch: str | None = None,
        config: Config | None = None,
    ) -> None:
        super().__init__(server_address, RequestHandlerClass, dispatch=dispatch, config=config)
        self.socket = SYSTEM.get().socket(self.address_family, self.socket_type)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self.server_close()
                raise

    def server_bind(self) -> None:
        """Bind the socket; `server_address` becomes the real one. A dead server's Unix socket file is replaced."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.allow_reuse_port and hasattr(socket, "SO_REUSEPORT"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self.socket.bind(self.server_address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _remove_dead(self.socket, self.server_address):
                raise
            self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen. A `request_queue_size` that nobody has set does not hold those who connect during a pass."""
        chosen = self.request_queue_size != TCPServer.request_queue_size
        self.socket.listen(self.request_queue_size if chosen else _QUEUE_SIZE)

    def server_close(self) -> None:
        try:
            super().server_close()
        finally:
            self.socket.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[Any, Any]:
        return self.socket.accept()

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):  # the peer may have gone
            request.shutdown(socket.SHUT_WR)
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        request.close()


class UDPServer(TCPServer):
    """A server of UDP datagrams: a request is the pair `(data, socket)`. What is over `max_packet_size` is cut off."""

    socket_type: int = socket.SOCK_DGRAM
    max_packet_size: int = 8192

    @property
    def receives_without_waiting(self) -> bool:
        """`get_request` never waits, so that a pass of the loop may take several; a timeout set on the socket waits."""
        return not self.socket.gettimeout()

    def get_request(self) -> tuple[Any, Any]:
        # Not by making the socket non-blocking: it is also what the handlers send by.
        data, client_address = self.socket.recvfrom(self.max_packet_size, socket.MSG_DONTWAIT)
        return (data, self.socket), client_address

    def server_activate(self) -> None:
        """There is nothing to listen on."""

    def process_request(self, request: Any, client_address: Any) -> None:
        session = self._host.session_of(self, client_address)
        if session is not None:
            session.deliver(request[0])
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """A datagram leaves nothing to close."""


if hasattr(socket, "AF_UNIX"):

    class UnixStreamServer(TCPServer):
        """A server of Unix stream connections. `server_address` is a path, or starts with a NUL (unix(7))."""

        address_family: int = socket.AF_UNIX

    class UnixDatagramServer(UDPServer):
        """A server of Unix datagrams."""

        address_family: int = socket.AF_UNIX


def _remove_dead(own: socket.socket, path: Any) -> bool:
    """Remove the Unix socket file at `path` where no server answers at it; True where that was so."""
    if own.family != getattr(socket, "AF_UNIX", None) or not path or path[0] in ("\0", 0):
        return False
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(own.family, own.type) as probe:
            probe.setblocking(False)  # a live server whose queue is full must not hold us up
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
        return True
    except OSError:
        pass
    return False
