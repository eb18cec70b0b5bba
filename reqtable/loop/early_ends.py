"""How requests end before they are done: by `cancel`, or at the end of `request_timeout_s`.

A handler whose client still waits for its answer may have last words, such as a 503 of HTTP. They are sent, and the
connection ends politely.
"""

from __future__ import annotations

import logging

from reqtable.loop.ending import Endings
from reqtable.loop.mailbox import Mailbox
from reqtable.table.addresses import address_text
from reqtable.table.input import MISSING
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

_NOTICE_S = 0.1  # how long a thread or a child has to end its request by itself
_SPEECHLESS = {State.OPENING, State.LINGERING, State.CLOSED}


class EarlyEndings(Endings):
    """Ends requests that are not done."""

    mailbox: Mailbox

    def finish(self, entry: Entry, cause: Event) -> None:
        """Finish `entry`: end its connection politely, once the kernel has taken its output."""
        raise NotImplementedError

    def cancel(self, entry: Entry) -> None:
        """End the request of `entry` and drop its unsent output. In a forked child do nothing: it is the parent's."""
        if self.in_other_thread:
            self.mailbox.post(self.end_early, entry, Event.CANCELLED)
        elif not self.poller.is_copy:
            self.end_early(entry, Event.CANCELLED)
            if self.table.thread is None:
                self.reap()

    def end_early(self, entry: Entry, event: Event, why: str = "") -> None:
        """End the request of `entry`, with the last words of its handler if there are any. `why` is for the log.

        A request that a thread or a child has may go on for `_NOTICE_S` more, so that it can end itself.
        """
        if entry.state is State.CLOSED:
            return
        if entry.state is State.MOVING:  # the process that goes on with the request ends it
            entry.ending = Ending.CANCELLED
            return
        words = self._last_words(entry)
        if words != b"":
            entry.ending = entry.ending or Ending.CANCELLED
        if why and self.table.driving_policy is None:  # else the loop that gave the request away says so
            log.info("%s %s: closed", address_text(entry.peer), why)
        if words is None:
            self.mailbox.call_later(lambda: self._end_noticed(entry, event), _NOTICE_S)
            return
        if not words:
            self.end(entry, event)
            return
        entry.result = MISSING
        self.give_up_call(entry)
        self.end_reach(entry)
        entry.output.append(words)
        self.finish(entry, Event.TURN_CAME if entry.state is State.READY else Event.DEADLINE_PASSED)

    def _end_noticed(self, entry: Entry, event: Event) -> None:
        if entry.state is State.DELEGATED:
            self.end_early(entry, event)

    def _last_words(self, entry: Entry) -> bytes | None:
        """Return what the client is told; None if the thread or the child that has the request was told to end it."""
        last_words = getattr(entry.resumable, "_last_words", None)
        is_able = last_words is not None and entry is not self.table.running and entry.state not in _SPEECHLESS
        return last_words() if is_able and entry.output.first is None else b""  # type: ignore[misc]
