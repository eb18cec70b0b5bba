"""Outgoing connections on a simulated network: the end that connects, and what answers it.

The rules:

* A connection takes a packet each way. The peer's answer may be late, may be a refusal, or may never come: the kernel
  then tries again for two minutes (tcp_syn_retries in tcp(7)).
* The end of a socket that doesn't block is the engine's own end, so its calls fail at times.
* A Unix socket connects at once or not at all (unix(7)).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

from reqtable.testing.kernel import Listening, StreamEnd, os_error, raise_error
from reqtable.testing.wires import Network

UNANSWERED_S = 127  # after how long the kernel gives up: 1 + 2 + 4 + … + 64 seconds
_LAST_RETRY_S = 64
# Addresses that wrong names have. Where nobody listens, a connection is refused; here, it is never answered.
WRONG_HOSTS = {socket.AF_INET: ("203.0.113.13", "203.0.113.14"), socket.AF_INET6: ("2001:db8::bad", "2001:db8::dead")}
_SILENT_HOSTS = {hosts[1] for hosts in WRONG_HOSTS.values()}
# Each is told at once, or by a packet that comes back.
_REFUSALS = ((errno.ENETUNREACH, True), (errno.EADDRNOTAVAIL, True), (errno.ECONNREFUSED, False))


class OutgoingEnd(StreamEnd):
    """Is the end of a socket that connects. There is no connection until the peer has answered."""

    def __init__(self, network: Network, name: str, window: int, address: Any, peer: Any, is_servers: bool) -> None:
        super().__init__(network, name, window, address, peer, is_servers)
        self.is_connected = False
        self.is_connecting = True
        self._is_told = False  # whether a second connect has told that there is a connection

    def ready(self) -> int:
        return 0 if self.is_connecting else super().ready()

    def failed(self) -> int:
        return 0 if self.is_connecting else super().failed()

    def send(self, data: Any) -> int:
        if self.is_connecting:
            raise os_error(errno.EAGAIN)
        return super().send(data)

    def recv(self, count: int, peek: bool = False) -> bytes:
        if self.is_connecting:
            raise os_error(errno.EAGAIN)
        return super().recv(count, peek)

    def shutdown(self, how: int) -> None:
        if self.is_connecting:
            self.is_connecting = False
            self.is_broken = True
        else:
            super().shutdown(how)

    def close(self) -> None:
        if self.is_connecting:
            self.is_connecting = False
            self.is_closed = self.is_broken = True
        super().close()

    def begin(self, is_local: bool) -> None:
        """Ask the peer for a connection. Raises OSError if that can't even be tried."""
        dice = self.network.dice
        if is_local:
            self._connect_at_once()
            return
        if dice.happens("unanswered", self.name):
            self.was_hit = True
            self.network.after(UNANSWERED_S, self._fail, errno.ETIMEDOUT)
        elif dice.happens("refused", self.name):
            self.was_hit = True
            number, at_once = _REFUSALS[dice.draw("errno", self.name, len(_REFUSALS))]
            if at_once:
                raise os_error(number)
            self._send_later(self._fail, number)
        else:
            self._send_later(self._ask, 1)

    def connect_again(self) -> None:
        """Do what a further connect(2) does: tell how far the connection is, by an error. Returns once, if it is up."""
        if self.is_connecting:
            raise os_error(errno.EALREADY)
        raise_error(self)
        if self._is_told or not self.is_connected:
            raise os_error(errno.EISCONN if self.is_connected else errno.ECONNABORTED)
        self._is_told = True

    def _connect_at_once(self) -> None:
        listening = self.network.listening_at(socket.SOCK_STREAM, self.peer)
        if not isinstance(listening, Listening):
            raise os_error(errno.ECONNREFUSED)
        if len(listening.queue) > listening.backlog:
            raise os_error(errno.EAGAIN)
        self._answered()
        listening.arrive(self.other)

    def _ask(self, wait_s: float) -> None:
        """Arrive at the peer's machine."""
        network = self.network
        if not self.is_connecting:
            return
        listening = network.listening_at(socket.SOCK_STREAM, self.peer)
        if self.peer[0] in _SILENT_HOSTS or (isinstance(listening, Listening) and listening.answers_after_s is None):
            network.after(UNANSWERED_S, self._fail, errno.ETIMEDOUT)
        elif not isinstance(listening, Listening) or not listening.descriptors:
            network.after(network.latency_s, self._fail, errno.ECONNREFUSED)
        elif len(listening.queue) > listening.backlog:
            if wait_s > _LAST_RETRY_S:
                self._fail(errno.ETIMEDOUT)
            else:
                network.after(wait_s, self._ask, 2 * wait_s)
        else:
            network.after(listening.answers_after_s or 0, self.other._send_later, self._accepted, listening)

    def _accepted(self, listening: Listening) -> None:
        """Receive the peer's answer. The peer can accept as soon as it has the answer to that."""
        if not self.is_connecting:
            return
        self._answered()
        if listening.descriptors:
            self._send_later(listening.arrive, self.other)
        else:
            self._reset()

    def _answered(self) -> None:
        self.is_connecting = False
        self.is_connected = True
        self._changed()

    def _fail(self, number: int) -> None:
        if self.is_connecting:
            self.is_connecting = False
            self.is_broken = True
            self.error = number
            self._changed()


class Port(Listening):
    """Is where an upstream listens. Passes each new connection to `accept_one` at once."""

    def __init__(
        self, network: Network, address: Any, answers_after_s: float | None, accept_one: Callable[[StreamEnd], None]
    ) -> None:
        super().__init__(network, address, 0)
        self.descriptors = 1
        self.answers_after_s = answers_after_s
        self._accept_one = accept_one

    def arrive(self, end: StreamEnd) -> None:
        end.is_servers = False
        if end.is_broken:
            return
        if self.network.dice.happens("aborted", end.name):
            end.was_hit = end.other.was_hit = True
            end.abort()
        else:
            self._accept_one(end)
