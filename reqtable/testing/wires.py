"""What the parts of a simulated network (its kernel, its sockets, its selector) ask of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from reqtable.testing.clock import FakeClock
from reqtable.testing.faults import Dice


class Network(Protocol):
    """A `SimNetwork`, as its parts see it. A file is what a descriptor of it stands for (`kernel`)."""

    clock: FakeClock
    dice: Dice
    latency_s: float  # how long a byte is under way at the least
    complaints: list[str]  # about how the engine and its handlers use it
    was_stalled: bool
    closed: int  # descriptors, so far
    closed_before_pass: int  # by the last poll
    files: dict[int, Any]  # by descriptor
    bound: dict[Any, Any]  # files by kind of socket and address
    on_quiet: Callable[[], None] | None  # called when nothing will ever happen again

    def after(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Have `function(*args)` called in so many seconds."""

    def at(self, time: float, function: Callable[..., None], *args: Any) -> None:
        """Have `function(*args)` called at that time."""

    def next_at(self) -> float:
        """When something happens next."""

    def happen(self) -> None:
        """Have what is due happen."""

    def wait(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        """Let time pass until the condition holds."""

    def open(self, file: Any) -> int:
        """A descriptor for the file."""

    def file(self, fd: int) -> Any:
        """The file of a descriptor."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def free_port(self) -> int:
        """A port that nobody has."""

    def unused_address(self) -> Any:
        """An address that nobody has."""

    def connect(self, address: Any, local: Any, connected: Callable[[Any], None], wait_s: int = 1) -> None:
        """Connect to what listens at `address`."""

    def listening_at(self, kind: int, address: Any) -> Any:
        """The file that is bound there; None where none is."""
