"""`reqtable serve` as a service with workers, and clients that keep it busy and remember what went wrong."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WAIT_S = 20.0


class Service:
    """`reqtable serve tests/teller.py:Teller` on a free port, a process group; its log is read as it comes."""

    def __init__(
        self,
        *arguments: str,
        workers: int | None = 2,
        handler: str = "tests/teller.py:Teller",
        bind: str = "tcp://127.0.0.1:0",
        **options: Any,
    ):
        self._reload_folder = tempfile.TemporaryDirectory(prefix="reqtable-service-")
        if "--config" in arguments:
            self._configuration = Path(arguments[arguments.index("--config") + 1])
        else:
            self._configuration = Path(self._reload_folder.name) / "reqtable.toml"
            self._configuration.touch()
            arguments = ("--config", str(self._configuration), *arguments)
        self._changes = 0
        self.lines: list[str] = []
        self._came = threading.Condition()
        command = [sys.executable, "-m", "reqtable", "serve", handler, "--bind", bind, *arguments]
        command += [] if workers is None else ["--workers", str(workers)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, **options
        )
        assert self.process.stdout is not None
        self.served = self.process.stdout.readline()
        self.address = ("127.0.0.1", int(re.findall(r":(\d+)", self.served)[-1]))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._came:
                self.lines.append(line.rstrip())
                self._came.notify_all()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, pattern: str, times: int = 1, within_s: float = WAIT_S) -> list[re.Match[str]]:
        """Until the log has so many lines with that in them."""
        if not self.comes(pattern, times, within_s):
            found = len(self.found(pattern))
            raise AssertionError(f"{pattern!r} came {found} times of {times}:\n" + "\n".join(self.lines))
        return self.found(pattern)

    def comes(self, pattern: str, times: int = 1, within_s: float = WAIT_S) -> bool:
        """Wait until the log has so many lines with that in them. Returns whether it has them in time."""
        with self._came:
            return self._came.wait_for(lambda: len(self.found(pattern)) >= times, within_s)

    def found(self, pattern: str) -> list[re.Match[str]]:
        """Return the matches in the log so far, at most one a line."""
        return [match for line in list(self.lines) if (match := re.search(pattern, line))]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def reload(self) -> None:
        """Have the service read a configuration that has changed: else no worker would be replaced."""
        text = self._configuration.read_text().partition("[fork]")[0]
        self._changes += 1
        other = Path(self._reload_folder.name) / "other.toml"
        other.write_text(f"{text}\n[fork]\nmax_children = {1000 + self._changes}\n")
        os.replace(other, self._configuration)  # a reload never reads half of it
        self.signal(signal.SIGHUP)

    def workers(self) -> list[int]:
        """The numbers of its processes, zombies left out."""
        return [pid for pid in children_of(self.pid) if state_of(pid) not in "ZX"]

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def ask(self, question: str) -> str:
        """Over a connection of its own."""
        with socket.create_connection(self.address, WAIT_S) as own:
            own.sendall(question.encode() + b"\n")
            return own.makefile().readline().strip()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # whatever a test that failed has left
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self._reload_folder.cleanup()


def children_of(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def state_of(pid: int) -> str:
    """As in proc(5); X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_sleeper(pid: int) -> bool:
    """Return whether a process of a program with `takeover` is a sleeper, or has gone; else it is a worker."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("reqtable-sleep")
    except OSError:
        return True


def wait_gone(pids: list[int], within_s: float = WAIT_S) -> None:
    """Until none of these processes is there, but as a zombie of someone else's."""
    until = time.monotonic() + within_s
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                has_exited = select.select([pidfd], [], [], max(0.0, until - time.monotonic()))[0]
            finally:
                os.close(pidfd)
            assert has_exited, f"still there: {pid}"


class Client(threading.Thread):
    """Asks over one connection after another, and tells its load of what went wrong."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        self.load = load
        self.worker = 0  # that has the present connection, once it has said so

    def run(self) -> None:
        while not self.load.over.is_set():
            self.worker = 0
            try:
                with socket.create_connection(self.load.address, WAIT_S) as own, own.makefile() as answers:
                    self.worker = int(self.ask(own, answers, b"pid\n"))
                    self.load.answered_by.add(self.worker)
                    for number in range(self.load.requests):
                        answer = self.ask(own, answers, b"slowly 0.02\n" if number % 2 else b"echo %d\n" % number)
                        worker, _, rest = answer.partition(" ")
                        by_another = self.load.in_one_process and worker != str(self.worker)
                        if by_another or rest != ("" if number % 2 else str(number)):
                            self.fail(f"request {number} was answered {answer!r}")
                        if self.load.over.is_set():
                            break
            except OSError as error:
                self.fail(type(error).__name__)

    def ask(self, own: socket.socket, answers: Any, question: bytes) -> str:
        self.load.asked += 1
        own.sendall(question)
        answer: str = answers.readline().strip()
        if not answer:
            raise ConnectionError
        return answer

    def fail(self, how: str) -> None:
        self.load.failed.append((self.worker, how))


class Load:
    """Clients that ask as long as it is entered. What `failed`: the worker that had the connection, or 0, and how."""

    def __init__(self, address: Any, clients: int, requests: int, in_one_process: bool = True) -> None:
        self.address = address
        self.in_one_process = in_one_process  # all requests of a connection are answered by the same
        self.requests = requests  # of each connection
        self.over = threading.Event()
        self.asked = 0
        self.answered_by: set[int] = set()
        self.failed: list[tuple[int, str]] = []
        self.clients = [Client(self) for _ in range(clients)]

    def held_by(self, pid: int) -> int:
        """How many connections that worker is known to have."""
        return sum(client.worker == pid for client in self.clients)

    def __enter__(self) -> Load:
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self.over.set()
        for client in self.clients:
            client.join(WAIT_S)


def connections_of(pid: int, port: int) -> int:
    """How many connections to that port a process has accepted, and their clients have not ended (proc_pid_net(5))."""
    inodes = {os.readlink(each.path) for each in os.scandir(f"/proc/{pid}/fd")}
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return sum(f"socket:[{row[9]}]" in inodes for row in established)


def kill_workers(service: Service, load: Load, times: int) -> dict[int, int]:
    """Kill one worker after another with SIGKILL, each once it has connections; how many each of them had."""
    victims = {}
    for count in range(1, times + 1):
        until = time.monotonic() + WAIT_S
        while not (alive := [pid for pid in service.workers() if load.held_by(pid) > 1]):
            assert time.monotonic() < until, "no worker has connections"
            time.sleep(0.01)
        victim = alive[count % len(alive)]
        os.kill(victim, signal.SIGSTOP)  # so that what it has is counted, not what it had
        while state_of(victim) != "T":
            time.sleep(0.001)
        time.sleep(0.05)  # what it has sent has been taken
        victims[victim] = connections_of(victim, service.address[1])
        os.kill(victim, signal.SIGKILL)
        service.wait_for(f"worker {victim} was killed by SIGKILL")
    load.end()
    return victims


def reload_times(service: Service, times: int) -> None:
    """SIGHUP, and wait until all workers are new ones; so many times."""
    done = len(service.wait_for(r"(\d+) of \1 workers are ready"))
    for count in range(1, times + 1):
        service.reload()
        service.wait_for(r"(\d+) of \1 workers are ready", done + count)
