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
from collections.abc import Iterator
from typing import Any, Self

from reqtable.config import Config
from reqtable.loop.platform import SYSTEM
from reqtable.net.pktinfo import receive, watch_destinations
from reqtable.net.sockets import is_peers_doing
from reqtable.net.stream import INTERNET
from reqtable.server.base import LoopServer
from reqtable.table.addresses import address_text, printable
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.places import trim

log = logging.getLogger("reqtable")

_QUEUE_SIZE = 1024


class BaseServer(LoopServer):
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
        has_traceback = any("\n" in note for note in notes)  # of the worker that the step was shipped to
        if is_peers_doing(error):
            log.info("%s: %s", peer, printable(error))
        elif error is None or trim(error) or not (is_rule or notes):
            log.error("%s: %s in its handler", peer, type(error).__name__, exc_info=error)
        elif has_traceback:
            log.error("%s: %s in its handler", peer, type(error).__name__, exc_info=(type(error), error, None))
        else:
            said = str(error) if is_rule else f"{type(error).__name__}: {error}"
            log.error("%s: %s", peer, printable("; ".join([said, *notes])))


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
        """Bind the socket; `server_address` becomes the real one. A dead server's Unix socket file is replaced.

        `allow_reuse_address` and `allow_reuse_port` are for internet sockets: Linux refuses SO_REUSEPORT of others.
        """
        if self.socket.family in INTERNET:
            if self.allow_reuse_address:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.allow_reuse_port and hasattr(socket, "SO_REUSEPORT"):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self.socket.bind(self.server_address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _bind_over_dead(self.socket, self.server_address):
                raise
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen. A `request_queue_size` that nobody has set does not hold those who connect during a pass."""
        self._keep_alive()  # the first clients may connect before anything is served
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
    """A server of UDP datagrams: a request is the pair `(data, socket)`. What is over `max_packet_size` is cut off.

    On a wildcard address, state and async handlers answer from the address that was asked (Linux).
    """

    socket_type: int = socket.SOCK_DGRAM
    max_packet_size: int = 8192
    _watches_destinations = False

    @property
    def receives_without_waiting(self) -> bool:
        """`get_request` never waits, so that a pass of the loop may take several; a timeout set on the socket waits."""
        return not self.socket.gettimeout()

    def get_request(self) -> tuple[Any, Any]:
        if self._watches_destinations:
            return receive(self.socket, self.max_packet_size, self.server_address[1])
        # Not by making the socket non-blocking: it is also what the handlers send by.
        data, client_address = self.socket.recvfrom(self.max_packet_size, socket.MSG_DONTWAIT)
        return (data, self.socket), client_address

    def server_activate(self) -> None:
        """There is nothing to listen on. On a socket for every address, learn which one each datagram was sent to."""
        self._watches_destinations = watch_destinations(self.socket)

    def process_request(self, request: Any, client_address: Any) -> None:
        session = self._host.intake.sessions.find(self, request, client_address)
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


def remove_dead(path: str | bytes) -> None:
    """Remove the Unix socket file at `path` if no socket is bound to it. Raises OSError, BlockingIOError for one."""
    with _lock_beside(path):
        if _is_dead(path):
            os.unlink(path)


def _bind_over_dead(own: socket.socket, address: Any) -> bool:
    """Bind `own` in place of a Unix socket file that a dead server left. False: the address is in use."""
    if own.family != getattr(socket, "AF_UNIX", None) or not address or address[0] in ("\0", 0):
        return False
    try:
        with _lock_beside(address):
            if not _is_dead(address):
                return False
            os.unlink(address)
            own.bind(address)
    except OSError:
        return False  # another server was faster, or this user may not write here
    return True


def _is_dead(path: str | bytes) -> bool:
    """Whether a Unix socket file is at `path`, and no socket is bound to it.

    Connecting a datagram socket tells, whatever type of socket is bound: ECONNREFUSED means none is. A stream socket is
    of the wrong type (EPROTOTYPE), whether it listens already or not, and its queue does not see the attempt.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


@contextlib.contextmanager
def _lock_beside(path: str | bytes) -> Iterator[None]:
    """Hold the right to remove the socket file at `path` (flock(2)). Raises BlockingIOError if another server has it.

    The file of the lock exists only while the lock is held. Its holder alone removes it, so a lock on a file without a
    name is worth nothing: another server has held the right in the meantime.
    """
    import fcntl  # POSIX alone has it, and Unix sockets

    folder, name = os.path.split(os.fsencode(path))
    lock = os.path.join(folder, b".%b.lock" % name)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        try:
            yield
        finally:
            os.unlink(lock)
    finally:
        os.close(descriptor)
