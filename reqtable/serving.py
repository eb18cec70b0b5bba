"""`serve()`: binds, and the three-line program.

A bind names a listener as one string:

    tcp://127.0.0.1:7000    tcp://[::1]:7000    udp://0.0.0.0:69
    unix:///run/x.sock      unixgram:///run/x.sock
    fd://3                  a socket that is open already, of any of these kinds
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from reqtable.config import CONFIG_VARIABLE, Config, from_environment
from reqtable.core.errors import ConfigurationError
from reqtable.core.states import State
from reqtable.core.table import address_text, format_rows
from reqtable.engine.drain import Drain
from reqtable.engine.engine import Engine
from reqtable.servers import TCPServer, UDPServer

log = logging.getLogger("reqtable")

_TYPES = {
    "tcp": socket.SOCK_STREAM,
    "udp": socket.SOCK_DGRAM,
    "unix": socket.SOCK_STREAM,
    "unixgram": socket.SOCK_DGRAM,
}
_SCHEMES = [*_TYPES, "fd"]


class _Stream(TCPServer):
    allow_reuse_address = True


class _Datagram(UDPServer):
    max_packet_size = 65_535  # the largest there is: nothing is cut


def serve(
    handler: Any,
    *binds: str,
    dispatch: str | None = None,
    config: Config | None = None,
    reload: Callable[[], Config] | None = None,
    on_listening: Callable[[list[str]], None] | None = None,
    on_pass: Callable[[Engine], None] | None = None,
) -> None:
    """Bind each of `binds`, and serve `handler` on all of them, over one table, until SIGINT, SIGTERM or an error.

    `config` is what `REQTABLE_CONFIG` names where it isn't given. SIGHUP has `reload` read it again: new requests are
    served as it says, those in the table end as they began. `on_listening` is called once with the real addresses
    (port 0 resolved), `on_pass` once a pass of the loop; SIGUSR1 logs the table. Raises ConfigurationError for a bind
    that is none, OSError for one that can't be had, before anything is served.
    """
    if not binds:
        raise ConfigurationError("serve() needs at least one bind, such as tcp://127.0.0.1:7000")
    parsed = [parse_bind(bind) for bind in binds]
    if config is None:
        config = from_environment()
        reload = reload or (from_environment if os.environ.get(CONFIG_VARIABLE) else None)
    engine = Engine(limits=config.limits)
    with contextlib.ExitStack() as stack:
        names = []
        for bind, (scheme, family, address) in zip(binds, parsed, strict=True):
            server = _open(bind, scheme, family, address, handler, dispatch, config)
            server._owns_queue = scheme != "fd"
            stack.callback(server.server_close)
            if scheme in ("unix", "unixgram"):
                stack.callback(_unlink_own, server.server_address, os.stat(server.server_address).st_ino)
            engine.add(server)
            names.append(f"{_scheme_of(server.socket)}://{address_text(server.server_address)}")
        if on_pass is not None:
            engine.servers[0].service_actions = lambda: on_pass(engine)  # type: ignore[method-assign]
        if on_listening is not None:
            on_listening(names)
        with _signals(engine, reload):
            engine.serve_forever()


def parse_bind(bind: str) -> tuple[str, int, Any]:
    """The scheme, address family and address of a bind. Raises ConfigurationError, naming it and the mend."""
    parts = urlsplit(bind)
    scheme = parts.scheme
    if scheme in ("tcp", "udp"):
        with contextlib.suppress(ValueError):
            if parts.port is not None and not parts.path.strip("/"):
                host = parts.hostname or ""
                return scheme, socket.AF_INET6 if ":" in host else socket.AF_INET, (host, parts.port)
        raise ConfigurationError(f"bind {bind!r}: give a host and a port, as in {scheme}://127.0.0.1:7000")
    if scheme in ("unix", "unixgram"):
        path = parts.netloc + parts.path
        if not path.strip("/"):
            raise ConfigurationError(f"bind {bind!r}: give a path, as in {scheme}:///run/app.sock")
        return scheme, socket.AF_UNIX, path
    if scheme == "fd":
        if not parts.netloc.isdigit():
            raise ConfigurationError(f"bind {bind!r}: give a descriptor's number, as in fd://3")
        return scheme, 0, int(parts.netloc)
    raise ConfigurationError(
        f"bind {bind!r}: write it as one of {', '.join(s + '://…' for s in _SCHEMES)}, such as tcp://127.0.0.1:7000"
    )


def _open(
    bind: str, scheme: str, family: int, address: Any, handler: Any, dispatch: str | None, config: Any
) -> TCPServer:
    """The server of one bind, bound."""
    own: socket.socket | None = None
    server: TCPServer
    try:
        if scheme == "fd":
            own = _socket_at(address)
            family, address = own.family, own.getsockname()
        kind = own.type if own else _TYPES[scheme]
        base: type[TCPServer] = _Stream if kind == socket.SOCK_STREAM else _Datagram
        made = type(base.__name__, (base,), {"address_family": family})
        server = made(address, handler, bind_and_activate=own is None, dispatch=dispatch, config=config)
    except OSError as error:
        raise OSError(
            error.errno, f"bind {bind!r}: {(error.strerror or str(error)).lower()}: {_mend(error)}"
        ) from error
    if own is not None:
        server.socket.close()
        server.socket = own
        server.server_activate()
    return server


def _socket_at(descriptor: int) -> socket.socket:
    """Our own duplicate of a socket that is open already. Raises OSError where it is none."""
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)
    except BaseException:
        os.close(duplicate)
        raise


def _mend(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "stop what is there, or choose another one"
    if error.errno == errno.EACCES:
        return "choose a port from 1024, or a place that this user may write to"
    return "choose another one"


def _scheme_of(own: socket.socket) -> str:
    stream = own.type == socket.SOCK_STREAM
    if own.family == socket.AF_UNIX:
        return "unix" if stream else "unixgram"
    return "tcp" if stream else "udp"


def _unlink_own(path: str, inode: int) -> None:
    """Remove a Unix socket file, unless someone else has put theirs in its place."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


