"""The table of states defines all transitions, and the table of requests obeys it."""

from __future__ import annotations

import selectors
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from reqtable.table.deadlines import Deadlines
from reqtable.table.errors import ReqtableError
from reqtable.table.states import INTEREST, READ, RESET, TRANSITIONS, WRITE, Event, State
from reqtable.table.table import Entry, RequestTable
from reqtable.testing import FakeClock


class Alpha:
    """A handler class."""


class Beta:
    """Another handler class."""


class TCPServer:
    """Has the attributes of a server that an entry uses."""

    def __init__(self, handler: type = Alpha) -> None:
        self.RequestHandlerClass = handler


POLICY: Any = SimpleNamespace(name="inline")
LOCAL = ("127.0.0.1", 80)


def an_entry(table: RequestTable, state: State = State.OPENING) -> Entry:
    entry = Entry(table, TCPServer(), POLICY, ("10.0.0.1", 1), LOCAL, transport=None)
    entry.state = state
    return entry


def reachable(start: State) -> set[State]:
    """Return all states that are reachable from `start`, including `start`."""
    found, new = {start}, [start]
    while new:
        after = set(TRANSITIONS[new.pop()].values()) - found
        found |= after
        new += after
    return found


def test_tables_cover_every_state():
    assert set(TRANSITIONS) == set(INTEREST) == set(State)
    assert (READ, WRITE) == (selectors.EVENT_READ, selectors.EVENT_WRITE)
    assert "".join(state.value for state in State) == "ONRTYXWSFDLMC"
    assert {state for state in State if INTEREST[state] & READ} == {State.READING, State.LINGERING}
    assert {state for state in State if INTEREST[state] & WRITE} == {State.WRITING}
    elsewhere = {State.WAITING, State.SLEEPING, State.OFFLOADED, State.DELEGATED}
    assert {state for state in State if INTEREST[state] & RESET} == elsewhere
    used = {event for events in TRANSITIONS.values() for event in events}
    assert used == set(Event), "an event that can never happen"


@pytest.mark.parametrize("state", State)
def test_advance_follows_the_table(state, clock):
    for event in Event:
        entry = an_entry(RequestTable(clock), state)
        entry.id = 7
        if event in TRANSITIONS[state]:
            entry.advance(event)
            assert entry.state is TRANSITIONS[state][event]
        else:
            with pytest.raises(ReqtableError, match=f"request 7: '{event.value}' can't happen in {state.name}"):
                entry.advance(event)
            assert entry.state is state


def test_every_state_is_reached_and_left():
    assert TRANSITIONS[State.CLOSED] == {}
    assert reachable(State.OPENING) == set(State) - {State.CONNECTING}
    assert reachable(State.CONNECTING) >= {State.WAITING}, "an outgoing connection begins here"
    for state in set(State) - {State.CLOSED}:
        assert State.CLOSED in reachable(state)
        assert TRANSITIONS[state][Event.CANCELLED] is TRANSITIONS[state][Event.LOST] is State.CLOSED


MOVES = {Event.FROZEN, Event.THAWED, Event.MOVED}


def test_what_ends_a_wait_leads_to_a_step_and_a_step_to_a_wait():
    waits_end = list(Event)[: list(Event).index(Event.AWAITS_INPUT)]
    for state, after in TRANSITIONS.items():
        for event in set(after) & set(waits_end):
            if event is Event.OUTPUT_BLOCKED:
                assert after[event] is State.WRITING
            else:
                over = state is State.LINGERING or (state is State.OPENING and event is Event.DEADLINE_PASSED)
                begins = State.WAITING if state is State.CONNECTING else State.RUNNING
                assert after[event] is (State.CLOSED if over else begins)
        asked = set(after) - set(waits_end) - MOVES - {Event.CANCELLED, Event.LOST}
        ends = {Event.FINISHED, Event.RELEASED}
        is_connection = state in (State.CONNECTING, State.WAITING) and asked == {Event.RELEASED}
        is_step = state is State.RUNNING or (state, asked) == (State.OPENING, ends)
        assert not asked or is_step or is_connection, "only a step asks"
    waits = set(TRANSITIONS[State.RUNNING].values())
    begins = {State.OPENING, State.CONNECTING, State.RUNNING, State.MOVING}
    assert waits == set(State) - begins, "a step leads to every wait"


def test_only_a_suspended_request_moves_and_nothing_steps_it_meanwhile():
    leave = {state for state, after in TRANSITIONS.items() if Event.FROZEN in after}
    suspended = {State.READING, State.WAITING, State.READY, State.WRITING, State.SLEEPING}
    assert leave == suspended | {State.OPENING}, "OPENING: the row of a record is new"
    assert all(TRANSITIONS[state][Event.FROZEN] is State.MOVING for state in leave)
    assert TRANSITIONS[State.MOVING] == {
        Event.THAWED: State.READY,
        Event.MOVED: State.CLOSED,
        Event.CANCELLED: State.CLOSED,
        Event.LOST: State.CLOSED,
    }
    assert not INTEREST[State.MOVING]


SECONDS = st.sampled_from([0.0, 0.25, 1.0, 2.0, 5.0, 30.0, 1000.0])
HOSTS = st.sampled_from(["10.0.0.1", "10.0.0.2", "::1"])
HANDLERS = st.sampled_from([Alpha, Beta])


