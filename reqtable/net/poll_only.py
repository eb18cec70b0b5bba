"""The transport of a handler that reads and writes its socket itself: the engine only polls the socket.

If the handler never waits in the loop, the engine does not touch the socket at all.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any, ClassVar, Final

from reqtable.loop.poller import Poller, Selectable, abandon_socket, close_copy
from reqtable.loop.step import Steps
from reqtable.net.hang_up import on_hang_up
from reqtable.net.sockets import discarded_all, end_request, has_bytes, has_unread
from reqtable.table.engine_wants import VACANCY
from reqtable.table.states import RESET, Event, State
from reqtable.table.table import Entry

# Names, as in the loop: looking up an Enum member takes 100 ns.
_LINGERING: Final = State.LINGERING
_CLOSED: Final = State.CLOSED
_RELEASED: Final = Event.RELEASED


class PollOnly(Selectable):
    """Polls the socket of a handler that does its own I/O; `request` is the argument of the server's hooks.

    The request may be given to a thread or a child (`give`), which then ends it with the server's hooks.
    """

    __slots__ = ("_hooks_done", "_own_hold", "entry", "fd", "request", "steps")

    fd: int

    timeout_s: float | None = None
    immovable: ClassVar[str | None] = "its handler does its own input and output"

    def __init__(self, steps: Steps, request: Any) -> None:
        super().__init__()
        self.steps = steps
        self.request = request
        self.fd = self._number()
        self.entry: Entry
        self._hooks_done = False  # the server's hooks have ended the request
        # Our duplicate of the connection's descriptor. Few requests need a socket object for it: see `_held`.
        self._own_hold: int | socket.socket | None = None

    @property
    def poller(self) -> Poller:
        return self.steps.poller

    def on_ready(self, mask: int) -> None:
        state = self.entry.state
        if state is _LINGERING:
            self._discard()
        elif state is not _CLOSED:
            on_hang_up(self, self._held() or self.request, mask)

    def watch(self, interest: int) -> None:
        if interest & RESET and self._own_hold is None and not self._is_known_to_be_open():
            interest = 0
        super().watch(interest)

    def _is_known_to_be_open(self) -> bool:
        """Return whether the connection is open, and stays so until somebody tells.

        A handler that has begun may close its socket in a thread, and the number may then be another connection's. Only
        a cooperative socket tells.
        """
        is_told = self.entry.want is VACANCY or getattr(self.request, "tells_of_close", False)
        return is_told and 0 <= self._number() == self.fd

    def flush(self) -> bool:
        return True

    def give(self, hold: bool = True) -> None:
        """Give the request to a thread or a child, which ends it with the server's hooks.

        With `hold`, this process keeps a duplicate of the descriptor: it can tell of a reset, a cancellation shuts it,
        and it lingers. While it is open the kernel sends no end of file, so `hold` is False if no loop goes on to close
        it.
        """
        if self.watched:
            self.watch(0)
        self._hooks_done = True
        if hold:
            self._hold()

    def tell_of_reset(self) -> None:
        """Watch for a reset of the connection, which a thread or a child has."""
        if self._own_hold is not None:
            self.watch(RESET)

    def take_back(self) -> None:
        """Take the request back: no thread or child could take it."""
        self._hooks_done = False
        self.watch(0)
        self._let_go()
        self.fd = self._number()
        self.watch(RESET)

    def finish(self) -> None:
        """End the request with the hooks `shutdown_request` and `close_request`: its handler has returned.

        Closing a connection with unread input resets it (tcp(7)), and the reset may overtake the answer. So if there
        is unread input, a duplicate of the descriptor outlives the hooks, and lingers.
        """
        if self.watched:
            self.watch(0)
        if not self._hooks_done:
            self._hooks_done = True
            if has_unread(self.request, self.steps.system.socket):
                self._hold()
                self._held()  # it will linger
            try:
                end_request(self.entry.server.shutdown_request, self.request)
            except BaseException:
                self.steps.end(self.entry, _RELEASED)
                raise
        elif self._own_hold is not None and not self._holds_unread():
            self._let_go()
        if self._own_hold is None:
            self.steps.end(self.entry, _RELEASED)
        else:
            self.steps.linger(self.entry)

    def shut(self) -> None:
        """Shut the connection, so that the thread or the child that has the request stops waiting for it."""
        connection = self._held() or self.request
        if isinstance(connection, socket.socket):
            with contextlib.suppress(OSError):  # the connection has ended already
                self.steps.system.socket.shutdown(connection, socket.SHUT_RDWR)

    def on_reset(self) -> None:
        self.steps.end(self.entry, Event.LOST)

    def end_input(self) -> None:
        """Shut the reading side if nothing is unread: the handler reads end of file."""
        if isinstance(self.request, socket.socket) and not has_unread(self.request, self.steps.system.socket):
            with contextlib.suppress(OSError):  # the connection has ended already
                self.request.shutdown(socket.SHUT_RD)

    def release(self) -> None:
        if self.watched:
            self.watch(0)
        if self._own_hold is not None:
            self._let_go()
        if not self._hooks_done:
            self._hooks_done = True
            end_request(self.entry.server.shutdown_request, self.request)
        self.request = None  # a cooperative socket refers back: the cycle would keep it open if no hook closes it

    def leave(self) -> None:
        """Keep this process's duplicate of the connection, which a child has."""

    def abandon(self) -> None:
        self.watched = 0
        abandon_socket(self.request)
        if isinstance(self._own_hold, int):
            close_copy(self._own_hold)
        else:
            abandon_socket(self._own_hold)

    def _number(self) -> int:
        return self.request.fileno() if isinstance(self.request, socket.socket) else -1

    def _hold(self) -> None:
        """Keep a duplicate of the connection's descriptor, if there can be one, and stand for that descriptor."""
        number = self._number()
        if number >= 0:
            try:  # noqa: SIM105  # costs less than `suppress`
                self._own_hold = self.fd = self.steps.system.dup(number)
            except OSError:
                pass  # out of descriptors

    def _held(self) -> socket.socket | None:
        """Return the duplicate as a socket, if there is one."""
        hold = self._own_hold
        if isinstance(hold, int):
            hold = self._own_hold = self.steps.system.socket(fileno=hold)
        return hold

    def _holds_unread(self) -> bool:
        """Return whether the connection, of which there is a duplicate, has unread input."""
        return has_bytes(self.fd) and has_unread(self._held(), self.steps.system.socket)

    def _let_go(self) -> None:
        hold, self._own_hold = self._own_hold, None
        if isinstance(hold, int):
            os.close(hold)
        elif hold is not None:
            hold.close()

    def _discard(self) -> None:
        connection = self._held()
        assert connection is not None
        if discarded_all(connection, self.steps.table.limits.recv_bytes):
            self.steps.end(self.entry, Event.INPUT_ENDED)
