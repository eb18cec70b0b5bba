"""A request that a forked child has, as the parent's table sees it."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Protocol

from reqtable.dispatch.forking.child import Child, fork, log
from reqtable.dispatch.handoff import Handoff, HandoffPolicy
from reqtable.dispatch.private_loop import send_message, take_message
from reqtable.net.datagram import Session
from reqtable.net.poll_only import PollOnly
from reqtable.table.addresses import address_text
from reqtable.table.buffers import Inbox
from reqtable.table.parts import Resumable
from reqtable.table.states import Ending
from reqtable.table.table import Entry
from reqtable.table.wants import Failure

# The exit statuses by which a child says how its request ended; 0 says that it is done.
STATUSES = {ending: 200 + number for number, ending in enumerate(Ending)} | {Ending.DONE: 0}
_ENDINGS = {status: ending for ending, status in STATUSES.items() if status}
# Keeps messages apart, and holds as many as its buffer does.
_PACKETS = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)

Pair = tuple[socket.socket, socket.socket]


class Killer(Protocol):
    """What can end a child."""

    def kill(self, pid: int) -> None: ...


class InChild(Handoff):
    """A request that a child has, or will have when this pass ends.

    The later datagrams of a session reach the child by a pair of sockets. The parent reads back what the child leaves
    unread of them: if the request was no session, they are new requests.
    """

    def __init__(self, policy: HandoffPolicy, entry: Entry, handler: Resumable | None, killer: Killer) -> None:
        super().__init__(policy, entry, handler)
        self._killer = killer
        self._pid: int | None = None
        self._is_killed = False
        self._pair: Pair | None = None

    def fork(self) -> int:
        """Fork the child. In the child: 0, with the pair's ends still open."""
        try:
            if isinstance(self.transport, Session) and self.entry.peer:
                self._pair = socket.socketpair(socket.AF_UNIX, _PACKETS)
                _send_later_ones(self.transport.inbox, self._pair[0])
            return fork()
        except BaseException:
            self._close_pair()
            raise

    def keep_feed(self) -> socket.socket | None:
        """In the child: the end by which the later datagrams come; None where there is none."""
        if self._pair is None:
            return None
        self._pair[0].close()
        return self._pair[1]

    def begun(self, pid: int) -> None:
        """In the parent: the child `pid` has the request."""
        entry, transport = self.entry, self.transport
        self._pid = pid
        entry.policy = self.policy
        if self._pair is not None:
            transport.forward = self._forward
        if isinstance(transport, PollOnly):
            transport.give(hold=self.policy.loop_goes_on)

    def leave(self) -> None:
        """In the parent, once the child runs: the child sends the output, and reads the input of a stream."""
        entry = self.entry
        if self.ends_itself:
            entry.server.close_request(self.request)
            return
        entry.handler._leave()
        self.transport.leave()
        entry.output.clear()
        if entry.input.is_stream:
            entry.input.leftover()
        entry.table.hold(entry, len(entry.input))

    def fail(self, problem: Exception) -> None:
        """In the loop: it could not be begun, or gone on with."""
        assert self.entry.table.owner is not None
        self.entry.table.owner.post_result(self.entry, self.number, Failure(problem))

    def exited(self, child: Child) -> None:
        """In the loop that children are watched in: the child has been waited for."""
        entry = self.entry
        how = child.how_it_failed()
        if child.status in _ENDINGS:
            entry.ending = entry.ending or _ENDINGS[child.status]
        elif how is not None and not self._is_killed:
            entry.ending = entry.ending or Ending.ERROR
            log.warning("%s: request %d: its child %s", address_text(entry.peer), entry.id, how)
        owner = entry.table.owner
        assert owner is not None
        if owner.in_other_thread:
            owner.post(self.returned)
        else:
            self.returned()

    def finish(self) -> None:
        self._read_back()
        super().finish()

    def release(self) -> None:
        if self._pid is not None and not self.is_let_go:
            self._is_killed = True
            self._killer.kill(self._pid)
            self.transport.shut()  # for children of its own, too
        self._read_back()
        super().release()

    def abandon(self) -> None:
        super().abandon()
        self._close_pair()

    def _forward(self, data: bytes) -> None:
        assert self._pair is not None
        try:
            send_message(self._pair[0], data)
        except OSError:
            self.transport.inbox.dropped += 1

    def _read_back(self) -> None:
        if self._pair is None:
            return
        self.transport.forward = None
        with contextlib.suppress(BlockingIOError):
            while (data := take_message(self._pair[1])) is not None:
                self.transport.deliver(data)
        self._close_pair()

    def _close_pair(self) -> None:
        pair: Any = self._pair or ()
        for end in pair:
            end.close()
        self._pair = None


def _send_later_ones(inbox: Inbox, end: socket.socket) -> None:
    """Datagrams that came after the request's own, and that nothing has been read of, go the way of those to come."""
    waiting = inbox.unopened()
    own = 0 if inbox.asked else 1
    for data in waiting[:own]:
        inbox.deliver(data, 1)
    for data in waiting[own:]:
        try:
            send_message(end, data)
        except OSError:
            inbox.dropped += 1
