"""Tells systemd the state of this process (sd_notify(3)): ready, reloading, stopping, alive. A no-op elsewhere."""

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
    """Reports the state of this process, not of its children: it takes the variables out of the environment.

    `watchdog_s` is the longest time, in seconds, that systemd waits for a sign of life; None: it wants none.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        address = os.environ.pop("NOTIFY_SOCKET", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._is_silent = False  # another process speaks for the service
        self.watchdog_s: float | None = None
        if address and microseconds.isdecimal() and int(microseconds) and pid in ("", str(os.getpid())):
            self.watchdog_s = int(microseconds) / _USECS_PER_S

    def environment(self) -> dict[str, str]:
        """Return the variables for the process that is to take this one's place."""
        if not self._address:
            return {}
        name = "@" + self._address[1:] if self._address[:1] == "\0" else self._address
        watchdog = {} if self.watchdog_s is None else {"WATCHDOG_USEC": str(round(self.watchdog_s * _USECS_PER_S))}
        return {"NOTIFY_SOCKET": name, **watchdog}

    def hand_over(self, pid: int, status: str) -> None:
        """Say that process `pid` serves in this one's place. After that, say nothing before `take_back`."""
        self._send(f"MAINPID={pid}\nREADY=1\nSTATUS={status}")
        self._is_silent = True

    def hold(self) -> None:
        """Say nothing for now: another process serves, and speaks for the service."""
        self._is_silent = True

    def begin(self, is_well: Callable[[], bool] = lambda: True) -> None:
        """Speak for the service from now on. The process before says that this one is ready."""
        self._is_silent = False
        self.feed_watchdog(is_well)

    def ready(self, status: str) -> None:
        """Say that this process serves, or serves again."""
        self._send(f"READY=1\nSTATUS={status}")

    def take_back(self, status: str) -> None:
        """Say that this process serves again, also if another one has served in its place."""
        main, self._is_silent = f"MAINPID={os.getpid()}\n" if self._is_silent else "", False
        self._send(f"{main}READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Say that this process reloads. Call `ready` afterwards."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """Say that this process accepts nothing new."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def say(self, status: str) -> None:
        """Send one short line for people."""
        self._send(f"STATUS={status}")

    def feed_watchdog(self, is_well: Callable[[], bool] = lambda: True) -> None:
        """From now on, tell systemd in time that this loop runs, as long as `is_well()`."""
        if self.watchdog_s is None:
            return
        if is_well():
            self._send("WATCHDOG=1")
        self._engine.call_later(self.watchdog_s / 2, self.feed_watchdog, is_well)

    def _send(self, text: str) -> None:
        if not self._is_silent:
            self._deliver(text)

    def _deliver(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            try:
                own.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
            except BlockingIOError:
                self._engine.call_later(_RETRY_S, self._deliver, text)
