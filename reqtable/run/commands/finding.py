"""Finds the control socket of a running server, for the commands that ask one.

They look for sockets of the usual name, `PID.sock`, in the usual folders, those of `folders()`. Root also finds the
servers of other users, in their folders. A socket of another name is never found: it is named by `--control`.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

import click

from reqtable.control.listening import folder_of, folders, remove_if_left, usual_sockets
from reqtable.run.operated import RUNNING
from reqtable.server.operator import HANDOVER_VARIABLE
from reqtable.table.addresses import printable

_CONNECT_S = 2.0


class CouldNotAsk(click.ClickException):
    """No server could be asked, or it has not answered. A change may be made all the same."""

    exit_code = 3


class Found(NamedTuple):
    """Describes a server whose control socket was found."""

    path: str
    pid: int
    command: str  # what started the process


class SeveralRun(click.UsageError):
    """Several servers are running, and none was chosen."""

    def __init__(self, servers: list[Found]) -> None:
        super().__init__(
            f"{len(servers)} servers are running: choose one by its process, as in --control {servers[0].pid}, "
            "or by the port of a bind, as in --control :7000"
        )
        self.servers = servers


def found_server() -> Found:
    """Return the only server of this user that is running, and has not handed over to another one.

    Raises CouldNotAsk if there is none, and SeveralRun if there are several.
    """
    servers = _serving(_some_running())
    if len(servers) > 1:
        raise SeveralRun(servers)
    return servers[0]


def path_of(named: str, addresses_of: Callable[[str], Sequence[str]]) -> str:
    """Return the control socket that `named` means: the path itself, `:PORT` of a bind, or the number of a process.

    `addresses_of(path)` asks a server where it listens, and returns nothing if the server does not answer. Raises
    CouldNotAsk if no such server is found.
    """
    if not RUNNING.fullmatch(named):
        return named
    servers = _some_running()
    silent: list[Found] = []
    if named.isdecimal():
        chosen = [each for each in servers if each.pid == int(named)]
        what = f"process {named}"
    else:
        known = {each: addresses_of(each.path) for each in _serving(servers)}
        chosen = [each for each, addresses in known.items() if any(at.endswith(named) for at in addresses)]
        silent = [each for each, addresses in known.items() if not addresses]
        what = f"port {named[1:]}"
    if len(chosen) != 1:
        found = f"{len(chosen)} servers have {what}" if chosen else f"no server of this user has {what}"
        unknown = f"; the ports of {_pids(silent)} are not known, as no answer has come" if silent else ""
        raise CouldNotAsk(f"{found}: these processes have sockets in {_looked_in()}: {_pids(servers)}{unknown}")
    return chosen[0].path


def _pids(servers: list[Found]) -> str:
    return ", ".join(str(each.pid) for each in servers)


def found_paths() -> list[str]:
    """Return the control sockets of all servers of this user that are running. Raises CouldNotAsk if there is none."""
    return [each.path for each in _some_running()]


def _some_running() -> list[Found]:
    servers = running()
    if not servers:
        raise CouldNotAsk(
            f"no server of this user is running: no control socket answers in {_looked_in()}: start a server, or name "
            "its socket by --control PATH"
        )
    return servers


def _serving(servers: list[Found]) -> list[Found]:
    """Leave out processes that only end their last requests: a restart has each start the process that replaces it."""
    replaced = {_replaced_by(each.pid) for each in servers}
    return [each for each in servers if each.pid not in replaced]


def _replaced_by(pid: int) -> int:
    """Return the number of the process whose place `pid` has taken; 0 if there is none, or if that is not known.

    That process has started `pid`, with a variable that tells `pid` from other processes (proc_pid_environ(5)).
    """
    try:
        if HANDOVER_VARIABLE.encode() not in Path(f"/proc/{pid}/environ").read_bytes():
            return 0
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _looked_in() -> str:
    return ", ".join(folders() + _folders_of_others())


def running() -> list[Found]:
    """Return the servers whose control sockets are in the usual folders. Removes the sockets of killed processes."""
    found = []
    for folder in folders() + _folders_of_others():
        if not _is_trusted(folder):
            continue
        for path in usual_sockets(folder):
            pid = _listener(path)
            if pid is not None:
                found.append(Found(path, pid, _command_of(pid)))
            else:
                remove_if_left(path)
    return found


def _is_trusted(folder: str) -> bool:
    """Return whether the folder is there, and no other user could have put a socket into it."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    is_own = status.st_uid == os.geteuid() or folder == folder_of(status.st_uid)
    return stat.S_ISDIR(status.st_mode) and is_own and not status.st_mode & 0o022


def _folders_of_others() -> list[str]:
    """Return the folders of other users: root finds the servers that it has started, and that have become those."""
    if os.geteuid() != 0:
        return []
    others = [each for each in glob(folder_of("[0-9]*")) if each.rpartition("-")[2].isdecimal()]
    return [each for each in others if each not in folders()]


def _listener(path: str) -> int | None:
    """Return the number of the process that listens at `path`; None if no process does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
        own.settimeout(_CONNECT_S)
        try:
            own.connect(path)
        except OSError as error:
            # A full queue belongs to a server that is alive, but does not accept.
            is_alive = error.errno == errno.EAGAIN or isinstance(error, TimeoutError)
            name = Path(path).stem
            return int(name) if is_alive and name.isdecimal() else None
        return listener_of(own)


def listener_of(own: socket.socket) -> int:
    """Return the number of the process at the other end of a Unix socket (SO_PEERCRED in unix(7))."""
    return int.from_bytes(own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), "little")


def _command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return f"process {pid}"
    return printable(" ".join(word.decode("utf-8", "replace") for word in words))
