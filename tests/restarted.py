"""A served program with all its generations: starting it, changing its code, restarting it, and waiting for events."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.control import Operator
from tests.support import WAIT_S, Client

ROOT = Path(__file__).parent.parent
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: see prctl(2)

LEDGER = """
import os
from reqtable import StateRequestHandler, chunk, exactly, flushed, line, sleep, state

VERSION = 1


class Ledger(StateRequestHandler):
    total: int = 0

    @state(line(limit=4096))
    def asked(self, text):
        verb, *rest = text.decode().split() or [""]
        if verb == "add":
            self.total += int(rest[0])
        elif verb == "nap":
            return self.awake, sleep(float(rest[0]))
        elif verb == "take":
            return self.taken, exactly(int(rest[0]))
        elif verb == "give":
            self.send(bytes(range(256)) * (int(rest[0]) // 256))
            return self.given, flushed()
        elif verb == "env":
            return self.say(os.environ.get(rest[0], "-"))
        return self.say(self.total)

    @state()
    def awake(self, _):
        return self.say("awake")

    @state()
    def taken(self, data):
        return self.say(sum(data))

    @state()
    def given(self, _):
        return self.say("given")

    def say(self, what):
        self.send(f"{VERSION} {os.getpid()} {what}\\n".encode())
        return self.asked
"""

# Beside a Ledger: it counts the datagrams of a client.
SESSION = """
import reqtable
from reqtable import datagram


class Session(StateRequestHandler):
    count: int = 0

    @state(datagram())
    def got(self, data):
        self.count += 1
        self.send(f"{VERSION} {os.getpid()} {self.count}".encode())
        return self.got
"""


class Answer(NamedTuple):
    """What a Ledger answers: the version of the code that has answered, its process, and the rest."""

    version: int
    pid: int
    rest: str


def answer_of(line: bytes) -> Answer:
    version, pid, rest = line.decode().split(maxsplit=2)
    return Answer(int(version), int(pid), rest.strip())


def ask(client: Client, text: str) -> Answer:
    """Ask a Ledger."""
    return answer_of(client.ask(f"{text}\n".encode()))


def next_version(source: str, version: int = 2) -> str:
    return source.replace("VERSION = 1\n", f"VERSION = {version}\n")


class Program:
    """A program in `folder`, served by `reqtable serve`, or by `command`; its log is read as it comes.

    All its generations are one process group, and the test's process adopts those whose parent has exited.
    """

    def __init__(
        self,
        folder: Path,
        source: str = LEDGER,
        *binds: str,
        handler: str = "Ledger",
        config: str = "",
        command: Sequence[str] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.change(source)
        self.configure(config)
        self.control = folder / "c.sock"
        binds = binds or ("tcp://127.0.0.1:0",)
        served = [sys.executable, "-m", "reqtable", "serve", f"app.py:{handler}", "--config", "reqtable.toml"]
        served += [f"--bind={bind}" for bind in binds] + ["--log-level=debug", *arguments]
        self._command = list(command) if command is not None else served
        self._options = options
        variables: dict[str, str | None] = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",  # a file that changes twice in a second is compiled twice
            "REQTABLE_CONTROL": str(self.control),
            **(environment or {}),
        }
        self._environment = {name: value for name, value in variables.items() if value is not None}
        self.lines: list[str] = []
        self.pids: list[int] = []  # of all generations
        self._pidfds: dict[int, int] = {}
        self._came = threading.Condition()

    def change(self, source: str) -> None:
        """Change the code, for the next generation."""
        (self.folder / "app.py").write_text(source)

    def configure(self, text: str) -> None:
        (self.folder / "reqtable.toml").write_text(text)

    # -- the processes ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        _adopt(True)
        self._process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            **self._options,
        )
        self._know(self._process.pid)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.wait_for(r"control: listening on")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(WAIT_S)
        self._reader.join(WAIT_S)  # once the last process has gone
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self._process.pid, 0)
        _adopt(False)
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _know(self, pid: int) -> None:
        self.pids.append(pid)
        with contextlib.suppress(ProcessLookupError):
            self._pidfds[pid] = os.pidfd_open(pid)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"restart: process (\d+) begins", line):
                self._know(int(found[1]))
            with self._came:
                self.lines.append(line.rstrip())
                self._came.notify_all()

    @property
    def pid(self) -> int:
        """The process of the first generation."""
        return self._process.pid

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def wait_exit(self, pid: int) -> None:
        """Wait until a process of the program has exited."""
        with contextlib.suppress(KeyError):
            assert select.select([self._pidfds[pid]], [], [], WAIT_S)[0], f"{pid} is still there:\n{self.log}"

    def is_there(self, pid: int) -> bool:
        return pid in self._pidfds and not select.select([self._pidfds[pid]], [], [], 0)[0]

    @property
    def there(self) -> list[int]:
        """The processes that have not exited."""
        return [pid for pid in self.pids if self.is_there(pid)]

    def descriptors(self, pid: int) -> list[str]:
        """Return what the descriptors of a process refer to."""
        found = []
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        return sorted(found)

    # -- its log ------------------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, times: int = 1) -> list[re.Match[str]]:
        """Wait until so many lines of the log have that in them."""

        def found() -> list[re.Match[str]]:
            return [match for line in self.lines if (match := re.search(pattern, line))]

        with self._came:
            came = self._came.wait_for(lambda: len(found()) >= times, WAIT_S)
        assert came, f"{pattern!r} came {len(found())} times of {times}:\n{self.log}"
        return found()

    def place(self, scheme: str = "tcp", handler: str = r"\w+") -> tuple[str, int]:
        """Return the address of the first bind of that scheme, and that handler."""
        host, _, port = self.wait_for(rf"serving {handler} on {scheme}://(\S+)")[0][1].rpartition(":")
        return host, int(port)

    # -- asking it ----------------------------------------------------------------------------------------------------

    def client(self, handler: str = r"\w+") -> Client:
        return Client(self.place("tcp", handler))

    def operator(self) -> Operator:
        return Operator(self.control)

    def restart(self, check: bool = False) -> dict[str, Any]:
        """Ask for a restart, or for a check. Returns the outcome."""
        found: dict[str, Any] = self.operator().post("/v1/restart", {"check": check})
        return found

    def moved(self) -> dict[str, Any]:
        """Restart, which must work, and wait until the process before has exited. Returns the outcome."""
        outcome = self.restart()
        assert outcome["problem"] is None, (outcome, self.log)
        self.wait_exit(self.pids[-2])
        return outcome

    def refused(self) -> str:
        """Ask for a restart, which must fail, and wait until the new process has gone. Returns the problem."""
        before = len(self.pids)
        outcome = self.restart()
        assert outcome["problem"], (outcome, self.log)
        for pid in self.pids[before:]:
            self.wait_exit(pid)
        return str(outcome["problem"])


def _adopt(is_on: bool) -> None:
    """Have orphans below this process become its children, so that it can wait for them."""
    ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, int(is_on), 0, 0, 0)
