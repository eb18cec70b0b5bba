"""Giving a request to a forked child, as the parent's table sees it."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Protocol

from reqtable.dispatch.forking.child import Child, fork, log
from reqtable.dispatch.handoff import HandedOffRequest, HandoffPolicy
from reqtable.dispatch.private_loop import send_message, take_message
from reqtable.dispatch.progress import SharedProgress, progress_of
from reqtable.loop.step import Steps
from reqtable.net.datagram import Session
from reqtable.net.poll_only import PollOnly
from reqtable.net.sockets import is_tls
from reqtable.table.addresses import address_text
from reqtable.table.input import Inbox
from reqtable.table.parts import Resumable
from reqtable.table.states import Ending
from reqtable.table.table import Entry
from reqtable.table.wants import Failure

# The exit statuses by which a child says how its request ended; 0: done.
STATUSES = {ending: 200 + number for number, ending in enumerate(Ending)} | {Ending.DONE: 0}
_ENDINGS = {status: ending for ending, status in STATUSES.items() if status}
_NOTICES_MAX = 20  # on a busy machine, a child that was killed may take a second to exit
# SOCK_SEQPACKET keeps messages apart, and queues as many as fit into its buffer.
_PACKETS = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)

Pair = tuple[socket.socket, socket.socket]


class Killer(Protocol):
    """Kills a child."""

    def kill(self, pid: int) -> None: ...


class InChild(HandedOffRequest):
    """Gives a request to a child, which is forked at once or when this pass ends.

    The later datagrams of a session reach the child through a socket pair. The parent reads back those that the child
    has left unread. If the request was no session, they become new requests.
    """

    def __init__(self, policy: HandoffPolicy, entry: Entry, handler: Resumable | None, killer: Killer) -> None:
        super().__init__(policy, entry, handler)
        self._killer = killer
        self._pid: int | None = None
        self._is_killed = False
        self._pair: Pair | None = None

    def fork(self) -> int:
        """Fork the child. Returns its pid; in the child 0, with both ends of the pair still open."""
        try:
            if not is_tls(self.request):  # only the child can go on with an encrypted connection
                self.progress = progress_of(self.entry.handler, SharedProgress, self.entry.began_at)
            if isinstance(self.transport, Session) and self.entry.peer:
                self._pair = socket.socketpair(socket.AF_UNIX, _PACKETS)
                _send_later_ones(self.transport.inbox, self._pair[0])
            return fork()
        except BaseException:
            self._close_pair()
            raise

    def serve_here(self) -> None:
        """In the child: have the request go on in this process. Unlike `undo`, it watches nothing."""
        self.entry.transport = self.transport
        if self.handler is not None:
            self.entry.resumable = self.handler

    def keep_feed(self) -> socket.socket | None:
        """In the child: return the end of the pair that later datagrams arrive at; None if there is no pair."""
        if self._pair is None:
            return None
        self._pair[0].close()
        return self._pair[1]

    def forked(self, pid: int) -> None:
        """In the parent: note that the child `pid` has the request."""
        entry, transport = self.entry, self.transport
        self._pid = pid
        entry.policy = self.policy
        if self._pair is not None:
            transport.forward = self._forward
        if isinstance(transport, PollOnly):
            self.policy.hold(self)

    def leave(self) -> None:
        """In the parent: drop the output, which the child sends, and a stream's input, which the child reads."""
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
        steps = entry.table.owner
        assert isinstance(steps, Steps)
        steps.end_reach(entry)  # closes only this process's copies

    def fail(self, problem: Exception) -> None:
        """In the loop: deliver the error that kept the child from being forked or watched."""
        assert self.entry.table.owner is not None
        self.entry.table.owner.post_result(self.entry, self.number, Failure(problem))

    def _words_at(self, notice: int) -> bytes | None:
        if self._pid is None:
            self.undo()  # there is no child yet
            return self._last_words()
        if notice > _NOTICES_MAX:
            return b""  # it was killed, but has not exited
        if notice == 2:
            self._is_killed = True
            self._killer.kill(self._pid)
        return None

    def _answer(self) -> None:
        """Answer the client of a child that was killed before any of its answer had left."""
        entry, progress = self.entry, self.progress
        if self._is_killed and progress is not None and not progress.is_partial:
            self.catch_up()
            words = entry.handler._apology(progress.has_connections)
            if words:
                entry.output.append(words)
                self.speaks = True

    def exited(self, child: Child) -> None:
        """In the loop that watches children: note how the child ended, and return the request."""
        entry = self.entry
        how = child.how_it_failed()
        if child.status in _ENDINGS:
            entry.ending = entry.ending or _ENDINGS[child.status]
        elif how is not None and not self._is_killed:
            entry.ending = entry.ending or Ending.ERROR
            log.warning("%s: request %d: its child %s", address_text(entry.peer), entry.id, how)
        self._answer()
        owner = entry.table.owner
        assert owner is not None
        if owner.in_other_thread:
            owner.post(self.returned)
        else:
            self.returned()

    def _close(self) -> None:
        if self.is_given and self._pid is None and self.handler is not None:
            self.handler._close()  # cancelled before the end of the pass: there is no child
        else:
            super()._close()

    def finish(self) -> None:
        self._read_back()
        super().finish()

    def release(self) -> None:
        if self._pid is not None and not self.is_let_go:
            self._is_killed = True
            self._killer.kill(self._pid)
            self.transport.shut()  # also for the child's own children
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
    """Send the child the unread datagrams that came after the request's own."""
    waiting = inbox.unopened()
    own = 0 if inbox.was_read else 1
    for data in waiting[:own]:
        inbox.deliver(data, 1)
    for data in waiting[own:]:
        try:
            send_message(end, data)
        except OSError:
            inbox.dropped += 1
