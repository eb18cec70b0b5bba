"""Workers under load: killed, reloaded, drained. Prints its figures; the exit code is 1 where one does not hold.

`make reloads`, or `python -m tests.reloads [KILLS] [RELOADS]`.
"""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.service import WAIT_S, Load, Service, kill_workers, reload_times, wait_gone

FOLDER = tempfile.TemporaryDirectory(prefix="reqtable-reloads-")
CONFIGURATION = "[limits]\ndrain_idle_s = 5\ndrain_timeout_s = {drain_s}\n"


def configuration(drain_s: float = 30) -> str:
    """Of a file that goes with this process. A client that this machine holds up for a while is not idle."""
    path = Path(FOLDER.name) / "reqtable.toml"
    path.write_text(CONFIGURATION.format(drain_s=drain_s))
    return str(path)


def killing(times: int, workers: int = 3, clients: int = 24) -> bool:
    """Only the connections of a killed worker are lost."""
    with Service("--config", configuration(), workers=workers) as service, Load(service.address, clients, 20) as load:
        began = time.monotonic()
        victims = kill_workers(service, load, times)
        took_s = time.monotonic() - began
        refused = [each for each in load.failed if each[1] == "ConnectionRefusedError"]
        others = [each for each in load.failed if each[0] not in {0, *victims}]
        held = sum(victims.values())
        print(
            f"killed {times} times in {took_s:.1f} s: {load.asked} requests of {clients} clients; "
            f"the killed had {held} connections, {len(load.failed)} were lost, {len(others)} of them another's; "
            f"{len(refused)} refused"
        )
        service.signal(signal.SIGTERM)
        ended = service.wait() == 0
    return ended and not others and not refused and 0 < len(load.failed) <= held


def reloading(times: int, workers: int = 3, clients: int = 24) -> bool:
    """No request fails."""
    with Service("--config", configuration(), workers=workers) as service, Load(service.address, clients, 5) as load:
        began = time.monotonic()
        reload_times(service, times)
        load.end()
        took = time.monotonic() - began
        print(
            f"reloaded {times} times in {took:.1f} s: {load.asked} requests of {clients} clients, answered by "
            f"{len(load.answered_by)} workers; failed: {dict(Counter(load.failed)) or 0}"
        )
        service.signal(signal.SIGTERM)
        ended = service.wait() == 0
    return ended and not load.failed


class Trickler(threading.Thread):
    """Begins one request after another, and sends each in pieces, until the server takes no more."""

    def __init__(self, address: Any, figures: Counter[str]) -> None:
        super().__init__()
        self.address = address
        self.figures = figures

    def run(self) -> None:
        while True:
            try:
                with socket.create_connection(self.address, WAIT_S) as own, own.makefile() as answers:
                    own.sendall(b"take 20\n")
                    if not answers.readline():
                        return
                    self.figures["begun"] += 1
                    self.finish(own, answers)
            except OSError:
                return  # no worker has taken it: it was no request yet

    def finish(self, own: socket.socket, answers: Any) -> None:
        try:
            for _ in range(20):
                own.sendall(b"x")
                time.sleep(0.05)
            self.figures["done" if answers.readline() == "20\n" else "cut"] += 1
        except OSError:
            self.figures["cut"] += 1


def draining(workers: int = 3, clients: int = 60, drain_s: float = 4.0) -> bool:
    """What has begun is done, but for one that would take longer than there is time; that has all of it."""
    figures: Counter[str] = Counter()
    with Service("--config", configuration(drain_s), workers=workers) as service:
        pids = service.workers()
        tricklers = [Trickler(service.address, figures) for _ in range(clients)]
        with socket.create_connection(service.address, WAIT_S) as endless, endless.makefile() as answers:
            endless.sendall(b"pid\nslowly 1000\n")
            answers.readline()
            for each in tricklers:
                each.start()
            time.sleep(1.5)
            service.signal(signal.SIGTERM)
            began = time.monotonic()
            rest = answers.readline()
            had_s = time.monotonic() - began
        ended = service.wait() == 0
        wait_gone(pids)
        for each in tricklers:
            each.join(WAIT_S)
    print(
        f"drained {clients} clients: {figures['begun']} requests had begun, {figures['done']} were done, "
        f"{figures['cut']} were cut; the endless one had {had_s:.2f} s of {drain_s:g}"
    )
    return ended and not rest and not figures["cut"] and figures["begun"] > clients and drain_s <= had_s < drain_s + 2


def main(kills: int = 20, reloads: int = 100) -> int:
    held = [killing(kills), reloading(reloads), draining(), draining()]
    print("holds" if all(held) else "DOES NOT HOLD")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
