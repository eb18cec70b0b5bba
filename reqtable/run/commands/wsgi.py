"""`reqtable wsgi`."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import random
import signal
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import click

from reqtable.config import Config, ProxyOptions, chosen_dispatch
from reqtable.config.import_string import candidates_in, module_at
from reqtable.http.wsgi import WSGIHandler, wsgi_handler
from reqtable.http.wsgi_environ import PROXY_HEADERS
from reqtable.run.code_watch import Watch
from reqtable.run.commands.http_options import Adapt, http_options
from reqtable.run.commands.serving import Serving, serve_as, serving_options
from reqtable.table.errors import ConfigurationError
from reqtable.table.tracebacks import account_of

POLICIES = ("inline", "greenlet", "pool", "thread", "fork")
_USUAL_NAMES = ("application", "app")


class Application(click.ParamType[Any]):
    """Converts `module:app` or `path/to/file.py:app` to the application. `app()` stands for what the call returns."""

    name = "module:app"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        place, colon, name = value.rpartition(":")
        if not colon:
            place, name = value, ""
        if not place:
            self.fail(f"{value!r}: write it as module:app or path/to/file.py:app")
        try:
            module = module_at(place)
        except SystemExit as error:
            self.fail(
                f"{value!r} ends the program when it is imported: {account_of(error)}: put what runs it under "
                'if __name__ == "__main__":'
            )
        except Exception as error:
            self.fail(f"{value!r} can't be imported: {account_of(error)}")
        if not name:
            name = next((each for each in _USUAL_NAMES if callable(getattr(module, each, None))), _USUAL_NAMES[0])
        is_factory = name.endswith("()")
        found = module
        for each in name.removesuffix("()").split("."):
            found = getattr(found, each, None)
        if found is None:
            others = ", ".join(candidates_in(module, functools.partial(_described, module.__name__))) or "none"
            self.fail(f"{value!r}: {place} has no {name.removesuffix('()')}; applications there: {others}")
        if is_factory:
            try:
                found = found()
            except Exception as error:
                self.fail(f"{value!r}: the call failed: {account_of(error)}")
        if not callable(found):
            self.fail(f"{value!r}: {name} is not a WSGI application: give a function of environ and start_response")
        if not _takes_two(found):
            made = "what the call returned" if is_factory else name
            mend = "" if is_factory else f": if it makes the application, write {place}:{name}()"
            self.fail(f"{value!r}: {made} can't be called with environ and start_response{mend}")
        return found


def _takes_two(found: Any) -> bool:
    """Return whether `found` can be called as an application is, as far as its signature tells."""
    try:
        inspect.signature(found).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _described(module: str, name: str, thing: Any) -> str | None:
    """Return the name of what looks like an application, or the call of a function that may make one."""
    if name.startswith("_") or isinstance(thing, type) or not callable(thing):
        return None
    is_function = inspect.isroutine(thing)
    if is_function and getattr(thing, "__module__", None) != module:
        return None
    if _takes_two(thing):
        return name
    return f"{name}()" if is_function and "app" in name else None


def _networks(trusted: tuple[str, ...]) -> tuple[tuple[IPv4Network | IPv6Network, ...], bool]:
    try:
        return tuple(ProxyOptions(trusted).networks()), "unix" in trusted
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("proxy.trusted", "--trust-proxy")) from None


def _path(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value and (not value.startswith("/") or value.endswith("/") or "?" in value):
        raise click.BadParameter(f"{value!r}: write a path such as /app, with a slash before it and none after it")
    return value


class _Quota:
    """Ends this worker after `most` requests, and up to `jitter` more, so that not all workers end at once."""

    def __init__(self, most: int, jitter: int) -> None:
        self._most = most
        self._jitter = jitter
        self._left = -1  # decided in the worker, where chance differs
        self._process = 0

    def __call__(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._left = self._most + random.SystemRandom().randint(0, self._jitter)
        self._left -= 1
        if not self._left:
            logging.getLogger("reqtable").info("worker %d has had its requests, and drains", os.getpid())
            os.kill(os.getpid(), signal.SIGTERM)


@click.command("wsgi", short_help="Serve a WSGI application until SIGINT or SIGTERM.")
@click.argument("application", metavar="APPLICATION")
@serving_options("tcp://127.0.0.1:8000")
@http_options
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="The number of threads of policy pool ([pool] size)."
)
@click.option("--prefix", callback=_path, default="", help="SCRIPT_NAME: the path under which the application is.")
@click.option(
    "--health-path", callback=_path, help="A path that the loop answers with 200, even if all threads are busy."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="The time until the application must send something; then 504. Not for the policy thread.",
)
@click.option(
    "--body-max",
    type=click.IntRange(min=0),
    metavar="BYTES",
    default=WSGIHandler.body_bytes_max,
    show_default=True,
    help="The longest body of a request; above it 413.",
)
@click.option(
    "--trust-proxy",
    "trusted",
    multiple=True,
    metavar="NETWORK",
    help="Believe the X-Forwarded fields of clients in this network, or unix; repeatable.",
)
@click.option(
    "--proxy-headers",
    type=click.Choice(PROXY_HEADERS),
    default=PROXY_HEADERS[0],
    show_default=True,
    help="The fields that the trusted proxies set.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    metavar="N",
    help="A worker ends after N requests, and another one starts.",
)
@click.option(
    "--max-requests-jitter",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    help="Add a random number of requests, at most N, to --max-requests.",
)
@click.option("--reload-code", is_flag=True, help="Start again when a file of the program changes: for development.")
def wsgi_command(
    application: str,
    serving: Serving,
    limited: Adapt,
    threads: int | None,
    prefix: str,
    health_path: str | None,
    timeout_s: float | None,
    body_max: int,
    trusted: tuple[str, ...],
    proxy_headers: str,
    max_requests: int | None,
    max_requests_jitter: int,
    reload_code: bool,
) -> None:
    """Serve the WSGI application APPLICATION, which is module:app or path/to/file.py:app, until SIGINT or SIGTERM.

    The application runs in the threads of a pool ([pool] size); --dispatch says otherwise. Signals are those of serve.
    """
    loaded = Config.load(serving.config, workers=serving.workers)
    networks, trusts_unix = _networks(trusted)
    dispatch, _ = chosen_dispatch(serving.dispatch, loaded, "pool")
    _check_policy(dispatch, threads, timeout_s)
    _check_workers(loaded.workers is not None, max_requests, reload_code)
    settings: dict[str, Any] = {
        "prefix": prefix or "",
        "health_path": health_path,
        "timeout_s": timeout_s,
        "body_bytes_max": body_max,
        "trusted": networks,
        "trusts_unix": trusts_unix,
        "proxy_headers": proxy_headers,
        "multiprocess": (loaded.workers or 1) > 1,
        "on_answered": None if max_requests is None else _Quota(max_requests, max_requests_jitter),
    }
    adapt = functools.partial(_adapted, limited, threads)
    chosen = serving._replace(dispatch=dispatch)
    if reload_code:
        _serve_until_changed(application, settings, chosen, adapt)
    else:
        serve_as(wsgi_handler(_application(application), **settings), chosen, adapt=adapt)


def _check_policy(dispatch: str, threads: int | None, timeout_s: float | None) -> None:
    """Raise ConfigurationError if the policy can't run an application, or not with these options."""
    if dispatch not in POLICIES:
        raise ConfigurationError(
            f"dispatch policy {dispatch!r} can't run a WSGI application: choose one of {', '.join(POLICIES)}"
        )
    if timeout_s is not None and dispatch == "thread":
        raise ConfigurationError(
            "--timeout can't interrupt an application under policy 'thread': set [limits] request_timeout_s instead"
        )
    if threads is not None and dispatch != "pool":
        raise ConfigurationError(f"--threads is for policy 'pool': policy {dispatch!r} has no such threads")


