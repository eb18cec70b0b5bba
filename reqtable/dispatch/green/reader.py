"""What `makefile("rb")` of a cooperative socket reads by."""

from __future__ import annotations

import socket
from typing import Any


class Reader(socket.SocketIO):
    """As the standard library's, which asks itself each time whether it may be read."""

    __slots__ = ("_sock", "_timeout_occurred")  # found at once, where its base class has a dictionary

    _sock: socket.socket | None
    _timeout_occurred: bool

    def readinto(self, buffer: Any) -> int | None:
        own = self._sock
        if own is None or self._timeout_occurred:
            return super().readinto(buffer)  # which says so
        try:
            return own.recv_into(buffer, len(buffer))
        except TimeoutError:
            self._timeout_occurred = True
            raise
        except BlockingIOError:
            return None
