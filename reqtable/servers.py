"""The server classes of `socketserver`, served by an engine.

The hooks of one request are called in `socketserver`'s order: `_handle_request_noblock`, `get_request`,
`verify_request`, `process_request`, `finish_request`, the handler's `setup`, `handle`, `finish`, then
`shutdown_request`, `close_request`. The I/O of a state or async handler is the engine's: for one, `process_request` is
followed by `close_request`, once its connection has ended. What differs is the loop (one, for all requests),
`shutdown` (at once, from anywhere), and `handle_error` (through `logging`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import sys
import threading
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, Self

from reqtable.core.errors import ConfigurationError, PeerError, ReqtableError
from reqtable.core.limits import Limits
from reqtable.core.states import State
from reqtable.core.table import RequestTable, address_text
from reqtable.dispatch import Policy, policy_named
from reqtable.engine.engine import Engine

log = logging.getLogger("reqtable")

_LOOK_S = 0.05
_DONE = {State.LINGERING, State.CLOSED}


class Configuration(Protocol):
    """What a server reads of a configuration."""

    dispatch: str | None
    limits: Limits


class Serving:
    """The loop's side of a server: what `TableMixIn` puts in front of one, and `BaseServer` is built on."""

    dispatch: str = "inline"
    timeout: float | None

    _limits: Limits | None = None
    _engine: Engine | None = None
    _policy_class: type[Policy]
    _policy: Policy | None = None
    _in_serve_forever = False

    # As `socketserver.BaseServer` names them: programs set and read them.
    _BaseServer__is_shut_down: threading.Event
    _BaseServer__shutdown_request: bool

    def _configure(self, dispatch: str | None, config: Configuration | None) -> None:
        """Take what the constructor was given. Raises ConfigurationError for a policy that there isn't."""
        if config is not None:
            self._limits = config.limits
        chosen = dispatch or (config and config.dispatch)
        if chosen:
            self.dispatch = chosen
        self._policy_class = policy_named(self.dispatch)
        if self._engine is None:
            self.engine = Engine(limits=self._limits)

    # -- the table ----------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The loop. Several servers may share one: `Engine().add(server)`."""
        assert self._engine is not None, "the constructor of TableMixIn or BaseServer was not called"
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        if self._engine is not None:
            if self._engine.has_requests(self):
                raise ReqtableError("a server with requests in its table can't change engines: add it before it serves")
            self._engine.discard(self)
            self._close_policy()
        self._engine = engine
        engine.servers.append(self)

    @property
    def table(self) -> RequestTable:
        """Every unfinished request of this server's engine."""
        return self.engine.table

    # -- serving ------------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown()`, with every other server of this engine.

        The loop waits for events, not for `poll_interval` (seconds): it only bounds how long it takes to notice that
        someone set the flag of `shutdown` by hand.
        """
        self.engine.must_be_idle()
        self._must_be_open()
        self._BaseServer__is_shut_down.clear()
        self._in_serve_forever = True
        try:
            for server in self.engine.servers:
                self.engine.listen(server)
            self.engine.run(lambda: self._BaseServer__shutdown_request, poll_interval)
        finally:
            self.engine.leave()
            self._in_serve_forever = False
            self._BaseServer__shutdown_request = False
            self._BaseServer__is_shut_down.set()

    def shutdown(self) -> None:
        """End `serve_forever`, at once, and wait until it has ended.

        From a handler, or a signal handler in the loop's thread, it does not wait: the loop ends with its pass. Called
        before `serve_forever`, it waits for one, which ends at once. Requests in the table stay there, suspended, until
        the next `serve_forever` or `server_close()`; but those of blocking handlers, whose stacks can't change threads,
        end with a loop that runs in another thread than the main one.
        """
        self._BaseServer__shutdown_request = True
        self._wait_for_end()

    def drain(self, timeout: float | None = None) -> None:
        """Take no new requests, let those in the table finish, for at most `timeout` seconds, then stop.

        Where no loop runs, this runs it. Otherwise it waits until it is done, unless it is called in the loop. Then
        `serve_forever` ends; where another server of the engine serves, that goes on.
        """
        engine = self.engine
        until = inf if timeout is None else engine.table.clock() + timeout
        if engine.running:
            drained = threading.Event()
            engine.post(self._begin_drain, until, drained)
            if not engine.in_loop_thread:
                while engine.running and not drained.wait(_LOOK_S):
                    pass  # someone may end the loop before it is drained
                self._wait_for_end()
            return
        engine.unlisten(self)
        engine.run(lambda: not engine.has_requests(self), until=None if timeout is None else until)
        engine.end_requests(self)

    def handle_request(self) -> None:
        """Serve one request, to its end, or call `handle_timeout()` when none comes in time.

        The time is the shorter one of `timeout` and the socket's own timeout, in seconds. Raises ValueError after
        `server_close()`.
        """
        self._must_be_open()
        engine = self.engine
        engine.must_be_idle()
        own = getattr(self, "socket", None)
        timeouts = [t for t in (own.gettimeout() if own is not None else None, self.timeout) if t is not None]
        until = engine.table.clock() + min(timeouts) if timeouts else None
        known = engine.table.last_id
        listener = engine.listen(self, most=1)
        try:
            engine.run(lambda: listener.taken > 0, until=until)
            if not listener.taken:
                self.handle_timeout()
                return
            engine.unlisten(self)
            begun = [entry for entry in engine.table if entry.id > known and entry.server is self]
            engine.run(lambda: all(entry.state in _DONE for entry in begun))
        finally:
            engine.unlisten(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the request into the table, under this server's policy."""
        if self._policy is None:
            self._policy = self._policy_class(self.engine)
        self._policy.admit(self, request, client_address)

    def _handle_request_noblock(self) -> bool:
        """Take a request that is there; True where there may be another."""
        try:
            request, client_address = self.get_request()
        except OSError as error:
            return self.engine.refused(self, error)
        if not self.verify_request(request, client_address):
            self.shutdown_request(request)
            return True
        try:
            self.process_request(request, client_address)
        except BaseException as error:
            if error is self.engine.unwinding:
                raise  # it has been through handle_error
            if isinstance(error, Exception):
                self.handle_error(request, client_address)
                self.shutdown_request(request)
            else:
                self.shutdown_request(request)
                raise
        return True

    def _begin_drain(self, until: float, drained: threading.Event) -> None:
        self.engine.unlisten(self)
        self._watch_drain(until, drained)

    def _watch_drain(self, until: float, drained: threading.Event) -> None:
        engine = self.engine
        if engine.has_requests(self) and engine.table.now < until:
            engine.retry(partial(self._watch_drain, until, drained))
            return
        engine.end_requests(self)
        self._BaseServer__shutdown_request = self._in_serve_forever
        drained.set()

    def _must_be_open(self) -> None:
        if self.fileno() < 0:
            raise ValueError(f"this {type(self).__name__} is closed: it has nothing to take requests from")

    def _wait_for_end(self) -> None:
        engine = self.engine
        if engine.running and not self._in_serve_forever:
            # another server of the engine, or the engine itself, serves: only this one's listening ends
            engine.post(engine.unlisten, self)
            self._BaseServer__shutdown_request = False
            return
        engine.wake()
        if not engine.in_loop_thread:
            self._BaseServer__is_shut_down.wait()

    def _end_requests(self) -> None:
        if self._in_serve_forever:
            self._BaseServer__shutdown_request = True
        self._close_policy()
        if self._engine is not None:
            self._engine.discard(self)

    def _close_policy(self) -> None:
        if self._policy is not None:
            self._policy.close()
            self._policy = None

    if TYPE_CHECKING:  # what the server class behind this one has, be it `socketserver`'s or ours
        RequestHandlerClass: Any
        server_address: Any

        def fileno(self) -> int: ...
        def get_request(self) -> tuple[Any, Any]: ...
        def verify_request(self, request: Any, client_address: Any) -> bool: ...
        def finish_request(self, request: Any, client_address: Any) -> None: ...
        def shutdown_request(self, request: Any) -> None: ...
        def close_request(self, request: Any) -> None: ...
        def handle_error(self, request: Any, client_address: Any) -> None: ...
        def handle_timeout(self) -> None: ...
        def service_actions(self) -> None: ...
        def server_close(self) -> None: ...