def _check_workers(has_workers: bool, max_requests: int | None, reload_code: bool) -> None:
    """Raise ConfigurationError if an option needs workers and there are none, or the other way round."""
    if max_requests is not None and not has_workers:
        raise ConfigurationError("--max-requests needs --workers: a worker ends, and another one takes its place")
    if reload_code and has_workers:
        raise ConfigurationError("--reload-code is for one process: leave --workers out")


def _serve_until_changed(application: str, settings: dict[str, Any], serving: Serving, adapt: Adapt) -> None:
    """Serve the application, and start the program again when a file of it changes.

    An application that can't be imported is waited for.
    """
    watch = Watch()
    try:
        handler = wsgi_handler(_application(application), **settings)
    except click.UsageError as error:
        watch.note_error()
        click.echo(f"reqtable: {error.format_message()}: waiting for a change", err=True)
        watch.wait()
    else:
        with watch.watching():
            serve_as(handler, serving, adapt=adapt)
    if watch.has_changed:
        watch.start_again()


def _application(named: str) -> Any:
    return Application().convert(named, None, None)


def _adapted(limited: Adapt, threads: int | None, config: Config) -> Config:
    """Apply the options. Greenlets suspend wherever the application waits, unless the configuration decides it."""
    config = limited(config)
    if threads is not None:
        config = replace(config, pool=replace(config.pool, size=threads))
    if "greenlet.suspend_all_sockets" not in config.origins:
        config = replace(config, greenlet=replace(config.greenlet, suspend_all_sockets=True))
    return config
