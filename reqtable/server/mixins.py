"""The mix-ins, and the classes that are predefined with them. Each names a policy.

A mix-in goes in front of any server class, ours or one derived from `socketserver`'s.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from reqtable.config import Config
from reqtable.dispatch.forking.run_blocking import serve
from reqtable.dispatch.policies.thread import Thread
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
        self._check_handler(self.RequestHandlerClass)  # before it is bound
        super().server_bind()  # type: ignore[misc]

    def server_close(self) -> None:
        try:
            self._end_requests()
        finally:
            super().server_close()


if TYPE_CHECKING:
    _Base = _LoopSide  # a type checker can't see the base that is put in below
else:
    _Base = object


class _MixIn(_Base):
    """Brings the loop's side to each class that has a server, or a mix-in of `socketserver`'s, behind it.

    A class without a server has none of the loop's names: a program may derive a stub of a socket from a mix-in.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        bases = cls.__bases__
        others = [base for base in bases if not issubclass(base, _MixIn)]
        if not issubclass(cls, _LoopSide) and any(hasattr(base, "process_request") for base in others):
            behind = 1 + next(place for place, base in enumerate(bases) if issubclass(base, _MixIn))
            cls.__bases__ = (*bases[:behind], _LoopSide, *bases[behind:])
        super().__init_subclass__(**kwargs)


class _Threads(list[Any]):
    """What `socketserver.ThreadingMixIn`, where it stands behind ours, calls on its threads."""

    def join(self) -> None:
        for thread in self:
            if not thread.daemon:
                thread.join()


class TableMixIn(_MixIn):
    """Blocking handlers, unchanged, are interleaved on one thread (policy `greenlet`)."""

    dispatch: str = "greenlet"
    request_queue_size: int = 1024  # the kernel's queue must hold those who connect during a pass


class ThreadingMixIn(_MixIn):
    """A thread for each request (policy `thread`).

    `server_close()` waits for threads that are not daemons, unless `block_on_close` is false.
    """

    dispatch: str = "thread"
    daemon_threads: bool = False
    block_on_close: bool = True

    @property
    def _threads(self) -> _Threads:
        """The threads that have not finished; none where this is no server."""
        if not isinstance(self, LoopServer):
            return _Threads()
        policy = self._policies.policy("thread")
        assert isinstance(policy, Thread)
        return _Threads(policy.threads)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the request into the table. It is here because programs call it by the name of this class."""
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Close the server; wait for its threads. It is here because programs call it by the name of this class."""
        super().server_close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """What a thread does with a request."""
        serve(self, request, client_address)


class TableTCPServer(TableMixIn, TCPServer):
    """TCP, with blocking handlers interleaved on one thread."""


class TableUDPServer(TableMixIn, UDPServer):
    """UDP, with blocking handlers interleaved on one thread."""


class ThreadingTCPServer(ThreadingMixIn, TCPServer):
    """TCP, a thread for each connection."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer):
    """UDP, a thread for each datagram or session."""


class ForkingMixIn(_MixIn):
    """A child process for each request (policy `fork`), at most `max_children` at a time; more wait in the table.

    `active_children` holds the children's process ids. `server_close()` waits for them, unless `block_on_close` is
    false.
    """

    dispatch: str = "fork"
    timeout: float | None = 300
    active_children: set[int] | None = None
    max_children: int = 40
    block_on_close: bool = True

    def collect_children(self, *, blocking: bool = False) -> None:
        """Wait for the children that have exited, or, with `blocking`, for all. The loop does it by itself."""
        if self.active_children is not None:
            self._policies.forking.collect(blocking)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the request into the table. It is here because programs call it by the name of this class."""
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Close the server; wait for its children. It is here because programs call it by the name of this class."""
        super().server_close()

    def service_actions(self) -> None:
        """Called once every pass of the loop; may be overridden."""
        super().service_actions()

    def handle_timeout(self) -> None:
        """`handle_request()` saw no request in time."""
        self.collect_children()


class ForkingTCPServer(ForkingMixIn, TCPServer):
    """TCP, a child for each connection."""


class ForkingUDPServer(ForkingMixIn, UDPServer):
    """UDP, a child for each datagram or session."""


if hasattr(socket, "AF_UNIX"):
    from reqtable.server.classes import UnixDatagramServer, UnixStreamServer

    class TableUnixStreamServer(TableMixIn, UnixStreamServer):
        """Unix streams, with blocking handlers interleaved on one thread."""

    class TableUnixDatagramServer(TableMixIn, UnixDatagramServer):
        """Unix datagrams, with blocking handlers interleaved on one thread."""

    class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer):
        """Unix streams, a thread for each connection."""

    class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer):
        """Unix datagrams, a thread for each datagram or session."""

    class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer):
        """Unix streams, a child for each connection."""

    class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer):
        """Unix datagrams, a child for each datagram or session."""
