"""Measure the example on this machine.

    python -m examples.cluster.load

starts the example with 1, 2 and 4 workers, and prints how many requests a second it answers, how long they take, and
what a task takes each program in processor time. `--bits 1` measures tasks that take a worker no time.
"""

import argparse
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from examples.cluster.together import Together

_TEXTS = [b"text %d" % number for number in range(16)]  # each client asks for all of them: each run has the same work
_PATIENCE_S = 300
_TICKS = os.sysconf("SC_CLK_TCK")


class Result(NamedTuple):
    """Says what the clients have seen, and how much processor time the programs took for a request."""

    workers: int
    per_s: float
    p50_s: float
    p99_s: float
    scheduler_s: float
    worker_s: float
    server_s: float


def processor_s(pids: Iterable[int]) -> float:
    """Return how much processor time some processes have had (proc(5))."""
    ticks = 0
    for pid in pids:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / _TICKS


def ask(address: tuple[str, int], bits: int, rounds: int) -> list[float]:
    """Ask for the stamp of each text, one after the other. Returns how long each answer took."""
    took = []
    with socket.create_connection(address, _PATIENCE_S) as own, own.makefile("rb") as answers:
        for text in _TEXTS * rounds:
            asked_at = time.monotonic()
            own.sendall(b"mint %d %b\n" % (bits, text))
            answer = answers.readline()
            took.append(time.monotonic() - asked_at)
            if not answer.strip().isdigit():
                raise RuntimeError(f"asked for a stamp, got {answer!r}")
    return took


def measure(workers: int, clients: int, bits: int, rounds: int) -> Result:
    """Start the example with so many workers, and ask it for stamps by some clients at the same time."""
    with tempfile.TemporaryDirectory(prefix="reqtable-cluster-") as folder, Together(Path(folder), workers) as together:
        ask(together.address, 1, 2)  # each program imports what it needs
        parts = (
            [together.scheduler.pid],
            [each.pid for each in together.workers],
            [each.pid for each in together.servers.values()],
        )
        before = [processor_s(each) for each in parts]
        took: list[float] = []
        threads = [
            threading.Thread(target=lambda: took.extend(ask(together.address, bits, rounds))) for _ in range(clients)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole_s = time.monotonic() - began
        spent = [processor_s(each) - known for each, known in zip(parts, before, strict=True)]
    if len(took) != clients * rounds * len(_TEXTS):
        raise RuntimeError("a client has failed")
    took.sort()
    each_s = [seconds / len(took) for seconds in spent]
    return Result(workers, len(took) / whole_s, took[len(took) // 2], took[len(took) * 99 // 100], *each_s)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.cluster.load")
    parser.add_argument("--bits", type=int, default=16, help="how much work a stamp is; 16")
    parser.add_argument("--clients", type=int, default=8, help="how many clients ask at the same time; 8")
    parser.add_argument("--rounds", type=int, default=3, help=f"each client asks {len(_TEXTS)} times so often; 3")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the programs of the example end, too
    print("                                     processor ms for a request")
    print("workers    per s   p50 ms   p99 ms   scheduler   workers   servers")
    for workers in (1, 2, 4):
        found = measure(workers, given.clients, given.bits, given.rounds)
        times = f"{found.per_s:>7.1f}  {found.p50_s * 1000:>7.0f}  {found.p99_s * 1000:>7.0f}"
        spent = f"{found.scheduler_s * 1000:>10.2f}  {found.worker_s * 1000:>8.2f}  {found.server_s * 1000:>8.2f}"
        print(f"{workers:>7}  {times}  {spent}", flush=True)


if __name__ == "__main__":
    main()
