"""`TakingPlace`: how a supervisor, and its first workers, take the place of another process."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from reqtable.handover import messages
from reqtable.handover.channel import Channel
from reqtable.handover.messages import Message
from reqtable.handover.taker import close_stream
from reqtable.run.inherited import Inherited
from reqtable.run.known_worker import Worker
from reqtable.run.systemd import Notifier
from reqtable.server.engine import Engine

log = logging.getLogger("reqtable")

_AT_ONCE_S = 0.5  # less than the process before waits until it kills this one


class Placed(Protocol):
    """The part of a supervisor that takes the place of another process."""

    engine: Engine
    workers: list[Worker]
    notifier: Notifier

    def leave(self) -> None: ...
    def dismiss(self, worker: Worker, number: int, within_s: float) -> None: ...


class TakingPlace:
    """Gives each of the first `wanted` workers its pairs with the process before, or with workers of it.

    Until the first of them listens, none does. `on_listening` is called then. If the process before aborts, or one of
    these workers ends before that, the supervisor leaves. It has taken the place once the process before has said so,
    or is gone.
    """

    def __init__(
        self,
        supervisor: Placed,
        servers: Sequence[Any],
        inherited: Inherited,
        wanted: int,
        on_listening: Callable[[], None],
    ) -> None:
        self._supervisor = supervisor
        self._servers = servers
        self._on_listening = on_listening
        self.is_held = True  # no worker accepts yet
        self.is_over = False  # nobody can take the place back
        self.is_direct = not inherited.givers  # the process before has no workers
        self._used = inherited.used
        self._note_listening = inherited.listens
        self._is_ready = False
        self._is_leaving = False
        self._given: list[socket.socket] = []  # the other ends, for the workers of the process before
        self._pairs: list[list[socket.socket]] = [[] for _ in range(wanted)]
        self._channel: Channel | None = None
        if self.is_direct:
            self._pairs[0].append(inherited.pair)
        else:
            self._channel = Channel(supervisor.engine.loop.poller, inherited.pair, self._hear, self._over)
        for number in range(inherited.givers):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._pairs[number % wanted].append(ours)
            self._given.append(theirs)
        supervisor.engine.loop.on_forked.append(self._abandon)

    def next_pairs(self) -> Sequence[socket.socket]:
        """Return the pairs of the next worker. The caller closes them once the worker has its copies."""
        return self._pairs.pop(0) if self._pairs else []

    def _abandon(self) -> None:
        """In a worker: close this process's copies of what is not the worker's."""
        if self._channel is not None:
            self._channel.abandon()
        for each in (*self._given, *(own for pairs in self._pairs for own in pairs)):
            each.close()

    def ready(self) -> None:
        """All workers run: tell the process before."""
        if self._is_ready:
            return
        self._is_ready = True
        for each in self._supervisor.workers:
            each.moves.send(messages.Take(self._used))
        if self._channel is not None:
            given, self._given = self._given, []
            self._channel.hand_on(messages.Ready(self._used), given)

    def told(self, worker: Worker, message: Message) -> None:
        """Note that a worker accepts. Then the others, and those that are started later, do so, too."""
        if isinstance(message, messages.Listening):
            self._listen()
            self.is_over = self.is_over or self.is_direct
        elif isinstance(message, messages.Abort) and self.is_held:
            self._leave(message.reason)

    def worker_ended(self, worker: Worker) -> None:
        """Leave if a worker ends too soon: the program does not work."""
        if self.is_held:
            self.refuse(f"worker {worker.pid} {worker.child.how_it_failed() or 'has ended'}: see its log")

    def refuse(self, reason: str) -> None:
        """Tell the process before that this one can't take its place, and leave."""
        if self._channel is not None and not self._is_leaving:
            self._channel.send(messages.Refuse(reason))
        self._leave(reason)

    def _hear(self, message: Message, descriptors: Sequence[Any]) -> None:
        if isinstance(message, messages.Abort) and not self.is_over:
            self._leave(message.reason)
        elif isinstance(message, messages.Done):
            self._over()

    def _over(self) -> None:
        """The process before has given all away, or is gone."""
        self.is_over = True
        self._listen()

    def _listen(self) -> None:
        if not self.is_held or self._is_leaving:
            return
        self.is_held = False
        for each in self._supervisor.workers:
            each.moves.send(messages.Listen())
        self._note_listening()
        self._on_listening()

    def _leave(self, reason: str) -> None:
        """End with the last request that was taken: at once, if none can have come."""
        if self._is_leaving:
            return
        self._is_leaving = True
        log.info("restart: this process is not needed, because %s", reason)
        self._supervisor.notifier.hold()
        self._supervisor.leave()
        for server in self._servers:
            close_stream(server)
        for each in self._supervisor.workers:
            each.moves.send(messages.Leave())
            if not self._is_ready:
                self._supervisor.dismiss(each, signal.SIGINT, _AT_ONCE_S)
