"""A sleeper: a process that has the same descriptors as a worker, and does nothing until the worker has died.

`clone(CLONE_FILES)` makes the sleeper, so both processes use one table of descriptors. A socket that the worker opens
is open in the sleeper too, at no cost. A socket that the worker closes is closed in both. When the worker dies, the
table lives on: the sleeper sends the sockets to the worker's successor, and exits.

The sleeper must end as soon as its worker has ended as it should, for the connections stay open until then.

clone(2), not clone3(2): the usual containers forbid the latter. The sleeper, not the worker, is the bare clone: the
threads library does not know of it, so it must never start a thread.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterable
from typing import Final

from reqtable.table.errors import ConfigurationError

log = logging.getLogger("reqtable")

_CLONE_FILES: Final = 0x400
_CLONE_PARENT: Final = 0x8000  # the supervisor is the parent of the sleeper, and can wait for it
_CLONE: Final = {"x86_64": 56, "aarch64": 220, "riscv64": 220}  # the number of the system call
_FDS_MAX: Final = 250  # of one message: SCM_MAX_FD of unix(7) is 253
_ASK: Final = struct.Struct("=QI")  # which inquiry, which part
_ANSWER: Final = struct.Struct("=QI")  # which inquiry, how many parts there are
PID: Final = struct.Struct("=q")  # a sleeper's first word
_PATIENCE_S: Final = 5.0

NAME: Final = b"reqtable-sleep"  # what ps and top show
_SET_NAME, _GET_NAME = 15, 16  # of prctl(2)


def why_not_here() -> str | None:
    """Return why this system can't have sleepers; None if it can."""
    if sys.platform != "linux" or os.uname().machine not in _CLONE or sys.maxsize < 2**32:
        return f"takeover needs Linux on {', '.join(sorted(_CLONE))}"
    return None


def check() -> None:
    """Raise ConfigurationError if this system can't have sleepers."""
    if (reason := why_not_here()) is not None:
        raise ConfigurationError(f"takeover = true: {reason}: leave it out")


def make_sleeper(own: socket.socket) -> int:
    """Make a sleeper of this process, which has one thread. It listens to `own`. Returns its pid; raises OSError.

    The signals that are blocked now stay blocked in it.
    """
    system = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: the sleeper must have it
    number = _CLONE[os.uname().machine]
    flags = _CLONE_FILES | _CLONE_PARENT | signal.SIGCHLD
    zero = ctypes.c_long(0)
    spare = os.open(os.devnull, os.O_RDONLY)  # the worker may die because it has no descriptor left
    before = set(_sockets())  # listening sockets, and pairs: a successor has its own
    name = ctypes.create_string_buffer(16)
    system.prctl(_GET_NAME, name, 0, 0, 0)
    system.prctl(_SET_NAME, NAME, 0, 0, 0)  # before the clone: nobody may take the sleeper for a worker
    pid = int(system.syscall(ctypes.c_long(number), ctypes.c_long(flags), zero, zero, zero, zero))
    if not pid:
        with contextlib.suppress(BaseException):
            _sleep(own, before, spare)
        os._exit(0)
    error = ctypes.get_errno()
    system.prctl(_SET_NAME, name, 0, 0, 0)
    if pid < 0:
        raise OSError(error, f"clone: {os.strerror(error)}")
    return pid


def _sleep(own: socket.socket, before: set[tuple[int, int]], spare: int) -> None:
    """In the sleeper: answer inquiries until the other end is closed, or says that it has everything."""
    gc.disable()  # nothing may be freed here that has a descriptor: the table is the worker's too
    own.setblocking(True)
    own.send(PID.pack(os.getpid()))
    inquiry, found = -1, [array.array("i")]
    while message := own.recv(_ASK.size):
        number, part = _ASK.unpack(message)
        if number != inquiry:
            if inquiry < 0:
                os.close(spare)
            inquiry, found = number, _parts(fd for fd, inode in _sockets() if (fd, inode) not in before)
        fds = found[part].tobytes() if part < len(found) else b""
        with_fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        own.sendmsg([_ANSWER.pack(number, len(found))], with_fds)


def _sockets() -> list[tuple[int, int]]:
    """Return the descriptors of all open sockets, each with the number by which the kernel tells it from others."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the folder is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.append((int(name), status.st_ino))
    return sorted(found)


def _parts(fds: Iterable[int]) -> list[array.array[int]]:
    every = array.array("i", fds)
    return [every[first : first + _FDS_MAX] for first in range(0, len(every), _FDS_MAX)]


def receive_sockets(sleeper: socket.socket) -> list[socket.socket]:
    """Have a sleeper whose worker has died send all its sockets. Raises OSError if it does not answer in time.

    `sleeper` is the other end of its `own`. An inquiry may follow one that was broken off.
    """
    inquiry = time.monotonic_ns()
    found: list[socket.socket] = []
    part, parts = 0, 1
    sleeper.settimeout(_PATIENCE_S)
    until = time.monotonic() + _PATIENCE_S
    try:
        while part < parts:
            sleeper.send(_ASK.pack(inquiry, part))
            number = -1
            while number != inquiry:  # else it answers a successor that died before this one
                if time.monotonic() > until:
                    raise TimeoutError("the sleeper does not answer")
                message, fds, flags, _ = socket.recv_fds(sleeper, _ANSWER.size, _FDS_MAX)
                if len(message) != _ANSWER.size:
                    raise ConnectionError("the sleeper has gone")
                number, parts = _ANSWER.unpack(message)
                received = [socket.socket(fileno=fd) for fd in fds]
                if number != inquiry:
                    for each in received:
                        each.close()
                else:
                    found += received
                    if flags & socket.MSG_CTRUNC:
                        log.error("some connections can't be continued: too many descriptors are open")
            part += 1
    except BaseException:
        for each in found:
            each.close()
        raise
    return found


def dismiss(sleeper: socket.socket, pidfd: int) -> None:
    """Have a sleeper exit, and wait until it has: only then is a connection that this process closes really closed."""
    with contextlib.suppress(OSError):
        sleeper.shutdown(socket.SHUT_RDWR)
    if pidfd >= 0:
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        waiting.poll(1000 * _PATIENCE_S)
