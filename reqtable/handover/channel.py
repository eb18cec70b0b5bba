"""One end of the socket pair between two processes that move requests. It carries messages with descriptors.

The pair is of type SOCK_SEQPACKET (unix(7)): a packet arrives whole, with its own descriptors. A message that is too
large for one packet, or has too many descriptors, goes in several.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from reqtable.handover.messages import Message, decode, encode
from reqtable.loop.poller import Descriptor, Poller
from reqtable.table.states import READ, WRITE

_PACKET_BYTES = 32_768
_PACKET_DESCRIPTORS = 250  # SCM_MAX_FD is 253
_MORE, _LAST = b"+", b"."
_MESSAGE_BYTES_MAX = 2**30

OnMessage = Callable[[Any, list[int]], None]


def packets_of(message: Message, descriptors: Sequence[int]) -> list[tuple[bytes, list[int]]]:
    """Return a message as packets, each with its descriptors."""
    data, part = encode(message), _PACKET_BYTES - 1
    count = max(1, -(-len(data) // part), -(-len(descriptors) // _PACKET_DESCRIPTORS))
    return [
        (
            (_MORE if number < count - 1 else _LAST) + data[number * part : (number + 1) * part],
            list(descriptors[number * _PACKET_DESCRIPTORS : (number + 1) * _PACKET_DESCRIPTORS]),
        )
        for number in range(count)
    ]


class Assembler:
    """Puts the packets of messages together."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._descriptors: list[int] = []

    def add(self, packet: bytes, descriptors: list[int]) -> tuple[Any, list[int]] | None:
        """Return the message that this packet completes, with its descriptors. Raises ValueError for no message."""
        self._data += packet[1:]
        self._descriptors += descriptors
        if len(self._data) > _MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of more than {_MESSAGE_BYTES_MAX} bytes")
        if packet[:1] == _MORE:
            return None
        data, own = bytes(self._data), self._descriptors
        self._data, self._descriptors = bytearray(), []
        try:
            return decode(data), own
        except ValueError:
            close_all(own)
            raise

    def clear(self) -> None:
        """Close the descriptors of a message whose end has not come."""
        self._data.clear()
        close_all(self._descriptors)
        self._descriptors.clear()


def close_all(descriptors: Sequence[Any]) -> None:
    """Close what has come with a message: numbers of descriptors, or sockets."""
    for each in descriptors:
        if isinstance(each, int):
            os.close(each)
        else:
            each.close()


def receive_packet(own: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors, which children do not inherit; b"" at the end. Raises OSError."""
    room = socket.CMSG_SPACE(_PACKET_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, flags, _ = own.recvmsg(_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, info in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(info[: len(info) - len(info) % found.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(found)
        raise OSError("the process has too few descriptors left to receive those of the requests")
    return data, found.tolist()


class _Packet:
    """A packet that is to be sent, with its descriptors. `then` is called once the kernel has it."""

    __slots__ = ("_is_held", "data", "descriptors", "is_over", "then")

    def __init__(self, data: bytes, descriptors: list[int]) -> None:
        self.data = data
        self.descriptors = descriptors
        self.then: Callable[[], None] | None = None
        self.is_over = False
        self._is_held = False

    def hold(self, dup: Callable[[int], int]) -> None:
        """Hold duplicates of the descriptors: what they are of may be closed before the kernel has the packet."""
        held: list[int] = []
        try:
            for each in self.descriptors:
                held.append(dup(each))
        except OSError:  # none is free
            close_all(held)
        else:
            self.descriptors, self._is_held = held, True

    def let_go(self) -> None:
        """Close the duplicates: the kernel has the packet, or it is dropped."""
        self.is_over = True
        if self._is_held:
            close_all(self.descriptors)


class Channel(Descriptor):
    """Sends and receives messages in a loop.

    `on_end()` is called once the other process is gone. `on_problem(why)` is called if that process is there, but can't
    be understood, or this one has no descriptors left for what it sends. Without `on_problem`, that counts as the end.
    Nothing more is received after either.
    """

    __slots__ = ("_assembler", "_is_broken", "_on_end", "_on_message", "_on_problem", "_own", "_waiting")

    def __init__(
        self,
        poller: Poller,
        own: socket.socket,
        on_message: OnMessage,
        on_end: Callable[[], None],
        on_problem: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(poller, own.fileno())
        own.setblocking(False)
        self._own = own
        self._on_message = on_message
        self._on_end = on_end
        self._on_problem = on_problem
        self._is_broken = False
        self._assembler = Assembler()
        self._waiting: deque[_Packet] = deque()  # what the kernel has not taken
        self.watch(READ)

    def send(self, message: Message, holders: Sequence[Any] = (), then: Callable[[], None] | None = None) -> None:
        """Send a message with the descriptors of `holders`. `then()` is called once the kernel has all of it.

        If the other process is gone, or this end is closed, `then` is never called.
        """
        if self.fd < 0:
            return
        new = [_Packet(*each) for each in packets_of(message, [each.fileno() for each in holders])]
        new[-1].then = then
        self._waiting += new
        self._send_on()
        for packet in new:
            if not packet.is_over:
                packet.hold(self.poller.dup)

    def hand_on(self, message: Message, ends: Sequence[Any]) -> None:
        """Send a message with the descriptors of `ends`, which are closed in this process, sent or not."""
        self.send(message, ends)
        for each in ends:
            each.close()

    def on_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._send_on()
        if mask & READ and self.fd >= 0:
            self._receive()

    def _send_on(self) -> None:
        while self._waiting and self.fd >= 0:
            packet = self._waiting[0]
            try:
                socket.send_fds(self._own, [packet.data], packet.descriptors)
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionError:
                self._drop_waiting()  # the end will be read
                break
            except OSError as error:
                self._drop_waiting()
                self._has_problem(f"a message can't be sent: {error.strerror}")
                break
            self._waiting.popleft()
            packet.let_go()
            if packet.then is not None:
                packet.then()
        self._watch()

    def _drop_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft().let_go()

    def read_rest(self) -> None:
        """Act on all messages that have come: the other process has exited."""
        while self.fd >= 0 and self._receive():
            pass

    def _receive(self) -> bool:
        """Receive a packet. Returns whether another one may have come."""
        try:
            data, descriptors = receive_packet(self._own)
            found = self._assembler.add(data, descriptors) if data else None
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionResetError:
            return True  # the other end was closed with unread messages; what it has sent before that can be read
        except (OSError, ValueError) as error:
            self._has_problem(str(error))
            return False
        if not data:
            self.close()
            self._on_end()
        elif found is not None:
            self._on_message(*found)
        return True

    def _has_problem(self, why: str) -> None:
        if self._on_problem is None:
            self.close()
            self._on_end()
        elif not self._is_broken:
            self._is_broken = True
            self._watch()
            self._on_problem(why)

    def _watch(self) -> None:
        if self.fd >= 0:
            self.watch((0 if self._is_broken else READ) | (WRITE if self._waiting else 0))

    def close(self) -> None:
        """Close this end, and drop the messages that have not been sent."""
        if self.fd >= 0:
            self.watch(0)
            self.fd = -1
            self._drop_waiting()
            self._assembler.clear()
            self._own.close()

    def abandon(self) -> None:
        """In a forked child: close this process's copies of descriptors, and leave the selector to the parent."""
        self.fd = -1
        self._drop_waiting()
        self._assembler.clear()
        self._own.close()
