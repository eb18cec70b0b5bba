"""Tells whether a request is idle, as its peer sees it: nothing unread, nothing unsent, nothing running."""

from __future__ import annotations

from reqtable.table.states import READ, State
from reqtable.table.table import Entry


def is_idle(entry: Entry) -> bool:
    """Return whether `entry` has waited for input for `drain_idle_s` and has none. In another thread: a guess."""
    table = entry.table
    reads = entry.state is State.READING
    if entry.state is State.WAITING:
        reads = bool(getattr(entry.transport, "watched", 0) & READ)
    waits = reads and table.running is not entry
    quiet = waits and not entry.input and not entry.input.ended
    return quiet and table.clock() - entry.active_at >= table.limits.drain_idle_s


def end_if_idle(entry: Entry) -> None:
    """End the input of `entry` if it is idle. Only the thread of its loop may call this."""
    if is_idle(entry):
        entry.transport.end_input()
