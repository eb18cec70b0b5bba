"""Workers: several processes on the same listening sockets, and the supervisor that keeps them running.

The supervisor holds the bound servers, but never serves. It forks workers, which serve with the sockets they inherit.
So the listening sockets, and new connections in the kernel's queues, outlive any worker.

The supervisor runs a loop of its own, in which a worker is a pidfd and one end of a socket pair. Over the pair, a
worker says that it is ready, and later that its loop still runs. When the supervisor is gone, the worker sees end of
file.

After each event (a death, a signal, a worker that becomes ready), `_balance` compares the workers with what is wanted,
and takes the next steps.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from enum import IntEnum
from functools import partial
from math import inf
from typing import Any

from reqtable.config import Config, changed, differences
from reqtable.control.listening import controlled
from reqtable.dispatch.forking.child import Child
from reqtable.run.back_off import BackOff
from reqtable.run.certificates import stamps_of
from reqtable.run.inherited import Inherited
from reqtable.run.known_worker import Worker, WorkerPhase
from reqtable.run.operated import control_options
from reqtable.run.signals import Progress, answer, begin_restart, handled
from reqtable.run.starting import Starter
from reqtable.run.supervised import SupervisorSource
from reqtable.run.systemd import Notifier
from reqtable.run.taking_place import TakingPlace
from reqtable.run.workers_restart import WorkersRestart
from reqtable.server.configured import reconfigure
from reqtable.server.engine import Engine
from reqtable.server.operator import SET_BY_HAND
from reqtable.table.errors import ConfigurationError
from reqtable.table.table import IDS_PER_PROCESS
from reqtable.table.words import counted

log = logging.getLogger("reqtable")

_YOUNG_S = 1.0  # a worker that dies younger than this is not replaced at once
_AT_ONCE_S = 1.0  # how long "at once" may take
_LOOK_S = 0.5


class Stage(IntEnum):
    """Orders the stages of the supervisor's life."""

    SERVING = 0
    LEAVING = 1  # another process serves, and the workers end by themselves
    DRAINING = 2
    STOPPING = 3