class TableMachine(RuleBasedStateMachine):
    """Drives a table and its deadlines at random, and compares them with one dict for each entry."""

    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.table = RequestTable(self.clock)
        owner: Any = SimpleNamespace(cancel=lambda entry: entry.advance(Event.CANCELLED), in_other_thread=False)
        self.table.owner = owner
        self.deadlines = Deadlines()
        self.model: dict[Entry, dict[str, Any]] = {}  # what is in the table, in order
        self.gone: set[Entry] = set()

    def model_advance(self, entry: Entry, event: Event) -> bool:
        row = self.model[entry]
        after = TRANSITIONS[row["state"]].get(event)
        if after is not None:
            row["state"] = after
        return after is not None

    @rule(target=entries, host=HOSTS, handler=HANDLERS)
    def add(self, host: str, handler: type) -> Entry:
        peer = (host, 4000 + len(self.model))
        entry = Entry(self.table, TCPServer(handler), POLICY, peer, LOCAL, transport=None)
        self.table.add(entry)
        assert entry.id == 1 + len(self.model) + len(self.gone), "ids count up and are never used twice"
        self.model[entry] = {"state": State.OPENING, "at": None, "peer": peer, "handler": handler, "born": self.clock()}
        return entry

    @rule(entry=entries, event=st.sampled_from(Event))
    def advance(self, entry: Entry, event: Event) -> None:
        if entry in self.gone:
            assert entry.state is State.CLOSED
        elif self.model_advance(entry, event):
            entry.advance(event)
        else:
            with pytest.raises(ReqtableError, match="can't happen in"):
                entry.advance(event)

    def may_wait(self, entry: Entry) -> bool:
        return entry in self.model and entry.state is not State.CLOSED

    @rule(entry=entries, after=SECONDS)
    def arm(self, entry: Entry, after: float) -> None:
        if self.may_wait(entry):
            self.deadlines.arm(entry, self.clock() + after)
            self.model[entry]["at"] = self.clock() + after

    @rule(entry=entries, times=st.integers(50, 150))
    def arm_ever_earlier(self, entry: Entry, times: int) -> None:
        for left in range(times, 0, -1):
            self.arm(entry, after=left)

    @rule(entry=entries)
    def drop(self, entry: Entry) -> None:
        if self.may_wait(entry):
            entry.deadline = self.model[entry]["at"] = None

    @rule(seconds=SECONDS)
    def let_time_pass(self, seconds: float) -> None:
        self.clock.jump(seconds)
        now = self.table.now = self.clock()
        due = [e for e, row in self.model.items() if row["at"] is not None and row["at"] <= now]
        expected = {e for e in due if e.state is not State.CLOSED}
        came = []
        for _, entry in self.deadlines.expired(now, 1000):
            assert entry.deadline is None
            came.append(entry)
        assert len(came) == len(set(came))
        assert set(came) == expected
        for entry in expected:
            self.model[entry]["at"] = None
        assert self.deadlines.soonest > now

    @rule(entry=entries)
    def cancel(self, entry: Entry) -> None:
        may = self.may_wait(entry)
        assert self.table.cancel(entry.id) is may
        if may:
            assert self.model_advance(entry, Event.CANCELLED)

    @rule(entry=entries)
    def remove(self, entry: Entry) -> None:
        if entry in self.gone:
            self.table.remove(entry)  # twice is harmless
            return
        if entry.state is not State.CLOSED:
            entry.advance(Event.LOST)
        self.table.remove(entry)
        self.deadlines.forget(entry)
        del self.model[entry]
        self.gone.add(entry)
        if self.table.running is entry:
            self.table.running = None

    @rule(entry=entries)
    def run(self, entry: Entry) -> None:
        self.table.running = entry if self.may_wait(entry) and self.table.running is not entry else None

    @rule(
        state=st.none() | st.sampled_from(State) | st.sampled_from(State).map(lambda s: s.name),
        host=st.none() | HOSTS,
        handler=st.none() | HANDLERS,
        older_than=st.none() | SECONDS,
    )
    def look(self, state: Any, host: Any, handler: Any, older_than: Any) -> None:
        wanted = State[state] if isinstance(state, str) else state
        expected = []
        for entry, row in self.model.items():
            is_running = entry is self.table.running and row["state"] is not State.CLOSED
            shown = State.RUNNING if is_running else row["state"]
            if (
                shown is not State.CLOSED  # it is gone but for the reaping
                and (wanted is None or shown is wanted)
                and (host is None or row["peer"][0] == host)
                and (handler is None or row["handler"] is handler)
                and (older_than is None or self.clock() - row["born"] > older_than)
            ):
                left = None if row["at"] is None else row["at"] - self.clock()
                expected.append((entry.id, shown.name, left))
        rows = self.table.snapshot(state=state, peer=host, handler=handler, older_than=older_than)
        assert [(row["id"], row["state"], row["deadline_s"]) for row in rows] == expected

    @invariant()
    def table_is_the_model(self) -> None:
        assert len(self.table) == len(self.model)
        assert list(self.table) == list(self.model)
        for entry, row in self.model.items():
            assert entry in self.table
            assert self.table.get(entry.id) is entry
            assert (entry.state, entry.deadline) == (row["state"], row["at"])
        for entry in self.gone:
            assert entry not in self.table

    @invariant()
    def heap_is_bounded(self) -> None:
        assert len(self.deadlines) <= 3 * len(self.model) + 64
        for row in self.model.values():
            assert row["at"] is None or row["state"] is State.CLOSED or self.deadlines.soonest <= row["at"]


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
