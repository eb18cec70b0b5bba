"""`Sender`: the part of a channel that a giver and a taker use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from reqtable.handover.messages import Message


class Sender(Protocol):
    """Sends messages to the other process."""

    def send(self, message: Message, holders: Sequence[Any] = (), then: Callable[[], None] | None = None) -> None: ...
    def close(self) -> None: ...


class Nobody:
    """Stands in for the channel to a process that has not been started."""

    def send(self, message: Message, holders: Sequence[Any] = (), then: Callable[[], None] | None = None) -> None:
        """Drop a message."""

    def close(self) -> None:
        """Close nothing."""
