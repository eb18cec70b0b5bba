"""How another thread or a signal handler ends the loop's poll."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator


class Wakeup:
    """Ends a poll with a socket pair: a byte written to one end makes the other end readable.

    `wake()` is safe from any thread. Many wakes before the loop looks cost one byte.
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
            # If the socket is full, enough bytes are on their way. If it is closed, the loop has ended.
            with contextlib.suppress(OSError):
                self._writer.send(b"\0")

    def on_ready(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._reader.recv(4096)) == 4096:
                pass
        # Clear this only after the drain. Otherwise a wake in between could set it and have its byte drained here, and
        # every later wake would send nothing. This pass sees whatever a waker did before it called wake().
        self._pending = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Have a signal end the poll, even a signal just before it. Has no effect outside the main thread."""
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
        """Stop listening to signals in a forked child: they must not wake the parent's loop."""
        if self._hears_signals:
            self._hears_signals = False
            signal.set_wakeup_fd(-1)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
