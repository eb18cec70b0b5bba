"""`Worker`: what a supervisor knows of a worker, and how the supervisor reaches it."""

from __future__ import annotations

import logging
import socket
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol

from reqtable.config import Config
from reqtable.control.workers import Caller
from reqtable.dispatch.forking.child import Child
from reqtable.handover.channel import Channel
from reqtable.run.supervised import StackFile
from reqtable.run.takeovers import AnyStandby, NoStandby
from reqtable.run.worker import Lifeline
from reqtable.server.engine import Engine

log = logging.getLogger("reqtable")

GRACE_S = 5.0  # how long a worker may take to end after its time to drain


class WorkerPhase(Enum):
    """Names the phases of a worker's life."""

    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"  # it was told to end


class Ends(NamedTuple):
    """Holds one side's ends of the three pairs between a supervisor and a worker."""

    life: socket.socket  # each side learns from it whether the other is alive
    line: socket.socket  # the supervisor asks for what an operator wants
    moves: socket.socket  # about the move of the worker's requests, when the supervisor restarts


class Supervising(Protocol):
    """The part of a supervisor that its workers report to."""

    engine: Engine
    config: Config

    def heard(self, worker: Worker, word: bytes) -> None: ...
    def told(self, worker: Worker, message: Any, descriptors: list[int]) -> None: ...
    def ended(self, worker: Worker, child: Child) -> None: ...


class Worker:
    """Holds what the supervisor knows of a worker."""

    def __init__(self, pid: int, ends: Ends, stacks: StackFile, supervisor: Supervising) -> None:
        loop = supervisor.engine
        self.config = supervisor.config
        self.stacks = stacks
        self.standby: AnyStandby = NoStandby()
        self.caller = Caller(loop, ends.line)
        self.phase = WorkerPhase.STARTING
        self.started_at = self.heard_at = loop.table.clock()
        self.child = Child(loop.steps, pid, partial(supervisor.ended, self))
        self.lifeline = Lifeline(loop.loop.poller, ends.life, partial(supervisor.heard, self))
        self.moves = Channel(loop.loop.poller, ends.moves, partial(supervisor.told, self), _nothing)

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def phase_name(self) -> str:
        return self.phase.value

    @property
    def drain_most_s(self) -> float:
        """How long the worker may take to drain and end."""
        return self.config.limits.drain_timeout_s + GRACE_S

    def tell(self, number: int) -> None:
        """Send the worker a signal."""
        self.child.tell(number)

    def end_late(self) -> None:
        """Kill the worker if it has not ended: its time is over."""
        if self.child.status is None:
            log.error("worker %d has not ended in time: killed", self.pid)
            self.child.kill()

    def abandon(self) -> None:
        """In another worker: close this process's copies of the descriptors."""
        self.child.abandon()
        self.lifeline.abandon()
        self.caller.line.abandon()
        self.moves.abandon()
        self.stacks.close()
        self.standby.abandon()

    def close(self) -> None:
        """Close what led to the worker, which has exited."""
        self.lifeline.close()
        self.caller.line.close()
        self.moves.close()
        self.stacks.close()


def _nothing() -> None:
    """Do nothing when that pair ends: `ended` is called when the worker has exited."""
