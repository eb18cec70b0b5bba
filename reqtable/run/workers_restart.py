"""`WorkersRestart`: restarts a supervisor. The workers of the next one take the requests of its workers, one by one."""

from __future__ import annotations

import logging
import signal
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Protocol

from reqtable.config import Config
from reqtable.handover import messages
from reqtable.handover.messages import Message
from reqtable.handover.outcome import Phase
from reqtable.loop.mailbox import Timer
from reqtable.run.givers import Givers
from reqtable.run.known_worker import Worker, WorkerPhase
from reqtable.run.restarting import ANSWER_S, OnOutcome, check_free, say_check
from reqtable.run.starting import Starter
from reqtable.run.successor import Successor
from reqtable.run.systemd import Notifier
from reqtable.run.taking_place import TakingPlace
from reqtable.server.engine import Engine
from reqtable.table.errors import ReqtableError
from reqtable.table.table import IDS_PER_PROCESS
from reqtable.table.words import counted

log = logging.getLogger("reqtable")

_UNDER_WAY = {Phase.STARTING, Phase.REHEARSING, Phase.MOVING, Phase.DRAINING}
_LOOK_S = 0.5  # how often the supervisor looks whether the workers that are to move are stuck


class Restarted(Protocol):
    """The part of a supervisor that its restart uses."""

    engine: Engine
    config: Config
    notifier: Notifier
    workers: list[Worker]
    starter: Starter
    place: TakingPlace | None

    def answer(self, again: bool = False) -> None: ...
    def leave(self) -> None: ...
    def stay(self) -> None: ...
    def dismiss(self, worker: Worker, number: int, within_s: float) -> None: ...


