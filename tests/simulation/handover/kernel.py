"""What a simulated hand-over needs of the kernel: processes with descriptors of their own, and pairs that pass them.

The rules (unix(7)):

* Each process has its own table of descriptors. A file lives as long as a descriptor of any process, or a packet on its
  way, refers to it.
* A pair holds a few packets in each direction. A packet arrives whole, with its descriptors.
* An end that is closed with unread packets makes the next call of the other end fail with ECONNRESET, once. The
  packets that it has sent can be read after that.
* Descriptors for which the receiver has no room are closed, and the packet is marked (MSG_CTRUNC).
* Whether calls block belongs to the file, which processes share (O_NONBLOCK in open(2)).
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from reqtable.table.states import READ, WRITE
from reqtable.testing import Faults, SimNetwork, SimSocket
from reqtable.testing.datagrams import DatagramEnd
from reqtable.testing.kernel import File, Listening, StreamEnd, os_error

_FIRST_DESCRIPTOR = 2**30
_DONTWAIT = int(socket.MSG_DONTWAIT)
_ATTACH_FILTER = 26
Passed = tuple[bytes, list[Any]]


class PairEnd(File):
    """Is one end of a pair (SOCK_SEQPACKET). Its fields describe its input."""

    def __init__(self, network: Any, name: str, packets_max: int) -> None:
        super().__init__(network)
        self.name = name
        self.packets_max = packets_max
        self.packets: deque[Passed] = deque()
        self.other: PairEnd
        self.coming = 0  # packets on their way here
        self.is_closed = False
        self.last_at = 0.0  # when the last packet that it has sent arrives

    @property
    def _has_ended(self) -> bool:
        return self.other.is_closed and not self.coming

    def ready(self) -> int:
        readable = self.packets or self._has_ended or self.error
        return (READ if readable else 0) | (WRITE if self.other.is_closed or self.other._has_room else 0)

    @property
    def _has_room(self) -> bool:
        return len(self.packets) + self.coming < self.packets_max

    def push(self, data: bytes, files: Callable[[], list[Any]]) -> None:
        """Send a packet. Raises OSError if there is no room or nobody to read it."""
        self.fail_at_times(self.name)
        if self.other.is_closed:
            raise os_error(errno.EPIPE)
        if not self.other._has_room:
            raise os_error(errno.EAGAIN)
        dice, at = self.network.dice, self.network.clock.now
        if dice.happens("delayed", self.name):  # as if the receiver had no processor for so long
            at += (1 + dice.draw("delay", self.name, 1000)) / 1000
        self.other.coming += 1
        self.last_at = max(self.last_at, at)
        self.network.at(self.last_at, self.other._arrive, (data, files()))

    def _arrive(self, packet: Passed) -> None:
        self.coming -= 1
        if self.is_closed:
            for each in packet[1]:
                drop(each)
        else:
            self.packets.append(packet)

    def pull(self) -> Passed:
        """Return the next packet; an empty one at the end. Raises OSError."""
        self.fail_at_times(self.name)
        if self.error:
            number, self.error = self.error, 0
            raise os_error(number)
        if self.packets:
            return self.packets.popleft()
        if self._has_ended:
            return b"", []
        raise os_error(errno.EAGAIN)

    def close(self) -> None:
        self.is_closed = True
        if self.packets or self.coming:
            self.other.error = errno.ECONNRESET
        while self.packets:
            for each in self.packets.popleft()[1]:
                drop(each)


def drop(passed: Any) -> None:
    """Close a file that is on its way from one process to another."""
    if isinstance(passed, int):
        os.close(passed)
        return
    passed.descriptors -= 1
    if not passed.descriptors:
        passed.close()


class Machine(SimNetwork):
    """Simulates a network for several processes of one machine. One of them runs at a time: the one last entered."""

    def __init__(self, seed: int, faults: Faults, latency_s: float) -> None:
        super().__init__(seed, faults, latency_s=latency_s)
        self.socket = type("SimSocket", (PassingSocket,), {"network": self})
        self.system = replace(self.system, socket=self.socket)

    def enter(self, files: dict[int, File], descriptors_max: int | None) -> None:
        """Run another process from here on: the one that has these files."""
        if files is not self.files:
            self.closed += 1  # whoever calls accept(2) now is another one
        self.files = files
        self.descriptors_max = descriptors_max

    def close_any(self, fd: int) -> None:
        """Close a descriptor, simulated or real."""
        if fd < _FIRST_DESCRIPTOR:
            os.close(fd)
        else:
            self.close(fd)

    def pair_of(self, packets_max: int) -> tuple[PairEnd, PairEnd]:
        """Return the files of a new pair."""
        ours, theirs = (PairEnd(self, f"pair{name}", packets_max) for name in "<>")
        ours.other, theirs.other = theirs, ours
        return ours, theirs

    def passed(self, fd: int) -> Any:
        """Return what a descriptor in a packet stands for, which lives as long as the packet."""
        if fd < _FIRST_DESCRIPTOR:
            return os.dup(fd)
        file = self.file(fd)
        file.descriptors += 1
        return file

    def taken(self, files: list[Any]) -> tuple[list[int], bool]:
        """Return descriptors of the running process for the files of a packet, and whether some were closed instead."""
        found = []
        is_cut = False
        for each in files:
            is_cut = is_cut or (self.descriptors_max is not None and len(self.files) >= self.descriptors_max)
            if is_cut:
                drop(each)
            elif isinstance(each, int):
                found.append(each)
            else:
                found.append(self.open(each))
                each.descriptors -= 1  # that of the packet
        return found, is_cut


class PassingSocket(SimSocket):
    """Adds pairs that pass descriptors, and the blocking mode that processes share."""

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: Any = None) -> None:
        if fileno is not None and family == -1:
            family, type = _kind_of(self.network.file(fileno))
        super().__init__(
            socket.AF_INET if family == -1 else family, socket.SOCK_STREAM if type == -1 else type, 0, fileno
        )

    def settimeout(self, value: float | None) -> None:
        super().settimeout(value)
        self.file.blocks = value is None

    def setblocking(self, flag: bool) -> None:
        super().setblocking(flag)
        self.file.blocks = flag

    def connect(self, address: Any) -> None:
        blocks = _blocks(self.file)
        try:
            super().connect(address)
        finally:
            self.file.blocks = blocks

    def setsockopt(self, level: int, option: int, value: Any, length: Any = None) -> None:
        super().setsockopt(level, option, value, length)
        if (level, option) == (socket.SOL_SOCKET, _ATTACH_FILTER):
            self.file.backlog = -1  # the kernel drops all that asks for a connection

    def shutdown(self, how: int) -> None:
        if isinstance(self.file, Listening):
            self.file.close()
        else:
            super().shutdown(how)

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, address: Any = None) -> int:
        file = self.file
        if not isinstance(file, PairEnd):
            return super().sendmsg(buffers, ancillary, flags, address)
        data = b"".join(map(bytes, buffers))
        fds = [fd for _, _, info in ancillary for fd in array.array("i", bytes(info))]
        self._attempt(flags, WRITE, file.push, data, lambda: [self.network.passed(fd) for fd in fds])  # type: ignore[attr-defined]
        return len(data)

    def recvmsg(self, count: int, ancillary: int = 0, flags: int = 0) -> Any:
        file = self.file
        if not isinstance(file, PairEnd):
            return super().recvmsg(count, ancillary, flags)
        data, files = self._attempt(0, READ, file.pull)
        found, is_cut = self.network.taken(files)  # type: ignore[attr-defined]
        info = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", found).tobytes())] if found else []
        return data, info, int(socket.MSG_CTRUNC) if is_cut else 0, None

    def _attempt(self, flags: int, ready: int, operation: Callable[..., Any], *args: Any) -> Any:
        blocks = _blocks(self.file)
        if not blocks:
            flags |= _DONTWAIT
        elif self._timeout == 0 and not flags & _DONTWAIT:
            try:
                return super()._attempt(flags | _DONTWAIT, ready, operation, *args)
            except BlockingIOError:
                self.network.complaints.append(f"a call of {self!r} hangs: another process has made the socket block")
                raise
        return super()._attempt(flags, ready, operation, *args)


def _blocks(file: File) -> bool:
    return getattr(file, "blocks", True)


def _kind_of(file: File) -> tuple[int, int]:
    if isinstance(file, PairEnd):
        return socket.AF_UNIX, socket.SOCK_SEQPACKET
    address = file.address
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    return family, socket.SOCK_DGRAM if isinstance(file, DatagramEnd) else socket.SOCK_STREAM


def only_in(files: dict[int, File]) -> list[StreamEnd]:
    """Return the ends of connections that no other process has, and no packet either."""
    counts: dict[File, int] = {}
    for each in files.values():
        counts[each] = counts.get(each, 0) + 1
    return [each for each, count in counts.items() if isinstance(each, StreamEnd) and each.descriptors == count]
