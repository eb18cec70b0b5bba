"""`serve()`, for programs of three lines: bind, then serve in this process or in workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from reqtable.config import CONFIG_VARIABLE, DEFAULT, Config, chosen_dispatch, from_environment, given_or_found
from reqtable.config.import_string import check_not_importing
from reqtable.dispatch import is_resumable
from reqtable.run.endpoints import Endpoint, find_endpoints
from reqtable.run.listening import name_of, open_server, remover
from reqtable.run.operated import OPERATORS
from reqtable.run.served import maker_of
from reqtable.run.signals import Progress, handled_by, in_main_thread, log_table
from reqtable.run.systemd import Notifier
from reqtable.server.engine import Engine
from reqtable.server.operator import Operator
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
    on_engine: Callable[[Engine], None] | None = None,
) -> None:
    """Bind each of `binds`, and serve `served` on all of them, over one table, until SIGINT, SIGTERM or an error.

    `served` is a handler class; or a server class, ours or one derived from `socketserver`'s, or a function that makes
    a server from an address without binding it. `handler` is the handler class that a server class is given after the
    address. Each bind has a server of its own. To serve several handlers, give a mapping of binds in place of both:
    `serve({"tcp://127.0.0.1:7000": Notes, "unix:///run/admin.sock": Admin})`.

    Without binds, this serves on the sockets that systemd has passed. If nothing names a dispatch policy, a blocking
    handler runs under `greenlet`, or under `thread` without the package greenlet; the log says which. `config` defaults
    to the file that `REQTABLE_CONFIG` names. `workers` is how many processes serve, each with its own table; it
    defaults to the configuration's number, and None means that this process serves.

    SIGHUP calls `reload` for a new configuration, and reads certificates again. New requests are served as these say,
    requests in the table end as they began. SIGUSR1 logs the table. Logger `reqtable.serving` says at level INFO what
    is served where; if the program has set up no logging, standard error does. `on_listening` is called once with the
    same addresses (port 0 resolved). `on_engine` is called with the engine before it serves, in each worker if there
    are any: for timers, for `table`, for `post` from other threads.

    Raises ConfigurationError for what can't work, before anything is bound, and OSError for a bind that fails, before
    anything is served.
    """
    check_not_importing()
    if config is None and os.environ.get(CONFIG_VARIABLE):
        reload = reload or from_environment
    given = config = given_or_found(config)
    config = config if workers is None else replace(config, workers=workers)
    _check_workers(config)
    parts = _parts(served, binds, handler)
    for maker, endpoint in parts:
        maker.check([endpoint], dispatch, config)
    engine = Engine(limits=config.limits)
    with contextlib.ExitStack() as stack:
        for maker, endpoint in parts:
            server = maker.make(endpoint, dispatch, config)
            server._owns_queue = config.workers is None and endpoint.descriptor is None
            stack.callback(server.server_close)
            if server._is_bound:
                stack.callback(remover(server))
            engine.add(server)
        for each in engine.servers:
            stack.callback(open_server(each))
        if chosen_dispatch(dispatch, config, "")[1] == DEFAULT:
            _log_policies(engine)
        names = _say_what_is_served(engine, [maker for maker, _ in parts], config)
        if on_listening is not None:
            on_listening(names)
        if config.workers is None:
            OPERATORS[engine] = operator = Operator(engine, config, reload or (lambda: given))
            if on_engine is not None:
                on_engine(engine)
            _serve_alone(engine, operator)
        else:
            from reqtable.run.supervisor import Supervisor  # only here, because it needs msgspec

            OPERATORS[engine] = None
            Supervisor(engine, config, workers, reload or (lambda: given), on_engine).run()


def _check_workers(config: Config) -> None:
    """Raise ConfigurationError if `config` asks for workers, but there can't be any."""
    if config.workers is None:
        return
    if not hasattr(os, "fork"):
        raise ConfigurationError(f"workers = {config.workers}: this platform has no fork(): leave it out")
    if not in_main_thread():
        raise ConfigurationError(f"workers = {config.workers}: call serve() in the main thread, where signals come")


def _parts(served: Any, binds: tuple[str, ...], handler: Any) -> list[tuple[Any, Endpoint]]:
    """Return each endpoint with what makes its server. Raises ConfigurationError."""
    if not isinstance(served, Mapping):
        maker = maker_of(served, handler)
        return [(maker, endpoint) for endpoint in find_endpoints(binds)]
    if binds or handler is not None or not served:
        raise ConfigurationError(
            "serve({bind: handler, …}) takes no other binds and no handler: put them into the mapping"
        )
    return [(maker_of(each, None), endpoint) for bind, each in served.items() for endpoint in find_endpoints((bind,))]


def _say_what_is_served(engine: Engine, makers: list[Any], config: Config) -> list[str]:
    """Log what is served where. Returns the addresses, as binds."""
    if config.tls.cert is not None and not any(each._begins_with_tls for each in engine.servers):
        log.warning("[tls] names a certificate, but no bind uses it: write tls:// in place of tcp://")
    names = [name_of(each) for each in engine.servers]  # type: ignore[arg-type]
    for maker, server, name in zip(makers, engine.servers, names, strict=True):
        _say(f"serving {maker.name_of(server)} on {name}")
    return names


def _log_policies(engine: Engine) -> None:
    """Log the policies of blocking handlers for which nobody has chosen one."""
    seen: set[Any] = set()
    for server in engine.servers:
        handler = server.RequestHandlerClass
        if not is_resumable(handler) and handler not in seen:
            seen.add(handler)
            policy = server._policies.chosen.name
            log.info("%s is a blocking handler: dispatch policy %r", handler_name(handler), policy)


def _say(text: str) -> None:
    """Log what is served where. Print it on standard error if the program has set up no logging."""
    if serving_log.hasHandlers():
        serving_log.info("%s", text)
    elif sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def _serve_alone(engine: Engine, operator: Operator) -> None:
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
            operator.announce_drain()
            engine.post(notifier.stopping, "draining")
            engine.post(operator.drain, False, "; SIGTERM again ends at once", Progress())

    handlers: dict[int, Callable[..., Any]] = {
        signal.SIGINT: stop,
        signal.SIGTERM: terminate,
        signal.SIGUSR1: lambda *_: log_table(engine),
        signal.SIGHUP: lambda *_: engine.post(_reload, operator, notifier),
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


def _reload(operator: Operator, notifier: Notifier) -> None:
    """In the loop: read the configuration and apply it, or keep the one before if it can't be applied."""
    notifier.reloading()
    try:
        operator.reload()
    except ConfigurationError as error:
        log.error("the new configuration was refused, the old one stays in force: %s", error)
    else:
        log.info("the configuration was read again")
        if operator.config.workers is not None:
            log.warning("workers = %d: restart to serve with workers", operator.config.workers)
    notifier.ready("serving")
