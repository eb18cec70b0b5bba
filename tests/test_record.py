"""A request as data: each state and each want can be turned into bytes and back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Limits, State, Transition, line, state
from reqtable.http import ws_message
from reqtable.table import engine_wants, wants
from reqtable.table.errors import NotMovable
from reqtable.table.input import Inbox
from reqtable.table.record import Record, from_bytes, record_of, restore, to_bytes
from reqtable.table.table import Entry, RequestTable
from reqtable.testing import exercise
from tests.test_wants import an_entry

NOW = 1000.0


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


def slow() -> None:
    """Is the function of a call."""


@wants.want_type
class Netstring(wants.Want[bytes]):
    """Stands for a want that a program defines."""

    limit: int

    def take(self, entry: Any) -> Any:
        return wants.MISSING


class Odd(wants.Want[bytes]):
    """Stands for a want that is not a dataclass."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Odd

    __hash__ = None  # type: ignore[assignment]


WANTS = [
    line(7),
    reqtable.until(b";", 9),
    reqtable.exactly(3),
    reqtable.chunk(5),
    reqtable.rest(11),
    reqtable.skip_line(),
    reqtable.datagram(),
    reqtable.parsed(int, 8),
    reqtable.told(),
    reqtable.disconnected(),
    reqtable.end_output(),
    reqtable.either(line(), reqtable.told()),
    reqtable.sleep(2.5),
    reqtable.flushed(),
    reqtable.nothing(),
    ws_message(7),
    reqtable.hand_off("fork"),
    Netstring(12),
    Odd(),
    *(each for each in vars(engine_wants).values() if isinstance(each, wants.Want)),
]


class Server:
    RequestHandlerClass = Notes
    server_address = ("127.0.0.1", 1)


class Policy:
    name = "inline"


def a_row(datagrams: bool = False) -> tuple[Entry, Notes]:
    """Return a row in a new table, and its handler, before the first step."""
    table = RequestTable(lambda: NOW, Limits())
    server: Any = Server()
    policy: Any = Policy()
    transport: Any = None
    entry = Entry(table, server, policy, ("192.0.2.1", 5), ("127.0.0.1", 1), transport)
    if datagrams:
        entry.input = Inbox()
    handler = entry.handler = Notes(entry)
    return entry, handler


def a_record(datagrams: bool = False, **changes: Any) -> Record:
    entry, handler = a_row(datagrams)
    handler.words = 3
    handler.seen = ["put 3"]
    if isinstance(entry.input, Inbox):
        for each in (b"one", b"", b"three"):
            entry.input.deliver(each, 9)
        assert wants.datagram().take(entry) == b"one"
    else:
        entry.input.feed(b"half of a li")
        entry.input.feed(b"ne\nmore")
        assert line().take(entry) == b"half of a line\n"
    entry.output.append(b"an answer\n")
    entry.timeout, entry.deadline = 5.0, NOW + 4
    entry.bytes_in, entry.bytes_out, entry.steps = 20, 10, 2
    entry.created_at, entry.active_at = NOW - 60, NOW - 1
    record = record_of(entry, handler)
    return Record(**{name: changes.get(name, getattr(record, name)) for name in Record.__dataclass_fields__})


def again(record: Record, datagrams: bool = False) -> Record:
    """Turn a record into bytes, restore a row from them in a new table, and return that row's record."""
    read = from_bytes(to_bytes(record, pickle.dumps), pickle.loads)
    entry, handler = a_row(datagrams)
    restore(read, entry, handler)
    assert entry.state.name == record.state
    return record_of(entry, handler)


@pytest.mark.parametrize(
    "suspended", [each for each in State if each not in (State.CLOSED, State.CONNECTING)], ids=lambda each: each.name
)
@pytest.mark.parametrize("datagrams", [False, True])
def test_a_request_in_each_state_comes_back_as_it_was(suspended: State, datagrams: bool) -> None:
    record = a_record(datagrams, state=suspended.name, handler_state="more")
    assert again(record, datagrams) == record


@pytest.mark.parametrize("want", WANTS, ids=repr)
def test_a_request_that_waits_for_each_want_comes_back_as_it_was(want: wants.Want[Any]) -> None:
    record = a_record(want=want)
    assert again(record) == record


def test_a_sleep_goes_on_for_as_long_as_was_left_of_it() -> None:
    entry, handler = a_row()
    entry.want = engine_wants.Sleeping(2.5, NOW + 1)
    record = record_of(entry, handler)
    assert (record.want, record.wakes_in_s) == (reqtable.sleep(2.5), 1)
    later, handler = a_row()
    later.table.now = NOW + 50
    restore(from_bytes(to_bytes(record, pickle.dumps), pickle.loads), later, handler)
    assert later.want == engine_wants.Sleeping(2.5, NOW + 51)


def test_every_want_is_tried() -> None:
    kinds = {each for module in (wants, engine_wants) for each in vars(module).values() if isinstance(each, type)}
    left = {each for each in kinds if issubclass(each, wants.Want)} - {type(each) for each in WANTS}
    assert {each.__name__ for each in left} == {"Want", "Posted", "_Opening", "Call", "Sleeping"}, (
        "two are tried by themselves"
    )


def test_a_call_comes_back_where_it_can_be_encoded() -> None:
    record = a_record(want=reqtable.call(slow, on="thread"))
    read = from_bytes(to_bytes(record, pickle.dumps), pickle.loads)
    assert isinstance(read.want, wants.Call)
    assert (read.want.fn, read.want.on, read.want.place) == (slow, "thread", record.want.place)  # type: ignore[union-attr]


def test_before_its_first_step_a_handler_has_no_state() -> None:
    entry, handler = a_row()
    record = record_of(entry, handler)
    assert (record.handler_state, record.state) == (None, "OPENING")
    assert again(record) == record


def test_what_is_restored_goes_on_as_the_first_one_would() -> None:
    first = exercise(Notes).send(b"one two\nhalf")
    record = record_of(first.entry, first.handler)
    assert (record.handler_state, record.fields["words"]) == ("more", 2)
    entry, handler = a_row()
    restore(record, entry, handler)
    entry.input.feed(b" a word;")
    item = entry.want.take(entry)
    assert item == b"half a word;"
    assert handler._resume(item) == line()
    assert handler.seen == ["one two\n"]


def test_how_values_become_bytes_is_the_callers_to_say() -> None:
    record = a_record(unread={}, unsent=(), peer=None, local=None, want=line(7))
    read = from_bytes(to_bytes(record, lambda plain: json.dumps(plain).encode()), json.loads)
    assert read == record
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_bytes(a_record(), lambda plain: json.dumps(plain).encode())


def test_a_file_that_is_being_sent_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    entry, handler = a_row()
    entry.table.running = entry
    with (tmp_path / "f").open("rb") as file:
        handler.send_file(file)
        with pytest.raises(NotMovable, match=r"^request \d+ of Notes can't be recorded now: a file is half sent$"):
            record_of(entry, handler)
        assert record_of(entry, handler, buffers=False).unsent == ()


@pytest.mark.parametrize("data", [b"", b"reqtable record 2\n", b"reqtable record", b"\x80\x04."])
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a record of version 1: it begins with"):
        from_bytes(data, pickle.loads)


def test_a_want_takes_from_what_was_restored() -> None:
    entry = an_entry()
    entry.input.restore({"data": b"two\nlines\n", "ended": True})
    assert [line().take(entry) for _ in range(2)] == [b"two\n", b"lines\n"]
    assert entry.input.ended
