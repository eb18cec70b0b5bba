"""Connects to the first of several addresses that answers (RFC 8305, "Happy Eyeballs")."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from ipaddress import ip_address
from itertools import chain, zip_longest
from typing import Any

from reqtable.loop.poller import Descriptor, abandon_socket
from reqtable.loop.step import Steps
from reqtable.table.addresses import address_text
from reqtable.table.states import WRITE

Address = tuple[int, int, Any]  # family, kind, and the address in the form of the socket module

_NEXT_S = 0.25  # after this time the next address is tried too (RFC 8305, 8: "Connection Attempt Delay")
_AGAIN_S = 0.01  # a Unix socket whose queue is full is tried again after this time
_UNDER_WAY = (errno.EINPROGRESS, errno.EINTR)


def numeric_address(host: str, port: int) -> tuple[int, Any] | None:
    """Return the family and the address of a numeric host; None if `host` is a name."""
    try:
        number = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    own, has_scope, scope = host.partition("%")
    if number.version == 4:
        return None if has_scope else (socket.AF_INET, (host, port))
    if has_scope and not (scope.isascii() and scope.isdigit()):
        return None  # getaddrinfo knows the number of the interface
    return socket.AF_INET6, (own, port, 0, int(scope or 0))


def in_turn(addresses: Iterable[Address]) -> list[Address]:
    """Return the addresses with the families in turn, beginning with the first one's (RFC 8305, 4)."""
    families: dict[int, list[Address]] = {}
    for each in addresses:
        families.setdefault(each[0], []).append(each)
    return [each for each in chain.from_iterable(zip_longest(*families.values())) if each is not None]


class Attempts:
    """Tries addresses in turn until a connection is made. The fastest one wins, and the others are closed.

    Calls `reached(socket, address)` or, if no address can be connected to, `failed(reason, error)` with the last error.
    """

    def __init__(
        self,
        steps: Steps,
        addresses: Iterable[Address],
        reached: Callable[[Any, Any], None],
        failed: Callable[[str, Exception | None], None],
    ) -> None:
        self.steps = steps
        self._left = deque(in_turn(addresses))
        self._reached = reached
        self._failed = failed
        self._under_way: list[_Attempt] = []
        self._begun = 0
        self._reasons: list[str] = []
        self._last: Exception | None = None
        self._is_over = False

    def begin(self) -> None:
        """Try the first address."""
        self._try_next()

    def close(self) -> None:
        """Give up all attempts."""
        self._is_over = True
        for attempt in self._under_way:
            attempt.close()
        self._under_way.clear()

    def abandon(self) -> None:
        """In a forked child: close this process's copies of the sockets."""
        self._is_over = True
        for attempt in self._under_way:
            attempt.watched = 0
            abandon_socket(attempt.socket)

    def _try_next(self) -> None:
        """Try addresses until one is under way. If none is left and none is under way, fail."""
        while self._left and not self._is_over:
            family, kind, address = self._left.popleft()
            self._begun += 1
            own: Any = None
            try:
                own = self.steps.system.socket(family, kind)
                own.setblocking(False)
                code = own.connect_ex(address)
                if code in _UNDER_WAY:
                    self._under_way.append(_Attempt(self, own, address))
            except Exception as error:  # a Unix path that is too long, say, or a number that is too large
                if own is not None:
                    own.close()
                self._note(address, error)
                continue
            if not code:
                self._won(own, address)
            elif code in _UNDER_WAY:
                self.steps.mailbox.call_later(partial(self._overdue, self._begun), _NEXT_S)
            elif code == errno.EAGAIN and family == socket.AF_UNIX:  # connect(2): its queue is full
                own.close()
                self._left.appendleft((family, kind, address))
                self.steps.mailbox.call_later(self._try_next, _AGAIN_S)
            else:
                own.close()
                self._note(address, OSError(code, os.strerror(code)))
                continue
            return
        if not self._under_way and not self._is_over:
            self._is_over = True
            self._failed("; ".join(self._reasons) or "the name has no address", self._last)

    def _overdue(self, number: int) -> None:
        """Try the next address too: attempt `number` has not been answered for a while."""
        if self._begun == number and self._left and not self._is_over:
            self._try_next()

    def ended(self, attempt: _Attempt, code: int) -> None:
        """Note the outcome of an attempt: 0, or the number of the error."""
        if self._is_over:
            return
        self._under_way.remove(attempt)
        attempt.watch(0)
        if not code:
            self._won(attempt.socket, attempt.address)
        else:
            attempt.socket.close()
            self._note(attempt.address, OSError(code, os.strerror(code)))
            self._try_next()

    def _won(self, own: Any, address: Any) -> None:
        self.close()
        self._reached(own, address)

    def _note(self, address: Any, error: Exception) -> None:
        self._last = error
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        is_only = not self._left and self._begun == 1
        self._reasons.append(reason if is_only else f"{address_text(address)}: {reason}")


class _Attempt(Descriptor):
    """Waits until one socket is connected, or can't be."""

    __slots__ = ("_attempts", "address", "socket")

    def __init__(self, attempts: Attempts, own: Any, address: Any) -> None:
        super().__init__(attempts.steps.poller, own.fileno())
        self._attempts = attempts
        self.socket = own
        self.address = address
        self.watch(WRITE)

    def on_ready(self, mask: int) -> None:
        if not self.watched:
            return  # another attempt has won in this pass
        self._attempts.ended(self, self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def close(self) -> None:
        self.watch(0)
        with contextlib.suppress(OSError):
            self.socket.close()
