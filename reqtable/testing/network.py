"""A network in memory, which an engine can't tell from the kernel's network.

The rules:

* Everything that happens later is an event on one queue, sorted by time. Events of the same time happen in the order in
  which they were caused. Time passes in the selector's poll and in blocking calls.
* Descriptors are numbers above those of real descriptors. A new descriptor gets the lowest free number, so code that
  goes on using a closed descriptor soon hits another socket.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from heapq import heappop, heappush
from math import inf
from typing import Any

from reqtable.loop.platform import SYSTEM, System
from reqtable.testing.clock import FakeClock
from reqtable.testing.connecting import OutgoingEnd
from reqtable.testing.faults import Dice, Faults
from reqtable.testing.kernel import File, Listening, StreamEnd, os_error
from reqtable.testing.resolver import Resolver
from reqtable.testing.selector import SimExecutor, SimSelector, SimWakeup
from reqtable.testing.sockets import SimSocket

_FIRST_DESCRIPTOR = 2**30
_FIRST_PORT = 40_000
_LAST_RETRY_S = 32
_BUFFER_BYTES = 65_536


class SimNetwork:
    """Simulates a network, the kernel's sockets, and the passing of time.

    A server that is made in `with network.installed():` uses this network. `seed` and `faults` (None: the default
    faults) decide what goes wrong. `clock` is the clock that the network moves; None: a new one. `latency_s` is the
    shortest time in seconds that a byte travels. `descriptors_max` is the number of descriptors that can be open at the
    same time; None: any. `names` has the addresses of the names that can be looked up. Not thread-safe.

    Raises TypeError for a `seed` that is no whole number, or for `faults` that are no `Faults`.
    """

    def __init__(
        self,
        seed: int = 0,
        faults: Faults | None = None,
        *,
        clock: FakeClock | None = None,
        latency_s: float = 0.0,
        descriptors_max: int | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, not {seed!r}")
        if not isinstance(faults, Faults | None):
            raise TypeError(f"faults must be Faults(…), not {faults!r}")
        self.clock = FakeClock() if clock is None else clock
        self.began_at = self.clock.now
        self.dice = Dice(seed, Faults() if faults is None else faults, lambda name: self.note(f"fault {name}"))
        self.latency_s = latency_s
        self.descriptors_max = descriptors_max
        self.trace: list[str] = []
        self.complaints: list[str] = []  # about how the engine and its handlers use it
        self.was_stalled = False
        self.closed = self.closed_before_pass = 0  # how many descriptors were closed: so far, and before the last poll
        self.files: dict[int, File] = {}  # by descriptor
        self.bound: dict[Any, File] = {}  # by kind of socket and address
        self.on_quiet: Callable[[], None] | None = None  # called when nothing will ever happen again
        self.is_over: Callable[[], bool] = bool  # asked when nothing is on its way: only timers may make things happen
        self.spent_s: float | None = None  # how long the running task of an executor has blocked; None: no task runs
        self.outgoing: list[OutgoingEnd] = []  # all connections that the engine has begun
        self.resolver = Resolver(self, names or {})
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._connections = 0
        self._clients = 0
        self.socket: type[SimSocket] = type("SimSocket", (SimSocket,), {"network": self})
        self.system = System(
            clock=self.clock,
            selector=partial(SimSelector, self),
            wakeup=partial(SimWakeup, self),
            getaddrinfo=self.resolver.getaddrinfo,
            socket=self.socket,
            dup=lambda fd: self.open(self.file(fd)),
            sendfile=self._sendfile,
            executor=partial(SimExecutor, self),
            stalls=False,
            policies=frozenset({"inline", "greenlet", "pool"}),
        )

    @contextmanager
    def installed(self) -> Iterator[System]:
        """Put the servers and engines that are made in this block on this network."""
        token = SYSTEM.set(self.system)
        try:
            yield self.system
        finally:
            SYSTEM.reset(token)

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.clock.now - self.began_at:.6f} {text}")

    # -- time ---------------------------------------------------------------------------------------------------------

    def after(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Call `function(*args)` when `seconds` have passed."""
        self.at(self.clock.now + seconds, function, *args)

    def at(self, time: float, function: Callable[..., None], *args: Any) -> None:
        """Call `function(*args)` at that `time`."""
        self._serial += 1
        heappush(self._events, (time, self._serial, function, args))

    def next_at(self) -> float:
        """Return the time of the next event; infinity if there is none."""
        return self._events[0][0] if self._events else inf

    def happen(self) -> None:
        """Run the events that are due."""
        while self._events and self._events[0][0] <= self.clock.now:
            _, _, function, args = heappop(self._events)
            function(*args)

    def wait(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        """Let time pass until the condition holds. Raises TimeoutError, also if the condition can never hold."""
        until = inf if timeout_s is None else self.clock.now + timeout_s
        while True:
            self.happen()
            if condition():
                return
            if self.clock.now >= until:
                raise TimeoutError("timed out")
            at = min(self.next_at(), until)
            if at == inf:
                self.complaints.append("a blocking call waits for something that never comes")
                raise TimeoutError(self.complaints[-1])
            self.clock.now = max(self.clock.now, at)

    def settle(self) -> None:
        """Run all events that are left, and let their time pass."""
        while self._events:
            self.clock.now = max(self.clock.now, self.next_at())
            self.happen()

    # -- descriptors --------------------------------------------------------------------------------------------------

    def open(self, file: File) -> int:
        """Return a new descriptor of the file. Raises OSError (EMFILE)."""
        if self.descriptors_max is not None and len(self.files) >= self.descriptors_max:
            raise os_error(errno.EMFILE)
        fd = _FIRST_DESCRIPTOR
        while fd in self.files:
            fd += 1
        self.files[fd] = file
        file.descriptors += 1
        return fd

    def file(self, fd: int) -> File:
        """Return the file of a descriptor. Raises OSError (EBADF)."""
        try:
            return self.files[fd]
        except KeyError:
            raise os_error(errno.EBADF) from None

    def close(self, fd: int) -> None:
        file = self.file(fd)
        del self.files[fd]
        self.closed += 1
        file.descriptors -= 1
        if not file.descriptors:
            file.close()

    def _sendfile(self, out: int, source: int, offset: int, count: int) -> int:
        data = os.pread(source, count, offset)
        return self.file(out).send(data) if data else 0

    # -- connections --------------------------------------------------------------------------------------------------

    def free_port(self) -> int:
        """Return a port that is not in use."""
        return next(port for port in range(_FIRST_PORT, 65_536) if all(port not in _ports(key) for key in self.bound))

    def unused_address(self, family: int = socket.AF_INET) -> Any:
        """Return an address for a socket that connects, a new one each time."""
        self._clients += 1
        port = _FIRST_PORT + self._clients
        if family == getattr(socket, "AF_UNIX", None):
            return ""
        return ("2001:db8::fe", port, 0, 0) if family == socket.AF_INET6 else ("198.51.100.254", port)

    def pair(self) -> tuple[SimSocket, SimSocket]:
        """Return the two sockets of a new connection. The first is the server's: only its calls fail at times."""
        near, far = self._connection(("192.0.2.1", 7), ("192.0.2.2", 50_000))
        ours = self.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self.open(near))
        return ours, self.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self.open(far))

    def connect(self, address: Any, local: Any, connected: Callable[[StreamEnd | None], None], wait_s: int = 1) -> None:
        """Connect to a listening socket. Calls `connected` with the client's end, or with None if nobody listens.

        If the listener's queue is full, the attempt is dropped, and repeated after 1, 2, 4, … seconds, six times in all
        (tcp_syn_retries in tcp(7)).
        """
        listening = self.listening_at(socket.SOCK_STREAM, address)
        if wait_s > _LAST_RETRY_S or not isinstance(listening, Listening) or not listening.descriptors:
            connected(None)
        elif len(listening.queue) > listening.backlog:
            self.after(wait_s, self.connect, address, local, connected, 2 * wait_s)
        else:
            near, far = self._connection(address, local)
            listening.queue.append(near)
            connected(far)

    def listening_at(self, kind: int, address: Any) -> File | None:
        """Return the file that is bound to the address, or else to its port on all addresses of the machine."""
        found = self.bound.get((kind, address))
        if found is None and isinstance(address, tuple):
            found = self.bound.get((kind, ("0.0.0.0", address[1]))) or self.bound.get((kind, ("::", *address[1:])))
        return found

    def new_end(self, address: Any, local: Any, is_servers: bool) -> OutgoingEnd:
        """Return the end of a socket that is to connect to `address`. `is_servers` is said of the kernel's `File`."""
        name, windows = self._new_name()
        near = StreamEnd(self, f"{name}<", windows[0], address, local, True)
        far = OutgoingEnd(self, f"{name}>", windows[1], local, address, is_servers)
        near.other, far.other = far, near
        if is_servers:
            self.outgoing.append(far)
        return far

    def _connection(self, address: Any, local: Any) -> tuple[StreamEnd, StreamEnd]:
        name, windows = self._new_name()
        near = StreamEnd(self, f"{name}<", windows[0], address, local, True)
        far = StreamEnd(self, f"{name}>", windows[1], local, address, False)
        near.other, far.other = far, near
        return near, far

    def _new_name(self) -> tuple[str, list[int]]:
        """Return the name of a new connection, and the sizes of its two buffers."""
        self._connections += 1
        name = f"c{self._connections}"
        if self.dice.happens("small_buffer", name):
            return name, [2 ** (4 + self.dice.draw("buffer", name, 8)) for _ in range(2)]  # 16 bytes to 2 KiB
        return name, [_BUFFER_BYTES, _BUFFER_BYTES]


def _ports(key: Any) -> tuple[Any, ...]:
    address = key[1]
    return address[1:2] if isinstance(address, tuple) else ()
