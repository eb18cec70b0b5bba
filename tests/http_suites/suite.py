"""What the suites share: how a suite says that it fails or can't run, programs, and `reqtable` as a process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 10.0


class Failed(Exception):
    """The server does not do what a suite expects."""


class Skipped(Exception):
    """A suite can't run here. The message says what is missing, and how to get it."""


def program(name: str, package: str) -> str:
    """Return the path of a program. Raises Skipped if it is missing; `package` is Debian's."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise Skipped(f"{name} is missing: apt-get install {package}")
    return found


def output_of(command: list[str], cwd: Path | None = None) -> tuple[int, str]:
    """Run a program, and return its exit code and what it printed. It ends with us, and so do its children."""
    process = subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        printed, _ = process.communicate()
        return process.returncode, printed.decode(errors="replace")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def number_in(text: str, pattern: str) -> int:
    """Return the number that `pattern` finds in what a program printed. Raises Failed if it finds none."""
    found = re.search(pattern, text)
    if found is None:
        raise Failed(f"{pattern!r} is not in the output:\n{text[-2000:]}")
    return int(found[1])


class Reqtable:
    """Runs the command `reqtable` during a block.

    At the end of the block, the server must have as many descriptors as at its beginning, no error in its log, and must
    end when it is asked to. Otherwise it raises Failed.
    """

    def __init__(self, *arguments: str, bind: str = "tcp://127.0.0.1:0") -> None:
        self._command = [sys.executable, "-m", "reqtable", *arguments, "--bind", bind]
        self._stack = ExitStack()

    def __enter__(self) -> Reqtable:
        # One file for all that it prints: nobody reads a pipe meanwhile, and the access log fills it.
        self._log = self._stack.enter_context(tempfile.NamedTemporaryFile("w+"))
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        self._stack.callback(self._end)
        until = time.monotonic() + WAIT_S
        while (found := re.search(r"^serving .* on \w+://[^ ]+:(\d+)$", self.log(), re.MULTILINE)) is None:
            if time.monotonic() > until or self.process.poll() is not None:
                self._stack.close()
                raise Failed(f"{' '.join(self._command)} did not start")
            time.sleep(0.02)
        self.port = int(found[1])
        self._warm_up()
        self._descriptors = self._count()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            if kind is not None:
                return
            until = time.monotonic() + WAIT_S
            while self._count() > self._descriptors:
                if time.monotonic() > until:
                    raise Failed(
                        f"{self._count() - self._descriptors} descriptors were left open:\n{self.log()[-2000:]}"
                    )
                time.sleep(0.05)  # the descriptors of another process can't be waited for
            if "Traceback" in self.log():
                raise Failed(f"the server reports an error:\n{self.log()[-4000:]}")
            self.process.terminate()
            if self.process.wait(WAIT_S):
                raise Failed(f"the server ended with {self.process.returncode}:\n{self.log()[-2000:]}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def _warm_up(self) -> None:
        """Make one request: from then on the server has the descriptors that it needs."""
        with socket.create_connection(("127.0.0.1", self.port), WAIT_S) as client, suppress(ConnectionError):
            client.sendall(b"GET /warm-up HTTP/1.0\r\n\r\n")
            while client.recv(65_536):
                pass
        time.sleep(0.2)  # the server closes its end, too

    def _count(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
