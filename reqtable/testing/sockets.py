"""Simulated sockets: the interface of `socket.socket`, on a network in memory."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, ClassVar

from reqtable.table.states import READ, WRITE
from reqtable.testing.connecting import OutgoingEnd
from reqtable.testing.datagrams import DatagramEnd
from reqtable.testing.kernel import File, Listening, StreamEnd, os_error, raise_error
from reqtable.testing.wires import Network

_RESOLVED = {"": "0.0.0.0", "localhost": "127.0.0.1"}
_INFO = (socket.IPPROTO_TCP, getattr(socket, "TCP_INFO", None))
_ESTABLISHED, _CLOSE = 1, 7  # linux/net/tcp_states.h
_PEEK, _DONTWAIT = int(socket.MSG_PEEK), int(socket.MSG_DONTWAIT)


class SimSocket(socket.socket):
    """Acts as a socket on a `SimNetwork`, with all the methods of a socket.

    Each network has a subclass of its own, `network.socket`.
    """

    network: ClassVar[Network]

    # Never calls the base class's constructor, which would open a real descriptor.
    def __init__(
        self, family: int = socket.AF_INET, type: int = socket.SOCK_STREAM, proto: int = 0, fileno: Any = None
    ):
        self._io_refs = 0
        self._closed = False
        self._family = socket.AddressFamily(family)
        self._type = socket.SocketKind(type)
        self._timeout: float | None = None
        self._options: dict[tuple[int, int], Any] = {}
        if fileno is None:
            file: File = File(self.network)
            if type == socket.SOCK_DGRAM:
                file = DatagramEnd(self.network, "d", family == getattr(socket, "AF_UNIX", None), True)
            fileno = self.network.open(file)
        self._fd: int = fileno

    def __repr__(self) -> str:
        return f"<SimSocket fd={self._fd}>"

    @property
    def family(self) -> int:  # type: ignore[override]
        return self._family

    @property
    def type(self) -> int:  # type: ignore[override]
        return self._type

    @property
    def proto(self) -> int:
        return 0

    @property
    def timeout(self) -> float | None:
        return self._timeout

    def fileno(self) -> int:
        return self._fd

    @property
    def file(self) -> Any:
        """The file of the socket's descriptor. Raises OSError (EBADF) if the socket is closed."""
        return self.network.file(self._fd)

    # -- the usual calls ----------------------------------------------------------------------------------------------

    def settimeout(self, value: float | None) -> None:
        self._timeout = value

    def gettimeout(self) -> float | None:
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        return self._timeout != 0

    def setsockopt(self, level: int, option: int, value: Any, length: Any = None) -> None:
        file = self.file
        self._options[level, option] = value
        if (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF) and isinstance(file, StreamEnd):
            file.other.window = value

    def getsockopt(self, level: int, option: int, length: int = 0) -> Any:
        file = self.file
        if (level, option) == _INFO and isinstance(file, StreamEnd):
            return bytes([_CLOSE if file.is_lost else _ESTABLISHED])
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            number, file.error = file.error, 0
            return number
        return self._options.get((level, option), 0)

    def bind(self, address: Any) -> None:
        file, network = self.file, self.network
        if isinstance(address, tuple):
            address = (_RESOLVED.get(address[0], address[0]), *address[1:])
        if isinstance(address, tuple) and address[1] == 0:
            address = (address[0], network.free_port(), *address[2:])
        if (self._type, address) in network.bound:
            raise os_error(errno.EADDRINUSE)
        if isinstance(file, DatagramEnd):
            file.bind(address)
        else:
            file.address = address
            network.bound[self._type, address] = file

    def listen(self, backlog: int = 128) -> None:
        if isinstance(self.file, Listening):
            self.file.backlog = backlog
            return
        address = self.file.address
        listening = Listening(self.network, address, backlog)
        listening.descriptors = 1
        self.network.files[self._fd] = self.network.bound[self._type, address] = listening

    def connect(self, address: Any) -> None:
        """Connect the socket. Raises BlockingIOError (EINPROGRESS) if it does not block, TimeoutError, and OSError."""
        file, network = self.file, self.network
        if self._type == socket.SOCK_DGRAM:
            if (self._type, file.address) not in network.bound:
                file.bind(network.unused_address(self._family))
            file.peer = address
            return
        if isinstance(file, OutgoingEnd):
            file.connect_again()
            return
        end = network.new_end(address, network.unused_address(self._family), self._timeout == 0)
        end.begin(self._family == getattr(socket, "AF_UNIX", None))
        end.descriptors = file.descriptors
        network.files.update((fd, end) for fd, each in list(network.files.items()) if each is file)
        if self._timeout == 0 and end.is_connecting:
            raise os_error(errno.EINPROGRESS)
        network.wait(lambda: not end.is_connecting, self._timeout)
        raise_error(end)

    def accept(self) -> tuple[socket.socket, Any]:
        end: StreamEnd = self._attempt(0, READ, self.file.accept)
        try:
            fd = self.network.open(end)
        except OSError:
            self.file.queue.appendleft(end)
            raise
        return type(self)(self._family, self._type, 0, fd), end.peer

    def send(self, data: Any, flags: int = 0) -> int:
        return self._attempt(flags, WRITE, self.file.send, memoryview(data).cast("B"))  # type: ignore[no-any-return]

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[SimSocket.send(self, view, flags) :]

    def sendto(self, data: Any, *flags_and_address: Any) -> int:
        flags = flags_and_address[0] if len(flags_and_address) == 2 else 0
        return self._attempt(flags, WRITE, self.file.sendto, data, flags_and_address[-1])  # type: ignore[no-any-return]

    def recv(self, count: int, flags: int = 0) -> bytes:
        return self._attempt(flags, READ, self.file.recv, count, bool(flags & _PEEK))  # type: ignore[no-any-return]

    def recv_into(self, buffer: Any, count: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer).cast("B")
        data = SimSocket.recv(self, count or len(view), flags)
        view[: len(data)] = data
        return len(data)

    def recvfrom(self, count: int, flags: int = 0) -> tuple[bytes, Any]:
        return self._attempt(flags, READ, self.file.recvfrom, count, bool(flags & _PEEK))  # type: ignore[no-any-return]

    def recvfrom_into(self, buffer: Any, count: int = 0, flags: int = 0) -> tuple[int, Any]:
        view = memoryview(buffer).cast("B")
        data, address = SimSocket.recvfrom(self, count or len(view), flags)
        view[: len(data)] = data
        return len(data), address

    def recvmsg(self, count: int, ancillary: int = 0, flags: int = 0) -> Any:
        if self._type == socket.SOCK_DGRAM:
            data, address = SimSocket.recvfrom(self, count, flags)
            return data, [], 0, address
        return SimSocket.recv(self, count, flags), [], 0, None

    def recvmsg_into(self, buffers: Any, ancillary: int = 0, flags: int = 0) -> Any:
        view = memoryview(buffers[0]).cast("B")  # the rest may stay empty: a call may take less than there is
        return SimSocket.recv_into(self, view, len(view), flags), [], 0, None

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, address: Any = None) -> int:
        data = b"".join(bytes(each) for each in buffers)
        return SimSocket.send(self, data, flags) if address is None else SimSocket.sendto(self, data, flags, address)

    def connect_ex(self, address: Any) -> int:
        try:
            self.connect(address)
        except OSError as error:
            return error.errno or 0
        return 0

    def shutdown(self, how: int) -> None:
        self.file.shutdown(how)

    def getsockname(self) -> Any:
        return self.file.address

    def getpeername(self) -> Any:
        if not self.file.is_connected:
            raise os_error(errno.ENOTCONN)
        return self.file.peer

    def dup(self) -> SimSocket:
        copy = type(self)(self._family, self._type, 0, self.network.open(self.file))
        copy._timeout = self._timeout
        return copy

    def detach(self) -> int:
        fd, self._fd = self._fd, -1
        self._closed = True
        return fd

    def _real_close(self, *args: Any) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            file = self.network.file(fd)
            option = self._options.get((socket.SOL_SOCKET, socket.SO_LINGER))
            if isinstance(file, StreamEnd) and file.descriptors == 1 and option == b"\1\0\0\0\0\0\0\0":
                file.abort()
            self.network.close(fd)

    def _attempt(self, flags: int, ready: int, operation: Callable[..., Any], *args: Any) -> Any:
        self.network.happen()
        while True:
            try:
                return operation(*args)
            except BlockingIOError:
                if self._timeout == 0 or flags & _DONTWAIT:
                    raise
                self.network.wait(lambda: bool(self.file.ready() & ready), self._timeout)
            except InterruptedError:
                if self._timeout == 0 or flags & _DONTWAIT:
                    raise
