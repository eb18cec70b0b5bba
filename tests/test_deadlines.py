"""Deadlines expire once, the soonest first. Moving a deadline to a later time costs nothing. The heap stays small."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reqtable.table.deadlines import Deadlines
from reqtable.table.states import State
from reqtable.table.table import Entry, RequestTable

DAY_S = 86_400.0


def timed(count: int) -> list[Any]:
    table, server = RequestTable(lambda: 0.0), SimpleNamespace(RequestHandlerClass=None)
    entries: list[Any] = [Entry(table, server, None, None, None, None) for _ in range(count)]  # type: ignore[arg-type]
    for entry in entries:
        entry.state = State.READING
    return entries


def expired(deadlines: Deadlines, now: float) -> list[Any]:
    """Return the entries whose deadlines are due, in the order in which they expire."""
    found = []
    for at, entry in deadlines.expired(now, 1_000_000):
        assert at <= now
        found.append(entry)
        assert entry.deadline is None
    return found


def test_deadline_is_due_at_its_time_and_once():
    deadlines, (entry,) = Deadlines(), timed(1)
    assert deadlines.soonest == inf
    deadlines.arm(entry, 10.0)
    assert deadlines.soonest == entry.deadline == 10.0
    assert expired(deadlines, 9.999) == []
    assert expired(deadlines, 10.0) == [entry]
    assert expired(deadlines, 99.0) == []
    assert (len(deadlines), deadlines.soonest) == (0, inf)
    deadlines.arm(entry, 20.0)
    assert expired(deadlines, 20.0) == [entry]


def test_later_does_not_touch_the_heap_and_earlier_does():
    deadlines, (entry,) = Deadlines(), timed(1)
    deadlines.arm(entry, 10.0)
    for at in range(11, 1000):
        deadlines.arm(entry, float(at))
    assert (len(deadlines), entry.heap_time, entry.deadline) == (1, 10.0, 999.0)
    assert expired(deadlines, 998.0) == [], "the stale time came up"
    assert (len(deadlines), entry.heap_time) == (1, 999.0)
    deadlines.arm(entry, 5.0)
    assert (len(deadlines), deadlines.soonest) == (2, 5.0)
    assert expired(deadlines, 5.0) == [entry]
    assert expired(deadlines, 999.0) == [], "the later item is stale"


def test_dropped_deadline_does_not_come():
    deadlines, (entry,) = Deadlines(), timed(1)
    deadlines.arm(entry, 10.0)
    entry.deadline = None
    assert len(deadlines) == 1
    assert expired(deadlines, 10.0) == []
    assert len(deadlines) == 0
    deadlines.arm(entry, 20.0)
    entry.deadline = None
    deadlines.arm(entry, 30.0)
    assert expired(deadlines, 29.0) == []
    assert expired(deadlines, 30.0) == [entry]


def test_ties_all_come():
    deadlines, entries = Deadlines(), timed(5)
    for entry in entries:
        deadlines.arm(entry, 10.0)
    assert expired(deadlines, 10.0) == entries


def test_closed_and_forgotten_do_not_come():
    deadlines, (closed, forgotten, left) = Deadlines(), timed(3)
    for entry in (closed, forgotten, left):
        deadlines.arm(entry, 10.0)
    closed.state = State.CLOSED
    deadlines.forget(forgotten)
    deadlines.forget(forgotten)
    assert (forgotten.deadline, forgotten.heap_time) == (None, inf)
    assert expired(deadlines, 10.0) == [left]
    deadlines.forget(closed)
    assert len(deadlines) == 0


def test_soonest_comes_first_after_a_long_pass():
    deadlines, (moved, soon, late) = Deadlines(), timed(3)
    deadlines.arm(moved, 5.0)
    deadlines.arm(late, 30.0)
    deadlines.arm(soon, 10.0)
    deadlines.arm(moved, 20.0)  # the heap still has it at 5
    assert expired(deadlines, 100.0) == [soon, moved, late]


def test_after_a_long_pass_all_that_were_moved_come_at_once():
    """A past bug: each entry took an extra pass, because its deadline was taken for a newly armed one."""
    deadlines, entries = Deadlines(), timed(5)
    for entry in entries:
        deadlines.arm(entry, 5.0)
        deadlines.arm(entry, 10.0)
    found = []
    for _, entry in deadlines.expired(100.0, 1000):
        found.append(entry)
        deadlines.arm(entry, 100.0)  # at once again: that is for the next pass
    assert found == entries
    assert len(deadlines) == 5


def test_a_bounded_number_is_looked_at_those_that_have_moved_among_them():
    deadlines, entries = Deadlines(), timed(100)
    for number, entry in enumerate(entries):
        deadlines.arm(entry, float(number))
        if number % 2:
            deadlines.arm(entry, 1000.0)
    found = [[entry for _, entry in deadlines.expired(200.0, 30)] for _ in range(5)]
    assert found == [entries[0:30:2], entries[30:60:2], entries[60:90:2], entries[90::2], []]


def test_ever_earlier_leaves_a_bounded_heap():
    deadlines, entries = Deadlines(), timed(500)
    most = 0
    for left in range(60, 0, -1):
        for entry in entries:
            deadlines.arm(entry, 1000.0 + left)
            most = max(most, len(deadlines))
    assert most <= 3 * len(entries) + 64
    for entry in entries[10:]:
        deadlines.forget(entry)
    assert len(deadlines) <= 3 * 10 + 64
    assert expired(deadlines, 1001.0) == entries[:10]


@pytest.mark.parametrize("forgotten", ["while it waits", "after it expired"])
def test_closed_entries_do_not_stay_in_the_heap(forgotten):
    deadlines, entries = Deadlines(), timed(1000)
    for entry in entries:
        deadlines.arm(entry, DAY_S)
        deadlines.arm(entry, 1.0)
    if forgotten == "after it expired":
        assert expired(deadlines, 1.0) == entries
    for entry in entries:
        entry.state = State.CLOSED
        deadlines.forget(entry)
    assert len(deadlines) <= 64


@pytest.mark.slow
def test_a_day_of_100_000_entries():
    deadlines, entries, pause = Deadlines(), timed(100_000), 7200
    busy, quick = entries[:95_000], entries[95_000:]
    most = timeouts = 0
    memory = []
    for now in range(0, int(DAY_S), pause):
        for entry in busy:
            deadlines.arm(entry, now + 6.0 * pause)  # never reached
        hasty = quick[:: 1 if now % (3 * pause) else 2]
        for entry in hasty:
            deadlines.arm(entry, now + 6.0 * pause)
            deadlines.arm(entry, now + 0.5 * pause)
        most = max(most, len(deadlines))
        came = expired(deadlines, now + pause - 1)
        assert set(came) == set(hasty)
        assert len(came) == len(hasty)
        timeouts += len(came)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert memory[-1] - memory[3] < 8 * 2**20, "level"
    assert most <= 3 * len(entries) + 64
    assert timeouts == 8 * 5000 + 4 * 2500
    assert len(expired(deadlines, 2 * DAY_S)) == len(busy)


STEPS = st.one_of(
    st.tuples(st.just("arm"), st.integers(0, 5), st.sampled_from([0, 0.5, 1, 2, 3, 10, 50])),
    st.tuples(st.just("arm"), st.integers(0, 5), st.integers(0, 30)),
    st.tuples(st.just("drop"), st.integers(0, 5), st.none()),
    st.tuples(st.just("close"), st.integers(0, 5), st.none()),
    st.tuples(st.just("forget"), st.integers(0, 5), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([0, 0.5, 1, 2, 7, 40]), st.none()),
)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(steps=st.lists(STEPS, max_size=60))
def test_what_is_due_is_what_a_dict_says(steps):
    deadlines, entries = Deadlines(), timed(6)
    model: dict[int, float] = {}
    now = 0.0
    for what, which, after in [*steps, ("wait", 1000, None)]:
        if what == "wait":
            now += which
            due = {each for each, at in model.items() if at <= now}
            assert {entries.index(entry) for entry in expired(deadlines, now)} == due
            for each in due:
                del model[each]
            assert deadlines.soonest > now
        elif what == "arm" and entries[which].state is State.READING:
            deadlines.arm(entries[which], now + after)
            model[which] = now + after
        elif what == "drop":
            entries[which].deadline = None
            model.pop(which, None)
        elif what in ("close", "forget"):
            if what == "forget":
                deadlines.forget(entries[which])
            else:
                entries[which].state = State.CLOSED  # it comes to be forgotten later, or its time comes first
            model.pop(which, None)
        assert deadlines.soonest <= min(model.values(), default=inf)
        assert deadlines.live == sum(entry.heap_time < inf for entry in entries)
    assert len(deadlines) == 0
