"""`serve()`, for programs of three lines: bind, then serve in this process or in workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from reqtable.config import CONFIG_VARIABLE, DEFAULT, Config, chosen_dispatch, from_environment, given_or_found
from reqtable.config.import_string import check_not_importing
from reqtable.dispatch import is_resumable
from reqtable.run.endpoints import find_endpoints
from reqtable.run.listening import name_of, open_server, remover
from reqtable.run.served import maker_of
from reqtable.run.signals import Progress, announce_drain, begin_drain, handled_by, in_main_thread, log_table
from reqtable.run.supervisor import Supervisor, check_workers
from reqtable.run.systemd import Notifier
from reqtable.server.configured import reconfigure
from reqtable.server.engine import Engine
from reqtable.table.errors import ConfigurationError
from reqtable.table.snapshot import handler_name

log = logging.getLogger("reqtable")
serving_log = logging.getLogger("reqtable.serving")


def serve(
    served: Any,
    /,
    *binds: str,
    handler: Any = None,
    dispatch: str | None = None,
    config: Config | None = None,
    workers: int | None = None,
    reload: Callable[[], Config] | None = None,
    on_listening: Callable[[list[str]], None] | None = None,
    on_pass: Callable[[Engine], None] | None = None,
) -> None:
    """Bind each of `binds`, and serve `served` on all of them, over one table, until SIGINT, SIGTERM or an error.

    `served` is a handler class; or a server class, ours or one derived from `socketserver`'s, or a function that makes
    a server from an address without binding it. `handler` is the handler class that a server class is given after the
    address. Each bind has a server of its own.

    Without binds, this serves on the sockets that systemd has passed. If nothing names a dispatch policy, a blocking
    handler runs under `greenlet`, or under `thread` without the package greenlet; the log says which. `config` defaults
    to the file that `REQTABLE_CONFIG` names. `workers` is how many processes serve, each with its own table; it
    defaults to the configuration's number, and None means that this process serves.

    SIGHUP calls `reload` for a new configuration, and reads certificates again. New requests are served as these say,
    requests in the table end as they began. SIGUSR1 logs the table. Logger `reqtable.serving` says at level INFO what
    is served where. `on_listening` is called once with the same addresses (port 0 resolved), `on_pass` in every pass.

    Raises ConfigurationError for what can't work, before anything is bound, and OSError for a bind that fails, before
    anything is served.
    """
    check_not_importing()
    if config is None and os.environ.get(CONFIG_VARIABLE):
        reload = reload or from_environment
    given = config = given_or_found(config)
    config = config if workers is None else replace(config, workers=workers)
    check_workers(config)
    endpoints = find_endpoints(binds)
    maker = maker_of(served, handler)
    maker.check(endpoints, dispatch, config)
    engine = Engine(limits=config.limits)
    with contextlib.ExitStack() as stack:
        for endpoint in endpoints:
            server = maker.make(endpoint, dispatch, config)
            server._owns_queue = config.workers is None and endpoint.descriptor is None
            stack.callback(server.server_close)
            if server._is_bound:
                stack.callback(remover(server))
            engine.add(server)
        for each in engine.servers:
            stack.callback(open_server(each))
        if on_pass is not None:
            _call_in_each_pass(engine, on_pass)
        if config.tls.cert is not None and not any(each._begins_with_tls for each in engine.servers):
            log.warning("[tls] names a certificate, but no bind uses it: write tls:// in place of tcp://")
        first = engine.servers[0]
        if not is_resumable(first.RequestHandlerClass) and chosen_dispatch(dispatch, config, "")[1] == DEFAULT:
            own, policy = handler_name(first.RequestHandlerClass), first._policies.chosen.name
            log.info("%s is a blocking handler: dispatch policy %r", own, policy)
        names = [name_of(each) for each in engine.servers]  # type: ignore[arg-type]
        for each, name in zip(engine.servers, names, strict=True):
            serving_log.info("serving %s on %s", maker.name_of(each), name)
        if on_listening is not None:
            on_listening(names)
        if config.workers is None:
            _serve_alone(engine, reload or (lambda: given))
        else:
            Supervisor(engine, config, workers, reload or (lambda: given)).run()


def _call_in_each_pass(engine: Engine, on_pass: Callable[[Engine], None]) -> None:
    """Call `on_pass` in each pass, after the hook of the first server."""
    first = engine.servers[0]
    own = first.service_actions

    def service_actions() -> None:
        own()
        on_pass(engine)

    first.service_actions = service_actions  # type: ignore[method-assign]


def _serve_alone(engine: Engine, reload: Callable[[], Config]) -> None:
    """Serve in this process. In the main thread, where Python delivers signals, handle them.

    SIGINT stops, SIGTERM drains (a second one stops), SIGHUP reloads, SIGUSR1 logs the table. A step can hold up the
    loop for ever, so a second stop interrupts the step.
    """
    notifier = Notifier(engine)
    draining: list[bool] = []
    stopping: list[bool] = []

    def stop(*_: object) -> None:
        if stopping:
            raise KeyboardInterrupt
        stopping.append(True)
        engine.stop()

    def terminate(*_: object) -> None:
        if draining:
            stop()
        else:
            draining.append(True)
            announce_drain(engine)
            engine.post(notifier.stopping, "draining")
            engine.post(begin_drain, engine, "; SIGTERM again ends at once", Progress())

    handlers: dict[int, Callable[..., Any]] = {
        signal.SIGINT: stop,
        signal.SIGTERM: terminate,
        signal.SIGUSR1: lambda *_: log_table(engine),
        signal.SIGHUP: lambda *_: engine.post(_reload, engine, reload, notifier),
    }
    engine.post(notifier.ready, "serving")
    engine.post(notifier.feed_watchdog)
    with handled_by(engine, handlers if in_main_thread() else {}):
        try:
            engine.serve_forever()
        except KeyboardInterrupt:
            if not stopping:
                raise
            log.warning("interrupted while the loop was held up")
    notifier.stopping("ending")
    for server in engine.servers:
        engine.end_requests(server)  # or closing would wait for children until their clients leave


def _reload(engine: Engine, reload: Callable[[], Config], notifier: Notifier) -> None:
    """In the loop: read the configuration and apply it, or keep the one before if it can't be applied."""
    notifier.reloading()
    try:
        config = reload()
        reconfigure(engine.servers, config)
    except ConfigurationError as error:
        log.error("the new configuration was refused, the old one stays in force: %s", error)
    else:
        log.info("the configuration was read again")
        if config.workers is not None:
            log.warning("workers = %d: restart to serve with workers", config.workers)
    notifier.ready("serving")
