"""The control server: where it listens, and whom it lets in."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from reqtable.config import Config, ControlOptions
from reqtable.control.annex import Annex
from reqtable.control.api import ControlHandler
from reqtable.control.exposition import check_client
from reqtable.control.page import PageServer
from reqtable.control.port import PortServer
from reqtable.control.scrape import ScrapeHandler
from reqtable.control.source import Source
from reqtable.control.watch import forget
from reqtable.loop.platform import System
from reqtable.server.classes import UnixStreamServer, remove_dead
from reqtable.server.engine import Engine
from reqtable.table.addresses import address_text
from reqtable.table.limits import Limits

log = logging.getLogger("reqtable.control")

_SUFFIX = ".sock"
_LOOK_S = 0.2  # how often a port is tried that another process is about to leave
_ROOT = 0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group (unix(7))
Makers = list[tuple[str | None, Callable[[str, Engine, Source], Any]]]  # places, and what makes their servers
LIMITS = Limits(
    entries_max=64,
    when_full="evict",
    accepts_per_pass=4,  # all bound how long a pass may hold up the clients
    steps_per_pass=2,
    idle_timeout_s=300.0,
    input_bytes_max=2**20,
    output_bytes_max=2**20,
    buffered_bytes_max=2**24,
    linger_timeout_s=0.5,
    loop_stall_s=float("inf"),
)


class ControlServer(UnixStreamServer):
    """Lets the server's own user, and root, ask `source`.

    With `replaces`, it takes the place of another process's control server at the same path.
    """

    _file: tuple[int, int] | None = None  # what identifies the socket's file

    request_queue_size = 64

    def __init__(self, path: str, engine: Engine, source: Source, replaces: bool = False) -> None:
        self.source = source
        own = f"{path}.{os.getpid()}" if replaces else path
        super().__init__(own, ControlHandler, bind_and_activate=False, config=Config(limits=engine.limits))
        engine.add(self)
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # before it has a name, so that nobody else gets in meanwhile
            self.server_bind()
            os.chmod(own, 0o600)
            self.server_activate()
            if replaces:  # at once: no operator meets a path where nobody listens
                os.rename(own, path)
                self.server_address = path
        except BaseException:
            self.server_close()
            raise
        self._file = _file_at(path)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the peer is this server's own user, or root."""
        user = self.user_of(request)
        if user in (os.geteuid(), _ROOT):
            return True
        log.warning("control: user %s may not use %s: refused", user, self.server_address)
        return False

    @staticmethod
    def user_of(request: socket.socket) -> int:
        """Return the number of the user at the other end (SO_PEERCRED in unix(7))."""
        found = request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(found)[1])

    def server_close(self) -> None:
        super().server_close()
        own, self._file = self._file, None
        with contextlib.suppress(OSError):
            if own is not None and _file_at(str(self.server_address)) == own:
                os.unlink(str(self.server_address))


class MetricsServer(PortServer):
    """Lets everybody who can connect to `place` read the metrics."""

    def __init__(self, place: str, engine: Engine, source: Source) -> None:
        super().__init__(place, ScrapeHandler, engine, source)


def _file_at(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def folders() -> list[str]:
    """Return the folders in which control sockets are by default, the preferred one first."""
    own = os.environ.get("XDG_RUNTIME_DIR")
    found = [os.path.join(own, "reqtable")] if own else []
    if os.geteuid() == _ROOT:
        found.append("/run/reqtable")
    return [*found, folder_of(os.geteuid())]


def folder_of(user: int | str) -> str:
    """Return the folder of a user's control sockets below the temporary folder."""
    return os.path.join(tempfile.gettempdir(), f"reqtable-{user}")


def usual_sockets(folder: str) -> list[str]:
    """Return the control sockets in a folder that have the usual name: `PID.sock`, by the process that made them."""
    found = [each for each in os.listdir(folder) if each.endswith(_SUFFIX) and each.removesuffix(_SUFFIX).isdecimal()]
    return [os.path.join(folder, each) for each in sorted(found)]


def remove_if_left(path: str) -> None:
    """Remove a control socket of the usual name if its process was killed, and nobody listens there."""
    with contextlib.suppress(OSError):
        try:
            os.kill(int(os.path.basename(path).removesuffix(_SUFFIX)), 0)
        except (ProcessLookupError, OverflowError):
            remove_dead(path)


def _make_private(folder: str, user: int) -> None:
    """Make a folder that one user alone can enter. Raises OSError if there is another one in its place."""
    try:
        os.makedirs(folder, 0o700)
        if user != os.geteuid():
            os.chown(folder, user, -1)
    except FileExistsError:
        pass
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")


def default_path(user: int | None = None) -> str:
    """Return the path of this process's control socket, in a folder that its user alone can enter. Raises OSError.

    `user` is the number of the user that this process, which is root's, will become.
    """
    problem: OSError | None = None
    for folder in folders() if user is None else [folder_of(user)]:
        try:
            _make_private(folder, os.geteuid() if user is None else user)
            for path in usual_sockets(folder):
                remove_if_left(path)
            return os.path.join(folder, f"{os.getpid()}{_SUFFIX}")
        except OSError as error:
            problem = problem or error
    assert problem is not None
    raise problem


@contextlib.contextmanager
def controlled(engine: Engine, options: ControlOptions, source: Source, replaces: bool = False) -> Iterator[None]:
    """Serve the control API beside `engine` during the block. Log a place that can't be opened, and leave it out.

    With `replaces`, another process is about to leave these places: take over its socket, and wait for its ports.

    Raises ConfigurationError if the package that metrics need is not installed.
    """
    if not options.is_on:
        yield
        return
    with contextlib.ExitStack() as around:
        around.callback(forget, engine)
        if options.metrics is not None:
            check_client()
        # A client of a port takes no room from those who may use the socket.
        page = partial(PageServer, token=options.token)
        own: Makers = [(options.socket, partial(ControlServer, replaces=replaces))]
        ports: Makers = [(options.page, page), (options.metrics, MetricsServer)]

        def open_all(makers: Makers) -> None:
            inner, left = _opened(makers, source, waits=replaces)
            if inner.servers:
                around.enter_context(contextlib.closing(Annex(engine, inner)))
            if left:
                around.callback(engine.call_later(_LOOK_S, open_all, left).cancel)

        for makers in (own, ports):
            open_all(makers)
        yield


def _opened(makers: Makers, source: Source, waits: bool) -> tuple[Engine, Makers]:
    """Return an engine with a server for each place that is named, and that can be opened.

    With `waits`, return the places that are in use, too.
    """
    inner = Engine(limits=LIMITS, system=System())
    left: Makers = []
    for place, make in makers:
        if place:
            is_usual = os.path.dirname(place) in folders()  # the commands find it by themselves
            try:
                address = address_text(make(place, inner, source).server_address)
                log.log(logging.DEBUG if is_usual else logging.INFO, "control: listening on %s", address)
            except OSError as error:
                if waits and error.errno == errno.EADDRINUSE:
                    left.append((place, make))
                else:
                    log.warning("control: %s can't be opened, so no operator can look: %s", place, error)
    return inner, left
