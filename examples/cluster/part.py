"""`Part`: one program of the example, which is started, waited for, and ended."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_START_S = 60.0
_END_S = 40.0  # longer than a server may drain
_LOOK_S = 0.02


class Part:
    """Runs a program in a process group of its own, and writes what it prints into a file."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, variables: Mapping[str, str], fd: int | None = None
    ) -> None:
        self.name = name
        self._log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **variables},
                pass_fds=() if fd is None else (fd,),
                process_group=0,  # so that Ctrl-C reaches only the program that ends the others in order
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def says(self, pattern: str) -> str:
        """Wait until the program prints a line with the pattern. Returns the first group of the pattern.

        Raises RuntimeError, with what the program has printed, if it ends before, or takes too long.
        """
        until = time.monotonic() + _START_S
        while True:
            has_ended = self.process.poll() is not None
            text = self._log.read_text(errors="replace")
            if found := re.search(pattern, text):
                return found[1]
            if has_ended or time.monotonic() > until:
                raise RuntimeError(f"{self.name} {'has ended' if has_ended else 'takes too long'}:\n{text}")
            time.sleep(_LOOK_S)

    def end(self) -> None:
        """Ask the program, or the program that has taken its place, to end. Kill it if it takes too long."""
        self._send(signal.SIGTERM)
        until = time.monotonic() + _END_S
        while self._runs():
            if time.monotonic() > until:
                self._send(signal.SIGKILL)
            time.sleep(_LOOK_S)

    def _runs(self) -> bool:
        """Return whether the group has a process. After `reqtable restart`, this is no child of this program."""
        self.process.poll()  # or its zombie would stay in the group
        return self._send(0)

    def _send(self, number: int) -> bool:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
            return True
        return False
