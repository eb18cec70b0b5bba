"""Gives an engine the operating system as one object, so that a simulation can replace all of it."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from reqtable.loop.selector import DefaultSelector
from reqtable.loop.threads import Threads
from reqtable.loop.wakeup import Wakeup


@dataclass(frozen=True, slots=True)
class System:
    """Gives an engine the operating system. The defaults are the real one."""

    clock: Callable[[], float] = time.monotonic  # seconds; never goes back
    selector: Callable[[], selectors.BaseSelector] = DefaultSelector
    wakeup: Callable[[], Wakeup] = Wakeup
    getaddrinfo: Callable[..., Any] = socket.getaddrinfo  # called in a thread of `executor`
    socket: type[socket.socket] = socket.socket
    dup: Callable[[int], int] = os.dup
    sendfile: Callable[[int, int, int, int], int] = os.sendfile
    executor: Callable[[int, str, Callable[[], bool]], Executor] = Threads  # called with the arguments of Threads
    stalls: bool = True  # a thread watches for steps that hold up the loop
    policies: frozenset[str] | None = None  # the names of the policies that can run on this system; None: all


# New servers and engines use the system that is set here.
SYSTEM: ContextVar[System] = ContextVar("SYSTEM", default=System())  # noqa: B039  # it is frozen
