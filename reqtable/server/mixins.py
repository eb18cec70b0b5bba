"""The mix-ins, each of which names a policy, and the server classes predefined with them.

A mix-in goes in front of any server class, ours or one derived from `socketserver`'s.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from reqtable.config import Config
from reqtable.dispatch.policies.thread import Thread
from reqtable.dispatch.run_blocking import serve
from reqtable.server.base import LoopServer
from reqtable.server.classes import TCPServer, UDPServer
from reqtable.table.errors import ConfigurationError


class _LoopSide(LoopServer):
    """Puts the loop in front of a server class."""

    def __init__(self, *args: Any, dispatch: str | None = None, config: Config | None = None, **kwargs: Any) -> None:
        self._configure(dispatch, config)
        super().__init__(*args, **kwargs)
        try:
            self._check_handler(self.RequestHandlerClass)
        except ConfigurationError:
            self.server_close()
            raise

    def server_bind(self) -> None:
        self._check_handler(self.RequestHandlerClass)  # fail before binding
        super().server_bind()  # type: ignore[misc]

    def server_close(self) -> None:
        try:
            self._end_requests()
        finally:
            super().server_close()


if TYPE_CHECKING:
    _Base = _LoopSide  # a type checker can't see the base that `_MixIn` inserts
else:
    _Base = object


class _MixIn(_Base):
    """Inserts the loop's side into each subclass that also derives from a server or a mix-in of `socketserver`'s.

    Other subclasses get none of the loop's names: a program may derive a stub of a socket from a mix-in.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        bases: tuple[type, ...] = cls.__bases__
        others = [base for base in bases if not issubclass(base, _MixIn)]
        if not issubclass(cls, _LoopSide) and any(hasattr(base, "process_request") for base in others):
            behind = 1 + next(place for place, base in enumerate(bases) if issubclass(base, _MixIn))
            cls.__bases__ = (*bases[:behind], _LoopSide, *bases[behind:])
        super().__init_subclass__(**kwargs)


class _Threads(list[Any]):
    """Lists threads, with the method that `socketserver.ThreadingMixIn` calls if it stands behind our mix-in."""

    def join(self) -> None:
        for thread in self:
            if not thread.daemon:
                thread.join()


class TableMixIn(_MixIn):
    """Interleaves unchanged blocking handlers on one thread (policy `greenlet`)."""

    dispatch: str = "greenlet"
    request_queue_size: int = 1024  # the kernel's queue must hold clients that connect during a pass


class ThreadingMixIn(_MixIn):
    """Serves each request in a thread (policy `thread`).

    `server_close()` waits for threads that are not daemons, unless `block_on_close` is false.
    """

    dispatch: str = "thread"
    daemon_threads: bool = False  # neither `server_close` nor the interpreter's exit waits for the threads
    block_on_close: bool = True  # `server_close` waits for the threads

    @property
    def _threads(self) -> _Threads:
        """The threads that have not finished; none if this is not a server."""
        if not isinstance(self, LoopServer):
            return _Threads()
        policy = self._policies.policy("thread")
        assert isinstance(policy, Thread)
        return _Threads(policy.threads)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the request into the table. Defined here because programs name this class to call it."""
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Close the server, and wait for its threads. Defined here because programs name this class to call it."""
        super().server_close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a request in the current thread."""
        serve(self, request, client_address)


class TableTCPServer(TableMixIn, TCPServer):
    """Serves TCP, with blocking handlers interleaved on one thread."""


class TableUDPServer(TableMixIn, UDPServer):
    """Serves UDP, with blocking handlers interleaved on one thread."""


class ThreadingTCPServer(ThreadingMixIn, TCPServer):
    """Serves TCP, with a thread for each connection."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer):
    """Serves UDP, with a thread for each datagram or session."""


class ForkingMixIn(_MixIn):
    """Serves each request in a child process (policy `fork`), at most `max_children` at a time; others wait.

    `active_children` holds the children's process ids. `server_close()` waits for them, unless `block_on_close` is
    false.
    """

    dispatch: str = "fork"
    timeout: float | None = 300
    active_children: set[int] | None = None
    max_children: int = 40  # at the same time, unless the configuration has `fork.max_children`
    block_on_close: bool = True  # `server_close` waits for the children

    def collect_children(self, *, blocking: bool = False) -> None:
        """Reap the children that have exited. With `blocking`, wait for all children. The loop does it by itself."""
        if self.active_children is not None:
            self._policies.forking.collect(blocking)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the request into the table. Defined here because programs name this class to call it."""
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Close the server, and wait for its children. Defined here because programs name this class to call it."""
        super().server_close()

    def service_actions(self) -> None:
        """Called once in every pass of the loop; may be overridden."""
        super().service_actions()

    def handle_timeout(self) -> None:
        """Called if no request came to `handle_request()` in time: reap children."""
        self.collect_children()


class ForkingTCPServer(ForkingMixIn, TCPServer):
    """Serves TCP, with a child process for each connection."""


class ForkingUDPServer(ForkingMixIn, UDPServer):
    """Serves UDP, with a child process for each datagram or session."""


if hasattr(socket, "AF_UNIX"):
    from reqtable.server.classes import UnixDatagramServer, UnixStreamServer

    class TableUnixStreamServer(TableMixIn, UnixStreamServer):
        """Serves Unix streams, with blocking handlers interleaved on one thread."""

    class TableUnixDatagramServer(TableMixIn, UnixDatagramServer):
        """Serves Unix datagrams, with blocking handlers interleaved on one thread."""

    class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer):
        """Serves Unix streams, with a thread for each connection."""

    class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer):
        """Serves Unix datagrams, with a thread for each datagram or session."""

    class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer):
        """Serves Unix streams, with a child process for each connection."""

    class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer):
        """Serves Unix datagrams, with a child process for each datagram or session."""
