"""A process inherits listening sockets, and a socket pair, from the process whose place it takes."""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from reqtable.handover import messages
from reqtable.handover.channel import Assembler, Channel, OnMessage, close_all, packets_of, receive_packet
from reqtable.handover.messages import Message
from reqtable.handover.taker import Taker, reason_of
from reqtable.loop.process import Process
from reqtable.run.endpoints import Endpoint
from reqtable.run.hold import Hold
from reqtable.server.engine import Engine
from reqtable.server.operator import HANDOVER_VARIABLE
from reqtable.table.errors import ReqtableError

log = logging.getLogger("reqtable")

_ANSWER_S = 30.0  # how long the giver may take to answer
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group (unix(7))


class _GoneError(Exception):
    """The process before has ended, and has offered nothing."""


class Inherited:
    """Holds what came with the giver's Offer, until the servers of this process have taken it."""

    def __init__(self, own: socket.socket) -> None:
        self._own = own
        own.settimeout(_ANSWER_S)
        with suppress(BrokenPipeError):
            self._say(messages.Hello([messages.FORMAT], os.getpid()))
        offer, descriptors = self._hear()
        if not isinstance(offer, messages.Offer):
            raise ReqtableError(f"the old process sent {type(offer).__name__}, not an Offer")
        self.first_id = offer.first_id
        self.givers = offer.givers
        self.restarts = offer.restarts
        self._descriptors = descriptors
        self.offered = list(zip(descriptors, offer.sockets, strict=True))  # what is left of it
        self.used: list[str] = []
        self._servers: Sequence[Any] = ()
        self.takers: list[Taker] = []
        self.on_abort: Callable[[], object] = bool
        self.on_listening: Callable[[], object] = bool
        Process.has_forked = True  # another process has the same sockets, and their blocking mode

    def placed(self, endpoint: Endpoint) -> Endpoint:
        """Return the endpoint at the socket that the giver has for it, if it has one."""
        for found in self.offered:
            descriptor, key = found
            if key == endpoint.key:
                self.offered.remove(found)
                self.used.append(key)
                return replace(endpoint, descriptor=descriptor, is_inherited=True)
        return endpoint

    def refuse(self, reason: str) -> None:
        """Tell the giver that this process can't go on."""
        with suppress(OSError):
            self._say(_refusal(reason))
        self._own.close()

    @property
    def pair(self) -> socket.socket:
        """This end of the pair with the process before."""
        return self._own

    def attach(self, engine: Engine) -> None:
        """Take requests into `engine` once it runs. Until a giver says so, the engine does not listen.

        The giver is the process before, or, if that has workers, each of these.
        """
        hold = Hold(engine)
        engine.serving.on_listen.append(self.listens)
        engine.table.last_id = max(engine.table.last_id, self.first_id)
        if not self.givers:
            channel = self._take(engine, self._own, hold, is_offered=True)
            engine.post(channel.send, messages.Ready(self.used))
            return
        others = []
        for _ in range(self.givers):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._take(engine, ours, hold, one_of_many=True)
            others.append(theirs)
        supervisor = _channel(engine, self._own, partial(self._hear_supervisor, hold), hold.listen)
        engine.post(supervisor.hand_on, messages.Ready(self.used), others)

    def stop(self) -> None:
        """Take nothing more: this process was told to end."""
        for each in self.takers:
            each.give_up("the new process was told to end")

    def listens(self) -> None:
        """Note that this process serves from now on: so it removes the files of Unix sockets at its end."""
        for each in self._servers:
            each._is_given_away = False
        self.on_listening()

    def close_sockets(self, servers: Sequence[Any] = ()) -> None:
        """Close the descriptors that came with the offer: the `servers` have copies of their own."""
        self._servers = servers or self._servers
        close_all(self._descriptors)
        self._descriptors.clear()

    def _take(
        self, engine: Engine, own: socket.socket, hold: Hold, is_offered: bool = False, one_of_many: bool = False
    ) -> Channel:
        """Take requests into `engine` over a pair. Returns the channel for it."""
        taker = Taker(engine, hold.listen, partial(self._over, hold), is_offered, one_of_many)
        channel = _channel(engine, own, taker.receive, taker.ended, taker.give_up)
        self.takers.append(taker)
        if is_offered:
            taker.channel = channel
        else:
            taker.begin(channel)
        return channel

    def _over(self, hold: Hold, reason: str | None) -> None:
        """End if the process before has aborted."""
        if reason is not None:
            self.on_abort()
            hold.leave()

    def _hear_supervisor(self, hold: Hold, message: Message, descriptors: Sequence[int]) -> None:
        """Act on what the supervisor of the givers has decided."""
        if isinstance(message, messages.Abort):
            self._over(hold, message.reason)
        elif isinstance(message, messages.Done):
            hold.listen()

    def _say(self, message: Message) -> None:
        for data, descriptors in packets_of(message, ()):
            socket.send_fds(self._own, [data], descriptors)

    def _hear(self) -> tuple[Any, list[int]]:
        assembler = Assembler()
        while True:
            try:
                packet, descriptors = receive_packet(self._own)
            except ConnectionResetError:
                continue  # it has ended with unread messages: what it has sent before can be read
            if not packet:
                raise _GoneError
            found = assembler.add(packet, descriptors)
            if found is not None:
                return found


def _channel(
    engine: Engine,
    own: socket.socket,
    on_message: OnMessage,
    on_end: Callable[[], None],
    on_problem: Callable[[str], None] | None = None,
) -> Channel:
    channel = Channel(engine.loop.poller, own, on_message, on_end, on_problem)
    engine.loop.on_forked.append(channel.abandon)
    return channel


@contextmanager
def inheriting() -> Iterator[Inherited | None]:
    """Begin with what the process before has offered; None if there is none. Tell it if the block fails.

    Raises ReqtableError if what the environment names is no pair with a process of the same user.
    """
    number = os.environ.pop(HANDOVER_VARIABLE, "")
    if not number:
        yield None
        return
    own = _pair_at(number)
    try:
        inherited = Inherited(own)
    except _GoneError:
        own.close()
        log.warning("the process before has ended: this one begins without it")
        yield None
        return
    try:
        yield inherited
    except BaseException as error:
        inherited.refuse(reason_of(error))
        raise
    finally:
        inherited.close_sockets()


def refuse_to_begin(reason: str) -> None:
    """Tell the process before that this one does not come to serving. It has not taken what is offered."""
    with suppress(ReqtableError, OSError), _pair_at(os.environ.pop(HANDOVER_VARIABLE)) as own:
        for data, descriptors in packets_of(_refusal(reason), ()):
            socket.send_fds(own, [data], descriptors)


def _refusal(reason: str) -> messages.Refuse:
    return messages.Refuse(f"the new process can't start: {reason}")


def _pair_at(number: str) -> socket.socket:
    """Return this end of the pair. Raises ReqtableError if it is no pair of the same user."""
    problem = f"environment {HANDOVER_VARIABLE}: {number!r} is not a pair with the process before"
    try:
        descriptor = int(number)
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise ReqtableError(problem)
        os.set_inheritable(descriptor, False)
        own = socket.socket(fileno=descriptor)
    except (ValueError, OSError) as error:
        raise ReqtableError(problem) from error
    user = -1
    if (own.family, own.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        user = _CREDENTIALS.unpack(own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
    if user not in (os.geteuid(), 0):
        own.detach()
        raise ReqtableError(problem)
    return own
