"""`Worker`: what a supervisor knows of a worker, and how the supervisor reaches it."""

from __future__ import annotations

import socket
from enum import Enum
from functools import partial
from typing import Protocol

from reqtable.config import Config
from reqtable.control.workers import Caller
from reqtable.dispatch.forking.child import Child
from reqtable.run.supervised import StackFile
from reqtable.run.worker import Channel
from reqtable.server.engine import Engine


class Phase(Enum):
    """Names the phases of a worker's life."""

    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"  # it was told to end


class Supervising(Protocol):
    """The part of a supervisor that its workers report to."""

    engine: Engine
    config: Config

    def heard(self, worker: Worker, word: bytes) -> None: ...
    def ended(self, worker: Worker, child: Child) -> None: ...


class Worker:
    """Holds what the supervisor knows of a worker."""

    def __init__(
        self, pid: int, ends: tuple[socket.socket, socket.socket], stacks: StackFile, supervisor: Supervising
    ) -> None:
        loop = supervisor.engine
        own, line = ends
        self.config = supervisor.config
        self.stacks = stacks
        self.caller = Caller(loop, line)
        self.phase = Phase.STARTING
        self.started_at = self.heard_at = loop.table.clock()
        self.child = Child(loop.steps, pid, partial(supervisor.ended, self))
        self.channel = Channel(loop.loop.poller, own, partial(supervisor.heard, self))

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def phase_name(self) -> str:
        return self.phase.value

    def tell(self, number: int) -> None:
        """Send the worker a signal."""
        self.child.tell(number)

    def abandon(self) -> None:
        """In another worker: close this process's copies of the descriptors."""
        self.child.abandon()
        self.channel.abandon()
        self.caller.line.abandon()
        self.stacks.close()

    def close(self) -> None:
        """Close what led to the worker, which has exited."""
        self.channel.close()
        self.caller.line.close()
        self.stacks.close()
