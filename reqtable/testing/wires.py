"""The interface of a simulated network to its parts: the kernel, the sockets, the selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from reqtable.testing.clock import FakeClock
from reqtable.testing.faults import Dice


class Network(Protocol):
    """Declares what the parts of a `SimNetwork` use of it. A file is what a descriptor stands for (see `kernel`)."""

    clock: FakeClock
    dice: Dice
    latency_s: float  # the shortest time that a byte travels
    complaints: list[str]  # about how the engine and its handlers use it
    was_stalled: bool
    closed: int  # how many descriptors were closed so far
    closed_before_pass: int  # how many were closed before the last poll
    files: dict[int, Any]  # by descriptor
    bound: dict[Any, Any]  # files by kind of socket and address
    on_quiet: Callable[[], None] | None  # called when nothing will ever happen again
    is_over: Callable[[], bool]  # asked when nothing is on its way: only timers may make things happen
    spent_s: float | None  # how long the running task of an executor has blocked; None: no task runs
    outgoing: list[Any]  # the ends of all connections that the engine has begun

    def after(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Call `function(*args)` when `seconds` have passed."""

    def at(self, time: float, function: Callable[..., None], *args: Any) -> None:
        """Call `function(*args)` at that `time`."""

    def next_at(self) -> float:
        """Return the time of the next event; infinity if there is none."""

    def happen(self) -> None:
        """Run the events that are due."""

    def wait(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        """Let time pass until the condition holds."""

    def open(self, file: Any) -> int:
        """Return a new descriptor of the file."""

    def file(self, fd: int) -> Any:
        """Return the file of a descriptor."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def free_port(self) -> int:
        """Return a port that is not in use."""

    def unused_address(self, family: int = ...) -> Any:
        """Return an address that is not in use."""

    def new_end(self, address: Any, local: Any, is_servers: bool) -> Any:
        """Return the end of a socket that is to connect to `address`."""

    def listening_at(self, kind: int, address: Any) -> Any:
        """Return the file that is bound to the address, or None."""
