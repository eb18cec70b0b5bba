"""`Successor`: the process that is to take this one's place, and the pair over which it is reached."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from reqtable.dispatch.forking.child import Child
from reqtable.handover.channel import Channel, OnMessage
from reqtable.loop.process import Process, flush_streams
from reqtable.run import activation
from reqtable.run.systemd import Notifier
from reqtable.server.engine import Engine
from reqtable.server.operator import HANDOVER_VARIABLE
from reqtable.table.table import IDS_PER_PROCESS

log = logging.getLogger("reqtable")

_WAIT_S_MAX = 2_000_000.0  # poll(2) takes an int of milliseconds
_GRACE_S = 1.0  # how long a process that was not needed may take to end by itself


def default_command() -> list[str]:
    """Return the command that has started this process."""
    return [sys.executable, *sys.orig_argv[1:]]


class Successor:
    """Starts `command`, or this process's own command, with the other end of a pair. Raises OSError if it can't.

    `on_message` and `on_problem` are those of a `Channel`. `on_end(how)` is called once, when the process has exited or
    has closed its end, with how it failed; None: it exited well.
    """

    def __init__(
        self,
        engine: Engine,
        command: Sequence[str],
        notifier: Notifier,
        on_message: OnMessage,
        on_problem: Callable[[str], None],
        on_end: Callable[[str | None], None],
    ) -> None:
        self._engine = engine
        self._on_end = on_end
        Process.has_forked = True  # another process shares the sockets, and their blocking mode
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.channel = Channel(engine.loop.poller, ours, on_message, self._closed, on_problem)
            os.set_inheritable(theirs.fileno(), True)
            flush_streams()
            own = {**notifier.environment(), **activation.environment(), HANDOVER_VARIABLE: str(theirs.fileno())}
            variables = {**os.environ, **own}
            arguments = list(command) or default_command()
            try:
                pid = os.posix_spawnp(arguments[0], arguments, variables, setsigmask=[])
            except OSError as error:
                self.channel.close()
                raise OSError(error.errno, f"{arguments[0]} can't be started: {error.strerror}") from error
        self._child = Child(engine.steps, pid, self._exited)
        engine.loop.on_forked.append(self._abandon)
        log.info("restart: process %d begins", pid)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_there(self) -> bool:
        """Whether the process has not exited."""
        return self._child.status is None

    def end(self) -> None:
        """Kill the process unless it ends by itself soon: it was told that it is not needed."""
        self._engine.call_later(_GRACE_S, self._child.kill)

    def stop(self, is_needed: bool) -> None:
        """End the process, too, because this one was told to end. If it has requests, they may end first."""
        self._child.tell(signal.SIGTERM if is_needed else signal.SIGKILL)

    def wait(self, most_s: float) -> None:
        """Wait until the process has exited. Kill it after `most_s` seconds, and a moment."""
        if not self._child.collect() and self._child.fd >= 0:
            exits = select.poll()
            exits.register(self._child.fd, select.POLLIN)
            exits.poll(min(most_s + _GRACE_S, _WAIT_S_MAX) * 1000)
        self._child.kill()
        self._child.collect(blocking=True)

    def _closed(self) -> None:
        """The pair has ended. The process exits next, and how it does so says more."""
        self._engine.call_later(_GRACE_S, self._ended, "has closed its end of the pair")

    def _abandon(self) -> None:
        """In a forked child: close this process's copies of what leads to the process."""
        self.channel.abandon()
        self._child.abandon()

    def _exited(self, child: Child) -> None:
        self.channel.read_rest()
        self.channel.close()
        self._engine.loop.on_forked.remove(self._abandon)
        how = child.how_it_failed()
        self._ended(f"{how}: see its log" if how is not None and child.status in range(1, 256) else how)

    def _ended(self, how: str | None) -> None:
        on_end, self._on_end = self._on_end, _nothing
        on_end(how)


def _nothing(how: str | None) -> None:
    """Say it once."""


def next_range(last_id: int) -> int:
    """Return the first id of the range after the one that `last_id` is in."""
    return (last_id // IDS_PER_PROCESS + 1) * IDS_PER_PROCESS
