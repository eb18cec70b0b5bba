"""The parts of an entry that live on higher floors, as the table sees them: handler, transport, server.

`RELEASED` and `OVER` stand in for the transport and the handler of an entry that has ended.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from reqtable.table.wants import Want


class Resumable(Protocol):
    """What runs the steps of one request: a state machine, a coroutine, a greenlet.

    The names are underscored because handlers are resumables themselves, and every name without an underscore belongs
    to whoever writes the handler.
    """

    bound_to_thread: ClassVar[bool]  # it has a stack, which another thread can't go on with

    def _resume(self, item: Any) -> Want[Any] | None:
        """Run one step with what it waited for; say what it waits for now, or None when it is done."""

    def _throw(self, error: BaseException) -> Want[Any] | None:
        """The same, with an error in place of the item."""

    def _close(self) -> None:
        """The request has ended; free what is held."""


class Transport(Protocol):
    """What connects an entry to its socket. It lives in the engine; the core only names what it calls."""

    request: Any
    timeout_s: float | None  # how long a wait may last that names no timeout of its own

    def watch(self, interest: int) -> None:
        """Have the selector watch the socket for exactly `interest`."""

    def flush(self) -> bool:
        """Give the kernel what it takes of the output; True when that is all of it."""

    def finish(self) -> None:
        """The request is done and its output is with the kernel: end the connection without cutting it off."""

    def release(self) -> None:
        """Free the socket."""

    def shut(self) -> None:
        """End the connection for whoever else has it."""

    def end_input(self) -> None:
        """Have the handler meet the end of its input, though the peer has not ended it."""

    def leave(self) -> None:
        """In the parent: a forked child has the connection, until the child has ended."""

    def abandon(self) -> None:
        """In a forked child: close this process's copy of the socket, without a word to the peer."""


class Server(Protocol):
    """The hooks of a server, which are `socketserver`'s. What they return is ignored."""

    RequestHandlerClass: Any
    server_address: Any

    def fileno(self) -> int: ...
    def handle_error(self, request: Any, client_address: Any) -> Any: ...
    def process_request(self, request: Any, client_address: Any) -> Any: ...
    def close_request(self, request: Any) -> Any: ...
    def finish_request(self, request: Any, client_address: Any) -> Any: ...
    def shutdown_request(self, request: Any) -> Any: ...
    def service_actions(self) -> Any: ...


class _Released:
    """Stands in for the transport of an entry that has ended."""

    request: Any = None
    timeout_s: float | None = None

    def watch(self, interest: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass

    def shut(self) -> None:
        pass

    def end_input(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _Over:
    """Stands in for the handler of an entry whose handler has ended."""

    bound_to_thread: ClassVar[bool] = False

    def _resume(self, item: Any) -> None:
        return None

    def _throw(self, error: BaseException) -> None:
        return None

    def _close(self) -> None:
        pass


RELEASED = _Released()
OVER = _Over()
