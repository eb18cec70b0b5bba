"""The five server classes of `socketserver`, with the hooks that may be overridden. `base` has their loop."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

from reqtable.config import Config
from reqtable.loop.platform import SYSTEM
from reqtable.net.pktinfo import receive, watch_destinations
from reqtable.net.sockets import INTERNET
from reqtable.server.base import LoopServer
from reqtable.server.failure_log import log_failure
from reqtable.table.addresses import address_text

_QUEUE_SIZE = 1024
_SHUT_WR = int(socket.SHUT_WR)


class BaseServer(LoopServer):
    """Does everything that the server classes share, which is all but the socket.

    `dispatch` names the policy, `config` gives limits; both are optional. Raises ConfigurationError, before anything is
    bound, for a policy that does not exist or can't run the handler.
    """

    timeout: float | None = None  # seconds that `handle_request` waits; None: for ever

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any],
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
        """End every request of this server, and free what serving them needed."""
        self._end_requests()

    def fileno(self) -> int:
        """Return the descriptor that requests arrive at; -1 if the server is closed."""
        return -1

    def get_request(self) -> tuple[Any, Any]:
        """Accept a waiting request. Returns `(request, client_address)`; raises OSError if it can't get one."""
        raise NotImplementedError(f"{type(self).__name__} must define get_request()")

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether to serve the request; may be overridden."""
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
        """Called if no request came to `handle_request()` in time; may be overridden."""

    def service_actions(self) -> None:
        """Called once in every pass of the loop; may be overridden."""

    def on_start(self) -> None:
        """Called when `serve_forever` begins, before the first accept; may be overridden. An exception ends it."""

    def on_stop(self) -> None:
        """Called when `serve_forever` ends, after its last request; may be overridden. An exception is logged."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error of a failed request: a line that names the user's line, and the traceback from there.

        An error that the peer caused, such as a disconnect, is one line. So is an error of another connection, and an
        error whose text names the place: a broken rule of this package, or an error that a `call` raised outside the
        user's code.
        """
        error = sys.exc_info()[1]
        if error is not None:
            log_failure(error, address_text(client_address))


class TCPServer(BaseServer):
    """Serves TCP connections. `server_address` is `(host, port)`; port 0 takes any free port.

    With `bind_and_activate=False`, call `server_bind()` and `server_activate()` before serving. If the constructor
    fails, it closes what it opened.
    """

    address_family: int = socket.AF_INET  # or socket.AF_INET6
    socket_type: int = socket.SOCK_STREAM
    request_queue_size: int = 5  # connections that the kernel queues, if a class sets another number
    allow_reuse_address: bool = False  # set SO_REUSEADDR (socket(7))
    allow_reuse_port: bool = False  # set SO_REUSEPORT (socket(7))

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any],
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
        """Bind the socket; `server_address` becomes the real address. Replaces a dead server's Unix socket file.

        `allow_reuse_address` and `allow_reuse_port` apply to internet sockets: Linux refuses SO_REUSEPORT for others.
        """
        if self.socket.family in INTERNET:
            if self.allow_reuse_address:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.allow_reuse_port and hasattr(socket, "SO_REUSEPORT"):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self.socket.bind(self.server_address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not bind_over_dead(self.socket.bind, self.server_address):
                raise
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen. The default `request_queue_size` is too short for clients that connect during a pass: use more."""
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
        try:  # noqa: SIM105  # costs less than `suppress`
            request.shutdown(_SHUT_WR)
        except OSError:
            pass  # the peer may have gone
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        request.close()


class UDPServer(TCPServer):
    """Serves UDP datagrams: a request is the pair `(data, socket)`. `data` is cut off at `max_packet_size` bytes.

    On a wildcard address, state and async handlers answer from the address that the client asked (Linux).
    """

    socket_type: int = socket.SOCK_DGRAM
    max_packet_size: int = 8192  # bytes of a datagram; the rest is cut off
    _watches_destinations = False

    @property
    def receives_without_waiting(self) -> bool:
        """Whether `get_request` never waits, so that a pass may take several datagrams. With a timeout, it waits."""
        return not self.socket.gettimeout()

    def get_request(self) -> tuple[Any, Any]:
        if self._watches_destinations:
            return receive(self.socket, self.max_packet_size, self.server_address[1])
        # The socket itself must stay blocking: handlers send with it.
        data, client_address = self.socket.recvfrom(self.max_packet_size, socket.MSG_DONTWAIT)
        return (data, self.socket), client_address

    def server_activate(self) -> None:
        """Ask the kernel for each datagram's destination if the socket is bound to every address; don't listen."""
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
        """Do nothing: a datagram leaves nothing to close."""


if hasattr(socket, "AF_UNIX"):

    class UnixStreamServer(TCPServer):
        """Serves Unix stream connections. `server_address` is a path, or starts with a NUL (unix(7))."""

        address_family: int = socket.AF_UNIX

    class UnixDatagramServer(UDPServer):
        """Serves Unix datagrams."""

        address_family: int = socket.AF_UNIX


def remove_dead(path: str | bytes) -> None:
    """Remove the Unix socket file at `path` if no socket is bound to it. Raises OSError if that can't be done."""
    with _lock_beside(path):
        if _is_dead(path):
            os.unlink(path)


def bind_over_dead(bind: Callable[[Any], object], address: Any) -> bool:
    """Call `bind` in place of a Unix socket file that a dead server left. Returns False if the address is in use."""
    if not isinstance(address, (str, bytes)) or not address or address[0] in ("\0", 0):
        return False
    try:
        with _lock_beside(address):
            if not _is_dead(address):
                return False
            os.unlink(address)
            bind(address)
    except OSError:
        return False  # another server was faster, or this user may not write there
    return True


def _is_dead(path: str | bytes) -> bool:
    """Return whether `path` is a Unix socket file to which no socket is bound.

    The probe connects a datagram socket. It fails with ECONNREFUSED if no socket of any type is bound, and with
    EPROTOTYPE if a stream socket is, listening or not. The queue of that stream socket does not see the attempt.
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
    """Hold the lock for removing the socket file at `path` (flock(2)). Raises BlockingIOError if another server has it.

    The lock file exists only while the lock is held, and only its holder removes it. So a lock on a file that has lost
    its name is worthless: another server has held and released the lock in the meantime.
    """
    import fcntl  # only POSIX has it, as it has Unix sockets

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
