"""What a simulated crash needs of the kernel: it dies with the process at any call, and counts bytes as TCP does.

A process dies before or after a call to the kernel, or before or after it stores a number in the head of its journal.
Its sleeper keeps its descriptors open. From its death on it can do nothing more: each further call raises
`Killed` and has no effect, and the successor reads a copy of the journal that was made at the death.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from reqtable.handover.journal import Journal, Slot, new_memory
from reqtable.testing import Faults, SimNetwork, SimSelector, SimSocket
from reqtable.testing.kernel import File, Listening, StreamEnd, os_error
from tests.simulation.shared import Killed

_COOKIE = 57  # SO_COOKIE
_INFO = struct.Struct("B119xQQ")  # struct tcp_info: the state, the bytes acknowledged, the bytes received
# linux/net/tcp_states.h
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE, _CLOSE_WAIT = 1, 4, 5, 7, 8


class MortalNetwork(SimNetwork):
    """Simulates a network for a process that dies, and for the one that follows it."""

    def __init__(self, seed: int, faults: Faults, latency_s: float) -> None:
        super().__init__(seed, faults, latency_s=latency_s)
        self.socket = type("SimSocket", (MortalSocket,), {"network": self})
        self.system = replace(self.system, socket=self.socket, selector=partial(MortalSelector, self))
        self.is_dead = False
        self.points_left: int | None = None  # to the next death; None: there is none
        self.journal: MortalJournal | None = None
        self.memory = -1  # of the dead process's journal
        self._cookies: dict[File, int] = {}

    def reach(self, point: str) -> None:
        """Tell that the process comes to a point at which it may die."""
        if self.is_dead:
            raise Killed
        if self.points_left is not None:
            self.points_left -= 1
            if self.points_left <= 0:
                self.die(point)

    def die(self, point: str) -> None:
        """Kill the process that runs."""
        self.note(f"the process is killed {point}")
        self.points_left = None
        self.is_dead = True
        assert self.journal is not None
        self.memory = copy_of(self.journal.fd)
        raise Killed

    def bury(self) -> list[StreamEnd]:
        """Return the connections that the dead process had open, and close all else that it had."""
        files, self.files = self.files, {}
        self.closed += 1
        ends = []
        for file in files.values():
            if isinstance(file, StreamEnd):
                ends.append(file)
                continue
            file.descriptors -= 1
            if not file.descriptors:
                file.close()
        self.drop_journal()
        self.is_dead = False
        return ends

    def drop_journal(self) -> None:
        """Close the journal of the process that has ended."""
        assert self.journal is not None
        self.journal.unmap()
        self.journal = None

    def inherit(self, end: StreamEnd) -> SimSocket:
        """Return a socket of the running process for a connection of the dead one."""
        fd = self.open(end)
        end.descriptors = 1
        return self.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)

    def cookie_of(self, file: File) -> int:
        return self._cookies.setdefault(file, len(self._cookies) + 1)

    def ioctl(self, fd: int, request: int, _: bytes) -> bytes:
        """Answer FIONREAD and TIOCOUTQ. As in the kernel, only the latter counts an end of file."""
        import termios

        end = self.file(fd)
        assert isinstance(end, StreamEnd)
        count = len(end.arrived) if request == termios.FIONREAD else _untaken(end)
        return count.to_bytes(4, sys.byteorder)


def _untaken(end: StreamEnd) -> int:
    return end.other.coming + (end.is_shut and not end.other.has_ended)


def copy_of(memory: int) -> int:
    """Return new memory with the same contents."""
    copy = new_memory()
    os.pwrite(copy, os.pread(memory, os.fstat(memory).st_size, 0), 0)
    return copy


def _mortal(name: str) -> Callable[..., Any]:
    """Return a method of a socket at whose beginning and end the process may die."""
    call = getattr(SimSocket, name)

    @wraps(call)
    def calls(self: Any, *args: Any, **named: Any) -> Any:
        self.network.reach(f"before {name}")
        result = call(self, *args, **named)
        self.network.reach(f"after {name}")
        return result

    return calls


class MortalSocket(SimSocket):
    """Adds the kernel's counts of a connection. The process may die at each call."""

    recv = _mortal("recv")
    recv_into = _mortal("recv_into")
    send = _mortal("send")
    accept = _mortal("accept")
    shutdown = _mortal("shutdown")
    setsockopt = _mortal("setsockopt")
    setblocking = _mortal("setblocking")
    getsockname = _mortal("getsockname")
    _real_close = _mortal("_real_close")

    def getpeername(self) -> Any:
        self.network.reach("before getpeername")  # type: ignore[attr-defined]
        if isinstance(self.file, StreamEnd) and self.file.is_lost:
            raise os_error(errno.ENOTCONN)
        return super().getpeername()

    def getsockopt(self, level: int, option: int, length: int = 0) -> Any:
        network: Any = self.network
        network.reach("before getsockopt")
        file = self.file
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
            acknowledged = file.bytes_out + file.is_shut - _untaken(file)
            received = file.bytes_in + len(file.arrived) + file.has_ended
            return _INFO.pack(_state_of(file), acknowledged, received)[:length]
        if (level, option) == (socket.SOL_SOCKET, _COOKIE):
            return network.cookie_of(file).to_bytes(8, sys.byteorder)
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return int(isinstance(file, Listening))
        return super().getsockopt(level, option, length)


def _state_of(end: StreamEnd) -> int:
    if end.is_lost:
        return _CLOSE
    if end.is_shut:
        return _FIN_WAIT2 if end.other.has_ended else _FIN_WAIT1
    return _CLOSE_WAIT if end.has_ended else _ESTABLISHED


class MortalSelector(SimSelector):
    """The process may die at each call of epoll."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        self._network.reach("before register")  # type: ignore[attr-defined]
        return super().register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> Any:
        self._network.reach("before unregister")  # type: ignore[attr-defined]
        return super().unregister(fileobj)

    def select(self, timeout: float | None = None) -> Any:
        self._network.reach("before select")  # type: ignore[attr-defined]
        found = super().select(timeout)
        self._network.reach("after select")  # type: ignore[attr-defined]
        return found


class _Numbers:
    """Is the head of a journal. The process may die before and after it stores a number."""

    def __init__(self, network: MortalNetwork, numbers: Any) -> None:
        self._network = network
        self.numbers = numbers

    def __getitem__(self, place: int) -> int:
        return self.numbers[place]  # type: ignore[no-any-return]

    def __setitem__(self, place: int, number: int) -> None:
        self._network.reach(f"before number {place} is stored")
        self.numbers[place] = number
        self._network.reach(f"after number {place} is stored")


class MortalJournal(Journal):
    """Is a journal in real memory. The process may die at each store in its head, and at each record."""

    def __init__(self, network: MortalNetwork, fd: int, input_max: int) -> None:
        super().__init__(fd, input_max)
        self._network = network
        self.numbers: Any = _Numbers(network, self.numbers)
        network.journal = self

    def write(self, slot: Slot, payload: bytes, received: int, sent: int) -> None:
        self._network.reach("before a record is written")
        super().write(slot, payload, received, sent)
        self._network.reach("after a record is written")

    def free(self, slot: Slot) -> None:
        self._network.reach("before a record is freed")
        super().free(slot)
        self._network.reach("after a record is freed")

    def unmap(self) -> None:
        """Give the memory back."""
        self.numbers.numbers.release()
        self.input.release()
        os.close(self.fd)
