"""Handles the connection of a request that waits for something else than its peer."""

from __future__ import annotations

import socket
from typing import Any

from reqtable.net.sockets import was_reset
from reqtable.table.states import PEER_END, RESET


def on_hang_up(transport: Any, connection: socket.socket, mask: int) -> None:
    """End the request of `transport` if its connection was reset. If the connection has only ended, let it go on.

    A connection of which both sides have ended, or whose Unix client has closed, may have unread input. The poll would
    report it again in every pass, so it is not watched until the request waits for its peer again.
    """
    if mask & (RESET | PEER_END):
        transport.watch(0)
    if mask & RESET and was_reset(connection):
        transport.entry.transport.on_reset()  # if a thread or a child has the request, not `transport` itself
