"""Ending the loop's poll from another thread or from a signal handler."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator


class Wakeup:
    """A socket pair: a byte written to one end makes the other readable. `wake()` is safe from any thread.

    Many wakes before the loop looks cost one byte.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._pending = False
        self._hears_signals = False

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        if not self._pending:
            self._pending = True
            # full means that bytes enough are on their way; closed means that the loop has ended
            with contextlib.suppress(OSError):
                self._writer.send(b"\0")

    def on_ready(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._reader.recv(4096)) == 4096:
                pass
        # Only now: had it been cleared first, the byte of a wake in between could be drained here and the wake after
        # it be lost. What the waker did before it called wake() is seen in this pass in either case.
        self._pending = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """A signal that arrives just before the poll ends it too. Only the main thread can ask for this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._hears_signals = True
        try:
            yield
        finally:
            self._hears_signals = False
            signal.set_wakeup_fd(previous)

    def forked(self) -> None:
        """In a forked child: its signals are no affair of the parent's loop."""
        if self._hears_signals:
            self._hears_signals = False
            signal.set_wakeup_fd(-1)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
