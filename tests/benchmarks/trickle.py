"""Compares `TableMixIn` with `ThreadingHTTPServer` for clients that trickle requests to `http.server`'s own handler.

All clients connect before any client sends. Each client then sends its request a few bytes at a time; the clients take
turns in random order. Every answer is checked. Prints the server's CPU time, memory and threads. Usage:
`--clients 2000 --bytes 1`
"""

from __future__ import annotations

import argparse
import http.server
import os
import random
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import reqtable

PAGE = b"<p>hello</p>" * 100
REQUEST = b"GET /page.html HTTP/1.0\r\nHost: here\r\nUser-Agent: a slow one\r\n\r\n"
TICKS = os.sysconf("SC_CLK_TCK")
WAIT_S = 600


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class TableHTTPServer(reqtable.TableMixIn, http.server.HTTPServer):
    """Runs the standard library's HTTP server on one thread."""


class ThreadingHTTPServer(http.server.ThreadingHTTPServer):
    """Runs the standard library's server with a longer queue: a queue of 5 would measure the kernel's retries."""

    request_queue_size = 1024
    daemon_threads = True


SERVERS = {each.__name__: each for each in (TableHTTPServer, ThreadingHTTPServer)}


@dataclass
class Figures:
    server: str
    clients: int
    cpu_s: float
    memory_kib: float  # for each client
    threads: int  # that the clients added
    wall_s: float

    def __str__(self) -> str:
        cpu = f"{self.cpu_s:7.2f} s CPU, {self.cpu_s / self.clients * 1e6:6.0f} us each"
        memory = f"{self.memory_kib:5.1f} KiB each"
        others = f"{self.threads:5} threads more  {self.wall_s:6.1f} s in all"
        return f"{self.server:20} {self.clients:6} served  {cpu}  {memory}  {others}"


def serve(name: str, folder: str) -> None:
    """Serve until the parent kills this process."""
    server = SERVERS[name](("127.0.0.1", 0), partial(Quiet, directory=folder))
    print(server.server_address[1], flush=True)
    server.serve_forever()


def measure(name: str, count: int, bytes_at_a_time: int, seed: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_bytes(PAGE)
        command = [sys.executable, "-m", "tests.benchmarks.trickle", "--serve", name, "--folder", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            trickle(port, 1, len(REQUEST), seed)  # warms up the server: things made once are not a client's cost
            cpu, memory, threads = usage(process.pid)
            started = time.monotonic()
            peak = trickle(port, count, bytes_at_a_time, seed, partial(settled, process.pid))
            wall_s = time.monotonic() - started
            return Figures(
                name,
                count,
                usage(process.pid)[0] - cpu,
                (peak[1] - memory) / count,
                peak[2] - threads,
                wall_s,
            )
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def usage(pid: int) -> tuple[float, int, int]:
    """Return a process's seconds of CPU, KiB of memory, and number of threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(fields[11]) + int(fields[12])) / TICKS, int(status["VmRSS"].split()[0]), int(status["Threads"])


def settled(pid: int) -> tuple[float, int, int]:
    """Wait until the server has read its input, and return the usage."""
    before, now = None, usage(pid)
    while now != before:
        time.sleep(0.2)
        before, now = now, usage(pid)
    return now


def trickle(port: int, count: int, bytes_at_a_time: int, seed: int, look: partial | None = None) -> tuple:  # type: ignore[type-arg]
    """Have `count` clients served. Returns the result of `look()`, called before the clients send their last bytes."""
    clients = [socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) for _ in range(count)]
    chance = random.Random(seed)
    parts = [REQUEST[at : at + bytes_at_a_time] for at in range(0, len(REQUEST), bytes_at_a_time)]
    for part in parts[:-1]:
        chance.shuffle(clients)
        for client in clients:
            client.sendall(part)
    seen = look() if look is not None else ()
    selector = selectors.DefaultSelector()
    answers = {}
    for client in clients:
        client.sendall(parts[-1])
        answers[client] = b""
        selector.register(client, selectors.EVENT_READ)
    while answers:
        for key, _ in selector.select(WAIT_S):
            more = key.fileobj.recv(65536)  # type: ignore[union-attr]
            answers[key.fileobj] += more  # type: ignore[index]
            if not more:
                selector.unregister(key.fileobj)
                answer = answers.pop(key.fileobj)  # type: ignore[call-overload]
                assert answer.startswith(b"HTTP/1.0 200 "), answer[:100]
                assert answer.endswith(b"\r\n\r\n" + PAGE)
                key.fileobj.close()  # type: ignore[union-attr]
    selector.close()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trickle", description=__doc__)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=1, help="how many bytes a client sends at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    figures = []
    for name in SERVERS:
        figures.append(measure(name, options.clients, options.bytes, options.seed))
        print(figures[-1], flush=True)
    ours, theirs = figures
    assert ours.threads == 0, "no thread is added"
    print(
        f"CPU: {ours.cpu_s / theirs.cpu_s:.3f} of theirs; memory: {ours.memory_kib / theirs.memory_kib:.3f} of theirs"
    )


if __name__ == "__main__":
    main()
