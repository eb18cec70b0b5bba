"""A request as data: each state and each want that can move becomes bytes and comes back; all else says why not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import reqtable
from reqtable import Limits, State, Transition, line, state
from reqtable.http import ws_message
from reqtable.table import engine_wants, reaching, wants
from reqtable.table.errors import NotMovable
from reqtable.table.input import NO_INPUT, Inbox
from reqtable.table.record import Record, record_of, restore, why_not_movable
from reqtable.table.saving import head_of, read, save
from reqtable.table.states import Event
from reqtable.table.table import Entry, RequestTable
from reqtable.testing import exercise
from tests.test_wants import an_entry

NOW = 1000.0
MOVING_STATES = [State.READING, State.WAITING, State.READY, State.WRITING, State.SLEEPING]


class Notes(reqtable.StateRequestHandler):
    words: int = 0
    seen: list[str] = []

    @state(line(), timeout=5)
    def command(self, text: bytes) -> Transition:
        self.words += len(text.split())
        self.seen.append(text.decode())
        return self.more

    @state(reqtable.until(b";", 100))
    def more(self, text: bytes) -> Transition:
        return self.command


def number(data: bytes) -> tuple[int, int] | None:
    """Is the function of a parsed(…) that can move."""
    return int(data), len(data)


@wants.want_type
class Netstring(wants.Want[bytes]):
    """Stands for a want that a program defines."""

    limit: int

    def take(self, entry: Any) -> Any:
        return wants.MISSING


class Odd(wants.Want[bytes]):
    """Stands for a want that is not a dataclass."""


WANTS = [
    line(7),
    reqtable.until(b";", 9),
    reqtable.exactly(3),
    reqtable.chunk(5),
    reqtable.rest(11),
    reqtable.skip_line(),
    reqtable.datagram(),
    reqtable.parsed(number, 8),
    reqtable.told(),
    reqtable.disconnected(),
    reqtable.end_output(),
    reqtable.either(line(), reqtable.told()),
    reqtable.sleep(2.5),
    engine_wants.Sleeping(2.5, NOW + 1),
    reaching.Either((line(), engine_wants.Sleeping(3, NOW + 2)), True),
    reqtable.flushed(),
    reqtable.nothing(),
    ws_message(7),
    Netstring(12),
    engine_wants.ENDED,
]


class Server:
    RequestHandlerClass = Notes
    server_address = ("127.0.0.1", 1)


def a_row(datagrams: bool = False) -> tuple[Entry, Notes]:
    """Return a row in a new table, and its handler, before the first step."""
    table = RequestTable(lambda: NOW, Limits())
    server: Any = Server()
    policy: Any = SimpleNamespace(name="inline")
    transport: Any = SimpleNamespace(immovable=None, request=object())
    entry = Entry(table, server, policy, ("192.0.2.1", 5), ("127.0.0.1", 1), transport)
    if datagrams:
        entry.input = Inbox()
    handler = entry.handler = Notes(entry)
    return entry, handler


def a_suspended_row(suspended: State = State.READING, want: Any = None, datagrams: bool = False) -> Entry:
    """Return a row that has something in every field."""
    entry, handler = a_row(datagrams)
    handler.words = 3
    handler.seen = ["put 3"]
    handler._state = Notes.more.declaration  # type: ignore[attr-defined]
    if isinstance(entry.input, Inbox):
        for each in (b"one", b"", b"three"):
            entry.input.deliver(each, 9)
        assert wants.datagram().take(entry) == b"one"
    else:
        entry.own_input().feed(b"half of a li")
        entry.own_input().feed(b"ne\nmore")
        assert line().take(entry) == b"half of a line\n"
    entry.output.append(b"an answer\n")
    entry.output.append(b"and more")
    entry.output.consume(3)
    entry.state = suspended
    entry.want = line(7) if want is None else want
    entry.timeout, entry.deadline = None, NOW + 4
    entry.bytes_in, entry.bytes_out, entry.steps = 20, 10, 2
    entry.created_at, entry.active_at, entry.began_at = NOW - 60, NOW - 1, NOW - 2
    return entry


def again(entry: Entry) -> Entry:
    """Turn a request into bytes, and restore a row of a new table from them."""
    head = head_of(save(entry, "a boot").record)
    assert (head.boot, head.time, head.state, head.handler_state) == ("a boot", NOW, entry.state.name, "more")
    later, handler = a_row(isinstance(entry.input, Inbox))
    restore(read(head, Notes, NOW), later, handler, NOW)
    assert later.state is State.MOVING
    return later


def plainly(entry: Entry) -> dict[str, Any]:
    """Return all that a record has of a request but its state, which is MOVING in a restored row."""
    record = record_of(entry, entry.handler)
    return {each.name: getattr(record, each.name) for each in dataclasses.fields(Record) if each.name != "state"}


def id_of(value: object) -> str:
    """Return the repr of a parameter, without addresses: they differ between the processes of xdist."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize("suspended", MOVING_STATES, ids=lambda each: each.name)
