"""`Restart`: starts the next version of the program beside this one, and moves the requests there."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from reqtable.handover.giver import Giver
from reqtable.handover.outcome import Phase
from reqtable.run.successor import Successor, next_range
from reqtable.run.systemd import Notifier
from reqtable.server.drain import Drain
from reqtable.server.engine import Engine
from reqtable.server.operator import Operator
from reqtable.table.errors import ReqtableError
from reqtable.table.words import counted

log = logging.getLogger("reqtable")

ANSWER_S = 0.1  # how long an operator's command has to read the answer before this process exits
_LAST_PASSES = 8

OnOutcome = Callable[[Mapping[str, Any]], Any]


class Restart:
    """Restarts the program of one engine, which runs in this process. One restart at a time."""

    def __init__(self, engine: Engine, operator: Operator, notifier: Notifier) -> None:
        self._engine = engine
        self._operator = operator
        self._notifier = notifier
        self._giver: Giver | None = None
        self._successor: Successor | None = None
        self._only_checks = False
        self._owners: list[Any] = []  # the servers that had their queues for themselves
        self._is_ending = False  # this process was told to end
        self._drain: Drain | None = None
        self._began_at = 0.0
        self._took_s: float | None = None
        self._tell: list[OnOutcome] = []
        self.counts = Counter(done=0, failed=0)

    # -- for an operator ----------------------------------------------------------------------------------------------

    def begin(self, only_checks: bool = False, on_outcome: OnOutcome = bool) -> None:
        """Do what `Restarting.begin` describes."""
        check_free(self._giver is None or self._giver.outcome.is_over, self._successor)
        if any(each._is_draining for each in self._servers()):
            raise ReqtableError("this process drains, so it can't be restarted: start the program again")
        engine, options = self._engine, self._operator.config.restart
        self._giver = giver = Giver(
            engine,
            [(each._endpoint.key, each.socket) for each in self._servers()],
            self._changed,
            options.start_timeout_s,
            options.slice_rows,
            options.unmovable == "drain",
            next_range(engine.table.last_id),
            self.counts + Counter(done=1),
        )
        self._successor, self._only_checks = None, only_checks
        self._tell = [on_outcome]
        self._began_at, self._took_s = engine.table.clock(), None
        if not only_checks:
            self._notifier.reloading()
        self._owners = [each for each in self._servers() if each._owns_queue]
        for server in self._owners:
            server._owns_queue = False
        try:
            self._successor = Successor(
                engine, options.command, self._notifier, giver.receive, giver.fail, partial(self._exited, giver)
            )
        except OSError as error:
            giver.fail(error.strerror or str(error))
        else:
            giver.begin(self._successor.channel)

    def shown(self) -> dict[str, Any] | None:
        """Do what `Restarting.shown` describes."""
        giver = self._giver
        if giver is None:
            return None
        outcome = giver.outcome
        clock = self._engine.table.clock
        return {
            "phase": outcome.phase.value,
            "check": self._only_checks,
            "pid": self.pid,
            "moved": outcome.moved,
            "refused": outcome.refused,
            "left": len(self._engine.table),
            "immovable": dict(outcome.immovable),
            "ago_s": clock() - self._began_at,
            "took_s": self._took_s if self._took_s is not None else clock() - self._began_at,
            "longest_freeze_s": outcome.longest_freeze_s,
            "problem": outcome.problem or None,
        }

    @property
    def pid(self) -> int | None:
        """The process that is to take this one's place."""
        if self._giver is not None and self._giver.pid is not None:
            return self._giver.pid  # the command may have started it in a process of its own
        return None if self._successor is None else self._successor.pid

    def stop(self) -> bool:
        """Do what `Restarting.stop` describes."""
        giver, self._is_ending = self._giver, True
        if giver is None or giver.outcome.phase is Phase.DONE:
            return False
        if giver.outcome.phase is Phase.DRAINING:
            return True
        giver.fail("the old process was told to end")
        if self._successor is not None:
            self._successor.stop(is_needed=giver.outcome.moved > 0)
        return False

    def close(self) -> None:
        """Do what `Restarting.close` describes."""
        most_s = self._engine.limits.drain_timeout_s if self._is_ending else 0.0
        if self.stop() and self._giver is not None:
            self._giver.finish()
        elif self._successor is not None and self._giver is not None and self._giver.outcome.phase is not Phase.DONE:
            self._successor.wait(most_s)  # else it would still have the sockets, and the service would seem to go on

    # -- inside -------------------------------------------------------------------------------------------------------

    def _exited(self, giver: Giver, how: str | None) -> None:
        if giver.outcome.phase is Phase.DRAINING and (how is None or self._is_ending):
            giver.keep_rest("the new process has ended")  # it was told to, so this one ends, too
        else:
            giver.ended(how or "ended by itself")
        self._answer()

    def _changed(self) -> None:
        giver = self._giver
        assert giver is not None
        phase = giver.outcome.phase
        log.debug("restart: %s", phase.value)
        if phase is Phase.REHEARSED:
            (giver.leave_it if self._only_checks else giver.go)()
        elif phase is Phase.DRAINING:
            self._given_away(giver)
        elif phase is Phase.DONE:
            self._engine.call_later(ANSWER_S, leave, self._engine)
        elif phase in (Phase.FAILED, Phase.CHECKED):
            self._go_on(giver)

    def _given_away(self, giver: Giver) -> None:
        """Let what can't move end here: the new process serves now."""
        assert self.pid is not None
        self.counts["done"] += 1
        for server in giver.choice.servers():
            server._is_given_away = True
        left = "; ".join(f"{count} because {why}" for why, count in giver.outcome.immovable.items())
        log.info(
            "restart: %s moved to process %d in %.2f s%s",
            counted(giver.outcome.moved, "request"),
            self.pid,
            self._engine.table.clock() - self._began_at,
            f"; these end here: {left}" if left else "",
        )
        self._notifier.hand_over(self.pid, "serving")
        self._answer()
        self._drain = self._operator.drain(ended=giver.finish)

    def _go_on(self, giver: Giver) -> None:
        """Serve as before: the new process has not come about."""
        for server in self._servers():
            server._is_given_away = False
        for server in self._owners:
            server._owns_queue = True
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None
            self._operator.reopen()
        if self._only_checks:
            say_check(giver.outcome.problem)
        elif giver.outcome.phase is Phase.FAILED:
            self.counts["failed"] += 1
            log.error("restart: this process goes on, because %s", giver.outcome.problem)
            self._notifier.take_back(f"serving; the restart failed: {giver.outcome.problem}")
        if self._successor is not None and self._successor.is_there and not giver.outcome.moved:
            self._successor.end()  # answer then: the operator may ask for another restart at once
        else:
            self._answer()

    def _answer(self) -> None:
        """Tell those who wait for the outcome."""
        if self._took_s is None:
            self._took_s = self._engine.table.clock() - self._began_at
        tell, self._tell = self._tell, []
        for each in tell:
            each(self.shown() or {})

    def _servers(self) -> list[Any]:
        return list(self._engine.servers)


def leave(engine: Engine, passes: int = _LAST_PASSES) -> None:
    """Stop serving after some passes. However late the loop is, an operator gets the answer that is on its way."""
    if passes:
        engine.post(leave, engine, passes - 1)
    else:
        engine.stop()


def say_check(problem: str) -> None:
    """Log how a check went. Nothing has changed, so it is no error."""
    log.info("restart: the check %s", f"has failed: {problem}" if problem else "has found no problem")


def check_free(is_over: bool, successor: Successor | None) -> None:
    """Raise ReqtableError if a restart is under way, or if its process has not ended yet."""
    if not is_over:
        raise ReqtableError("a restart is under way: reqtable stats says how far it is")
    if successor is not None and successor.is_there:
        raise ReqtableError(f"process {successor.pid} of the last restart has not ended yet: try again")
