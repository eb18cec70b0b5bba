"""Starts the program again when a file of its code changes: for development."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

log = logging.getLogger("reqtable")

_LOOK_S = 0.5


class Watch:
    """Looks at the files of all imported modules, twice a second."""

    def __init__(self) -> None:
        self.has_changed = False
        self._times: dict[str, int] = {}
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """End the program with SIGINT when a file changes, while entered."""
        self._look()
        thread = threading.Thread(target=self._watch, name="reqtable-code", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def note_error(self) -> None:
        """Note the files of the imported modules, and those of the error that is being handled."""
        self._look()
        error = sys.exc_info()[1]
        while error is not None:
            for each in traceback.extract_tb(error.__traceback__):
                self._note(each.filename)
            if isinstance(error, SyntaxError) and error.filename:
                self._note(error.filename)
            error = error.__cause__ or error.__context__

    def wait(self) -> None:
        """Wait until a file changes."""
        while not self._look():
            self._ended.wait(_LOOK_S)
        self.has_changed = True

    def start_again(self) -> None:
        """Replace this process by a new one with the same arguments."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", "reqtable", *sys.argv[1:]])

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            if changed := self._look():
                log.info("%s has changed: starting again", changed)
                self.has_changed = True
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _look(self) -> str | None:
        """Return the name of a file that has changed since the last look, if there is one. Notes new files."""
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file not in self._times:
                self._note(file)
        for file, before in self._times.items():
            if _time_of(file) != before:
                return file
        return None

    def _note(self, file: str) -> None:
        if file not in self._times and os.path.exists(file):
            self._times[file] = _time_of(file)


def _time_of(file: str) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return -1  # it is being replaced
