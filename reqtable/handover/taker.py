"""`Taker`: takes the requests of another process over. The order of the messages is in `messages`.

The giver decides. The taker holds what is sent to it, frozen, until the giver commits it. If the giver dies, the taker
goes on with all that it holds, because nobody else has it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from reqtable.handover import messages
from reqtable.handover.channel import close_all
from reqtable.handover.messages import Message
from reqtable.handover.sender import Sender
from reqtable.server.engine import Engine
from reqtable.server.mover import has_same_clock
from reqtable.server.shared_state import restore_states
from reqtable.table import plain
from reqtable.table.errors import ReqtableError
from reqtable.table.reach import Reach
from reqtable.table.saving import Head, head_of
from reqtable.table.states import Ending, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

_LOOK_S = 0.05


class Taker:
    """Takes requests into `engine`. `on_listen` begins to accept.

    `on_over(None)` is called once no more will come. `on_over(reason)` is called instead if the giver has aborted: then
    this process is to end. If the giver is `one_of_many`, a process above it decides when this one accepts or ends.
    """

    def __init__(
        self,
        engine: Engine,
        on_listen: Callable[[], None],
        on_over: Callable[[str | None], None],
        is_offered: bool = False,
        one_of_many: bool = False,
    ) -> None:
        self._engine = engine
        self._mover = engine.mover
        self._on_listen = on_listen
        self._on_over = on_over
        self.channel: Sender
        self._prepared: list[Entry | None] = []  # in the order of the batch; None: refused
        self._committed: list[Entry | None] = []  # the batch before
        self._is_offered = is_offered  # the giver has begun
        self._is_one_of_many = one_of_many
        self._is_listening = False
        self.is_over = False
        self._frozen_at = inf  # when the first request of the batch was frozen, by the clock of this machine
        self.taken = 0
        self.longest_freeze_s = 0.0
        self.began_at = engine.table.clock()

    def begin(self, channel: Sender) -> None:
        """Tell the giver, on `channel`, that this process runs."""
        self.channel = channel
        channel.send(messages.Hello([messages.FORMAT], os.getpid()))

    def receive(self, message: Message, descriptors: Sequence[Any] = ()) -> None:
        """Act on a message of the giver. `descriptors` are those of the sockets and the files that came with it."""
        if self.is_over:
            close_all(descriptors)
            return
        try:
            self._act_on(message, descriptors)
        except Exception as error:  # a bug, or a hook of the program: the giver goes on alone
            log.exception("this process can't take the requests of the old one")
            self.give_up(reason_of(error))

    def _act_on(self, message: Message, descriptors: Sequence[Any]) -> None:
        if isinstance(message, messages.Offer):
            self._is_offered = True
            close_all(descriptors)  # the servers have their sockets
            self.channel.send(messages.Ready())
        elif isinstance(message, messages.Rehearse):
            self.channel.send(messages.Rehearsed(self._problems(message.records)))
        elif isinstance(message, messages.Send):
            self.channel.send(messages.Prepared(self._prepare(message.records, descriptors)))
        elif isinstance(message, messages.Share):
            self.channel.send(messages.Shared(self._take_share(message)))
        elif isinstance(message, messages.Commit):
            self._commit(message)
        elif isinstance(message, messages.Later):
            self._tell_later(message)
        elif isinstance(message, messages.Listen):
            self._listen()
            self.channel.send(messages.Listening())
        elif isinstance(message, messages.Done):
            self._drop_prepared()  # the giver has kept what it has not committed
            self._end(None)
        elif isinstance(message, messages.Abort):
            self._drop_prepared()
            self._end(message.reason)
        else:
            log.error("the old process sent %s, which only the new one may send", type(message).__name__)

    def ended(self) -> None:
        """The giver is gone. Without an Abort or a Done it has died, so all that was sent is this process's."""
        if self.is_over:
            return
        if not self._is_offered:
            self._end("the old process has not begun to move requests")
            return
        self._commit(messages.Commit([]))
        if not self._is_one_of_many:
            log.warning("the old process has ended before all was moved: this process goes on")
            self._listen()
        self._end(None)

    def give_up(self, why: str) -> None:
        """Take nothing more. The giver, which is there, goes on with what it has not committed."""
        if self.is_over:
            return
        self.is_over = True
        self._drop_prepared()
        self.channel.send(messages.Refuse(why), then=self.channel.close)
        if self._is_listening:
            self._on_over(None)
        elif not self._is_one_of_many:
            self._end_when_empty(why)

    def leave(self) -> None:
        """This process ends: what is not committed goes on in the giver."""
        self._drop_prepared()

    def _problems(self, records: Sequence[bytes]) -> list[str]:
        found = []
        for each in records:
            try:
                self._mover.rehearse(head_of(each))
            except Exception as error:  # `migrate` is the program's
                found.append(reason_of(error))
        return found

    def _prepare(self, records: Sequence[bytes], descriptors: Sequence[Any]) -> list[tuple[int, str]]:
        """Enter the requests into the table, frozen. Returns the places and the reasons of those that can't go on."""
        heads = [head_of(each) for each in records]
        left = list(descriptors)
        refused = []
        for place, head in enumerate(heads):
            own: Sequence[Any] = left[: head.attachments]
            left = left[head.attachments :]
            if has_same_clock(head):
                self._frozen_at = min(self._frozen_at, head.time)
            try:
                own = _opened(head, own)
                self._prepared.append(self._mover.resume(head, own))
                close_all(own[len(own) - len(head.files) :])
            except Exception as error:
                close_all(own)
                self._prepared.append(None)
                refused.append((place, reason_of(error)))
        close_all(left)
        return refused

    def _take_share(self, message: messages.Share) -> str | None:
        """Call `restore_state`, now that the prepared requests are in the table. Returns what is wrong."""
        try:
            restore_states(self._engine.servers, message.states, message.only_checks)
        except ReqtableError as error:
            return str(error)
        return None

    def _commit(self, message: messages.Commit) -> None:
        prepared, self._prepared = self._prepared, []
        self._committed = prepared
        late = {each.place: each for each in message.late}
        for place, entry in enumerate(prepared):
            if entry is None or entry.state is not State.MOVING:
                continue
            if place in late and late[place].stays:
                self._mover.freezer.let_go(entry)
                continue
            self.taken += 1
            try:
                if place in late:
                    self._add_late(entry, late[place])
                self._mover.freezer.thaw(entry)
            except BaseException as problem:
                self._engine.steps.failures.outside_step(entry, problem)
        self.longest_freeze_s = max(self.longest_freeze_s, self._engine.table.clock() - self._frozen_at)
        self._frozen_at = inf

    def _tell_later(self, message: messages.Later) -> None:
        """Do to requests of the last Commit, which go on here, what happened to them before they were let go."""
        for late in message.late:
            entry = self._committed[late.place]
            if entry is None or entry.state in (State.CLOSED, State.LINGERING):
                continue
            self._add_late(entry, late)
            self._engine.table.touch(entry)
            if late.cancelled:
                entry.ending = None
                self._engine.table.cancel(entry.id)

    @staticmethod
    def _add_late(entry: Entry, late: messages.Late) -> None:
        for piece in late.output:
            entry.output.append(piece)
        told = plain.decode(late.told, lenient=True)
        if told:
            entry.reach = entry.reach or Reach()
            entry.reach.told.extend(told)
        if late.cancelled:
            entry.ending = Ending.CANCELLED

    def _drop_prepared(self) -> None:
        prepared, self._prepared = self._prepared, []
        for entry in prepared:
            if entry is not None and entry.state is State.MOVING:
                self._mover.freezer.let_go(entry)

    def _listen(self) -> None:
        if not self._is_listening:
            self._on_listen()
            self._is_listening = True

    def _end(self, reason: str | None) -> None:
        """Expect nothing more. If the giver has aborted, end with the last request that was taken."""
        self.is_over = True
        self.channel.close()
        if reason is None:
            self._on_over(None)
        elif not self._is_one_of_many:
            self._end_when_empty(reason)

    def _end_when_empty(self, reason: str) -> None:
        stop_listening(self._engine)
        if any(each.state is not State.CLOSED for each in self._engine.table):
            self._engine.call_later(_LOOK_S, self._end_when_empty, reason)
        else:
            self._on_over(reason)


def stop_listening(engine: Engine) -> None:
    """Leave new connections to the giver: a copy of its socket would hold up those that come after its end."""
    for server in engine.servers:
        engine.listeners.unlisten(server)
        close_stream(server)


def close_stream(server: Any) -> None:
    """Close this process's copy of a listening socket. A datagram socket also serves the sessions."""
    if server.socket_type == socket.SOCK_STREAM:
        server.socket.close()


def _opened(head: Head, descriptors: Sequence[Any]) -> list[Any]:
    """Return the descriptors of a record, those of sockets as sockets."""
    if len(descriptors) < head.attachments:
        raise ReqtableError(f"request {head.id} came with {len(descriptors)} of {head.attachments} descriptors")
    sockets = head.attachments - len(head.files)
    return [
        socket.socket(fileno=each) if place < sockets and isinstance(each, int) else each
        for place, each in enumerate(descriptors)
    ]


def reason_of(error: BaseException) -> str:
    """Return what is wrong, in one line."""
    if isinstance(error, ReqtableError):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ", ".join([text, *getattr(error, "__notes__", ())])