@pytest.mark.parametrize("datagrams", [False, True])
def test_a_request_in_each_state_that_moves_comes_back_as_it_was(suspended: State, datagrams: bool) -> None:
    entry = a_suspended_row(suspended, datagrams=datagrams)
    assert plainly(again(entry)) == plainly(entry)
    assert entry.state is suspended, "a record is a copy"


@pytest.mark.parametrize("want", WANTS, ids=id_of)
def test_a_request_that_waits_for_each_want_comes_back_as_it_was(want: wants.Want[Any]) -> None:
    entry = a_suspended_row(State.WAITING, want)
    later = again(entry)
    assert plainly(later) == plainly(entry)
    assert type(later.want) is type(want)
    if want is engine_wants.ENDED:
        assert later.want is want, "the engine compares it by identity"


def test_every_want_is_tried() -> None:
    kinds = {
        each for module in (wants, engine_wants, reaching) for each in vars(module).values() if isinstance(each, type)
    }
    left = {each for each in kinds if issubclass(each, wants.Want)} - {type(each) for each in WANTS}
    abstract = {"Want", "WantOf", "Posted", "_Opening", "Reaching"}
    elsewhere = {"Call", "HandOff", "Elsewhere", "Vacancy", "Step", "Turn", "Writable", "Readable"}
    openings = {"ProxyHeader", "Handshake"}
    beside = {"OfConnection"}  # in tests/test_moving.py
    assert {each.__name__ for each in left} == abstract | elsewhere | openings | beside


HELD = [
    (State.OPENING, "its PROXY header or its TLS handshake has not come"),
    (State.RUNNING, "its step is running"),
    (State.OFFLOADED, "a call, or a step that runs elsewhere, is in flight"),
    (State.DELEGATED, "a thread or a child has it"),
    (State.LINGERING, "it is done"),
    (State.CLOSED, "it has ended"),
    (State.MOVING, "it is being moved"),
]


def test_every_state_either_moves_or_says_why_not() -> None:
    assert {*MOVING_STATES, *(each for each, _ in HELD)} == set(State) - {State.CONNECTING}


@pytest.mark.parametrize(("held", "reason"), HELD, ids=lambda each: getattr(each, "name", None))
def test_a_request_in_another_state_says_why_it_can_not_move(held: State, reason: str) -> None:
    entry = a_suspended_row(held)
    with pytest.raises(NotMovable, match=f"^request 0 of Notes can't be recorded now: {reason}$"):
        save(entry, "")


