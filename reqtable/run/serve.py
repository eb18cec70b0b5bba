"""`serve()`, for programs of three lines: bind, then serve in this process or in workers."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from reqtable.config import CONFIG_VARIABLE, DEFAULT, Config, chosen_dispatch, from_environment, given_or_found
from reqtable.config.import_string import check_not_importing
from reqtable.dispatch import is_resumable
from reqtable.run.alone import Alone
from reqtable.run.endpoints import Endpoint, find_endpoints
from reqtable.run.listening import name_of, open_server, remover
from reqtable.run.operated import OPERATORS
from reqtable.run.served import maker_of
from reqtable.run.signals import in_main_thread
from reqtable.server.engine import Engine
from reqtable.server.operator import HANDOVER_VARIABLE, Operator
from reqtable.table.errors import ConfigurationError
from reqtable.table.snapshot import handler_name

log = logging.getLogger("reqtable")
serving_log = logging.getLogger("reqtable.serving")


def serve(
    served: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    /,
    *binds: str,
    handler: Callable[..., Any] | None = None,
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

    SIGHUP calls `reload` for a new configuration, and reads certificates again. New requests use the new configuration,
    and requests in the table keep the old one. SIGUSR1 logs the table. SIGUSR2 moves all requests to the next version
    of the program.

    The logger `reqtable.serving` names each handler and its address at level INFO. If the program has set up no
    logging, these lines go to standard error. `on_listening` is called once with the same addresses (port 0 resolved).
    `on_engine` is called with the engine before it serves, in each worker if there are any: for timers, for `table`,
    for `post` from other threads.

    Raises ConfigurationError, before anything is bound, for arguments or a configuration that can't work. Raises
    OSError, before anything is served, for a bind that fails.
    """
    check_not_importing()
    if config is None and os.environ.get(CONFIG_VARIABLE):
        reload = reload or from_environment
    given = config = given_or_found(config)
    config = config if workers is None else replace(config, workers=workers)
    _check_workers(config)
    with contextlib.ExitStack() as stack:
        inherited = stack.enter_context(_inheriting())
        parts = _parts(served, binds, handler, [] if inherited is None else inherited.offered)
        engine = _bound(parts, dispatch, config, inherited, stack)
        if chosen_dispatch(dispatch, config, "")[1] == DEFAULT:
            _log_policies(engine)
        names = [name_of(each) for each in engine.servers]  # type: ignore[arg-type]
        say = partial(_say_what_is_served, engine, [maker for maker, _ in parts], config, names)
        if on_listening is not None:
            on_listening(names)
        if inherited is not None:
            inherited.on_listening = say  # until then the process before serves
        _run(engine, config, workers, reload or (lambda: given), on_engine, inherited, say)


def _run(
    engine: Engine,
    config: Config,
    workers: int | None,
    reload: Callable[[], Config],
    on_engine: Callable[[Engine], None] | None,
    inherited: Any,
    say: Callable[[], None],
) -> None:
    """Serve in this process, or in workers. `say` tells of it, once a loop runs: signals are handled by then."""
    if config.workers is None:
        OPERATORS[engine] = operator = Operator(engine, config, reload)
        if on_engine is not None:
            on_engine(engine)
        if inherited is None:
            engine.post(say)
        else:
            inherited.attach(engine)
        Alone(engine, operator, inherited).run()
    else:
        from reqtable.run.supervisor import Supervisor  # only here, because it needs msgspec

        OPERATORS[engine] = None
        supervisor = Supervisor(engine, config, workers, reload, on_engine, inherited)
        if inherited is None:
            supervisor.engine.post(say)
        supervisor.run()


def _bound(
    parts: list[tuple[Any, Endpoint]], dispatch: str | None, config: Config, inherited: Any, stack: contextlib.ExitStack
) -> Engine:
    """Return an engine with a server for each of `parts`, all of them listening. `stack` closes them.

    `inherited` is what comes from the process before; None if there is none.
    """
    for maker, endpoint in parts:
        maker.check([endpoint], dispatch, config)
    engine = _engine(config)
    for maker, found in parts:
        endpoint = found if inherited is None else inherited.placed(found)
        server = maker.make(endpoint, dispatch, config)
        server._owns_queue = config.workers is None and endpoint.bind.scheme != "fd"
        stack.callback(server.server_close)
        if server._is_bound:
            stack.callback(remover(server))
        engine.add(server)
    for each in engine.servers:
        stack.callback(open_server(each))
    if inherited is not None:
        inherited.close_sockets(engine.servers)
    return engine


def _inheriting() -> contextlib.AbstractContextManager[Any]:
    """Begin with what the process before has offered, if this one is to take its place."""
    if HANDOVER_VARIABLE not in os.environ:
        return contextlib.nullcontext()
    from reqtable.run.inherited import inheriting  # only here, because it needs msgspec

    return inheriting()


def _check_workers(config: Config) -> None:
    """Raise ConfigurationError if `config` asks for workers, but there can't be any."""
    if config.workers is None:
        if config.takeover:
            raise ConfigurationError("takeover = true: it needs workers: set workers = 2, or --workers 2")
        return
    if not hasattr(os, "fork"):
        raise ConfigurationError(f"workers = {config.workers}: this platform has no fork(): leave it out")
    if not in_main_thread():
        raise ConfigurationError(f"workers = {config.workers}: call serve() in the main thread, where signals come")


def _engine(config: Config) -> Engine:
    """Return the engine that serves. Raises ConfigurationError if takeover is asked for, but can't be done here."""
    if not config.takeover:
        return Engine(limits=config.limits)
    from reqtable.handover import sleeper  # only here: most programs do without
    from reqtable.handover.journalled_steps import JournalledSteps

    sleeper.check()
    return Engine(limits=config.limits, steps=JournalledSteps)


def _parts(
    served: Any, binds: tuple[str, ...], handler: Any, offered: list[tuple[int, str]]
) -> list[tuple[Any, Endpoint]]:
    """Return each endpoint with what makes its server. Raises ConfigurationError."""
    if not isinstance(served, Mapping):
        maker = maker_of(served, handler)
        return [(maker, endpoint) for endpoint in find_endpoints(binds, offered)]
    if binds or handler is not None or not served:
        raise ConfigurationError(
            "serve({bind: handler, …}) takes no other binds and no handler: put them into the mapping"
        )
    return [
        (maker_of(each, None), endpoint)
        for bind, each in served.items()
        for endpoint in find_endpoints((bind,), offered)
    ]


def _say_what_is_served(engine: Engine, makers: list[Any], config: Config, names: list[str]) -> None:
    """Log what is served where."""
    if config.tls.cert is not None and not any(each._begins_with_tls for each in engine.servers):
        log.warning("[tls] names a certificate, but no bind uses it: write tls:// in place of tcp://")
    for maker, server, name in zip(makers, engine.servers, names, strict=True):
        _say(f"serving {maker.name_of(server)} on {name}")


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