@contextlib.contextmanager
def _signals(engine: Engine, reload: Callable[[], Config] | None) -> Iterator[None]:
    """SIGINT stops, SIGTERM drains (a second one stops), SIGHUP re-reads, SIGUSR1 logs the table. Only in the main
    thread, where Python delivers signals. A forked child has them as they were: it is ended by them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def log_table(*_: object) -> None:
        log.warning("%d requests\n%s", len(engine.table), format_rows(engine.table.snapshot()))

    def terminate(*_: object) -> None:
        if draining:
            engine.stop()
            return
        draining.append(True)
        engine.post(_begin_drain, engine)

    draining: list[bool] = []
    handlers: dict[int, Callable[..., None]] = {
        signal.SIGINT: lambda *_: engine.stop(),
        signal.SIGTERM: terminate,
        signal.SIGUSR1: log_table,
    }
    if reload is not None:
        handlers[signal.SIGHUP] = lambda *_: engine.post(_reload, engine, reload)
    previous = {number: signal.signal(number, each) for number, each in handlers.items()}

    def restore() -> None:
        for number, each in previous.items():
            signal.signal(number, each)

    engine.in_child.append(restore)
    try:
        yield
    finally:
        engine.in_child.remove(restore)
        restore()


def _begin_drain(engine: Engine) -> None:
    """In the loop: take nothing new, and end when what has begun is done, or its time is over."""
    most_s = engine.limits.drain_timeout_s
    at_first = sum(entry.state is not State.CLOSED for entry in engine.table)
    if at_first:
        log.info("ending when %d requests are done, or in %g s; SIGTERM again ends at once", at_first, most_s)
    progress = _Progress(at_first) if sys.stderr.isatty() else None
    Drain(engine, engine.servers, engine.table.now + most_s, engine.stop, progress).begin()


class _Progress:
    """One line on a terminal, rewritten in its place."""

    def __init__(self, at_first: int) -> None:
        self._at_first = at_first
        self._shown = ""

    def __call__(self, left: int, seconds: float) -> None:
        text = f"draining: {left} of {self._at_first}, {seconds:.0f} s left" if left else ""
        if text != self._shown:
            sys.stderr.write("\r" + text.ljust(len(self._shown)) + ("" if text else "\r"))
            sys.stderr.flush()
            self._shown = text


def _reload(engine: Engine, reload: Callable[[], Config]) -> None:
    """In the loop: take the configuration as it is now, or, where it can't be taken, go on with the one before."""
    try:
        config = reload()
        for server in engine.servers:
            server.reconfigure(config)  # type: ignore[attr-defined]
    except ConfigurationError as error:
        log.error("the configuration was not taken, the one before holds: %s", error)
    else:
        log.info("the configuration was read again")
