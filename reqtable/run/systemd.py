"""Telling systemd how we are (sd_notify(3)): ready, reloading, stopping, alive. Elsewhere it says nothing to anyone."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable

from reqtable.server.engine import Engine

_USECS_PER_S = 1_000_000
_RETRY_S = 0.05


class Notifier:
    """Of one process, which alone speaks: the variables leave its environment, and so that of its children.

    `watchdog_s` is how often systemd wants to hear of us at least; None: never.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        address = os.environ.pop("NOTIFY_SOCKET", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self.watchdog_s: float | None = None
        if address and microseconds.isdecimal() and int(microseconds) and pid in ("", str(os.getpid())):
            self.watchdog_s = int(microseconds) / _USECS_PER_S

    def ready(self, status: str) -> None:
        """Serving, or serving again."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """`ready` follows."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """Nothing new is taken."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def say(self, status: str) -> None:
        """One short line for people."""
        self._send(f"STATUS={status}")

    def feed_watchdog(self, is_well: Callable[[], bool] = lambda: True) -> None:
        """From now on, tell it in time that this loop goes round, as long as `is_well()` too."""
        if self.watchdog_s is None:
            return
        if is_well():
            self._send("WATCHDOG=1")
        self._engine.call_later(lambda: self.feed_watchdog(is_well), self.watchdog_s / 2)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            try:
                own.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
            except BlockingIOError:
                self._engine.call_later(lambda: self._send(text), _RETRY_S)
