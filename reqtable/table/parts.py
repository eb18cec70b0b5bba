"""The parts of an entry and of a table that are defined in higher layers, as the table sees them.

`RELEASED` and `OVER` stand in for the transport and the handler of an entry that has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

from reqtable.table.output import Output
from reqtable.table.want import Want


class Resumable(Protocol):
    """Runs the steps of one request: a state machine, a coroutine or a greenlet.

    The methods begin with an underscore because handlers are resumables, and all other names belong to the author of
    the handler.
    """

    bound_to_thread: ClassVar[bool]  # it has a stack, which another thread can't continue

    def _resume(self, item: Any) -> Want[Any] | None:
        """Run one step with `item`, which the request waited for. Returns the next want, or None if it is done."""

    def _throw(self, error: BaseException) -> Want[Any] | None:
        """Run one step like `_resume`, but raise `error` in it."""

    def _close(self) -> None:
        """Free what the handler holds: the request has ended."""


class Policy(Protocol):
    """The part of a dispatch policy that the engine calls and a snapshot shows."""

    name: ClassVar[str]

    def begin_call(self, entry: Any, want: Any) -> Callable[[], Any]:
        """Run a call elsewhere and have its result posted. Returns the function that gives the call up."""

    def hand_off(self, entry: Any, want: Any) -> Want[Any]:
        """Hand the request over to another policy. Returns the want that the request waits for meanwhile."""

    def secured(self, entry: Any, request: Any, context: Any) -> Any:
        """Return the TLS socket for a request, before its handshake."""

    def admitted(self) -> Any:
        """Note that a request of this policy has entered the table."""

    def released(self) -> Any:
        """Note that a request of this policy has left the table."""


class RemoteStep(Protocol):
    """A step that runs in another thread than the loop's."""

    thread: int | None  # the `threading.get_ident()` of its thread, once it runs
    output: Output  # what the step sends; the entry's own output belongs to the loop


class Transport(Protocol):
    """Connects an entry to its socket. Higher layers implement it; this lists what the table and the loop call."""

    request: Any
    timeout_s: float | None  # for a wait without a timeout of its own; None: the limits decide

    @property
    def immovable(self) -> str | None:
        """Why its connection can't move to another process; None if it can."""

    def watch(self, interest: int) -> None:
        """Have the selector watch the socket for exactly `interest`."""

    def flush(self) -> bool:
        """Give the kernel as much output as it takes. Returns whether that was all of it."""

    def finish(self) -> None:
        """End the connection politely: the request is done, and the kernel has all of its output."""

    def release(self) -> None:
        """Free the socket."""

    def shut(self) -> None:
        """Cut the connection, also for other threads and processes that have it."""

    def on_reset(self) -> None:
        """End the request: its peer has reset the connection, while it waits for something else."""

    def end_input(self) -> None:
        """Let the handler see end of file, although the peer has not closed the connection."""

    def leave(self) -> None:
        """Leave the connection to a forked child until the child has ended. Called in the parent."""

    def abandon(self) -> None:
        """Close this process's copy of the socket without a word to the peer. Called in a forked child."""


class Server(Protocol):
    """Has the hooks of a server, which are those of `socketserver`. Their return values are ignored."""

    RequestHandlerClass: Any
    server_address: Any

    def fileno(self) -> int: ...
    def handle_error(self, request: Any, client_address: Any) -> Any: ...
    def process_request(self, request: Any, client_address: Any) -> Any: ...
    def close_request(self, request: Any) -> Any: ...
    def finish_request(self, request: Any, client_address: Any) -> Any: ...
    def shutdown_request(self, request: Any) -> Any: ...
    def service_actions(self) -> Any: ...


class NoTransport:
    """Does nothing, in place of a transport. Stand-ins derive from it."""

    request: Any = None
    timeout_s: float | None = None
    immovable: ClassVar[str | None] = "it has no connection of its own"

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

    def on_reset(self) -> None:
        pass

    def end_input(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def catch_up(self) -> None:
        """Bring the row up to date, if a thread or a child has its request."""


class Mover(Protocol):
    """Saves requests as records, and goes on with them."""

    def save(self, ids: Iterable[int] | None) -> list[bytes]: ...
    def restore(self, records: Iterable[bytes], sockets: Iterable[Any]) -> list[int]: ...


class _Over:
    """Stands in for a handler that has been closed."""

    bound_to_thread: ClassVar[bool] = False

    def _resume(self, item: Any) -> None:
        return None

    def _throw(self, error: BaseException) -> None:
        return None

    def _close(self) -> None:
        pass


RELEASED = NoTransport()
OVER = _Over()
