"""`Alone`: serves in this process, without workers, and does what signals ask for."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

from reqtable.run.signals import Progress, begin_restart, handled_by, in_main_thread, log_table
from reqtable.run.systemd import Notifier
from reqtable.server.engine import Engine
from reqtable.server.operator import Operator, Restarting
from reqtable.table.errors import ConfigurationError

log = logging.getLogger("reqtable")


class Alone:
    """Serves in this process. In the main thread, where Python delivers signals, handles them.

    SIGINT stops, SIGTERM drains (a second one stops), SIGHUP reloads, SIGUSR1 logs the table, SIGUSR2 restarts. A step
    can hold up the loop for ever, so a second stop interrupts the step.

    `inherited` is what comes from the process before; None if there is none.
    """

    def __init__(self, engine: Engine, operator: Operator, inherited: Any) -> None:
        self._engine = engine
        self._operator = operator
        self._inherited = inherited
        self._notifier = Notifier(engine)
        self._restart = operator.restart = _restart_of(engine, operator, self._notifier)
        self._is_draining = False
        self._is_stopping = False
        if inherited is not None:
            operator.takers = inherited.takers
            operator.restart.counts.update(inherited.restarts)  # type: ignore[union-attr]  # there is msgspec

    def run(self) -> None:
        """Serve until told to end, and end the requests that are left."""
        engine = self._engine
        self._tell_systemd()
        with handled_by(engine, self._handlers() if in_main_thread() else {}):
            try:
                engine.serve_forever()
            except KeyboardInterrupt:
                if not self._is_stopping:
                    raise
                log.warning("interrupted while the loop was held up")
        if self._inherited is not None:
            self._inherited.stop()
        if self._restart is not None:
            self._restart.close()
        self._notifier.stopping("ending")
        for server in engine.servers:
            engine.end_requests(server)  # or closing would wait for children until their clients leave

    def _tell_systemd(self) -> None:
        """Tell systemd once this process serves. Until then, the process before, if any, speaks for the service."""
        notifier = self._notifier
        if self._inherited is None:
            self._engine.post(notifier.ready, "serving")
            self._engine.post(notifier.feed_watchdog)
        else:
            notifier.hold()
            self._engine.serving.on_listen.append(notifier.begin)
            self._inherited.on_abort = notifier.hold

    def _handlers(self) -> dict[int, Callable[..., Any]]:
        engine = self._engine
        return {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._terminate,
            signal.SIGUSR1: lambda *_: log_table(engine),
            signal.SIGHUP: lambda *_: engine.post(self._reload),
            signal.SIGUSR2: lambda *_: engine.post(begin_restart, self._restart),
        }

    def _stop(self, *_: object) -> None:
        if self._is_stopping:
            raise KeyboardInterrupt
        self._is_stopping = True
        self._engine.stop()

    def _terminate(self, *_: object) -> None:
        if self._is_draining:
            self._stop()
            return
        self._is_draining = True
        self._operator.announce_drain()
        self._engine.post(self._notifier.stopping, "draining")
        self._engine.post(self._drain)

    def _drain(self) -> None:
        if self._inherited is not None:
            self._inherited.stop()
        if self._restart is None or not self._restart.stop():
            self._operator.drain(False, "; SIGTERM again ends at once", Progress())

    def _reload(self) -> None:
        """In the loop: read the configuration and apply it, or keep the one before if it can't be applied."""
        self._notifier.reloading()
        try:
            self._operator.reload()
        except ConfigurationError as error:
            log.error("the new configuration was refused, the old one stays in force: %s", error)
        else:
            log.info("the configuration was read again")
            if self._operator.config.workers is not None:
                log.warning("workers = %d: restart to serve with workers", self._operator.config.workers)
        self._notifier.ready("serving")


def _restart_of(engine: Engine, operator: Operator, notifier: Notifier) -> Restarting | None:
    """Return what restarts the program; None without the package msgspec."""
    try:
        from reqtable.run.restarting import Restart
    except ImportError:
        return None
    return Restart(engine, operator, notifier)