class WorkersRestart:
    """Restarts the supervisor of `servers`. One restart at a time.

    All workers rehearse at the same time. Then one after another moves its requests: what can't move ends in it.
    """

    def __init__(self, supervisor: Restarted, servers: Sequence[Any]) -> None:
        self._supervisor = supervisor
        self._servers = servers
        self._successor: Successor | None = None
        self._number = 0
        self._phase = Phase.DONE
        self._only_checks = False
        self._givers = Givers()
        self._problem = ""
        self._began_at = 0.0
        self._took_s: float | None = None
        self._tell: list[OnOutcome] = []
        self._timer: Timer | None = None
        self.counts = Counter(done=0, failed=0)

    @property
    def is_under_way(self) -> bool:
        """Whether a restart has begun and not failed. Meanwhile no worker is replaced."""
        return self._phase in _UNDER_WAY

    # -- for an operator ----------------------------------------------------------------------------------------------

    def begin(self, only_checks: bool = False, on_outcome: OnOutcome = bool) -> None:
        """Do what `Restarting.begin` describes."""
        supervisor = self._supervisor
        check_free(not self.is_under_way, self._successor)
        if supervisor.place is not None and not supervisor.place.is_over:
            raise ReqtableError("the process before still gives its requests to this one: try again")
        serving = [each for each in supervisor.workers if each.phase is WorkerPhase.SERVING]
        if not serving or any(each.phase is WorkerPhase.STARTING for each in supervisor.workers):
            raise ReqtableError("some workers are still starting: try again when reqtable workers shows none")
        options = supervisor.config.restart
        self._number += 1
        self._givers = Givers(serving)
        self._successor, self._only_checks, self._problem, self._tell = None, only_checks, "", [on_outcome]
        self._began_at, self._took_s = supervisor.engine.table.clock(), None
        if not only_checks:
            supervisor.notifier.reloading()
        why = f"the new process has not started within {options.start_timeout_s:g} s"
        self._enter(Phase.STARTING, supervisor.engine.call_later(options.start_timeout_s, self._fail, why))
        try:
            self._successor = Successor(
                supervisor.engine,
                options.command,
                supervisor.notifier,
                self._hear,
                self._fail,
                self._successor_ended,
            )
        except OSError as error:
            self._fail(error.strerror or str(error))

    def shown(self) -> dict[str, Any] | None:
        """Do what `Restarting.shown` describes: the sums over all workers."""
        if not self._givers.workers:
            return None
        clock = self._supervisor.engine.table.clock
        return {
            "phase": self._phase.value,
            "check": self._only_checks,
            "pid": None if self._successor is None else self._successor.pid,
            **self._givers.shown(),
            "ago_s": clock() - self._began_at,
            "took_s": self._took_s if self._took_s is not None else clock() - self._began_at,
            "problem": self._problem or None,
        }

    def stop(self) -> bool:
        """Do what `Restarting.stop` describes. The new process ends, too, unless it has taken the place."""
        if self._phase is Phase.DRAINING:
            return True
        if self.is_under_way:
            self._problem = "the old process was told to end"
            self._end(Phase.FAILED, self._problem)
        if self._successor is not None:
            self._successor.stop(is_needed=True)
        return False

    def close(self) -> None:
        """Do what `Restarting.close` describes."""
        self.stop()

    # -- the next supervisor ------------------------------------------------------------------------------------------

    def _hear(self, message: Message, descriptors: Sequence[int]) -> None:
        ends = [socket.socket(fileno=each) for each in descriptors]
        if self._phase is Phase.DRAINING or not self.is_under_way:
            pass  # it comes too late
        elif isinstance(message, messages.Refuse):
            self._fail(message.reason)
        elif isinstance(message, messages.Hello):
            self._offer(message)
        elif isinstance(message, messages.Ready) and len(ends) == len(self._givers.workers):
            self._watch(Phase.REHEARSING)
            for worker, end in zip(self._givers.workers, ends, strict=True):
                worker.moves.hand_on(messages.Give(self._number), [end])
            return
        else:
            self._fail(f"the new process sent {type(message).__name__} with {len(ends)} descriptors, not expected now")
        for end in ends:
            end.close()

    def _offer(self, message: messages.Hello) -> None:
        assert self._successor is not None
        if messages.FORMAT not in message.formats:
            self._fail(f"the new process does not know format {messages.FORMAT} of messages, but {message.formats}")
            return
        keys = [each._endpoint.key for each in self._servers]
        first_id = (self._supervisor.starter.started + 1) * IDS_PER_PROCESS
        restarts = self.counts + Counter(done=1)
        offer = messages.Offer(messages.FORMAT, keys, first_id, len(self._givers.workers), restarts)
        self._successor.channel.send(offer, [each.socket for each in self._servers])

    def _successor_ended(self, how: str | None) -> None:
        if self._phase is not Phase.DRAINING:
            self._fail(f"the new process {how or 'ended by itself'}")
            self._answer()
        elif how is not None:  # else it was told to end, so this one ends, too
            self._take_back(f"the new process {how}")

    # -- the workers --------------------------------------------------------------------------------------------------

    def told(self, worker: Worker, message: Message) -> None:
        """Note how far a worker is, and take the next step."""
        if not isinstance(message, messages.Progress) or message.restart != self._number:
            return
        givers, had_moved = self._givers, self._givers.has_moved(worker)
        givers.note(worker, message)
        has_failed = message.phase == Phase.FAILED.value
        if self._phase is Phase.REHEARSING and has_failed:
            self._fail(message.problem)
        elif self._phase is Phase.REHEARSING and givers.have_rehearsed:
            self._rehearsed()
        elif self._phase is Phase.MOVING and has_failed and not had_moved:
            self._could_not_move(worker, message.problem)
        elif self._phase is Phase.MOVING and worker is givers.moving and givers.has_moved(worker):
            self._move_next()

    def worker_ended(self, worker: Worker) -> None:
        """Go on without a worker, which has exited."""
        if worker not in self._givers.workers:
            return
        if self._phase in (Phase.STARTING, Phase.REHEARSING):
            self._fail(f"worker {worker.pid} {worker.child.how_it_failed() or 'has ended'}")
        elif self._phase is Phase.MOVING and self._givers.leave_out(worker):
            self._move_next()

    def _rehearsed(self) -> None:
        if self._only_checks:
            self._abort("it was only a check")
            self._end(Phase.CHECKED, "it was only a check")
            say_check("")
            self._supervisor.stay()
            return
        self._watch(Phase.MOVING)
        self._move_next()

    def _move_next(self) -> None:
        worker = self._givers.next()
        if worker is None:
            self._given_away()
        else:
            worker.moves.send(messages.Go())

    def _could_not_move(self, worker: Worker, problem: str) -> None:
        """Drain a worker that could not move its requests. If nothing has moved yet, the restart has failed."""
        if not self._givers.some_have_moved:
            self._fail(problem)
            return
        log.error("restart: worker %d could not move its requests, so it drains: %s", worker.pid, problem)
        self._supervisor.dismiss(worker, signal.SIGTERM, worker.drain_most_s)
        if self._givers.leave_out(worker):
            self._move_next()

    def _given_away(self) -> None:
        """Let what can't move end in the workers: the new supervisor's workers serve now."""
        assert self._successor is not None
        engine = self._supervisor.engine
        self._enter(Phase.DRAINING)
        for server in self._servers:
            server._is_given_away = True
        self.counts["done"] += 1
        self._answer()
        found = self.shown() or {}
        moved = counted(found["moved"], "request")
        log.info("restart: %s moved to process %s in %.2f s", moved, found["pid"], found["took_s"])
        self._supervisor.notifier.hand_over(self._successor.pid, "serving")
        self._successor.channel.send(messages.Done())
        engine.call_later(ANSWER_S, self._leave)
        for worker in self._supervisor.workers:
            if worker.drain_most_s < inf:
                engine.call_later(worker.drain_most_s, self._end_stuck, worker)

    def _leave(self) -> None:
        if self._phase is Phase.DRAINING:
            self._supervisor.leave()

    # -- workers that are stuck ---------------------------------------------------------------------------------------

    def _watch(self, phase: Phase) -> None:
        """Enter a phase in which workers have something to do."""
        self._enter(phase, self._supervisor.engine.every(_LOOK_S, self._look_for_stuck))

    def _look_for_stuck(self) -> None:
        """Go on without a worker whose loop does not run: it would never move."""
        most_s = self._supervisor.config.restart.start_timeout_s
        since = self._supervisor.engine.table.clock() - most_s
        worker = self._givers.stuck_since(since) if since > self._began_at else None
        if worker is not None:
            problem = f"worker {worker.pid} has been stuck for {most_s:g} s: reqtable workers shows where"
            self._could_not_move(worker, problem)

    def _end_stuck(self, worker: Worker) -> None:
        if self._phase is Phase.DRAINING:
            worker.end_late()

    # -- failure ------------------------------------------------------------------------------------------------------

    def _fail(self, problem: str) -> None:
        """Serve as before. Requests that have moved go on in the new process as long as that is there."""
        if not self.is_under_way:
            return
        may_be_replaced = self._phase is Phase.MOVING
        self._abort(problem)
        self._problem = problem
        self._end(Phase.FAILED, problem)
        if self._only_checks:
            say_check(problem)
        else:
            self.counts["failed"] += 1
            log.error("restart: this process goes on, because %s", problem)
            self._supervisor.notifier.take_back(f"serving; the restart failed: {problem}")
        if may_be_replaced:
            self._supervisor.answer(again=True)
        self._supervisor.stay()

    def _end(self, phase: Phase, reason: str) -> None:
        """End the restart, and have the new process end: at once, if it can have no requests. Answer after that."""
        may_have_some = self._phase is Phase.MOVING
        self._enter(phase)
        successor = self._successor
        if successor is None or not successor.is_there:
            self._answer()
            return
        successor.channel.send(messages.Abort(reason))
        if may_have_some:
            self._answer()
        else:
            successor.end()

    def _take_back(self, problem: str) -> None:
        """Serve again, although the new process has served: it is gone."""
        self._problem = problem
        for server in self._servers:
            server._is_given_away = False
        self.counts["failed"] += 1
        self._abort(problem)
        self._enter(Phase.FAILED)
        log.error("restart: this process serves again, because %s", problem)
        self._supervisor.notifier.take_back(f"serving; the restart failed: {problem}")
        self._supervisor.answer(again=True)
        self._supervisor.stay()

    def _abort(self, reason: str) -> None:
        """Have the workers keep what they have not given away."""
        for worker in self._givers.workers:
            if worker in self._supervisor.workers:
                worker.moves.send(messages.Abort(reason))

    def _enter(self, phase: Phase, timer: Timer | None = None) -> None:
        """Enter a phase, for which `timer` runs."""
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer
        log.debug("restart: %s", phase.value)

    def _answer(self) -> None:
        """Tell those who wait for the outcome."""
        if self._took_s is None:
            self._took_s = self._supervisor.engine.table.clock() - self._began_at
        tell, self._tell = self._tell, []
        found: Mapping[str, Any] = self.shown() or {}
        for each in tell:
            each(found)