class Supervisor:
    """Keeps as many workers as `config` says running. They serve the bound servers of `served`, which never runs here.

    SIGTERM drains all workers; a second one, or SIGINT, ends them at once. SIGHUP reads the configuration again, and
    replaces one worker after another. SIGTTIN adds a worker, SIGTTOU removes one. SIGUSR1 logs the workers, and has
    each log its table.
    """

    phases = tuple(each.value for each in WorkerPhase)

    def __init__(
        self,
        served: Engine,
        config: Config,
        workers: int | None,
        reload: Callable[[], Config],
        on_engine: Callable[[Engine], None] | None = None,
        inherited: Inherited | None = None,
    ) -> None:
        assert config.workers is not None
        self._servers: list[Any] = list(served.servers)
        self.config = config
        self._wanted = config.workers
        self._pinned = workers  # the number given as an argument; a reload does not change it
        self._reload = reload
        self.starter = Starter(self, served, on_engine)
        self.engine = Engine()
        self.notifier = Notifier(self.engine)
        self.workers: list[Worker] = []
        self._control = ExitStack()
        self.on_worker: list[Callable[[Worker], Any]] = []  # called with each worker that was started
        self.on_worker_end: list[Callable[[Worker], Any]] = []  # called with each worker that has exited
        self.restarts: Counter[str] = Counter(crashed=0, exited=0, reload=0, asked=0)
        self.reloads: Counter[str] = Counter(applied=0, refused=0)
        self._stage = Stage.SERVING
        self._reload_asked = False
        self._reloaded: list[dict[str, Any]] | ConfigurationError = []  # what the last reload changed, or why nothing
        self._certificates = stamps_of(self._servers, config)
        self.is_accepting = True  # False: workers that start later do not accept either
        self.changed_at: float | None = None  # when the configuration was changed last, by the engine's clock
        self.changes: list[dict[str, Any]] = []  # what that has changed
        self._back_off = BackOff(self.engine, self._balance)
        self.restart = WorkersRestart(self, self._servers)
        self.place: TakingPlace | None = None
        if inherited is not None:
            self.notifier.hold()
            self.starter.started = inherited.first_id // IDS_PER_PROCESS - 1
            self.restart.counts.update(inherited.restarts)
            self.place = TakingPlace(self, self._servers, inherited, self._wanted, self.answer)
        # The last configuration that all workers served by, and the last status that was told.
        self._told: tuple[Config | None, str] = (None, "")

    def run(self) -> None:
        """Supervise until told to end, and no worker is left."""
        with handled(self._handlers()) as self.starter.restore_signals:
            for server in self._servers:
                if server.socket_type == socket.SOCK_STREAM:
                    # All processes share this setting of the socket: no worker may make it blocking for the others.
                    server.socket.setblocking(False)
            self._release_policies()
            gc.collect()
            gc.freeze()  # or a worker's collections would copy every page of what exists already
            self.engine.post(self._balance)
            with self._control:
                if self.place is None:
                    self.answer()
                self.engine.run(lambda: self._stage is not Stage.SERVING and not self.workers)
        self.notifier.stopping("ended")

    def answer(self, again: bool = False) -> None:
        """Answer operators, and tell systemd how many workers are ready. `again`: another process did so meanwhile."""
        options, replaces = control_options(self.config.control), again or self.place is not None
        options = replace(options, page=None, metrics=None) if again else options  # it has the ports still
        self._control.enter_context(controlled(self.engine, options, SupervisorSource(self), replaces))
        if not again:
            self.notifier.begin(partial(_are_well, self))
        self.engine.post(self._balance)

    def _handlers(self) -> dict[int, Callable[..., Any]]:
        post = self.engine.post
        return {
            signal.SIGINT: lambda *_: self._end(Stage.STOPPING),
            signal.SIGTERM: lambda *_: self.begin_drain(),
            signal.SIGHUP: lambda *_: post(self.ask_reload),
            signal.SIGTTIN: lambda *_: post(self._want, 1),
            signal.SIGTTOU: lambda *_: post(self._want, -1),
            signal.SIGUSR1: lambda *_: post(self._show),
            signal.SIGUSR2: lambda *_: post(begin_restart, self.restart),
        }

    # -- what is wanted, and what there is ----------------------------------------------------------------------------

    def _balance(self) -> None:
        """Take the next steps until there are as many workers as wanted, all with the current configuration."""
        while self._stage is Stage.SERVING and not self.restart.is_under_way:
            serving = [each for each in self.workers if each.phase is not WorkerPhase.LEAVING]
            former = [each for each in serving if each.config is not self.config]
            if self._reload_asked and (not former or self._back_off.is_on):
                self._take_new_configuration()
                continue
            room = self._wanted + bool(former) - len(serving)  # one more while former ones are replaced
            if room > 0 and not self._back_off.is_on:
                self._start()
                continue
            if room < 0 or (room == 0 and former and _are_ready(serving, but=former)):
                leaving = (former or serving[::-1])[0]
                self.restarts["reload"] += bool(former)
                self.dismiss(leaving, signal.SIGTERM, leaving.drain_most_s)
                continue
            self._tell(serving, former)
            if not self._back_off.is_on:
                self.starter.takeovers.close()  # fewer workers are wanted now
            return

    def _want(self, more: int) -> None:
        self._wanted = max(1, self._wanted + more)
        self._balance()

    def _tell(self, serving: list[Worker], former: list[Worker]) -> None:
        """Tell systemd and the log how many workers are ready, if that has changed."""
        if self.place is not None and self.place.is_held:
            return  # the process before serves
        ready = sum(each.phase is WorkerPhase.SERVING for each in serving)
        status = f"{ready} of {self._wanted} workers are ready"
        is_settled = not former and ready == self._wanted
        config = self.config if is_settled else self._told[0]
        if config is self._told[0] and status == self._told[1]:
            return
        self._told = config, status
        if is_settled:
            log.info(status)
            self.notifier.ready(status)
        else:
            self.notifier.say(status)

    def _show(self) -> None:
        now = self.engine.table.now
        rows = [f"{each.pid} {each.phase.value}, {now - each.started_at:.0f} s old" for each in self.workers]
        answer("\n".join([f"{counted(len(rows), 'worker')}, {self._wanted} wanted", *rows]))
        for each in self.workers:
            each.tell(signal.SIGUSR1)

    # -- starting a worker --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            self.workers.append(self.starter.start(self.place))
            for told in tuple(self.on_worker):
                told(self.workers[-1])
        except OSError as error:
            self._back_off.failed(self.engine.table.now)
            log.error("a worker can't be started, next try in %g s: %s", self._back_off.left_s, error)
            if self.place is not None and self.place.is_held:
                self.place.refuse(f"a worker can't be started: {error}")

    def heard(self, worker: Worker, word: bytes) -> None:
        worker.heard_at = self.engine.table.now
        if word and worker.phase is WorkerPhase.STARTING:
            worker.phase = WorkerPhase.SERVING
            worker.standby.serves()
            self.engine.call_later(_YOUNG_S, self._lasts, worker)
            if self.place is not None and all(each.phase is WorkerPhase.SERVING for each in self.workers):
                self.place.ready()
            self._balance()

    def told(self, worker: Worker, message: Any, descriptors: list[int]) -> None:
        """Note what a worker says of a move of its requests."""
        self.restart.told(worker, message)
        if self.place is not None:
            self.place.told(worker, message)

    def _lasts(self, worker: Worker) -> None:
        if worker in self.workers:
            self._back_off.lasted()

    # -- ending a worker ----------------------------------------------------------------------------------------------

    def ended(self, worker: Worker, child: Child) -> None:
        """Forget a worker, which has exited and was reaped. Log how it ended, unless it ended well when told to."""
        self.workers.remove(worker)
        worker.caller.line.hear_out()
        for told in self.on_worker_end:
            told(worker)
        worker.close()
        self.restart.worker_ended(worker)
        if self.place is not None:
            self.place.worker_ended(worker)
        how = child.how_it_failed()
        lived_s = self.engine.table.now - worker.started_at
        is_restart = self.restart.is_under_way and worker.phase is not WorkerPhase.LEAVING
        is_meant = is_restart or worker.phase is WorkerPhase.LEAVING or self._stage is not Stage.SERVING
        goes_on = self.starter.takeovers.ended(worker.standby, crashed=how is not None and not is_meant)
        if is_meant:
            if how is not None:
                text = "worker %d %s during the restart" if is_restart else "worker %d, which was told to end, %s"
                log.warning(text, worker.pid, how)
        else:
            if not goes_on and (worker.phase is WorkerPhase.STARTING or lived_s < _YOUNG_S):
                self._back_off.failed(worker.started_at)
            self.restarts["crashed" if how else "exited"] += 1
            wait_s = self._back_off.left_s
            then = f"in {wait_s:.1f} s" if wait_s else "now"
            level = logging.INFO if how is None else logging.WARNING
            text = "worker %d %s after %.2f s; another one starts %s"
            log.log(level, text, worker.pid, how or "ended by itself", lived_s, then)
        self._balance()

    def dismiss(self, worker: Worker, number: int, within_s: float) -> None:
        """Tell a worker to end, and kill it if it has not ended `within_s` seconds later."""
        worker.phase = WorkerPhase.LEAVING
        worker.tell(number)
        self.engine.call_later(within_s, worker.end_late)

    def _end(self, stage: Stage) -> None:
        """Enter `stage` at once, in the signal handler: a worker that ends from here on was meant to end."""
        if stage > self._stage:
            self._stage = stage
            self.engine.post(self.restart.stop)
            self.engine.post(self._dismiss_all, stage)

    def begin_drain(self) -> None:
        """Drain all workers, then end. End them at once if they drain already."""
        self._end(Stage.DRAINING if self._stage < Stage.DRAINING else Stage.STOPPING)

    def leave(self) -> None:
        """End when the last worker has: another process serves in this one's place."""
        self._stage = max(self._stage, Stage.LEAVING)

    def stay(self) -> None:
        """Serve as before: no other process has taken this one's place."""
        if self._stage is Stage.LEAVING:
            self._stage = Stage.SERVING
        self._balance()

    def _dismiss_all(self, stage: Stage) -> None:
        self.starter.takeovers.close()
        for worker in self.workers:
            if stage is Stage.DRAINING:
                self.dismiss(worker, signal.SIGTERM, worker.drain_most_s)
            else:
                self.dismiss(worker, signal.SIGINT, _AT_ONCE_S)
        if stage is Stage.DRAINING:
            self.notifier.stopping(f"draining {counted(len(self.workers), 'worker')}")
            until = self.engine.table.now + self.config.limits.drain_timeout_s
            self._show_progress(Progress(" workers"), until)

    def _show_progress(self, progress: Progress, until: float) -> None:
        progress(len(self.workers), max(0.0, until - self.engine.table.now))
        if self._stage is Stage.DRAINING:
            self.engine.call_later(_LOOK_S, self._show_progress, progress, until)

    # -- for an operator ----------------------------------------------------------------------------------------------

    def set_config(self, changes: Mapping[str, Any]) -> None:
        """Change some values, for the workers that start from here on. The caller tells those that serve."""
        config = changed(self.config, changes, SET_BY_HAND)
        reconfigure(self._servers, config)
        self._release_policies()
        for worker in self.workers:
            if worker.config is self.config:
                worker.config = config  # it is not a former one: it takes the change as it serves
        if self._told[0] is self.config:
            self._told = config, self._told[1]
        self.changes, self.changed_at = differences(self.config, config), self.engine.table.clock()
        self.config = config

    def replace_worker(self, worker: Worker) -> None:
        """Drain one worker. Another one takes its place."""
        self.restarts["asked"] += 1
        self.dismiss(worker, signal.SIGTERM, worker.drain_most_s)
        self._balance()

    # -- the configuration --------------------------------------------------------------------------------------------

    def ask_reload(self) -> list[dict[str, Any]] | ConfigurationError:
        """Read the configuration again. If something has changed, replace all workers.

        Returns what has changed, or why that is not done, or not yet.
        """
        self._reload_asked = True
        self._balance()
        if self._reload_asked:
            return ConfigurationError("workers are still being replaced: the reload follows when that is done")
        return self._reloaded

    def _take_new_configuration(self) -> None:
        """Read the configuration and apply it, or keep the one before. If applied, all workers are former ones now.

        No worker is replaced if neither a value nor a certificate's file has changed: that would only end connections.
        """
        self._reload_asked = False
        self.notifier.reloading()
        try:
            config = self._reload()
            config = replace(config, workers=self._pinned or config.workers)
            certificates = stamps_of(self._servers, config)
            has_changed = config != self.config or certificates != self._certificates
            if has_changed:
                reconfigure(self._servers, config)
        except ConfigurationError as error:
            self.reloads["refused"] += 1
            log.error("the new configuration was refused, the old one stays in force: %s", error)
            self._reloaded = error
            if self._told[0] is self.config:
                self.notifier.ready(self._told[1])
            return
        self.reloads["applied"] += 1
        self._reloaded = differences(self.config, config)
        self._wanted = config.workers or self._wanted
        self._back_off.reset()
        if has_changed:
            log.info("the configuration was read again: another worker takes the place of each")
            self._release_policies()
            self._certificates, self.config = certificates, config
        else:
            log.info("the configuration was read again: nothing has changed, so no worker is replaced")
            self._told = self._told[0], ""  # tells again that the workers are ready
        if self._reloaded:
            self.changes, self.changed_at = self._reloaded, self.engine.table.clock()

    def _release_policies(self) -> None:
        """Close the policies, which only showed that the configuration works. Each worker makes its own."""
        for server in self._servers:
            server._policies.close(wait=True)


def _are_ready(serving: list[Worker], but: list[Worker]) -> bool:
    return all(each.phase is WorkerPhase.SERVING for each in serving if each not in but)


def _are_well(supervisor: Supervisor) -> bool:
    most_s = supervisor.notifier.watchdog_s or inf
    now = supervisor.engine.table.now
    return all(now - each.heard_at <= most_s for each in supervisor.workers if each.phase is not WorkerPhase.LEAVING)
