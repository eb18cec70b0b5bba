"""What a server meets that faces a network: slow clients, clients that do not read, no descriptors.

Each server runs in a process of its own, where its memory, its descriptors and its calls are its own. The figures are
printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reqtable import Limits
from tests.conftest import WAIT_S, Client

ROOT = Path(__file__).parent.parent
MIB = 2**20

SERVER = """
import json, resource, sys, time
import reqtable
from reqtable import Config, Limits, flushed, line, state

PIECE = bytes(32768)

class States(reqtable.StateRequestHandler):
    left: int = 0

    @state(line())
    def command(self, text):
        if text.startswith(b"big "):
            self.left = int(text[4:])
            return self.more, flushed()
        self.send(text)
        return self.command

    @state(flushed())
    def more(self, _):
        if self.left <= 0:
            return self.command
        self.send(PIECE)
        self.left -= len(PIECE)
        return self.more

class Coroutine(reqtable.AsyncRequestHandler):
    async def handle(self):
        while text := await self.read(line()):
            if text.startswith(b"big "):
                for _ in range(int(text[4:]) // len(PIECE)):
                    await self.send(PIECE)
            else:
                await self.send(text)

class Blocking(reqtable.StreamRequestHandler):
    def handle(self):
        for text in self.rfile:
            if text.startswith(b"big "):
                for _ in range(int(text[4:]) // len(PIECE)):
                    self.wfile.write(PIECE)
            else:
                self.wfile.write(text)

class Server(reqtable.TCPServer):
    calls = 0  # of accept

    def get_request(self):
        self.calls += 1
        return super().get_request()

options = json.loads(sys.argv[1])
if "descriptors" in options:
    resource.setrlimit(resource.RLIMIT_NOFILE, (options["descriptors"], options["descriptors"]))
handler = {"state": States, "async": Coroutine, "blocking": Blocking}[options.get("style", "state")]
config = Config(limits=Limits(**options.get("limits", {})))
with Server(("127.0.0.1", 0), handler, config=config, dispatch="greenlet") as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


class Program:
    """The server above, in a process of its own."""

    def __init__(self, **options: Any) -> None:
        command = [sys.executable, "-c", SERVER, json.dumps(options)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def memory(self) -> int:
        """Bytes, at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def processor_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


@contextlib.contextmanager
def program(**options: Any) -> Iterator[Program]:
    made = Program(**options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def connect_all(address: Any, count: int) -> list[socket.socket]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 1000), hard))
    return [socket.create_connection(address, timeout=WAIT_S) for _ in range(count)]


def honest(address: Any, requests: int) -> list[float]:
    """How long each of so many requests took, of ten clients at once, in seconds."""
    times: list[float] = []

    def ask() -> None:
        with Client(address) as client:
            for _ in range(requests // 10):
                started = time.perf_counter()
                assert client.ask(b"honest\n") == b"honest\n"
                times.append(time.perf_counter() - started)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


@pytest.mark.parametrize("style", ["state", "async"])
def test_slow_loris_are_gone_by_their_deadline_and_hurt_nobody(style: str) -> None:
    with program(style=style, limits={"read_timeout_s": 2}) as server:
        quiet = p99(honest(server.address, 2000))
        loris = connect_all(server.address, 1000)
        began = time.monotonic()
        selector = selectors.DefaultSelector()
        for each in loris:
            each.send(b"x")
            selector.register(each, selectors.EVENT_READ)
        during = p99(honest(server.address, 2000))
        gone: dict[Any, float] = {}
        while len(gone) < len(loris):
            assert time.monotonic() < began + WAIT_S, f"{len(loris) - len(gone)} are still there"
            for each in loris:
                if each not in gone:
                    with contextlib.suppress(OSError):  # it has been ended
                        each.send(b"x")
            for key, _ in selector.select(0.25):
                with contextlib.suppress(ConnectionError):
                    assert key.fileobj.recv(1) == b""  # type: ignore[union-attr]
                gone[key.fileobj] = time.monotonic() - began
                selector.unregister(key.fileobj)
        print(
            f"\n{style}: p99 {quiet * 1e3:.2f} ms quiet, {during * 1e3:.2f} ms; all gone in {max(gone.values()):.1f} s"
        )
        for each in loris:
            each.close()
        assert min(gone.values()) > 1.5
        assert max(gone.values()) < 8


@pytest.mark.parametrize("style", ["state", "async", "blocking"])
def test_readers_that_never_read_cost_no_more_than_the_high_water_mark(style: str) -> None:
    count = 300
    with program(style=style) as server:
        honest(server.address, 100)
        before = server.memory()
        readers = connect_all(server.address, count)
        for each in readers:
            each.sendall(b"big %d\n" % (10 * MIB))
        during = p99(honest(server.address, 1000))  # while the kernel's buffers fill
        after = p99(honest(server.address, 1000))
        held = server.memory() - before
        print(f"\n{style}: {held / count / 1024:.0f} KiB for each that does not read; ", end="")
        print(f"p99 {during * 1e3:.2f} ms while they fill the kernel's buffers, {after * 1e3:.2f} ms after")
        assert after < 0.25, "who is blocked costs the others nothing"
        assert held < count * Limits().high_water_bytes + 64 * MIB
        with readers[0].makefile("rb") as file:  # it reads after all
            assert len(file.read(10 * MIB)) == 10 * MIB
        for each in readers:
            each.close()


def test_with_no_descriptors_left_it_waits_without_spinning_and_serves_all_in_the_end() -> None:
    with program(descriptors=64) as server:
        clients = connect_all(server.address, 300)
        for each in clients:
            each.sendall(b"hello\n")
        waited = [each for each in clients if not answered(each)]
        assert len(waited) > 200, "the others wait in the kernel's queue"
        used = server.processor_s()
        threading.Event().wait(1.0)  # what is measured is a second with nothing to do
        spent = server.processor_s() - used
        print(f"\n{spent * 1000:.0f} ms of processor in a second without descriptors")
        assert spent < 0.1
        for each in clients:
            with each, each.makefile("rb") as file:
                assert file.readline() == b"hello\n"
        with Client(server.address) as client:
            assert client.ask(b"a\n") == b"a\n"


def answered(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        client.settimeout(WAIT_S)


@pytest.mark.parametrize("style", ["state", "async", "blocking"])
def test_a_drain_under_load_cuts_no_request_before_its_deadline(style: str) -> None:
    """Ten clients ask without a pause; each asks until it is told that there is no more, or until the time is over."""
    program_of_it = SERVER.replace(
        "    server.serve_forever()",
        "    import signal, threading\n"
        "    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.drain, args=(2,)).start())\n"
        "    server.serve_forever()",
    )
    command = [sys.executable, "-c", program_of_it, json.dumps({"style": style, "limits": {"drain_idle_s": 0.2}})]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        counts: list[tuple[int, float]] = []
        enough = threading.Barrier(11)

        def ask() -> None:
            with Client(address) as client:
                asked = 0
                with contextlib.suppress(ConnectionError):
                    while client.ask(b"more\n") == b"more\n":
                        asked += 1
                        if asked == 50:
                            enough.wait(WAIT_S)
                counts.append((asked, time.monotonic()))

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for thread in threads:
            thread.start()
        enough.wait(WAIT_S)
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(WAIT_S)
        assert process.wait(WAIT_S) == 0
        first = min(at for _, at in counts) - told
        print(f"\n{style}: {sum(count for count, _ in counts)} answered, the first cut {first:.2f} s after the signal")
        assert first > 1.9
    finally:
        process.kill()
        process.communicate()
