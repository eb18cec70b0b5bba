"""The transport of a handler that reads and writes its socket itself: the engine only polls the socket.

If the handler never waits in the loop, the engine does not touch the socket at all.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, ClassVar, Final

from reqtable.loop.poller import Poller, Selectable, abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.hang_up import on_hang_up
from reqtable.net.sockets import discarded_all, end_request, has_unread
from reqtable.table.engine_wants import VACANCY
from reqtable.table.states import RESET, Event, State
from reqtable.table.table import Entry

# Names, as in the loop: looking up an Enum member takes 100 ns.
_LINGERING: Final = State.LINGERING
_CLOSED: Final = State.CLOSED


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
        self._own_hold: socket.socket | None = None  # our duplicate of the connection's socket

    @property
    def poller(self) -> Poller:
        return self.steps.poller

    def on_ready(self, mask: int) -> None:
        state = self.entry.state
        if state is _LINGERING:
            self._discard()
        elif state is not _CLOSED:
            on_hang_up(self, self.request if self._own_hold is None else self._own_hold, mask)

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

        With `hold`, this process keeps a duplicate of the descriptor: it tells of a reset, a cancellation shuts it, and
        it lingers. While it is open the kernel sends no end of file, so `hold` is False if no loop goes on to close it.
        """
        self.watch(0)
        self._hooks_done = True
        self._own_hold = self._duplicate() if hold else None
        if self._own_hold is not None:
            self.fd = self._own_hold.fileno()
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
        self.watch(0)
        if not self._hooks_done:
            self._hooks_done = True
            if has_unread(self.request, self.steps.system.socket):
                self._own_hold = self._duplicate()
            try:
                end_request(self.entry.server.shutdown_request, self.request)
            except BaseException:
                self.steps.end(self.entry, Event.RELEASED)
                raise
        elif not has_unread(self._own_hold, self.steps.system.socket):
            self._let_go()
        if self._own_hold is None:
            self.steps.end(self.entry, Event.RELEASED)
        else:
            self.fd = self._own_hold.fileno()
            self.steps.linger(self.entry)

    def shut(self) -> None:
        """Shut the connection, so that the thread or the child that has the request stops waiting for it."""
        connection = self._own_hold if self._own_hold is not None else self.request
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
        self.watch(0)
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
        abandon_socket(self._own_hold)

    def _number(self) -> int:
        return self.request.fileno() if isinstance(self.request, socket.socket) else -1

    def _duplicate(self) -> socket.socket | None:
        """Return a duplicate of the connection's socket; None if there can't be one."""
        own, system = self.request, self.steps.system
        if not isinstance(own, socket.socket) or own.fileno() < 0:
            return None
        try:
            return system.socket(fileno=system.dup(own.fileno()))
        except OSError:
            return None  # out of descriptors

    def _let_go(self) -> None:
        if self._own_hold is not None:
            self._own_hold.close()
            self._own_hold = None

    def _discard(self) -> None:
        assert self._own_hold is not None
        if discarded_all(self._own_hold, self.steps.table.limits.recv_bytes):
            self.steps.end(self.entry, Event.INPUT_ENDED)
