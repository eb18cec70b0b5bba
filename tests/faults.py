"""What a server meets that faces a network, at full size, and what it must hold: `python -m tests.faults [NAME]...`.

The server, the clients that do it harm and the honest ones whose waiting is measured are processes of their own. Prints
a table of figures; the exit status is 1 where a condition does not hold. `tests/test_faults.py` runs the same, smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from reqtable import Limits

ROOT = Path(__file__).parent.parent
MIB = 2**20
WAIT_S = 60.0
HONEST = 10  # clients
ATTEMPTS = 3
PAUSE_S = (0.010, 0.020)  # of an honest client between an answer and its next request


@dataclass
class Finding:
    """What was seen of one fault: figures to read, and conditions, by what they say, that hold or do not."""

    fault: str
    figures: list[str] = field(default_factory=list)
    conditions: dict[str, bool] = field(default_factory=dict)

    @property
    def broken(self) -> list[str]:
        return [what for what, holds in self.conditions.items() if not holds]

    def __str__(self) -> str:
        lines = [self.fault, *(f"    {each}" for each in self.figures)]
        lines += [f"    {'holds' if holds else 'BROKEN'}: {what}" for what, holds in self.conditions.items()]
        return "\n".join(lines)


class Program:
    """The server of `faults_server.py`."""

    def __init__(self, **options: Any) -> None:
        command = [sys.executable, str(ROOT / "tests/faults_server.py"), json.dumps(options)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def memory(self) -> int:
        """Bytes, at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def processor_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def program(**options: Any) -> Iterator[Program]:
    made = Program(**options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


class Line:
    """A connection that asks for lines."""

    def __init__(self, address: Any) -> None:
        self.socket = socket.create_connection(address, timeout=WAIT_S)
        self.file = self.socket.makefile("rb")

    def ask(self, text: bytes) -> bytes:
        self.socket.sendall(text)
        return self.file.readline()

    def stats(self) -> dict[str, Any]:
        counted: dict[str, Any] = json.loads(self.ask(b"stats\n"))
        return counted

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()
        self.socket.close()


def connect_all(address: Any, count: int, over_s: float = 0.0, receives: int | None = None) -> list[socket.socket]:
    """So many connections, spread over so many seconds, each with a receive buffer of so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 1000), hard))
    made = []
    begun = time.monotonic()
    for number in range(count):
        ahead = begun + number / count * over_s - time.monotonic()
        if ahead > 0.002:
            pass_by(ahead)
        one = socket.socket()
        one.settimeout(WAIT_S)
        if receives is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        one.connect(address)
        made.append(one)
    return made


# -- honest clients ---------------------------------------------------------------------------------------------------


class Honest:
    """Ten clients, in a process of their own, that ask and pause, for as long as the block lasts."""

    def __init__(self, address: Any) -> None:
        command = [sys.executable, "-m", "tests.faults", "--honest", str(address[1])]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._samples: list[tuple[float, float]] = []  # when it asked, and for how long it waited

    def __enter__(self) -> Honest:
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *args: object) -> None:
        self._samples = json.loads(self._process.communicate()[0])

    def between(self, begun: float, ended: float) -> Waits:
        return Waits([waited for at, waited in self._samples if begun <= at < ended])


@dataclass
class Waits:
    """For how long honest clients waited, in seconds."""

    seconds: list[float]

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.seconds, n=100)[98]

    def __str__(self) -> str:
        if len(self.seconds) < 2:
            return "too short for anybody to have asked twice"
        median, most = statistics.median(self.seconds), max(self.seconds)
        shown = f"p50 {median * 1e3:.2f} ms, p99 {self.p99 * 1e3:.2f} ms, longest {most * 1e3:.1f} ms"
        return f"{shown}, of {len(self.seconds)}"


def be_honest(port: int) -> None:
    """What the process of the honest clients does until its input ends."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    rng = random.Random(1)
    next_at = {}
    for _ in range(HONEST):
        connection = socket.create_connection(("127.0.0.1", port))
        selector.register(connection, selectors.EVENT_READ)
        next_at[connection] = time.monotonic() + rng.uniform(*PAUSE_S)
    asked_at: dict[Any, float] = {}
    samples = []
    print("ready", flush=True)
    while True:
        for connection in [each for each, at in next_at.items() if at <= time.monotonic()]:
            del next_at[connection]
            asked_at[connection] = time.monotonic()
            connection.send(b"honest\n")
        patience = max(0.0, min(next_at.values()) - time.monotonic()) if next_at else None
        ready = selector.select(patience)
        now = time.monotonic()
        for key, _ in ready:
            if key.fileobj is sys.stdin:
                print(json.dumps(samples))
                return
            connection = key.fileobj
            assert connection.recv(100) == b"honest\n"
            begun = asked_at.pop(connection)
            samples.append((begun, now - begun))
            next_at[connection] = now + rng.uniform(*PAUSE_S)


def pass_by(seconds: float) -> float:
    """Let so much time be measured. Returns when it was over."""
    threading.Event().wait(seconds)
    return time.monotonic()


def gently(do_harm: Callable[[], None]) -> None:
    """Call it in a thread of the lowest priority: on a real network those who do harm have processors of their own."""

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        do_harm()

    with ThreadPoolExecutor(1) as one:
        one.submit(run).result()


# -- the faults -------------------------------------------------------------------------------------------------------


class Loris:
    """So many clients that send a byte each `every_s`, from one thread."""

    def __init__(self) -> None:
        self.left: set[socket.socket] = set()
        self.gone: list[float] = []  # for how long each was let be, from its first byte on
        self._selector = selectors.DefaultSelector()
        self._first_at: dict[socket.socket, float] = {}

    def connect(self, address: Any, count: int, over_s: float) -> None:
        self.left = set(connect_all(address, count, over_s))
        for each in self.left:
            each.setblocking(False)
            self._selector.register(each, selectors.EVENT_READ)

    def drip(self, every_s: float, until: float) -> None:
        """One after the other, evenly, until that time, or until none is left; `every_s` of 0: all of them at once."""
        count = len(self.left)
        queue = list(self.left)
        begun, sent = time.monotonic(), 0
        while self.left and (now := time.monotonic()) < until:
            due = count if not every_s else min(int((now - begun) / every_s * count), sent + 100)
            for number in range(sent, due):
                self._send(queue[number % count])
            sent = due
            if not every_s:
                every_s = WAIT_S  # and not again
            self._look(0.002)

    def _send(self, each: socket.socket) -> None:
        if each in self.left:
            self._first_at.setdefault(each, time.monotonic())
            with contextlib.suppress(OSError):  # it has been ended
                each.send(b"x")

    def _look(self, patience: float) -> None:
        for key, _ in self._selector.select(patience):
            ended: Any = key.fileobj
            with contextlib.suppress(ConnectionError):
                assert ended.recv(1) == b""
            self.gone.append(time.monotonic() - self._first_at[ended])
            self.left.remove(ended)
            self._selector.unregister(ended)
            ended.close()

    def close(self) -> None:
        for each in self.left:
            each.close()
        self._selector.close()


def slow_loris(
    style: str,
    count: int,
    timeout_s: float,
    every_s: float,
    quiet_s: float,
    connect_s: float = 0,
    most: float | None = None,
    late_s: float = inf,
) -> Finding:
    """Clients that send a byte each `every_s`. They are gone within `late_s` after their deadline, and the honest ones
    wait no longer than `most` times as long as in quiet (None: however long).
    """
    how = f"one byte each {every_s:g} s" if every_s else "one byte each, all at once"
    found = Finding(f"{count} slow-loris clients, {how}, {style} handler")
    loris = Loris()
    with program(style=style, limits={"read_timeout_s": timeout_s}) as server:
        with Honest(server.address) as honest:
            pass_by(0.5)
            at = [time.monotonic(), pass_by(quiet_s)]

            def do_harm() -> None:
                loris.connect(server.address, count, connect_s)
                at.append(time.monotonic())
                loris.drip(every_s, at[-1] + (timeout_s - 0.1))
                at.append(time.monotonic())
                loris.drip(every_s, at[-1] + every_s + WAIT_S)
                at.append(time.monotonic())

            gently(do_harm)
        with Line(server.address) as line:
            times = line.stats()["loop"]
        phases = ("quiet", "while they connect", "while they drip", "while they expire")
        waits = {name: honest.between(*at[number : number + 2]) for number, name in enumerate(phases)}
        found.figures += [f"{name} ({at[i + 1] - at[i]:.1f} s): {waits[name]}" for i, name in enumerate(phases)]
        first, last = (min(loris.gone), max(loris.gone)) if loris.gone else (0.0, 0.0)
        found.figures.append(f"gone {first:.2f} to {last:.2f} s after their first byte, {len(loris.left)} left")
        found.figures.append(
            f"lag {times['lag_s_mean'] * 1e3:.1f} ms on average, {times['lag_s_max'] * 1e3:.1f} at most"
        )
        for name in phases[1:] if most is not None else ():
            within = waits[name].p99 <= most * waits["quiet"].p99
            found.conditions[f"{name}, the 99th percentile is within {most:g} x of the quiet one"] = within
        by_then = not loris.left and timeout_s - 0.1 <= first and last <= timeout_s + late_s
        found.conditions[f"all are gone by their deadline, {timeout_s:g} s, and none before"] = by_then
        loris.close()
    return found


def unread_answers(style: str, count: int, quiet_s: float, most: float | None = None) -> Finding:
    """Clients that ask for 10 MB and read nothing; the honest ones wait as those of `slow_loris` do."""
    found = Finding(f"{count} readers that never read a 10 MB answer, {style} handler")
    readers: list[socket.socket] = []
    with program(style=style) as server:
        with Honest(server.address) as honest:
            pass_by(0.5)
            before = server.memory()
            at = [time.monotonic(), pass_by(quiet_s)]
            gently(lambda: readers.extend(connect_all(server.address, count)))
            for each in readers:
                each.sendall(b"big %d\n" % (10 * MIB))
            at.append(until_blocked(server.address))
            at.append(pass_by(quiet_s))
        held = server.memory() - before
        phases = ("quiet", "while they fill the kernel's buffers", "after that")
        waits = [honest.between(*at[number : number + 2]) for number in range(3)]
        found.figures += [f"{name} ({at[i + 1] - at[i]:.1f} s): {waits[i]}" for i, name in enumerate(phases)]
        found.figures.append(f"{held / count / 1024:.0f} KiB of memory each, {held / MIB:.0f} MiB in all")
        bound = count * Limits().high_water_bytes + 64 * MIB
        found.conditions[f"memory grows by less than {bound / MIB:.0f} MiB"] = held < bound
        if most is not None:
            within = waits[2].p99 <= most * waits[0].p99
            found.conditions[f"blocked, they leave the 99th percentile within {most:g} x of the quiet one"] = within
        with readers[0].makefile("rb") as file:
            found.conditions["one that reads after all gets all of it"] = len(file.read(10 * MIB)) == 10 * MIB
        for each in readers:
            each.close()
    return found


def until_blocked(address: Any) -> float:
    """Wait until the kernel takes no more for any of those that do not read. Returns when that was so."""
    honest_most = 100_000  # bytes that honest clients are sent meanwhile
    with Line(address) as line:
        sent, before = line.stats()["sent"], -honest_most
        while sent > before + honest_most:
            before = sent
            pass_by(0.5)
            sent = line.stats()["sent"]
    return time.monotonic()


def no_descriptors(descriptors: int, count: int, full_s: float) -> Finding:
    """More clients than there are descriptors."""
    found = Finding(f"RLIMIT_NOFILE {descriptors}, {count} clients")
    with program(style="state", descriptors=descriptors) as server, Line(server.address) as line:
        line.stats()
        clients = connect_all(server.address, count)
        for each in clients:
            each.sendall(b"hello\n")
        held = line.stats()["entries"]
        while (entries := line.stats()["entries"]) > held:
            held = entries
        calls, used, begun = line.stats()["accept_calls"], server.processor_s(), time.monotonic()
        took = pass_by(full_s) - begun
        calls, used = line.stats()["accept_calls"] - calls, server.processor_s() - used
        found.figures.append(f"{held} are served at a time")
        found.figures.append(f"{calls / took:.1f} accept calls and {used / took * 1000:.0f} ms of processor a second")
        found.conditions["while full, under 20 accept calls a second"] = calls / took < 20
        found.conditions["while full, under 100 ms of processor a second"] = used / took < 0.1
        served = 0
        begun = time.monotonic()
        for each in clients:
            with each, each.makefile("rb") as file:
                served += file.readline() == b"hello\n"
        found.figures.append(f"{served} are served in the end, within {time.monotonic() - begun:.1f} s")
        found.conditions["all are served in the end"] = served == count
    return found


def long_answer(style: str, dispatch: str, size: int) -> Finding:
    """An answer of `size` bytes to a peer that takes it now fast, now slowly, now not at all."""
    found = Finding(f"a peer that takes {size // MIB} MiB at changing speeds, {style} handler, policy {dispatch}")
    rng = random.Random(1)
    with program(style=style, dispatch=dispatch, samples=True) as server, Line(server.address) as watching:
        watching.stats()
        before = server.memory()
        with Line(server.address) as peer:
            peer.socket.sendall(b"big %d\n" % size)
            taken, held_max, begun = 0, 0, time.monotonic()
            buffer = bytearray(4 * MIB)
            while taken < size:
                most = rng.choice([1_000, 100_000, len(buffer)])
                for _ in range(rng.choice([1, 10, 100])):
                    taken += peer.socket.recv_into(buffer, min(most, size - taken))
                    if taken == size:
                        break
                pass_by(rng.choice([0, 0.001, 0.01]))
            took = time.monotonic() - begun
            whole = peer.ask(b"done\n") == b"done\n"
            held_max = watching.stats()["held_max"]
        grown = server.memory() - before
        found.figures.append(f"in {took:.1f} s; {held_max} bytes held at most, memory grew by {grown / MIB:.1f} MiB")
        bound = Limits().high_water_bytes + 32_768
        found.conditions["all of it came, and nothing else"] = whole
        found.conditions["no more is held than the high-water mark and one send"] = held_max <= bound
        found.conditions["memory is level, to 8 MiB"] = grown < 8 * MIB
    return found


def drain_under_load(style: str, dispatch: str, drain_s: float) -> Finding:
    """Ten clients ask without a pause; each asks until it is told that there is no more, or until the time is over."""
    found = Finding(f"drain under load, {drain_s:g} s, {style} handler, policy {dispatch}")
    limits = {"drain_idle_s": 0.2}
    with program(style=style, dispatch=dispatch, drain_s=drain_s, limits=limits) as server:
        ended: list[tuple[int, float]] = []
        enough = threading.Barrier(HONEST + 1)

        def ask() -> None:
            with Line(server.address) as line:
                asked = 0
                with contextlib.suppress(ConnectionError):
                    while line.ask(b"more\n") == b"more\n":
                        asked += 1
                        if asked == 50:
                            enough.wait(WAIT_S)
                ended.append((asked, time.monotonic()))

        threads = [threading.Thread(target=ask) for _ in range(HONEST)]
        for thread in threads:
            thread.start()
        enough.wait(WAIT_S)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(WAIT_S)
        status = server.process.wait(WAIT_S)
        first = min(at for _, at in ended) - told
        found.figures.append(f"{sum(count for count, _ in ended)} answered; the first was cut after {first:.2f} s")
        found.conditions["no request is cut before its deadline"] = first > drain_s - 0.1
        found.conditions["the server ends well"] = status == 0
    return found


def a_day_of_deadlines() -> Finding:
    """The one that the suite has, which raises where the heap or the memory is not level."""
    from tests.test_deadlines import test_a_day_of_100_000_entries

    found = Finding("24 hours of deadlines of 100,000 entries, by a fake clock")
    begun = time.monotonic()
    test_a_day_of_100_000_entries()
    found.figures.append(f"in {time.monotonic() - begun:.1f} s")
    found.conditions["the heap is bounded, and memory level"] = True
    return found


# -- all of them ------------------------------------------------------------------------------------------------------


def full_size() -> Iterator[tuple[str, Callable[[], Finding]]]:
    yield "loris", lambda: slow_loris("state", 5000, timeout_s=15, every_s=10, quiet_s=5, connect_s=5, most=2, late_s=1)
    yield "loris", lambda: slow_loris("state", 5000, timeout_s=4, every_s=0, quiet_s=5, late_s=1)
    for style in ("state", "async", "blocking"):
        yield "unread", lambda style=style: unread_answers(style, 1000, quiet_s=3, most=2)
    yield "descriptors", lambda: no_descriptors(256, 1000, full_s=3)
    for style, dispatch in BACKPRESSURE:
        yield "backpressure", lambda style=style, dispatch=dispatch: long_answer(style, dispatch, 1024 * MIB)
    for style in ("state", "async", "blocking"):
        yield "drain", lambda style=style: drain_under_load(style, "greenlet", 2)
    yield "day", a_day_of_deadlines


BACKPRESSURE = [(style, "greenlet") for style in ("state", "burst", "async", "blocking")]
BACKPRESSURE += [(style, "thread") for style in ("burst", "async", "blocking")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="loris, unread, descriptors, backpressure, drain, day; default: all")
    parser.add_argument("--honest", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.honest:
        be_honest(given.honest)
        return 0
    broken = 0
    for name, fault in full_size():
        if given.names and name not in given.names:
            continue
        for attempt in range(ATTEMPTS):  # whoever else uses the machine only ever adds to what is measured
            found = fault()
            print(found, flush=True)
            if not found.broken:
                break
            print(f"    attempt {attempt + 1} of {ATTEMPTS}")
        broken += len(found.broken)
    print(f"{broken} conditions are broken" if broken else "all conditions hold")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