class BaseServer(Serving):
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
        config: Configuration | None = None,
    ) -> None:
        self._configure(dispatch, config)
        self._policy_class.check(RequestHandlerClass)
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
        """A request failed: log it. A peer's doing, such as a disconnect, is one line, without a traceback."""
        error = sys.exc_info()[1]
        peer = address_text(client_address)
        if isinstance(error, PeerError | ConnectionError | TimeoutError):
            log.info("%s: %s", peer, error)
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
        config: Configuration | None = None,
    ) -> None:
        super().__init__(server_address, RequestHandlerClass, dispatch=dispatch, config=config)
        self.socket = socket.socket(self.address_family, self.socket_type)
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
        self.socket.listen(self.request_queue_size)

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
        session = self.engine.session_of(self, client_address)
        if session is not None:
            session.deliver(request[0])
        elif not self.engine.table.full:  # else it is dropped, as the network would
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """A datagram leaves nothing to close."""


class TableMixIn(Serving):
    """Put in front of any server class, ours or one derived from `socketserver`'s: its requests go into the table.

    Its blocking handlers, unchanged, are interleaved on one thread.
    """

    dispatch: str = "greenlet"
    request_queue_size: int = 1024  # the kernel's queue must hold those who connect during a pass

    def __init__(
        self, *args: Any, dispatch: str | None = None, config: Configuration | None = None, **kwargs: Any
    ) -> None:
        self._configure(dispatch, config)
        super().__init__(*args, **kwargs)
        try:
            self._policy_class.check(self.RequestHandlerClass)
        except ConfigurationError:
            self.server_close()
            raise

    def server_close(self) -> None:
        try:
            self._end_requests()
        finally:
            super().server_close()


class TableTCPServer(TableMixIn, TCPServer):
    """TCP, with blocking handlers interleaved on one thread."""


class TableUDPServer(TableMixIn, UDPServer):
    """UDP, with blocking handlers interleaved on one thread."""


if hasattr(socket, "AF_UNIX"):

    class UnixStreamServer(TCPServer):
        """A server of Unix stream connections. `server_address` is a path, or starts with a NUL (unix(7))."""

        address_family: int = socket.AF_UNIX

    class UnixDatagramServer(UDPServer):
        """A server of Unix datagrams."""

        address_family: int = socket.AF_UNIX

    class TableUnixStreamServer(TableMixIn, UnixStreamServer):
        """Unix streams, with blocking handlers interleaved on one thread."""

    class TableUnixDatagramServer(TableMixIn, UnixDatagramServer):
        """Unix datagrams, with blocking handlers interleaved on one thread."""


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
