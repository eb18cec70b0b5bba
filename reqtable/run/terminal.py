"""The log on standard error and, on a terminal, the status line below it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

_CLEAR = "\x1b[2K\r"  # erase the line, and go back to its beginning (ECMA-48)


def is_terminal() -> bool:
    """Return whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class Terminal(logging.Handler):
    """Writes log records to standard error. On a terminal, a status line stays below them and is rewritten in place.

    A progress line, while there is one, takes the place of the status.
    """

    def __init__(self) -> None:
        super().__init__()
        self._status = self._progress = ""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def show(self, status: str | None = None, progress: str | None = None) -> None:
        """Change the status or the progress; `""` removes it. Shows nothing if standard error is not a terminal."""
        self.acquire()  # safe in a forked child: logging renews the locks of handlers there
        try:
            before = self._line
            self._status = self._status if status is None else status
            self._progress = self._progress if progress is None else progress
            if self._line != before and is_terminal():
                self._rewrite()
        finally:
            self.release()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the status line away during the block, which writes to the terminal by itself."""
        with self.lock or contextlib.nullcontext():
            is_shown = bool(self._line) and is_terminal()
            if is_shown:
                with contextlib.suppress(OSError):
                    sys.stderr.write(_CLEAR)
                    sys.stderr.flush()
            yield
            if is_shown:
                self._rewrite()

    @property
    def _line(self) -> str:
        return self._progress or self._status

    def _rewrite(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone, or takes no more
            self._write("")

    def _write(self, text: str) -> None:
        # Erase the line even if this process shows none: another process on the same terminal may show one.
        if sys.stderr is not None:  # it is None if the descriptor was closed at the start
            sys.stderr.write(_CLEAR + text + self._line if is_terminal() else text)
            sys.stderr.flush()


TERMINAL = Terminal()


class Output(logging.StreamHandler[TextIO]):
    """Writes log records to standard output. On a terminal, the status line stays below them."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        with TERMINAL.aside():
            super().emit(record)
