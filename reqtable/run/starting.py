"""Starts the workers of a supervisor, by fork."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, NoReturn, Protocol

from reqtable.config import Config
from reqtable.dispatch.forking.child import fork
from reqtable.loop.process import flush_streams, leave_child
from reqtable.run.known_worker import Ends, Supervising, Worker
from reqtable.run.supervised import StackFile
from reqtable.run.systemd import Notifier
from reqtable.run.takeovers import AnyStandby, Takeovers
from reqtable.run.taking_place import TakingPlace
from reqtable.run.worker import HANDLED, Work
from reqtable.run.worker_moves import WorkerMoves
from reqtable.server.engine import Engine
from reqtable.server.operator import Operator
from reqtable.table.errors import ConfigurationError
from reqtable.table.table import IDS_PER_PROCESS
from reqtable.table.tracebacks import account_of, trim

log = logging.getLogger("reqtable")

_BEAT_S = 1.0  # how often a worker says that its loop runs: so a stuck one is shown with how long it is stuck


class Parent(Supervising, Protocol):
    """The part of a supervisor that a new worker is made from."""

    config: Config
    workers: list[Worker]
    is_accepting: bool
    notifier: Notifier


class Starter:
    """Forks workers of `supervisor`, which serve the bound servers of `served`.

    `on_engine` is called in each worker before it serves. `restore_signals` gives a child of a worker the signal
    handlers from before.
    """

    def __init__(self, supervisor: Parent, served: Engine, on_engine: Callable[[Engine], None] | None) -> None:
        self._supervisor = supervisor
        self._served = served
        self._on_engine = on_engine
        self.restore_signals: Callable[[], None] = lambda: None
        self.takeovers = Takeovers(supervisor.config)
        self.started = 0  # how many workers were started; each has ids of its own

    def start(self, place: TakingPlace | None) -> Worker:
        """Start a worker. It takes requests over its pairs, if it takes its `place` among others. Raises OSError."""
        kinds = (socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
        both = [socket.socketpair(socket.AF_UNIX, kind) for kind in kinds]
        ours, theirs = Ends(*(each[0] for each in both)), Ends(*(each[1] for each in both))
        stacks = StackFile()
        self.started += 1
        pairs = [] if place is None else place.next_pairs()
        standby = self.takeovers.new(self.started)
        # A signal that comes before the worker has its own handlers waits for them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            flush_streams()
            pid = fork()
            if not pid:
                for each in ours:
                    each.close()
                unblock = partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
                self._be_worker(theirs, stacks, standby, unblock, place, pairs)
        except BaseException:
            for end in (*ours, stacks, standby):
                end.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for each in (*theirs, *pairs):
                each.close()
        worker = Worker(pid, ours, stacks, self._supervisor)
        worker.standby = standby
        standby.started(pid, self._supervisor.engine.steps)
        return worker

    def _be_worker(
        self,
        ends: Ends,
        stacks: StackFile,
        standby: AnyStandby,
        unblock: Callable[[], Any],
        place: TakingPlace | None,
        pairs: Sequence[socket.socket],
    ) -> NoReturn:
        supervisor, served = self._supervisor, self._served
        servers: list[Any] = list(served.servers)
        status = 1
        try:
            supervisor.engine.abandon(None)
            self.takeovers.abandon()
            for each in supervisor.workers:
                each.abandon()
            served.loop.on_forked.append(self.restore_signals)
            watchdog_s = supervisor.notifier.watchdog_s or inf
            served.table.last_id = self.started * IDS_PER_PROCESS
            stacks.register(served)
            standby.begin(served, supervisor.config.takeover_attempts)
            operator = Operator(served, supervisor.config)
            if not supervisor.is_accepting:
                operator.announce_drain()
            if self._on_engine is not None:
                self._on_engine(served)
            moves = WorkerMoves(operator, ends.moves)
            if place is not None and place.is_held:
                moves.take(pairs, place.is_direct)
            for server in servers:
                server._make_policies_again()
            standby.restore(served)
            Work(operator, ends, min(_BEAT_S, watchdog_s / 4), moves.moves_on).run(unblock)
            status = 0
        except ConfigurationError as error:
            log.error("worker %d: %s", os.getpid(), error)
        except BaseException as error:
            trim(error)
            log.error("worker %d: %s", os.getpid(), account_of(error), exc_info=error)
        finally:
            leave_child(status)
