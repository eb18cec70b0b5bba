"""The raw file behind `makefile("rb")` of a cooperative socket."""

from __future__ import annotations

import socket
from typing import Any


class Reader(socket.SocketIO):
    """Reads like its base class, but without the checks that the base class makes on every read."""

    __slots__ = ("_sock", "_timeout_occurred")  # found faster than in the dictionary of the base class

    _sock: socket.socket | None
    _timeout_occurred: bool

    def readinto(self, buffer: Any) -> int | None:
        own = self._sock
        if own is None or self._timeout_occurred:
            return super().readinto(buffer)  # raises the error
        try:
            return own.recv_into(buffer, len(buffer))
        except TimeoutError:
            self._timeout_occurred = True
            raise
        except BlockingIOError:
            return None
