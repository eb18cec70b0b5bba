"""Finds which of the machine's addresses a datagram was sent to, and answers from that address.

A socket on every address (0.0.0.0, ::) answers from the address at which the route to the peer begins. A peer whose
socket is connected drops an answer from any address but the one it sent to. Linux reports the destination of each
datagram and accepts a source for each answer: IP_PKTINFO in ip(7), IPV6_PKTINFO in ipv6(7) and RFC 3542, 6.
"""

from __future__ import annotations

import socket
import struct
import sys
from functools import lru_cache
from typing import Any, Self

_IP_PKTINFO = 8  # linux/in.h; the socket module has the name since Python 3.14
_INFO = struct.Struct("=I4s4s")  # in_pktinfo: interface, address of this machine, destination in the header
_INFO6 = struct.Struct("=16sI")  # in6_pktinfo: destination, interface
_CONTROL_BYTES = 256  # room for options that the program has set too, such as time stamps
_NOWHERE = bytes(4)

Control = list[tuple[int, int, bytes]]


class Datagram(tuple[bytes, socket.socket]):
    """A request `(data, socket)` of a datagram server that knows the address it was sent to.

    `local` is that address, in the form of `getsockname`; `control` is the ancillary data of an answer from there.
    """

    local: Any
    control: Control

    @classmethod
    def made(cls, data: bytes, own: socket.socket, local: Any, control: Control) -> Self:
        made = cls((data, own))
        made.local, made.control = local, control
        return made


def watch_destinations(own: socket.socket) -> bool:
    """Have the kernel report each datagram's destination if `own` is bound to every address; True if it does so."""
    if not sys.platform.startswith("linux"):
        return False
    if own.family == socket.AF_INET and own.getsockname()[0] == "0.0.0.0":
        own.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    elif own.family == socket.AF_INET6 and own.getsockname()[0] == "::":
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)  # also for IPv4, as ::ffff:127.0.0.1
    else:
        return False
    return True


def receive(own: socket.socket, most: int, port: int) -> tuple[Any, Any]:
    """Receive a datagram of at most `most` bytes, without waiting.

    Returns the request and its peer's address. Raises OSError; BlockingIOError if there is no datagram.
    """
    data, ancillary, _, peer = own.recvmsg(most, _CONTROL_BYTES, socket.MSG_DONTWAIT)
    for level, kind, info in ancillary:
        if (level, kind) in _READ:
            local, control = _READ[level, kind](info, port)
            if control:
                return Datagram.made(data, own, local, control), peer
    return (data, own), peer


def send(request: Any, data: Any, peer: Any) -> None:
    """Send an answer to `request` without waiting, from the address that the request was sent to, if that is known."""
    own = request[1]
    if type(request) is not Datagram:
        own.sendto(data, socket.MSG_DONTWAIT, peer)
        return
    try:
        own.sendmsg([data], request.control, socket.MSG_DONTWAIT, peer)
    except (BlockingIOError, InterruptedError):
        raise
    except OSError:  # a broadcast address, or one that this machine no longer has
        own.sendto(data, socket.MSG_DONTWAIT, peer)


def later(request: Any, data: bytes) -> Any:
    """Return the request of a later datagram, `data`, from the peer of `request` to the same address."""
    if type(request) is Datagram:
        return Datagram.made(data, request[1], request.local, request.control)
    return data, request[1]


@lru_cache(maxsize=4096)
def _read_ipv4(info: bytes, port: int) -> tuple[Any, Control]:
    # A broadcast address can't be a source: the kernel also names an address of this machine. It names none for a
    # datagram that arrived before the option was set.
    _, own, destination = _INFO.unpack(info)
    source = destination if own == _NOWHERE else own
    control = [(socket.IPPROTO_IP, _IP_PKTINFO, _INFO.pack(0, source, _NOWHERE))]
    return (socket.inet_ntop(socket.AF_INET, source), port), control


@lru_cache(maxsize=4096)
def _read_ipv6(info: bytes, port: int) -> tuple[Any, Control]:
    source, interface = _INFO6.unpack(info)
    if source[0] == 0xFF:
        return None, []  # a multicast address can't be a source
    is_link_local = source[0] == 0xFE and source[1] & 0xC0 == 0x80  # the same on several interfaces (RFC 4291)
    if not is_link_local:
        interface = 0  # the route to the peer decides
    control = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _INFO6.pack(source, interface))]
    return (socket.inet_ntop(socket.AF_INET6, source), port, 0, interface), control


_READ = {(socket.IPPROTO_IP, _IP_PKTINFO): _read_ipv4}
if hasattr(socket, "IPV6_PKTINFO"):
    _READ[socket.IPPROTO_IPV6, socket.IPV6_PKTINFO] = _read_ipv6
