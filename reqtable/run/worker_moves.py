"""A worker gives its requests away, or takes those of another worker, when its supervisor restarts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from reqtable.handover import messages
from reqtable.handover.channel import Channel
from reqtable.handover.giver import Giver
from reqtable.handover.messages import Message
from reqtable.handover.outcome import Phase
from reqtable.handover.taker import Taker
from reqtable.loop.process import Process
from reqtable.run.hold import Hold
from reqtable.server.drain import Drain
from reqtable.server.operator import Operator


class WorkerMoves:
    """Does what the supervisor says on `own`, one end of a pair, and tells it how far that is."""

    def __init__(self, operator: Operator, own: socket.socket) -> None:
        self._operator = operator
        self._engine = operator.engine
        self._hold: Hold | None = None
        self._takers: list[Taker] = []
        self._begin: list[Callable[[list[str]], None]] = []  # what the takers that have not begun do then
        self._giver: Giver | None = None
        self._restart = 0  # the number of the supervisor's restart
        self._drain: Drain | None = None
        self._is_orphaned = False
        self._channels: list[Channel] = []
        self._supervisor = self._channel(own, self._hear, _nothing)
        self._engine.loop.on_forked.append(self._abandon)

    def take(self, pairs: Sequence[socket.socket], is_direct: bool) -> None:
        """Take requests over each of `pairs`, as soon as the supervisor says so. Accept when told to.

        If `is_direct`, a process without workers is at the other end.
        """
        self._hold = Hold(self._engine, self._listening)
        self._operator.takers = self._takers = []
        for own in pairs:
            taker = Taker(self._engine, self._listen, self._over, is_offered=is_direct, one_of_many=not is_direct)
            taker.channel = channel = self._channel(own, taker.receive, taker.ended, taker.give_up)
            self._takers.append(taker)
            self._begin.append(partial(_tell_ready, channel) if is_direct else partial(_begin, taker, channel))

    def _channel(
        self,
        own: socket.socket,
        on_message: Callable[[Any, list[int]], None],
        on_end: Callable[[], None],
        on_problem: Callable[[str], None] | None = None,
    ) -> Channel:
        channel = Channel(self._engine.loop.poller, own, on_message, on_end, on_problem)
        self._channels = [each for each in self._channels if each.fd >= 0] + [channel]
        return channel

    def _abandon(self) -> None:
        """In a forked child: close this process's copies of the pairs."""
        for each in self._channels:
            each.abandon()

    def _hear(self, message: Message, descriptors: Sequence[int]) -> None:
        if isinstance(message, messages.Take):
            for begin in self._begin:
                begin(message.sockets)
            self._begin = []
        elif isinstance(message, messages.Listen):
            self._listen()
        elif isinstance(message, messages.Leave):
            self._leave()
        elif isinstance(message, messages.Give):
            self._restart = message.restart
            self._give(descriptors[0])
        elif isinstance(message, messages.Go):
            self._go()
        elif isinstance(message, messages.Abort):
            self._stay(message.reason)

    # -- taking -------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._hold is not None:
            self._hold.listen()

    def _listening(self) -> None:
        self._supervisor.send(messages.Listening())

    def _leave(self) -> None:
        if self._hold is not None:
            self._hold.leave()

    def _over(self, reason: str | None) -> None:
        """Pass on that a process without workers has aborted."""
        if reason is not None:
            self._supervisor.send(messages.Abort(reason))

    # -- giving -------------------------------------------------------------------------------------------------------

    def _give(self, descriptor: int) -> None:
        options = self._operator.config.restart
        self._giver = giver = Giver(
            self._engine,
            (),
            self._changed,
            options.start_timeout_s,
            options.slice_rows,
            options.unmovable == "drain",
        )
        Process.has_forked = True
        giver.begin(self._channel(socket.socket(fileno=descriptor), giver.receive, giver.ended, giver.fail))

    def _go(self) -> None:
        if self._giver is not None and self._giver.outcome.phase is Phase.REHEARSED:
            self._giver.go()

    def _changed(self) -> None:
        giver = self._giver
        assert giver is not None
        outcome = giver.outcome
        self._supervisor.send(
            messages.Progress(
                self._restart,
                outcome.phase.value,
                outcome.moved,
                outcome.refused,
                outcome.problem,
                outcome.longest_freeze_s,
                len(self._engine.table),
                dict(outcome.immovable),
            )
        )
        if outcome.phase is Phase.DONE:
            self._engine.stop()
        elif outcome.phase is Phase.DRAINING:
            self._begin_drain()
        elif outcome.phase is Phase.FAILED and self._drain is not None:
            for server in self._engine.servers:  # other new workers serve, although this one's is gone
                self._engine.listeners.unlisten(server)
        elif outcome.phase is Phase.FAILED and self._is_orphaned:
            self._begin_drain()

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = self._operator.drain(ended=self._drained)

    def _drained(self) -> None:
        assert self._giver is not None
        self._giver.finish()
        self._engine.stop()

    def _stay(self, reason: str) -> None:
        """Serve as before: the supervisor goes on."""
        if self._drain is not None and self._giver is not None:
            self._drain.cancel()
            self._drain = None
            self._giver.ended("is gone")
            for server in self._engine.servers:
                self._engine.listeners.listen(server)
        elif self._giver is not None:
            self._giver.fail(reason)

    def moves_on(self) -> bool:
        """The supervisor is gone. Give the requests away all the same if they can be. Returns False if they can't."""
        for taker in self._takers:
            taker.give_up("the supervisor of the new process is gone")  # what came would only be drained
        giver = self._giver
        if giver is None or giver.outcome.is_over:
            return self._drain is not None
        self._is_orphaned = True
        if giver.outcome.phase in (Phase.STARTING, Phase.REHEARSING):
            giver.fail("the supervisor is gone")
        else:
            self._go()
        return True


def _begin(taker: Taker, channel: Channel, sockets: list[str]) -> None:
    """Tell a worker of the process before that this one runs: its supervisor knows which sockets are used."""
    taker.begin(channel)


def _tell_ready(channel: Channel, sockets: list[str]) -> None:
    """Tell a process without workers, to which the supervisor has spoken already, that all workers run."""
    channel.send(messages.Ready(sockets))


def _nothing() -> None:
    """Leave it to the worker's channel, which notices the end of the supervisor, too."""
