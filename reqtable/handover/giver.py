"""`Giver`: gives the requests of an engine to another process. The order of the messages is in `messages`.

The giver decides. It moves batches of requests: freeze a batch, send it, and, once the taker holds all of it, commit
it. If anything goes wrong before the commit, the batch is thawed and goes on here. All other requests go on meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from reqtable.handover import messages
from reqtable.handover.batch import Batch, parts_of
from reqtable.handover.choice import Choice
from reqtable.handover.messages import Message
from reqtable.handover.outcome import Outcome, Phase
from reqtable.handover.patience import Patience
from reqtable.handover.sender import Nobody, Sender
from reqtable.server.engine import Engine
from reqtable.server.shared_state import save_states
from reqtable.table.errors import NotMovable
from reqtable.table.table import Entry
from reqtable.table.words import counted

log = logging.getLogger("reqtable")

_ANSWER_S = 10.0  # how long the taker may take to answer a message
_LOOK_S = 0.05  # how often the giver looks for requests that can move now


class Giver:
    """Gives the requests of `engine` away, at most `slice_rows` in one batch.

    `sockets` are the listening sockets by their keys. `on_change` is called when the phase changes. `lets_stay` says
    that requests which can't move may end here; else they are a reason to abort. After the rehearsal, nothing moves
    before `go`: whoever hears of the phase calls it, or ends the move. `restarts` is for the taker's metrics.
    """

    def __init__(
        self,
        engine: Engine,
        sockets: Sequence[tuple[str, Any]],
        on_change: Callable[[], None],
        start_timeout_s: float,
        slice_rows: int,
        lets_stay: bool = True,
        first_id: int = 0,
        restarts: Mapping[str, int] | None = None,
    ) -> None:
        self._engine = engine
        self._sockets = sockets
        self._on_change = on_change
        self._start_timeout_s = start_timeout_s
        self._slice_rows = slice_rows
        self._lets_stay = lets_stay
        self._first_id = first_id
        self._restarts = dict(restarts or {})
        self.outcome = Outcome()
        self.pid: int | None = None  # the taker, once it has said so
        self.channel: Sender = Nobody()
        self.choice = Choice(engine)
        self._known = 0  # the last id when the move began: newer requests move in the last batch
        self._is_last = False  # nothing is accepted any more, so this batch is the last before Listen
        self._batch = Batch(engine, ())
        self._unrehearsed: Iterator[Sequence[Entry]] = iter(())
        self._listened: list[Any] = []  # the servers that accepted before the last batch
        self._patience = Patience(engine, self.fail)
        self._is_committing = False  # the kernel does not have all of the Commit yet
        self._has_ended = False
        self._keeps_rest = False  # what is left ends here

    def begin(self, channel: Sender) -> None:
        """Wait for the taker's first message, on `channel`."""
        self.channel = channel
        self._patience.begin(self._start_timeout_s, "has not started")

    # -- messages -----------------------------------------------------------------------------------------------------

    def receive(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Act on a message of the taker."""
        handle: Callable[[Any], None] | None = getattr(self, f"_on_{type(message).__name__.lower()}", None)
        if self.outcome.is_over:
            return
        if isinstance(message, messages.Refuse):
            self.fail(message.reason)
            return
        if handle is None:
            self.fail(f"the new process sent {type(message).__name__}, which only the old one may send")
            return
        self._run(handle, message)

    def _run(self, step: Callable[..., None], *args: Any) -> None:
        """Do a step of the move. An exception of the step ends the move, and not the loop."""
        try:
            step(*args)
        except Exception as error:  # a bug, or a hook of the program
            log.exception("a restart has failed")
            self.fail(f"{type(error).__name__}: {error}")

    def ended(self, how: str = "has ended") -> None:
        """The taker is gone. Requests that it has not got go on here."""
        self._has_ended = True
        if self.outcome.is_over:
            self._batch.thaw()
        else:
            self.fail(f"the new process {how}")

    def _on_hello(self, message: messages.Hello) -> None:
        if messages.FORMAT not in message.formats:
            self.fail(f"the new process does not know format {messages.FORMAT} of messages, but {message.formats}")
            return
        self.pid = message.pid
        keys = [key for key, _ in self._sockets]
        offer = messages.Offer(messages.FORMAT, keys, self._first_id, restarts=self._restarts)
        self.channel.send(offer, [own for _, own in self._sockets])

    def _on_ready(self, message: messages.Ready) -> None:
        self.choice.leave_behind(self._sockets, message.sockets)
        self._enter(Phase.REHEARSING)
        if not self._lets_stay and self.choice.immovable():
            self.fail(self.choice.refusal())
            return
        self._unrehearsed = parts_of(list(self._engine.table))
        self._rehearse()

    def _rehearse(self) -> None:
        """Have the taker try the next records, so that no request is frozen in vain."""
        if self.outcome.is_over:
            return
        entries = next(self._unrehearsed, None)
        if entries is None:
            self._share()
            return
        records = self.choice.records(entries)
        if self.choice.stays and not self._lets_stay:
            self.fail(self.choice.refusal())
            return
        self._ask(messages.Rehearse(records))

    def _on_rehearsed(self, message: messages.Rehearsed) -> None:
        self._patience.end()
        if message.problems:
            others = len(message.problems) - 1
            more = f" (and {counted(others, 'more request')})" if others else ""
            self.fail(f"the new code can't go on with the requests: {message.problems[0]}{more}")
        else:
            self._engine.post(self._run, self._rehearse)  # in another pass: the other requests have their turn

    def go(self) -> None:
        """Begin to move, after the rehearsal."""
        self._known = self._engine.table.last_id
        self.choice.stays.clear()  # some may have become movable
        self._enter(Phase.MOVING)
        self._engine.post(self._run, self._move_on)  # not now: this pass may still step what its poll has found

    def leave_it(self) -> None:
        """End a check, after the rehearsal. Nothing has moved."""
        self.channel.send(messages.Abort("it was only a check"), then=self.channel.close)
        self._enter(Phase.CHECKED)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _move_on(self) -> None:
        """Move the next batch. After the last one, have the taker listen."""
        if self.outcome.is_over:
            return
        entries: list[Entry] = []
        if not self._is_last:
            if not self.choice.is_whole:
                entries = self.choice.streams(self._known, self._slice_rows)
            self._is_last = not entries
            if self._is_last:
                listening = [each.server for each in self._engine.listeners]
                self._listened = [each for each in self.choice.servers() if each in listening]
                for server in self._listened:
                    self._engine.listeners.unlisten(server)
        if self._is_last:
            entries = list(self.choice.all())
        if entries:
            self._batch = Batch(self._engine, entries)
            self.choice.stays |= self._batch.stays
            self._send()
        elif self.outcome.phase is Phase.MOVING:
            self._share()  # the state that requests share moves, even if there are none
        else:
            self._look_again()

    def _send(self) -> None:
        part = self._batch.next_part()
        if part:
            holders = [each for frozen in part for each in frozen.movable.attachments]
            self._ask(messages.Send([each.movable.record for each in part]), holders)
        else:
            self._share()

    def _on_prepared(self, message: messages.Prepared) -> None:
        self._patience.end()
        for place, reason in message.refused:
            id = self._batch.refuse(place)
            self.choice.stays[id] = reason
            self.outcome.refused.append(reason)
            log.warning("request %d stays in this process: %s", id, reason)
        self._send()

    def _share(self) -> None:
        """Have the taker try what requests share, or, after the requests, take it."""
        phase = self.outcome.phase
        if not self.choice.is_whole or phase is Phase.DRAINING:
            self._on_shared(messages.Shared(None))
            return
        try:
            states = save_states(self._engine.servers)
        except NotMovable as error:
            self.fail(
                f"{error}. This hook is the running version's, so no new code can mend it: drain the server, and start "
                "the new version"
            )
            return
        self.channel.send(messages.Share(states, only_checks=phase is Phase.REHEARSING))
        self._patience.begin(self._start_timeout_s, "has not taken what requests share")  # it may be much

    def _on_shared(self, message: messages.Shared) -> None:
        self._patience.end()
        if message.problem is not None:
            self.fail(f"the new code can't go on with what requests share: {message.problem}")
        elif self.outcome.phase is Phase.REHEARSING:
            self._enter(Phase.REHEARSED)
        elif self._batch.frozen:  # as soon as the kernel has the Commit, the requests are the taker's
            self._is_committing = True
            self.channel.send(messages.Commit(self._batch.late()), then=self._committed)
        else:
            self._committed()

    def _committed(self) -> None:
        self._is_committing = False
        batch, self._batch = self._batch, Batch(self._engine, ())
        later = batch.later()
        self.outcome.moved += batch.let_go()
        if later:
            self.channel.send(messages.Later(later))
        self.outcome.longest_freeze_s = max(self.outcome.longest_freeze_s, batch.lasted_s)
        if self.outcome.is_over or self._keeps_rest:
            return
        if self.outcome.phase is Phase.MOVING and self._is_last:
            self._enter(Phase.LISTENING)
            self._ask(messages.Listen())
        else:
            self._engine.post(self._run, self._move_on)

    # -- after the last batch -----------------------------------------------------------------------------------------

    def _on_listening(self, message: messages.Listening) -> None:
        self._patience.end()
        self._enter(Phase.DRAINING)
        self._look_again()

    def _look_again(self) -> None:
        """Go on giving away what can move by now, until nothing is left."""
        if not len(self._engine.table):
            self.finish()
        elif not self.outcome.is_over:
            stays = self.choice.is_whole or self._keeps_rest
            self._engine.call_later(_LOOK_S, self._run, self._look_again if stays else self._move_on)

    def finish(self) -> None:
        """End the move: nothing is left, or the time for what stayed here is over."""
        if self.outcome.is_over:
            return
        if not self._keeps_rest:
            self.channel.send(messages.Done())
        self._enter(Phase.DONE)

    def keep_rest(self, problem: str) -> None:
        """Move nothing more: what is left ends here. The new process serves."""
        log.warning("restart: nothing more moves, because %s", problem)
        self._keeps_rest = True
        self._patience.end()
        if not self._is_committing:
            self._batch.thaw()
        self.channel.send(messages.Done(), then=self.channel.close)
        self._look_again()

    # -- failure ------------------------------------------------------------------------------------------------------

    def fail(self, problem: str) -> None:
        """End the move. All that is not committed goes on here, and what is committed goes on in the other process."""
        if self.outcome.is_over:
            return
        if self.outcome.phase is Phase.DRAINING and not self._has_ended:
            self.keep_rest(problem)
            return
        self._patience.end()
        self.outcome.problem = problem
        self.channel.send(messages.Abort(problem), then=self.channel.close)
        if self._has_ended or not self._is_committing:
            self._batch.thaw()
        for server in self._listened:
            if server in self._engine.servers:
                self._engine.listeners.listen(server)
        self._enter(Phase.FAILED)

    def _ask(self, message: Message, holders: Sequence[Any] = ()) -> None:
        self.channel.send(message, holders)
        self._patience.begin(_ANSWER_S, f"has not answered {type(message).__name__}")

    def _enter(self, phase: Phase) -> None:
        self._patience.end()
        self.outcome.phase = phase
        if phase in (Phase.REHEARSED, Phase.DRAINING):
            self.outcome.immovable = self.choice.immovable()
        if phase is Phase.DONE:
            self.channel.close()
        self._on_change()
