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
from reqtable.server.engine import Engine
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


def work(
    operator: Operator,
    ends: Ends,
    beat_s: float,
    unblock: Callable[[], Any],
    restore: Callable[[Engine], None],
    moves_on: Callable[[], bool],
) -> None:
    """Serve until told to end, or until the supervisor is gone. Signals are blocked until this calls `unblock()`.

    `restore(engine)` takes over the requests of another worker, before the loop runs. If the supervisor is gone, drain,
    unless the requests move to another process: `moves_on` says so.
    """
    engine = operator.engine
    servers: list[Any] = list(engine.servers)
    for server in servers:
        server._make_policies_again()
    restore(engine)
    draining: list[bool] = []

    def drain() -> None:
        if draining:
            return  # systemd signals every process of a service, and the supervisor signals again
        draining.append(True)
        operator.drain()

    def terminate(*_: object) -> None:
        operator.announce_drain()
        engine.post(drain)

    def beat() -> None:
        lifeline.say(ALIVE)
        engine.call_later(beat_s, beat)

    def hear(word: bytes) -> None:
        if not word and not moves_on():
            drain()

    lifeline = Lifeline(engine.loop.poller, ends.life, hear)
    desk = Desk(Target(engine, operator), ends.line)
    engine.loop.on_forked += [lifeline.abandon, desk.line.abandon]
    handlers: dict[int, Callable[..., Any]] = dict.fromkeys(HANDLED, lambda *_: None)  # the supervisor acts on these
    handlers |= {
        signal.SIGINT: lambda *_: engine.stop(),
        signal.SIGTERM: terminate,
        signal.SIGUSR1: lambda *_: log_table(engine),
    }
    # Replace the supervisor's handlers directly. Restoring the original ones first would lose a pending signal whose
    # original action is "ignore".
    for number, handler in handlers.items():
        signal.signal(number, handler)
    unblock()
    engine.post(beat)
    engine.serve_forever()
    desk.say_last()
    for server in servers:
        server.server_close()
