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
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, IntEnum
from functools import partial
from math import inf
from typing import Any, NoReturn

from reqtable.config import Config
from reqtable.dispatch.forking.child import Child, fork
from reqtable.loop.process import flush_streams, leave_child
from reqtable.run.signals import Progress, answer, counted, handled, in_main_thread
from reqtable.run.systemd import Notifier
from reqtable.run.worker import HANDLED, Channel, work
from reqtable.server.configured import reconfigure
from reqtable.server.engine import Engine
from reqtable.table.errors import ConfigurationError

log = logging.getLogger("reqtable")

_YOUNG_S = 1.0  # a worker that dies younger than this is not replaced at once
_BACK_OFF_S, _BACK_OFF_MAX_S = 0.1, 30.0
_GRACE_S = 5.0  # how long a worker may take to end after its time to drain
_AT_ONCE_S = 1.0  # how long "at once" may take
_LOOK_S = 0.5


class Phase(Enum):
    """Names the phases of a worker's life."""

    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"  # it was told to end


class Stage(IntEnum):
    """Orders the stages of the supervisor's life."""

    SERVING = 0
    DRAINING = 1
    STOPPING = 2


def check_workers(config: Config) -> None:
    """Raise ConfigurationError if `config` asks for workers, but there can't be any."""
    if config.workers is None:
        return
    if not hasattr(os, "fork"):
        raise ConfigurationError(f"workers = {config.workers}: this platform has no fork(): leave it out")
    if not in_main_thread():
        raise ConfigurationError(f"workers = {config.workers}: call serve() in the main thread, where signals come")


class _Worker:
    """Holds what the supervisor knows of a worker."""

    def __init__(self, loop: Engine, pid: int, own: socket.socket, config: Config, supervisor: Supervisor) -> None:
        self.config = config
        self.phase = Phase.STARTING
        self.started_at = self.heard_at = loop.table.clock()
        self.child = Child(loop.steps, pid, partial(supervisor._ended, self))
        self.channel = Channel(loop.loop.poller, own, partial(supervisor._heard, self))

    @property
    def pid(self) -> int:
        return self.child.pid

    def tell(self, number: int) -> None:
        """Send the worker a signal."""
        self.child.tell(number)

    def abandon(self) -> None:
        """In another worker: close this process's copies of the descriptors."""
        self.child.abandon()
        self.channel.abandon()


