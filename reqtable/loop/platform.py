"""What an engine takes from the operating system, in one object, so that a simulation can stand in for all of it."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from dataclasses import dataclass

from reqtable.loop.selector import DefaultSelector
from reqtable.loop.threads import Threads
from reqtable.loop.wakeup import Wakeup


@dataclass(frozen=True, slots=True)
class System:
    """The defaults are the real one's."""

    clock: Callable[[], float] = time.monotonic  # seconds; never goes back
    selector: Callable[[], selectors.BaseSelector] = DefaultSelector
    wakeup: Callable[[], Wakeup] = Wakeup
    socket: type[socket.socket] = socket.socket
    dup: Callable[[int], int] = os.dup
    sendfile: Callable[[int, int, int, int], int] = os.sendfile
    executor: Callable[[int, str, Callable[[], bool]], Executor] = Threads  # how many threads, their name, may_leave
    stalls: bool = True  # a step may hold up the loop, and a thread looks on
    policies: frozenset[str] | None = None  # what can run on it; None: all


# Servers and engines are made in the one that is set here.
SYSTEM: ContextVar[System] = ContextVar("SYSTEM", default=System())  # noqa: B039  # it is frozen
