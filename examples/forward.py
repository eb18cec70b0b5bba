"""A TCP forwarder: connects each client to one other service, and passes on whatever either side sends.

    FORWARD_TO=tcp://127.0.0.1:8000 reqtable serve examples/forward.py:Forward
    curl http://127.0.0.1:7000/

FORWARD_TO is any address that `connect` takes: with tls://example.org:443 the clients need no TLS, and with
unix:///run/service.sock they need no access to the file. Encrypted bytes pass through as they are.

A fast sender doesn't fill the memory if the other side reads slowly: neither side is read while more than
`high_water_bytes` wait for the other.
"""

import os
from typing import Any

from reqtable import (
    Arrived,
    Connection,
    StateRequestHandler,
    Transition,
    Want,
    chunk,
    connect,
    either,
    end_output,
    state,
)

IDLE_S = 3600.0


class Forward(StateRequestHandler):
    """Serves one client. An end of file is passed on too: the other direction stays open until it ends as well."""

    upstream: Connection
    either_side: Want[Arrived]  # made once: a want does not change
    open: int = 2  # the directions that have not ended

    def start(self) -> Transition:
        return self.connected, connect(os.environ.get("FORWARD_TO", "tcp://127.0.0.1:8000"))

    @state()
    def connected(self, upstream: Connection) -> Transition:
        """Begin to forward."""
        self.upstream = upstream
        self.either_side = either(chunk(), upstream.chunk())
        return self.forward_more()

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
        """The client has been told that the other service has ended."""
        return self.forward_more()

    def forward_more(self) -> Transition:
        return (self.forwarded, self.either_side) if self.open else None