class Supervisor:
    """Keeps as many workers as `config` says running. They serve the bound servers of `served`, which never runs here.

    SIGTERM drains all workers; a second one, or SIGINT, ends them at once. SIGHUP reads the configuration again, and
    replaces one worker after another. SIGTTIN adds a worker, SIGTTOU removes one. SIGUSR1 logs the workers, and has
    each log its table.
    """

    def __init__(self, served: Engine, config: Config, workers: int | None, reload: Callable[[], Config]) -> None:
        assert config.workers is not None
        self._served = served
        self._servers: list[Any] = list(served.servers)
        self._config = config
        self._wanted = config.workers
        self._pinned = workers  # the number given as an argument; a reload does not change it
        self._reload = reload
        self._loop = Engine()
        self._notifier = Notifier(self._loop)
        self._workers: list[_Worker] = []
        self._stage = Stage.SERVING
        self._reload_asked = False
        self._not_before = -inf  # when the next worker may be started
        self._back_off_s = 0.0
        # The last configuration that all workers served by, and the last status that was told.
        self._told: tuple[Config | None, str] = (None, "")
        self._restore_signals: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Supervise until told to end, and no worker is left."""
        with handled(self._handlers()) as self._restore_signals:
            for server in self._servers:
                if server.socket_type == socket.SOCK_STREAM:
                    # All processes share this setting of the socket: no worker may make it blocking for the others.
                    server.socket.setblocking(False)
            self._release_policies()
            gc.collect()
            gc.freeze()  # or a worker's collections would copy every page of what exists already
            self._loop.post(self._balance)
            self._loop.post(self._notifier.feed_watchdog, self._all_are_well)
            self._loop.run(lambda: self._stage is not Stage.SERVING and not self._workers)
        self._notifier.stopping("ended")

    def _handlers(self) -> dict[int, Callable[..., Any]]:
        post = self._loop.post
        return {
            signal.SIGINT: lambda *_: self._end(Stage.STOPPING),
            signal.SIGTERM: lambda *_: self._end(Stage(min(self._stage + 1, Stage.STOPPING))),
            signal.SIGHUP: lambda *_: post(self._ask_reload),
            signal.SIGTTIN: lambda *_: post(self._want, 1),
            signal.SIGTTOU: lambda *_: post(self._want, -1),
            signal.SIGUSR1: lambda *_: post(self._show),
        }

    # -- what is wanted, and what there is ----------------------------------------------------------------------------

    def _balance(self) -> None:
        """Take the next steps until there are as many workers as wanted, all with the current configuration."""
        while self._stage is Stage.SERVING:
            serving = [each for each in self._workers if each.phase is not Phase.LEAVING]
            former = [each for each in serving if each.config is not self._config]
            if self._reload_asked and (not former or self._is_backing_off):
                self._take_new_configuration()
                continue
            room = self._wanted + bool(former) - len(serving)  # one more while former ones are replaced
            if room > 0 and not self._is_backing_off:
                self._start()
                continue
            if room < 0 or (room == 0 and former and _are_ready(serving, but=former)):
                leaving = (former or serving[::-1])[0]
                self._dismiss(leaving, signal.SIGTERM, leaving.config.limits.drain_timeout_s + _GRACE_S)
                continue
            self._tell(serving, former)
            return

    @property
    def _is_backing_off(self) -> bool:
        return self._loop.table.now < self._not_before

    def _want(self, more: int) -> None:
        self._wanted = max(1, self._wanted + more)
        self._balance()

    def _tell(self, serving: list[_Worker], former: list[_Worker]) -> None:
        """Tell systemd and the log how many workers are ready, if that has changed."""
        ready = sum(each.phase is Phase.SERVING for each in serving)
        status = f"{ready} of {self._wanted} workers are ready"
        is_settled = not former and ready == self._wanted
        config = self._config if is_settled else self._told[0]
        if config is self._told[0] and status == self._told[1]:
            return
        self._told = config, status
        if is_settled:
            log.info(status)
            self._notifier.ready(status)
        else:
            self._notifier.say(status)

    def _all_are_well(self) -> bool:
        most_s = self._notifier.watchdog_s or inf
        now = self._loop.table.now
        return all(now - each.heard_at <= most_s for each in self._workers if each.phase is not Phase.LEAVING)

    def _show(self) -> None:
        now = self._loop.table.now
        rows = [f"{each.pid} {each.phase.value}, {now - each.started_at:.0f} s old" for each in self._workers]
        answer("\n".join([f"{counted(len(rows), 'worker')}, {self._wanted} wanted", *rows]))
        for each in self._workers:
            each.tell(signal.SIGUSR1)

    # -- starting a worker --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            self._workers.append(self._fork())
        except OSError as error:
            self._back_off(self._loop.table.now)
            log.error("a worker can't be started, next try in %g s: %s", self._back_off_s, error)

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            # A signal that comes before the worker has its own handlers waits for them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
            try:
                flush_streams()
                pid = fork()
                if not pid:
                    ours.close()
                    self._be_worker(theirs, partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask))
            except BaseException:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return _Worker(self._loop, pid, ours, self._config, self)

    def _be_worker(self, own: socket.socket, unblock: Callable[[], Any]) -> NoReturn:
        status = 1
        try:
            self._loop.abandon(None)
            for each in self._workers:
                each.abandon()
            self._served.loop.on_forked.append(self._restore_signals)
            watchdog_s = self._notifier.watchdog_s
            work(self._served, own, inf if watchdog_s is None else watchdog_s / 4, unblock)
            status = 0
        except ConfigurationError as error:
            log.error("worker %d: %s", os.getpid(), error)
        except BaseException:
            log.exception("worker %d", os.getpid())
        finally:
            leave_child(status)

    def _heard(self, worker: _Worker, word: bytes) -> None:
        worker.heard_at = self._loop.table.now
        if word and worker.phase is Phase.STARTING:
            worker.phase = Phase.SERVING
            self._loop.call_later(_YOUNG_S, self._lasts, worker)
            self._balance()

    def _lasts(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._back_off_s = 0.0

    def _back_off(self, started_at: float) -> None:
        """Delay the next start: a worker started at `started_at` failed. Those started together count as one."""
        if started_at >= self._not_before:
            self._back_off_s = min(max(2 * self._back_off_s, _BACK_OFF_S), _BACK_OFF_MAX_S)
            self._not_before = self._loop.table.now + self._back_off_s
            self._loop.call_later(self._back_off_s, self._balance)

    # -- ending a worker ----------------------------------------------------------------------------------------------

    def _ended(self, worker: _Worker, child: Child) -> None:
        """Forget a worker, which has exited and was reaped. Log how it ended, unless it ended well when told to."""
        self._workers.remove(worker)
        worker.channel.close()
        how = child.how_it_failed()
        lived_s = self._loop.table.now - worker.started_at
        if worker.phase is Phase.LEAVING or self._stage is not Stage.SERVING:
            if how is not None:
                log.warning("worker %d, which was told to end, %s", worker.pid, how)
        else:
            if worker.phase is Phase.STARTING or lived_s < _YOUNG_S:
                self._back_off(worker.started_at)
            wait_s = max(0.0, self._not_before - self._loop.table.now)
            then = f"in {wait_s:.1f} s" if wait_s else "now"
            level = logging.INFO if how is None else logging.WARNING
            text = "worker %d %s after %.2f s; another one starts %s"
            log.log(level, text, worker.pid, how or "ended by itself", lived_s, then)
        self._balance()

    def _dismiss(self, worker: _Worker, number: int, within_s: float) -> None:
        """Tell a worker to end, and kill it if it has not ended `within_s` seconds later."""
        worker.phase = Phase.LEAVING
        worker.tell(number)
        self._loop.call_later(within_s, self._kill, worker)

    def _kill(self, worker: _Worker) -> None:
        if worker in self._workers:
            log.error("worker %d has not ended in time: killed", worker.pid)
            worker.child.kill()

    def _end(self, stage: Stage) -> None:
        """Enter `stage` at once, in the signal handler: a worker that ends from here on was meant to end."""
        if stage > self._stage:
            self._stage = stage
            self._loop.post(self._dismiss_all, stage)

    def _dismiss_all(self, stage: Stage) -> None:
        drain_s = self._config.limits.drain_timeout_s
        number, within_s = (
            (signal.SIGTERM, drain_s + _GRACE_S) if stage is Stage.DRAINING else (signal.SIGINT, _AT_ONCE_S)
        )
        for worker in self._workers:
            self._dismiss(worker, number, within_s)
        if stage is Stage.DRAINING:
            self._notifier.stopping(f"draining {counted(len(self._workers), 'worker')}")
            self._show_progress(Progress(" workers"), self._loop.table.now + drain_s)

    def _show_progress(self, progress: Progress, until: float) -> None:
        progress(len(self._workers), max(0.0, until - self._loop.table.now))
        if self._stage is Stage.DRAINING:
            self._loop.call_later(_LOOK_S, self._show_progress, progress, until)

    # -- the configuration --------------------------------------------------------------------------------------------

    def _ask_reload(self) -> None:
        self._reload_asked = True
        self._balance()

    def _take_new_configuration(self) -> None:
        """Read the configuration and apply it, or keep the one before. If applied, all workers are former ones now."""
        self._reload_asked = False
        self._notifier.reloading()
        try:
            config = self._reload()
            config = replace(config, workers=self._pinned or config.workers)  # a new object even if nothing has changed
            reconfigure(self._servers, config)
        except ConfigurationError as error:
            log.error("the new configuration was refused, the old one stays in force: %s", error)
            if self._told[0] is self._config:
                self._notifier.ready(self._told[1])
            return
        log.info("the configuration was read again")
        self._release_policies()
        self._config = config
        self._wanted = config.workers or self._wanted
        self._back_off_s, self._not_before = 0.0, -inf

    def _release_policies(self) -> None:
        """Close the policies, which only showed that the configuration works. Each worker makes its own."""
        for server in self._servers:
            server._policies.close(wait=True)


def _are_ready(serving: list[_Worker], but: list[_Worker]) -> bool:
    return all(each.phase is Phase.SERVING for each in serving if each not in but)
