"""`Standby`: what outlives a worker, so that another one can continue its requests: a journal and a sleeper."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import time
from typing import Any, Final

from reqtable.dispatch.forking.child import Child
from reqtable.handover.journal import Journal, holder_of, new_memory
from reqtable.handover.journalled import stream_for
from reqtable.handover.sleeper import PID, dismiss, make_sleeper, receive_sockets
from reqtable.handover.taking_over import Result, TakingOver, kind_of
from reqtable.loop.poller import Descriptor, close_copy
from reqtable.loop.step import Steps
from reqtable.net.preamble import stream_over
from reqtable.net.stream import Stream
from reqtable.server.engine import Engine
from reqtable.server.hosted import Hosted
from reqtable.table.states import READ

log = logging.getLogger("reqtable")

_FIRST_WORD_S: Final = 1.0  # how long a sleeper may take to say which process it is
_TRIES_AT_ONCE: Final = 3  # how many workers may die, one after another, before one that takes over has to wait
_TRIES_MAX: Final = 10  # and before the requests are given up


class Standby:
    """Holds, in the supervisor, what a successor of one worker needs. `number` tells the workers apart.

    `former` is the standby of the worker whose requests this one continues; its journal goes on.
    """

    def __init__(self, number: int, former: Standby | None) -> None:
        self.number = number
        self.former = former
        self.memory: int = new_memory() if former is None else os.dup(former.memory)
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.tries = 0  # how many workers have died while they took the requests over
        self.pid = 0  # of the worker
        self.died_at = 0.0  # by the clock that all processes share; 0: the worker lives
        self._listening: _Listening | None = None
        self.sleeper: Child | None = None
        self._is_over = False
        self._taking_over: TakingOver | None = None  # in the worker

    # -- in the supervisor --------------------------------------------------------------------------------------------

    def started(self, pid: int, steps: Steps) -> None:
        """The worker was forked. Listen for the sleeper that it makes."""
        self.pid = pid
        self._theirs.close()
        self._listening = _Listening(steps, self)

    def heard(self, steps: Steps, message: bytes) -> None:
        """The sleeper says which process it is."""
        if self._listening is not None:
            self._listening.watch(0)
            self._listening = None
        if len(message) == PID.size:
            self.sleeper = Child(steps, PID.unpack(message)[0], self._sleeper_ended)

    def serves(self) -> None:
        """The worker serves, so it has everything of the one before it."""
        former, self.former = self.former, None
        self.tries = 0
        if former is not None:
            former.close()

    def rest(self) -> Standby | None:
        """The worker has crashed. Return what its successor continues from; None if nothing is there to continue."""
        self._hear_now()
        former, self.former = self.former, None
        if former is not None:  # the worker has died before it served
            self.tries = former.tries = former.tries + 1
            if holder_of(self.memory) != self.number:
                self.close()  # it did not have everything
                return former if former._is_worth_a_try() else None
            former.close()
        self.died_at = time.monotonic()
        return self if self._is_worth_a_try() else None

    def _is_worth_a_try(self) -> bool:
        """Return whether another worker is to continue the requests. If not, give them up."""
        if self.sleeper is not None and self.sleeper.status is None:
            if self.tries < _TRIES_MAX:
                return True
            log.error("the requests of worker %d are given up: %d workers have died of them", self.pid, self.tries)
        self.close()
        return False

    @property
    def may_start_at_once(self) -> bool:
        """Whether the next worker need not wait, because those before it have not failed again and again."""
        return self.tries < _TRIES_AT_ONCE

    def close(self) -> None:
        """End the sleeper, and let the memory go."""
        if self._is_over:
            return
        self._hear_now()
        self._is_over = True
        self.ours.close()
        os.close(self.memory)
        if self.sleeper is not None:
            self.sleeper.kill()
        if self.former is not None:
            self.former.close()

    def _hear_now(self) -> None:
        """The worker has died. Hear the sleeper's first word, unless it was heard: there may be a sleeper by now.

        If there is none, nobody has the other end, so this does not wait.
        """
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self.ours.settimeout(_FIRST_WORD_S)
            self._listening.on_ready(READ)

    def _sleeper_ended(self, sleeper: Child) -> None:
        if not self._is_over and not self.died_at:
            how = sleeper.how_it_failed() or "has ended"
            log.warning("the sleeper of worker %d %s: its requests can't be taken over", self.pid, how)

    # -- in a worker --------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """In another worker: close this process's copies."""
        for each in (self.ours, self._theirs):
            each.close()
        close_copy(self.memory)
        if self.sleeper is not None:
            self.sleeper.abandon()
        if self.former is not None:
            self.former.abandon()

    def begin(self, engine: Engine, attempts_max: int) -> None:
        """In the worker, before it has threads: make its sleeper, and get the sockets of what it is to continue."""
        self.ours.close()
        try:
            make_sleeper(self._theirs)
        except OSError as error:
            log.error("this worker has no sleeper, so its requests can't be taken over: %s", error)
            return
        journal = Journal(self.memory, engine.limits.recv_bytes)
        _journal(engine, journal)
        former = self.former
        if former is None:
            journal.holder = self.number
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the worker before may have died at the limit
        sockets = receive_sockets(former.ours)
        journal.holder = self.number
        dismiss(former.ours, former.sleeper.fd if former.sleeper is not None else -1)
        former.abandon()
        self.former = None

        def done(result: Result) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            took_ms = 1000 * (time.monotonic() - former.died_at)
            log.warning("took over %s of worker %d in %.0f ms%s", result, former.pid, took_ms, result.loss)

        self._taking_over = TakingOver(engine, journal, sockets, attempts_max, done)

    def restore(self, engine: Engine) -> None:
        """In the worker, once its policies are there: take the rows over. They go on when the loop runs."""
        if self._taking_over is not None:
            self._taking_over.restore()
            engine.post(self._taking_over.go_on)


class _Listening(Descriptor):
    """Waits for the first word of a sleeper."""

    __slots__ = ("_standby", "steps")

    def __init__(self, steps: Steps, standby: Standby) -> None:
        super().__init__(steps.poller, standby.ours.fileno())
        self.steps = steps
        self._standby = standby
        self.watch(READ)

    def on_ready(self, mask: int) -> None:
        message = b""
        with contextlib.suppress(OSError):
            message = self._standby.ours.recv(PID.size)
        self._standby.heard(self.steps, message)


def _journal(engine: Engine, journal: Journal) -> None:
    """Have the requests of `engine` written into `journal`, where that is possible."""
    kinds: dict[Any, Any] = {}

    def make(server: Hosted, steps: Steps, request: Any) -> Stream:
        key = server, server._policies.chosen
        if key not in kinds:
            kinds[key] = kind_of(server)
        kind = kinds[key]
        return stream_over(steps, request) if kind is None else stream_for(steps, request, journal, kind)

    engine.intake.make_stream = make