@pytest.mark.parametrize(
    ("want", "reason"),
    [
        (reqtable.call(number, b"1"), "a call, or a step that runs elsewhere, is in flight"),
        (reqtable.hand_off("fork"), "a call, or a step that runs elsewhere, is in flight"),
        (engine_wants.TURN, "a call, or a step that runs elsewhere, is in flight"),
        (engine_wants.STEP, "a call, or a step that runs elsewhere, is in flight"),
        (engine_wants.WRITABLE, "a call, or a step that runs elsewhere, is in flight"),
        (
            reaching.Either((line(), reqtable.call(number, b"1")), True),
            "a call, or a step that runs elsewhere, is in flight",
        ),
        (reqtable.parsed(int), r"the function of parsed\(int\) is not at the top of the handler's module"),
        (
            reqtable.parsed(lambda _: None),
            r"the function of parsed\(<lambda>\) is not at the top of the handler's module",
        ),
        (Odd(), r"it waits for odd\(\), which is no plain data: make its class a dataclass"),
    ],
    ids=id_of,
)
def test_a_request_that_waits_for_what_is_no_data_says_why_it_can_not_move(want: Any, reason: str) -> None:
    entry = a_suspended_row(State.WAITING, want)
    with pytest.raises(NotMovable, match=f"^request 0 of Notes can't be recorded now: {reason}$"):
        save(entry, "")


def test_a_request_whose_step_runs_can_not_move_although_it_looks_suspended() -> None:
    entry = a_suspended_row()
    entry.table.running = entry
    assert why_not_movable(entry) == "its step is running"


def test_a_request_whose_step_runs_elsewhere_can_not_move() -> None:
    entry = a_suspended_row(State.WAITING)
    entry.table.elsewhere[entry] = SimpleNamespace()  # type: ignore[assignment]
    assert why_not_movable(entry) == "a call, or a step that runs elsewhere, is in flight"


def test_a_row_thaws_only_after_it_was_restored_whole() -> None:
    later = again(a_suspended_row())
    later.advance(Event.THAWED)
    assert later.state is State.READY


def test_what_is_restored_goes_on_as_the_first_one_would() -> None:
    first = exercise(Notes).send(b"one two\nhalf")
    record = record_of(first.entry, first.handler)
    assert (record.handler_state, record.fields["words"]) == ("more", 2)
    entry, handler = a_row()
    restore(record, entry, handler, NOW)
    entry.own_input().feed(b" a word;")
    item = entry.want.take(entry)
    assert item == b"half a word;"
    assert handler._resume(item) == line()
    assert handler.seen == ["one two\n"]


def test_the_time_between_two_tables_counts() -> None:
    entry = a_suspended_row(want=engine_wants.Sleeping(9, NOW + 6))
    head = head_of(save(entry, "").record)
    later, handler = a_row()
    later.table.now = NOW + 500
    made_at = NOW + 497
    restore(read(head, Notes, made_at), later, handler, made_at)
    assert later.want == engine_wants.Sleeping(9, NOW + 503), "6 s were left, of which 3 s have passed"
    assert later.deadline == NOW + 501
    assert (later.created_at, later.active_at, later.began_at) == (NOW + 437, NOW + 496, NOW + 495)


def test_a_file_of_the_output_goes_beside_the_record(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdef")
    entry = a_suspended_row(State.WRITING)
    entry.table.running = entry
    with (tmp_path / "f").open("rb") as file:
        entry.handler.send_file(file, 1)
        entry.table.running = None
        moved = save(entry, "")
        assert moved.attachments[1:] == (file,)
        head = head_of(moved.record)
        assert head.files == ({"name": str(tmp_path / "f"), "mode": "rb", "is_raw": False, "position": 0},)
        assert record_of(entry, entry.handler, buffers=False).unsent == ()
    with pytest.raises(NotMovable, match=r"it has a file that is closed$"):
        save(entry, "")


def test_a_row_without_input_shares_the_empty_one_after_its_move() -> None:
    entry, _ = a_row()
    entry.state = State.READING
    entry.handler._state = Notes.more.declaration  # type: ignore[attr-defined]
    assert entry.input is again(entry).input is NO_INPUT
    entry.own_input().ended = True
    assert again(entry).input.save() == {"data": b"", "ended": True}


def test_a_want_takes_from_what_was_restored() -> None:
    entry = an_entry()
    entry.input.restore({"data": b"two\nlines\n", "ended": True})
    assert [line().take(entry) for _ in range(2)] == [b"two\n", b"lines\n"]
    assert entry.input.ended
