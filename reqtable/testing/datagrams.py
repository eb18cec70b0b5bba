"""Simulated datagram sockets: the kernel's part of a server's, a client's and an upstream's."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from reqtable.table.states import READ, RESET, WRITE
from reqtable.testing.kernel import File, os_error, raise_error
from reqtable.testing.wires import Network

_DATAGRAMS_MAX = 256  # in the buffer of one socket
_UNIX_DATAGRAMS_MAX = 10  # net.unix.max_dgram_qlen
_DATAGRAM_BYTES_MAX = 65_507  # udp(7)


class DatagramEnd(File):
    """Sends and receives datagrams. Its queue holds each arrived datagram with its sender's address."""

    def __init__(self, network: Network, name: str, is_unix: bool, is_servers: bool) -> None:
        super().__init__(network)
        self.name = name
        self.is_unix = is_unix
        self.is_servers = is_servers
        self.queue: deque[tuple[bytes, Any]] = deque()
        self.peer: Any = None  # the destination of `send`, and the only sender that is heard
        self.was_hit = False
        self.on_change: Callable[[], None] | None = None
        self.coming = 0  # datagrams on their way here
        self._next_at: dict[Any, float] = {}  # by destination, as for a stream; only the fault "reordered" overtakes

    def ready(self) -> int:
        return WRITE | (READ if self.queue or self.error else 0)

    def failed(self) -> int:
        return READ | WRITE | RESET if self.error else 0

    @property
    def is_connected(self) -> bool:  # type: ignore[override]
        return self.peer is not None

    def bind(self, address: Any) -> None:
        self.address = address
        self.network.bound[socket.SOCK_DGRAM, address] = self

    def send(self, data: bytes) -> int:
        if self.peer is None:
            raise os_error(errno.EDESTADDRREQ)
        return self.sendto(data, self.peer)

    def sendto(self, data: bytes, address: Any) -> int:
        if self.is_servers:
            self.fail_at_times(self.name)
        raise_error(self)
        if len(data) > _DATAGRAM_BYTES_MAX:
            raise os_error(errno.EMSGSIZE)
        other = self.network.listening_at(socket.SOCK_DGRAM, address)
        if self.is_unix and other is None:
            raise os_error(errno.ECONNREFUSED)
        if not isinstance(other, DatagramEnd):
            if self.is_connected and self.is_servers:
                self.network.after(2 * self.network.latency_s, self._refuse)
            return len(data)
        other = other.end_for(self.address)
        if self.is_unix and len(other.queue) + other.coming > _UNIX_DATAGRAMS_MAX:
            raise os_error(errno.EAGAIN)
        peer = other if self.is_servers else self
        place = f"{peer.name}{'<' if self.is_servers else '>'}"
        dice = self.network.dice
        sent = bytes(data)
        if dice.happens("lost", place):
            peer.was_hit = True
            return len(data)
        if sent and dice.happens("cut", place):
            peer.was_hit = True
            sent = sent[: dice.draw("cut at", place, len(sent))]
        is_repeated = dice.happens("repeated", place)
        peer.was_hit |= is_repeated
        for _ in range(1 + is_repeated):
            at = self.network.clock.now + self.network.latency_s
            if dice.happens("delayed", place):
                at += dice.faults.delay_max_s * (1 + dice.draw("delay", place, 1000)) / 1000
            if dice.happens("reordered", place):
                peer.was_hit = True
                at += dice.faults.delay_max_s
            else:
                self._next_at[address] = at = max(at, self._next_at.get(address, at))
            other.coming += 1
            self.network.at(at, other._arrive, sent, self.address)
        return len(data)

    def recvfrom(self, count: int, peek: bool = False) -> tuple[bytes, Any]:
        if self.is_servers:
            self.fail_at_times(self.name)
        raise_error(self)
        if not self.queue:
            raise os_error(errno.EAGAIN)
        data, address = self.queue[0] if peek else self.queue.popleft()
        return data[:count], address

    def recv(self, count: int, peek: bool = False) -> bytes:
        return self.recvfrom(count, peek)[0]

    def end_for(self, sender: Any) -> DatagramEnd:
        """Return the end that receives what `sender` sends here."""
        return self

    def _refuse(self) -> None:
        self.error = errno.ECONNREFUSED
        self._changed()

    def _hears(self, sender: Any) -> bool:
        """Return whether a connected socket takes what that sender sends: only its peer's datagrams."""
        found = self.network.listening_at(socket.SOCK_DGRAM, self.peer)
        return sender == self.peer or (found is not None and found.address == sender)

    def _arrive(self, data: bytes, address: Any) -> None:
        self.coming -= 1
        if self.is_connected and not self._hears(address):
            return
        if self.descriptors and len(self.queue) < _DATAGRAMS_MAX:
            self.queue.append((data, address))
            self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.network.after(0, self.on_change)


class DatagramPort(DatagramEnd):
    """Is where an upstream receives datagrams. Each sender has an end of its own, which `accept_one` is called with."""

    def __init__(self, network: Network, address: Any, accept_one: Callable[[DatagramEnd], None]) -> None:
        super().__init__(network, "u", False, False)
        self.descriptors = 1
        self._ends: dict[Any, DatagramEnd] = {}
        self._accept_one = accept_one
        self.bind(address)

    def end_for(self, sender: Any) -> DatagramEnd:
        end = self._ends.get(sender)
        if end is None:
            end = self._ends[sender] = DatagramEnd(self.network, f"u{sender[1]}", False, False)
            end.address, end.peer, end.descriptors = self.address, sender, 1
            self._accept_one(end)
        return end
