"""A worker: a process that serves what its supervisor has bound, and the lifeline between the two."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable
from typing import Any, Protocol

from reqtable.control.desk import Desk
from reqtable.control.operations import Target
from reqtable.loop.poller import Descriptor, Poller
from reqtable.run.signals import log_table
from reqtable.server.operator import Operator
from reqtable.table.states import READ

ALIVE = b"."  # what a worker sends, now and then
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)


class Lifeline(Descriptor):
    """Reads one end of a socket pair: calls `on_word(word)` with what arrives, and `on_word(b"")` once at its end."""

    __slots__ = ("_on_word", "_socket")

    def __init__(self, poller: Poller, own: socket.socket, on_word: Callable[[bytes], None]) -> None:
        super().__init__(poller, own.fileno())
        self._socket = own
        self._on_word = on_word
        self.watch(READ)

    def on_ready(self, mask: int) -> None:
        try:
            word = self._socket.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if not word:
            self.watch(0)
        self._on_word(word)

    def say(self, word: bytes) -> None:
        """Send `word`. It is dropped if the other end is gone, or has too much unread."""
        with contextlib.suppress(OSError):
            self._socket.send(word, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self.watch(0)
        self._socket.close()

    def abandon(self) -> None:
        """In a forked child: close this process's copy of the socket, and leave the selector to the parent."""
        self._socket.close()


class Ends(Protocol):
    """The worker's ends of two pairs with its supervisor."""

    @property
    def life(self) -> socket.socket: ...
    @property
    def line(self) -> socket.socket: ...


class Work:
    """Serves in a worker until the worker is told to end, or until the supervisor is gone.

    If the supervisor is gone, the worker drains, unless its requests move to another process: `moves_on` says so.
    """

    def __init__(self, operator: Operator, ends: Ends, beat_s: float, moves_on: Callable[[], bool]) -> None:
        self._operator = operator
        self._engine = engine = operator.engine
        self._beat_s = beat_s
        self._moves_on = moves_on
        self._is_draining = False
        self._lifeline = Lifeline(engine.loop.poller, ends.life, self._hear)
        self._desk = Desk(Target(engine, operator), ends.line)
        engine.loop.on_forked += [self._lifeline.abandon, self._desk.line.abandon]

    def run(self, unblock: Callable[[], Any]) -> None:
        """Serve. Signals are blocked until this calls `unblock()`."""
        servers: list[Any] = list(self._engine.servers)
        # Replace the supervisor's handlers directly. Restoring the original ones first would lose a pending signal
        # whose original action is "ignore".
        for number, handler in self._handlers().items():
            signal.signal(number, handler)
        unblock()
        self._engine.post(self._beat)
        self._engine.serve_forever()
        self._desk.say_last()
        for server in servers:
            server.server_close()

    def _handlers(self) -> dict[int, Callable[..., Any]]:
        engine = self._engine
        return {
            **dict.fromkeys(HANDLED, lambda *_: None),  # the supervisor acts on these
            signal.SIGINT: lambda *_: engine.stop(),
            signal.SIGTERM: self._terminate,
            signal.SIGUSR1: lambda *_: log_table(engine),
        }

    def _terminate(self, *_: object) -> None:
        self._operator.announce_drain()
        self._engine.post(self._drain)

    def _drain(self) -> None:
        if not self._is_draining:  # systemd signals every process of a service, and the supervisor signals again
            self._is_draining = True
            self._operator.drain()

    def _beat(self) -> None:
        self._lifeline.say(ALIVE)
        self._engine.call_later(self._beat_s, self._beat)

    def _hear(self, word: bytes) -> None:
        if not word and not self._moves_on():
            self._drain()
