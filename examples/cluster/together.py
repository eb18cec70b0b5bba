"""`Together`: all programs of the example, on free ports of this machine."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from examples.cluster.part import Part

_FOLDER = Path(__file__).parent
_CLUSTER = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
_ANSWER_S = 10.0
SERVERS = ("a", "b")


class Together:
    """Starts a scheduler, its workers, two servers, and HAProxy. Ends them in the opposite order.

    `folder` takes the logs and the control sockets. With `port` 0, HAProxy listens on a free port.
    """

    def __init__(self, folder: Path, workers: int = 2, port: int = 0) -> None:
        self._folder = folder
        self._workers_wanted = workers
        self._port = port
        self._parts = ExitStack()
        self.scheduler_address = ""
        self.address = ("127.0.0.1", 0)  # of HAProxy
        self.ports: dict[str, int] = {}  # of the servers
        self.scheduler: Part
        self.workers: list[Part]
        self.servers: dict[str, Part]
        self.front: Part

    def __enter__(self) -> Self:
        with self._parts as parts:  # ends what has begun, if the rest can't begin
            self._start()
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def control(self, server: str) -> Path:
        """Return the control socket of a server."""
        return self._folder / f"{server}.sock"

    def start_scheduler(self) -> None:
        """Start the scheduler, at the address of the one before, if there was one."""
        port = self.scheduler_address.rpartition(":")[2] or "0"
        self.scheduler = self._python("scheduler", "distributed.cli.dask_scheduler", *_CLUSTER, "--port", port)
        self.scheduler_address = self.scheduler.says(r"Scheduler at: +(tcp://\S+)")

    def start_worker(self, name: str) -> Part:
        """Start a worker of the cluster, which takes one task at a time."""
        folder = str(self._folder)
        own = ("--nthreads", "1", "--no-nanny", "--name", name, "--local-directory", folder, "--memory-limit", "0")
        return self._python(name, "distributed.cli.dask_worker", self.scheduler_address, *_CLUSTER, *own)

    def _start(self) -> None:
        self.start_scheduler()
        self.workers = [self.start_worker(f"worker-{number}") for number in range(1, self._workers_wanted + 1)]
        self.servers = {name: self._start_server(name) for name in SERVERS}
        self.ports = {name: int(each.says(r"serving .*:(\d+)")) for name, each in self.servers.items()}
        for each in self.workers:
            each.says("(Registered to)")
        self._start_front()

    def _start_server(self, name: str) -> Part:
        handler = ("examples.cluster.stamps:Stamps", "--config", str(_FOLDER / "cluster.toml"))
        where = ("--bind", "tcp://127.0.0.1:0", "--control", str(self.control(name)))
        return self._python(name, "reqtable", "serve", *handler, *where)

    def _start_front(self) -> None:
        """Start HAProxy. Its socket listens before it runs, so no other program can take the port."""
        with socket.create_server(("127.0.0.1", self._port), backlog=1024) as listening:
            self.address = listening.getsockname()
            command = [_haproxy(), "-db", "-f", str(_FOLDER / "haproxy.cfg")]
            variables = {f"SERVER_{name.upper()}": str(port) for name, port in self.ports.items()}
            variables["FRONT"] = str(listening.fileno())
            self.front = self._started("haproxy", command, variables, listening.fileno())
        try:
            with socket.create_connection(self.address, _ANSWER_S) as own:
                own.sendall(b"ping\n")
                own.recv(1)
        except OSError as error:
            raise RuntimeError(f"HAProxy passes nothing on: {self._log('haproxy').read_text()}") from error

    def _python(self, name: str, module: str, *words: str) -> Part:
        """Start a module of Python. Its processes find the scheduler by a variable, as all programs of Dask do."""
        variables = {"DASK_SCHEDULER_ADDRESS": self.scheduler_address}
        return self._started(name, [sys.executable, "-m", module, *words], variables)

    def _started(self, name: str, command: list[str], variables: dict[str, str], fd: int | None = None) -> Part:
        part = Part(name, command, self._log(name), variables, fd)
        self._parts.callback(part.end)
        return part

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def lines(self) -> Iterator[str]:
        """Yield what a user should know: where each program is, and how to look at the servers."""
        yield f"scheduler  {self.scheduler_address}  process {self.scheduler.pid}"
        for worker in self.workers:
            yield f"{worker.name}   process {worker.pid}"
        for name, port in self.ports.items():
            yield f"server {name}   127.0.0.1:{port}  process {self.servers[name].pid}  {self.control(name)}"
        yield f"HAProxy    127.0.0.1:{self.address[1]}  process {self.front.pid}"
        yield "Ask:    reqtable talk, or nc, with lines such as: mint 16 hello"
        yield "Watch:  reqtable top " + " ".join(f"--control {self.control(name)}" for name in SERVERS)


def _haproxy() -> str:
    path = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if path is None:
        raise RuntimeError("this example needs HAProxy: install the package haproxy")
    return path
