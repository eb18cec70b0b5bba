"""A SOCKS proxy, version 5 (RFC 1928): CONNECT to IPv4 and IPv6 addresses and to names, without authentication.

    reqtable serve examples/socks5.py:Socks5 --bind tcp://127.0.0.1:1080
    curl --socks5-hostname 127.0.0.1:1080 http://example.org/

Whoever reaches this proxy can reach everything that its machine reaches: bind it to an address that only you can use.
A client has ten seconds for each message of its request, and each connection attempt ends after ten seconds too.
"""

import errno
import socket
import struct
from typing import Any

from reqtable import (
    Arrived,
    ConnectFailed,
    Connection,
    StateRequestHandler,
    Transition,
    chunk,
    connect,
    either,
    end_output,
    exactly,
    state,
)

VERSION = 5
NO_AUTHENTICATION, NONE_ACCEPTABLE = 0, 0xFF
CONNECT = 1
IPV4, NAME, IPV6 = 1, 3, 4

# The replies of RFC 1928, section 6.
SUCCEEDED, FAILED, NETWORK_UNREACHABLE, HOST_UNREACHABLE, REFUSED = 0, 1, 3, 4, 5
COMMAND_UNKNOWN, ADDRESS_UNKNOWN = 7, 8

REPLIES: dict[int | None, int] = {
    errno.ENETUNREACH: NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    errno.ETIMEDOUT: HOST_UNREACHABLE,
    errno.ECONNREFUSED: REFUSED,
}

REQUEST_S = 10.0
IDLE_S = 3600.0


class Socks5(StateRequestHandler):
    """Serves one client: the choice of a method, the request, and then whatever the two sides say."""

    host: str = ""
    upstream: Connection
    open: int = 2  # the directions that have not ended

    # -- the choice of a method ---------------------------------------------------------------------------------------

    @state(exactly(2), timeout=REQUEST_S)
    def greeting(self, head: bytes) -> Transition:
        """Read the version, and how many methods the client offers."""
        version, count = head
        if version != VERSION:
            return None  # this client speaks something else, and would not understand a reply
        return self.methods, exactly(count)

    @state(timeout=REQUEST_S)
    def methods(self, offered: bytes) -> Transition:
        """Choose a method: only "no authentication" will do."""
        is_offered = NO_AUTHENTICATION in offered
        self.send(bytes([VERSION, NO_AUTHENTICATION if is_offered else NONE_ACCEPTABLE]))
        return self.request if is_offered else None

    # -- the request --------------------------------------------------------------------------------------------------

    @state(exactly(4), timeout=REQUEST_S)
    def request(self, head: bytes) -> Transition:
        """Read the command, and of what kind the address is."""
        version, command, _, kind = head
        if version != VERSION:
            return None
        if command != CONNECT:
            return self.refuse(COMMAND_UNKNOWN)
        if kind == NAME:
            return self.length, exactly(1)
        if kind in (IPV4, IPV6):
            return self.address, exactly(4 if kind == IPV4 else 16)
        return self.refuse(ADDRESS_UNKNOWN)

    @state(timeout=REQUEST_S)
    def length(self, size: bytes) -> Transition:
        """Read the length of a name."""
        return self.name, exactly(size[0])

    @state(timeout=REQUEST_S)
    def name(self, name: bytes) -> Transition:
        """Read a name."""
        self.host = name.decode("ascii", "replace")
        return self.port

    @state(timeout=REQUEST_S)
    def address(self, packed: bytes) -> Transition:
        """Read an address."""
        if len(packed) == 4:
            self.host = socket.inet_ntop(socket.AF_INET, packed)
        else:
            self.host = f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"
        return self.port

    @state(exactly(2), timeout=REQUEST_S)
    def port(self, packed: bytes) -> Transition:
        """Read the port, and connect."""
        try:
            return self.connected, connect(f"tcp://{self.host}:{int.from_bytes(packed)}")
        except ValueError:  # this can't be the name of a host, or the port is 0
            return self.refuse(HOST_UNREACHABLE)

    @state()
    def connected(self, upstream: Connection) -> Transition:
        """Tell the client the address that its connection comes from, and begin to forward."""
        self.upstream = upstream
        self.send(reply(SUCCEEDED, upstream.local))
        return self.forward_more()

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed):
            raise error
        is_unknown = isinstance(error.__cause__, socket.gaierror)
        return self.refuse(HOST_UNREACHABLE if is_unknown else REPLIES.get(error.errno, FAILED))

    def refuse(self, code: int) -> Transition:
        self.send(reply(code))
        return None

    # -- the data -----------------------------------------------------------------------------------------------------

    @state(timeout=IDLE_S)
    def forwarded(self, arrived: Arrived) -> Transition:
        """Pass on what either side has sent; no bytes are the end of file."""
        receiver: Any = self if arrived.index else self.upstream
        if arrived.item:
            receiver.send(arrived.item)
            return self.forward_more()
        self.open -= 1
        if arrived.index:
            return self.ended, end_output()
        self.upstream.end_output()
        return self.forward_more()

    @state()
    def ended(self, _: None) -> Transition:
        """The client has been told that the other side has ended."""
        return self.forward_more()

    def forward_more(self) -> Transition:
        if not self.open:
            return None
        return self.forwarded, either(chunk(), self.upstream.chunk())


def reply(code: int, address: Any = ("0.0.0.0", 0)) -> bytes:
    """Return a reply: its code, and an address in the form of the socket module."""
    host, port = address[:2]
    family, kind = (socket.AF_INET6, IPV6) if ":" in host else (socket.AF_INET, IPV4)
    packed = socket.inet_pton(family, host.partition("%")[0])
    return bytes([VERSION, code, 0, kind]) + packed + struct.pack("!H", port)
