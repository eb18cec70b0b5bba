"""Forked children: what a new child does first, and how the loop learns that it has exited.

A child has one request. It closes its copies of all other descriptors of the engine, serves the request to its end, and
leaves by `os._exit`. So it runs none of the parent's `atexit` functions and never returns into the parent's loop.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the C module behind `signal` has no stub
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from reqtable.dispatch.policy import Host
from reqtable.loop.poller import Descriptor, close_copy
from reqtable.loop.step import Steps
from reqtable.table.states import READ
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

_HELD = (_signal.SIGINT, _signal.SIGTERM)


class Child(Descriptor):
    """Watches a child until it has been waited for. Then calls `on_exit(child)`, once, in the loop, with `status` set.

    When the child exits, its pidfd becomes readable (pidfd_open(2)). Without a pidfd, the loop looks every few
    milliseconds.
    """

    __slots__ = ("_on_exit", "_steps", "pid", "status")

    def __init__(self, steps: Steps, pid: int, on_exit: Callable[[Child], None], pidfd: int | None = None) -> None:
        super().__init__(steps.poller, _pidfd(pid) if pidfd is None else pidfd)
        self._steps = steps
        self.pid = pid
        self.status: int | None = None  # as `os.waitstatus_to_exitcode` returns it; None: not waited for
        self._on_exit = on_exit
        if self.fd >= 0:
            self.watch(READ)
        else:
            steps.mailbox.call_later(self._look)

    def on_ready(self, mask: int) -> None:
        self.collect()

    def collect(self, blocking: bool = False) -> bool:
        """Wait for the child if it has exited; with `blocking`, until it has. True once it has been waited for."""
        if self.status is not None:
            return True
        try:
            pid, status = os.waitpid(self.pid, 0 if blocking else os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0  # other code has waited for the child
        if not pid:
            return False
        self.status = os.waitstatus_to_exitcode(status)
        self.unwatch()
        self._on_exit(self)
        return True

    def unwatch(self) -> None:
        """Stop watching the child, and close its pidfd."""
        if self.fd >= 0:
            self.watch(0)
            os.close(self.fd)
            self.fd = -1

    def tell(self, number: int) -> None:
        """Send the child a signal, unless it has been waited for."""
        if self.status is None:
            send_signal(self.pid, self.fd, number)

    def kill(self) -> None:
        """Kill the child."""
        self.tell(signal.SIGKILL)

    def how_it_failed(self) -> str | None:
        """Return how the child failed, in words; None if it did not fail."""
        if not self.status:
            return None
        if self.status > 0:
            return f"exited with status {self.status}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-self.status).name}"
        return f"was killed by signal {-self.status}"

    def abandon(self) -> None:
        """In another child: close this process's copy of the pidfd."""
        self.watched = 0
        close_copy(self.fd)

    def _look(self) -> None:
        if not self.collect():
            self._steps.mailbox.call_later(self._look)


class Forked:
    """Kills or waits for a child that a handler has forked.

    The handler may wait for the child too. Then its pid may soon be another process's, so this holds a pidfd.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = _pidfd(pid)

    def kill(self) -> None:
        """Kill the child."""
        send_signal(self.pid, self._pidfd, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until the child has exited."""
        with contextlib.suppress(ChildProcessError):  # the handler has waited for the child
            if self._pidfd >= 0:
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            else:
                os.waitpid(self.pid, 0)
        close_copy(self.detach())

    def detach(self) -> int:
        """Return the pidfd (pidfd_open(2)), which the caller has to close; -1 if there is none."""
        pidfd, self._pidfd = self._pidfd, -1
        return pidfd


def send_signal(pid: int, pidfd: int, number: int) -> None:
    """Signal a child by its pidfd or, if `pidfd` is -1, by its pid. Does nothing if the child has gone.

    The pid of a child that was waited for may be another process's by now, so the pid is checked first.
    """
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, number)
        else:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises ChildProcessError
            os.kill(pid, number)


def _pidfd(pid: int) -> int:
    """Open a pidfd; -1 if there can be none: an old kernel, another system, or no descriptor left."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def fork() -> int:
    """Call `os.fork()`, with SIGINT and SIGTERM held back until it has returned.

    Python drops an exception that a signal handler raises inside a fork hook (os.register_at_fork), so Ctrl-C would be
    lost.
    """
    # Not `signal.pthread_sigmask`, which makes enum members: for these a child copies pages.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD)
    try:
        return os.fork()
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)


_kept: list[Any] = []


def keep(thing: Any) -> None:
    """In a forked child: never free a thing of the parent's.

    To free an executor takes a lock. If another thread held that lock at the fork, nobody in this process ever releases
    it. To free anything else writes to pages of memory, which are then copied.
    """
    _kept.append(thing)


def become_child(own: Entry | None, host: Host) -> None:
    """In a new child: drop all that is the parent's, except the connection of `own` if there is one."""
    gc.freeze()  # a collection here would copy every page that holds an object of the parent's
    host.leave_parent(own)
