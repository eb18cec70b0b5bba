"""`Upstream` describes a service that the server under test connects to. `UpstreamPeer` plays one connection of it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from math import inf
from typing import Any
from urllib.parse import urlsplit

from reqtable.testing.client import Client, Peer
from reqtable.testing.connecting import Port
from reqtable.testing.datagrams import DatagramEnd, DatagramPort
from reqtable.testing.kernel import StreamEnd
from reqtable.testing.network import SimNetwork


class Upstream:
    """Listens at an address of the simulated network, and plays a script with each connection that the server makes.

        Upstream("tcp://192.0.2.1:6379", Client().expect(b"PING\\r\\n").send(b"+PONG\\r\\n").expect_end())

    `address` is one that `connect()` takes, with a numeric host: `tcp://`, `udp://` or `unix://` (TLS is not
    simulated). Give names of hosts to `simulate(names=…)`. A UDP upstream plays its script with each sender. `script`
    may be a function, which is called with the number of the connection, 0 for the first. Without a script, the
    upstream takes what comes, up to the end. `answers_after_s` is how long the upstream's machine takes to answer an
    attempt to connect; None: it never does. Where no upstream listens, connections are refused.

    Raises ValueError for an address that can't be simulated.
    """

    def __init__(
        self,
        address: str,
        script: Client | Callable[[int], Client] | None = None,
        *,
        answers_after_s: float | None = 0.0,
    ) -> None:
        if answers_after_s is not None and not 0 <= answers_after_s < inf:
            raise ValueError(f"answers_after_s must be seconds, 0 or more, or None, not {answers_after_s!r}")
        self.address = address
        self.scheme, self.where = _parsed(address)
        default = Client() if self.scheme == "udp" else Client().take_rest()
        self._script = script if script is not None else default
        self.answers_after_s = answers_after_s

    def __repr__(self) -> str:
        return f"upstream {self.address}"

    def script_of(self, number: int) -> Client:
        """Return the script for the connection with that number, 0 for the first."""
        return self._script if isinstance(self._script, Client) else self._script(number)

    def listen(self, network: SimNetwork, accepted: Callable[[UpstreamPeer], None]) -> None:
        """Listen on `network`; `accepted` is called with the peer of each new connection. Raises OSError."""
        count = 0

        def accept_one(end: StreamEnd | DatagramEnd) -> None:
            nonlocal count
            peer = UpstreamPeer(network, self, count)
            count += 1
            accepted(peer)
            peer.accept(end)

        if self.scheme == "udp":
            DatagramPort(network, self.where, accept_one)
        else:
            port = Port(network, self.where, self.answers_after_s, accept_one)
            network.bound[socket.SOCK_STREAM, self.where] = port


class UpstreamPeer(Peer):
    """Plays the script of one connection of an upstream. `upstream` is the `Upstream`."""

    def __init__(self, network: SimNetwork, upstream: Upstream, number: int) -> None:
        super().__init__(network, number, upstream.script_of(number))
        self.upstream = upstream
        self.address = upstream.where

    def __repr__(self) -> str:
        return f"{self.upstream}, connection {self.number}"

    def accept(self, end: StreamEnd | DatagramEnd) -> None:
        """Begin to play the script."""
        self._server = end.peer
        self._connected(end)


def _parsed(address: str) -> tuple[str, Any]:
    """Return the scheme of an address, and the address as sockets have it. Raises ValueError."""
    parts = urlsplit(address)
    if parts.scheme == "unix" and parts.path:
        return "unix", parts.path
    if parts.scheme not in ("tcp", "udp") or parts.hostname is None or not parts.port:
        raise ValueError(f"an upstream listens at tcp://HOST:PORT, udp://HOST:PORT or unix:///PATH, not at {address!r}")
    try:
        host = ipaddress.ip_address(parts.hostname)
    except ValueError:
        raise ValueError(
            f"an upstream listens at a numeric address, not at {address!r}: see simulate(names=…)"
        ) from None
    return parts.scheme, (str(host), parts.port, 0, 0) if host.version == 6 else (str(host), parts.port)
