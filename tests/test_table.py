"""The table: its rows, its snapshots as plain data, filters, and cancelling."""

from __future__ import annotations

import functools
import json
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest

from reqtable.table.addresses import address_text, host_text
from reqtable.table.errors import ReqtableError
from reqtable.table.gradually import SLICE_ROWS
from reqtable.table.limits import Limits
from reqtable.table.snapshot import Listing, format_rows, handler_name
from reqtable.table.states import Event, State
from reqtable.table.table import Entry, RequestTable
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING, line, sleep, until
from reqtable.testing import FakeClock


class Echo:
    """A handler class."""


class Chat:
    """Another handler class."""


class TCPServer:
    RequestHandlerClass = Echo


@pytest.fixture
def table(clock: FakeClock) -> RequestTable:
    return RequestTable(clock)


def an_entry(table: RequestTable, peer: Any = ("10.0.0.1", 4000), handler: Any = Echo, **values: Any) -> Entry:
    policy: Any = SimpleNamespace(name="greenlet")
    entry = Entry(table, TCPServer(), policy, peer, ("127.0.0.1", 80), transport=None)
    entry.handler = handler
    for name, value in values.items():
        setattr(entry, name, value)
    table.add(entry)
    return entry


def ids(rows: list[Any]) -> list[int]:
    return [row["id"] for row in rows]


def test_ids_count_up_and_are_not_used_twice(table):
    entries = [an_entry(table) for _ in range(3)]
    assert [entry.id for entry in entries] == [1, 2, 3]
    table.remove(entries[2])
    table.remove(entries[0])
    table.remove(entries[0])
    assert an_entry(table).id == 4
    assert ids(table.snapshot()) == [entry.id for entry in table] == [2, 4]
    assert len(table) == 2
    assert entries[1] in table
    assert entries[2] not in table
    assert (table.get(2), table.get(3)) == (entries[1], None)


def test_an_entry_of_another_table_is_not_in_this_one(table, clock):
    mine, other = an_entry(table), an_entry(RequestTable(clock))
    assert mine.id == other.id
    assert mine in table
    assert other not in table


def test_a_new_entry_waits_for_nothing(table, clock):
    clock.jump(1)
    entry = Entry(table, TCPServer(), None, "peer", "local", transport=None)
    assert (entry.state, entry.deadline, entry.want, entry.timeout, entry.heap_time) == (
        State.OPENING,
        None,
        NOTHING,
        None,
        inf,
    )
    assert entry.created_at == entry.active_at == table.now == clock() - 1
    assert entry.handler is Echo
    assert repr(entry) == "<Entry 0 OPENING peer nothing()>"
    assert entry not in table
    with pytest.raises(AttributeError):
        entry.anything = 1


def test_table_may_change_while_someone_looks(table):
    for _ in range(4):
        an_entry(table)
    seen = []
    for entry in table:
        seen.append(entry.id)
        table.remove(entry)
        an_entry(table)
    assert seen == [1, 2, 3, 4]
    assert [entry.id for entry in table] == [5, 6, 7, 8]


def test_full_at_its_limit(clock):
    table = RequestTable(clock, Limits(entries_max=2))
    seen = [table.full]
    for _ in range(3):
        entry = an_entry(table)
        seen.append(table.full)
    table.remove(entry)
    table.remove(table.get(1))
    assert [*seen, table.full] == [False, False, True, True, False]


def test_rows_share_an_empty_input_until_theirs_is_written(table):
    mine, other = an_entry(table), an_entry(table)
    assert mine.input is other.input
    mine.own_input().feed(b"mine")
    mine.own_input().ended = True
    assert (mine.input.peek(10), mine.input.ended) == (b"mine", True)
    assert (other.input.peek(10), other.input.ended) == (b"", False)


def test_a_row_is_plain_data(table, clock):
    entry = an_entry(table, peer=("::1", 4000, 0, 0), handler=Echo(), want=line(512), bytes_in=7, bytes_out=8, steps=9)
    entry.own_input().feed(b"unread")
    entry.output.append(b"not sent")
    entry.state = State.WRITING
    entry.deadline = clock() + 30
    clock.jump(10)
    entry.active_at = clock() - 4
    (row,) = table.snapshot()
    assert row == {
        "id": 1,
        "kind": "client",
        "parent": None,
        "peer": "[::1]:4000",
        "local": "127.0.0.1:80",
        "server": "TCPServer",
        "handler": "Echo",
        "handler_state": None,
        "source": None,
        "policy": "greenlet",
        "state": "WRITING",
        "letter": "W",
        "waits_for": "line(limit=512)",
        "age_s": 10.0,
        "idle_s": 4.0,
        "deadline_s": 20.0,
        "bytes_in": 7,
        "bytes_out": 8,
        "buffered_in": 6,
        "buffered_out": 8,
        "steps": 9,
        "moves": 0,
    }
    assert json.loads(json.dumps(row)) == row
    entry.deadline = None
    entry.active_at = clock() + 1
    (after,) = table.snapshot()
    assert (after["deadline_s"], after["idle_s"]) == (None, 0.0)
    assert row["deadline_s"] == 20.0, "a snapshot does not change"


def test_the_entry_that_runs_is_shown_as_running(table):
    entry, other = an_entry(table, state=State.READING), an_entry(table, state=State.READING)
    table.running = entry
    assert [(row["state"], row["letter"]) for row in table.snapshot()] == [("RUNNING", "X"), ("READING", "R")]
    assert ids(table.snapshot(state="RUNNING")) == [entry.id]
    assert ids(table.snapshot(state="READING")) == [other.id]
    assert entry.state is State.READING


FILTERS = {
    "state": [(State.READING, {1, 2, 3}), ("READING", {1, 2, 3}), ("S", {4, 5}), (State.CLOSED, set())],
    "peer": [
        ("10.0.0.1", {1, 2}),
        ("10.0.0.1:2", {2}),
        ("::1", {3, 4}),
        ("[::1]:4", {4}),
        ("/run/x", {5}),
        ("x", set()),
    ],
    "handler": [(Echo, {1, 3, 5}), ("Echo", {1, 3, 5}), (Chat, {2, 4}), ("echo", set()), (dict, set())],
    "older_than": [(0, {1, 2, 3, 4}), (10, {1, 2, 3}), (39.9, {1}), (40, set())],
}


@pytest.fixture
def five(table, clock) -> RequestTable:
    """Return a table of five requests, which are 40, 30, 20, 10 and 0 seconds old."""
    peers = [("10.0.0.1", 1), ("10.0.0.1", 2), ("::1", 3, 0, 0), ("::1", 4, 0, 0), "/run/x"]
    handlers = [Echo, Chat(), functools.partial(Echo, 1), Chat, Echo()]
    for number, (peer, handler) in enumerate(zip(peers, handlers, strict=True)):
        if number:
            table.now = clock.now = clock.now + 10
        an_entry(table, peer, handler, state=State.READING if number < 3 else State.SLEEPING)
    return table


def test_each_filter_and_all_together(five):
    assert ids(five.snapshot()) == [1, 2, 3, 4, 5]
    for name, cases in FILTERS.items():
        for value, expected in cases:
            assert ids(five.snapshot(**{name: value})) == sorted(expected), (name, value)
    for state, in_state in FILTERS["state"]:
        for peer, of_peer in FILTERS["peer"]:
            for handler, of_handler in FILTERS["handler"]:
                for older_than, of_age in FILTERS["older_than"]:
                    rows = five.snapshot(state=state, peer=peer, handler=handler, older_than=older_than)
                    assert set(ids(rows)) == in_state & of_peer & of_handler & of_age


@pytest.mark.parametrize("name", ["reading", "Z", "", "READING ", 5])
def test_a_state_that_is_none_is_named(table, name):
    with pytest.raises(ValueError, match="READING") as caught:
        table.snapshot(state=name)
    assert repr(name) in str(caught.value)
    for state in State:
        assert (
            table.snapshot(state=state) == table.snapshot(state=state.name) == table.snapshot(state=state.value) == []
        )


def test_cancel_says_whether_there_was_one(table):
    entry = an_entry(table)
    assert table.cancel(entry.id) is False, "no engine, nobody to do it"
    cancelled = []
    table.owner = SimpleNamespace(cancel=cancelled.append)
    assert table.cancel(entry.id) is True
    assert cancelled == [entry]
    assert table.cancel(99) is False
    entry.advance(Event.LOST)
    assert table.cancel(entry.id) is False, "it has closed"
    table.remove(entry)
    assert table.cancel(entry.id) is False
    assert cancelled == [entry]


def test_error_of_advance_names_the_request(table):
    entry = an_entry(table)
    with pytest.raises(ReqtableError, match="request 1: 'turn came' can't happen in OPENING"):
        entry.advance(Event.TURN_CAME)


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, [0]), (1, [1]), (250, [250]), (251, [250, 1]), (600, [250, 250, 100])]
)
def test_a_listing_comes_in_slices(table, count, sizes):
    entries = [an_entry(table) for _ in range(count)]
    slices = list(table.slices(Listing()))
    assert [len(rows) for rows in slices] == sizes
    assert max(sizes) <= SLICE_ROWS
    assert [row for rows in slices for row in rows] == table.snapshot()
    assert ids(table.snapshot()) == [entry.id for entry in entries]


def test_each_slice_is_as_it_is_when_it_is_asked_for(table, clock):
    entries = [an_entry(table, state=State.READING) for _ in range(3 * SLICE_ROWS)]
    slices = table.slices(Listing(state="READING"))
    assert ids(next(slices)) == [entry.id for entry in entries[:SLICE_ROWS]]
    for entry in entries[SLICE_ROWS : 2 * SLICE_ROWS - 1]:
        entry.state = State.CLOSED
    clock.jump(1)
    an_entry(table, state=State.READING)  # it has come too late
    assert [(row["id"], row["age_s"]) for row in next(slices)] == [(2 * SLICE_ROWS, 1.0)]
    assert ids(next(slices)) == [entry.id for entry in entries[2 * SLICE_ROWS :]]
    assert next(slices, None) is None


@pytest.mark.parametrize(("in_other_thread", "given_way"), [(True, 3), (False, 0)])
def test_a_snapshot_in_another_thread_gives_way_after_each_slice(table, in_other_thread, given_way):
    for _ in range(3 * SLICE_ROWS):
        an_entry(table)
    ways = []
    table.owner = SimpleNamespace(in_other_thread=in_other_thread, give_way=lambda: ways.append(None))
    assert len(table.snapshot()) == 3 * SLICE_ROWS
    assert len(ways) == given_way


def test_rows_are_printed_in_columns(table, clock):
    an_entry(table, want=line(512), state=State.READING, deadline=clock() + 2.25, bytes_in=123456)
    an_entry(table, "\0name", Chat, want=until(b"\r\n", 9), state=State.SLEEPING)
    an_entry(table, "", want=sleep(5))
    clock.jump(1)
    assert format_rows(table.snapshot()).splitlines() == [
        "id  st  peer           handler  policy    age  idle  left  in      out  qin  qout  waits for",
        "1   R   10.0.0.1:4000  Echo     greenlet  1.0  1.0   1.2   123456  0    0    0     line(limit=512)",
        "2   S   @name          Chat     greenlet  1.0  1.0   -     0       0    0    0     until(separator=b'\\r\\n', "
        "limit=9)",
        "3   O   -              Echo     greenlet  1.0  1.0   -     0       0    0    0     sleep(seconds=5)",
    ]
    assert len(format_rows([]).splitlines()) == 1


@pytest.mark.parametrize(
    ("address", "text", "host"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80", "127.0.0.1"),
        (("::1", 80, 0, 0), "[::1]:80", "::1"),
        (("fe80::1%eth0", 80, 0, 2), "[fe80::1%eth0]:80", "fe80::1%eth0"),
        (("localhost", 0), "localhost:0", "localhost"),
        ("/run/x.sock", "/run/x.sock", "/run/x.sock"),
        (b"/run/x.sock", "/run/x.sock", "/run/x.sock"),
        ("\0abstract", "@abstract", "@abstract"),
        (b"\0abstract", "@abstract", "@abstract"),
        (b"\0\xff", "@\ufffd", "@\ufffd"),
        ("", "-", "-"),
        (b"", "-", "-"),
        (None, "-", "-"),
        ((), "-", "-"),
        (5, "-", "-"),
    ],
)
def test_addresses_read_as_people_write_them(address, text, host):
    assert (address_text(address), host_text(address)) == (text, host)


FORGED = [
    ("/tmp/x\n9   R   forged", r"/tmp/x\n9   R   forged"),
    (b"\0y\r\n\x1b[2J", r"@y\r\n\x1b[2J"),
    ("/tmp/\udcff", r"/tmp/\udcff"),
    (("fe80::1%\n\x1b[31m", 80, 0, 2), r"[fe80::1%\n\x1b[31m]:80"),
    (("10.0.0.1", "80\u202e\u2028"), r"10.0.0.1:80\u202e\u2028"),
    (("\x9b31m", 80), r"\x9b31m:80"),
]


@pytest.mark.parametrize("address", [("0.0.0.0", 0), ("10.0.0.1", 4000), ("255.255.255.255", 65_535)])
def test_an_address_of_ipv4_is_kept_as_a_number(table, address):
    entry = an_entry(table, peer=address)
    assert (entry.peer, type(entry.packed_peer)) == (address, int)


@pytest.mark.parametrize(
    "address",
    [
        ("127.1", 80),
        ("010.0.0.1", 80),
        ("1.2.3.256", 80),
        ("1.2.3.4.5", 80),
        ("١.2.3.4", 80),
        ("::1", 80),
        ("::1", 80, 0, 0),
        ("1.2.3.4", 65_536),
        ("1.2.3.4", -1),
        ("1.2.3.4", True),
        ("1.2.3.4", "80"),
        ("", 0),
        (),
        "/run/x.sock",
        b"\0abstract",
        0,
        80,
        True,
        None,
    ],
)
def test_any_other_address_is_kept_as_it_is(table, address):
    kept = an_entry(table, peer=address).peer
    assert (kept, type(kept)) == (address, type(address))
    assert not isinstance(address, tuple) or list(map(type, kept)) == list(map(type, address))


@pytest.mark.parametrize(("address", "text"), FORGED)
def test_a_peer_can_not_write_a_line_of_its_own(table, address, text):
    """A Unix peer chooses its own name, and `get_request` may return any address. Each must fill only one line."""
    entry = an_entry(table, address)
    entry.local = address
    entry.want = Forged(text="\n\x1b[2J")
    [row] = table.snapshot(peer=text)
    assert (row["peer"], row["local"], row["waits_for"]) == (text, text, r"'\n\x1b[2J\r'".strip("'"))
    listing = format_rows([row])
    assert len(listing.splitlines()) == 2
    assert (listing + repr(entry)).replace("\n", "").isprintable()
    assert host_text(address).isprintable()


class Forged(Want[bytes]):
    """Stands for a want that a program defines. Its repr shows text that the peer has sent."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text + "\r"


class WithFunc:
    """Has an attribute called `func`. Names without an underscore belong to the handler's author."""

    func = len


@pytest.mark.parametrize(
    ("handler", "name"),
    [
        (Echo, "Echo"),
        (Echo(), "Echo"),
        (functools.partial(Echo, 1), "Echo"),
        (functools.partial(functools.partial(Echo, 1), 2), "Echo"),
        (ids, "ids"),
        (SimpleNamespace(), "SimpleNamespace"),
        (WithFunc, "WithFunc"),
        (WithFunc(), "WithFunc"),
    ],
    ids=["class", "itself", "partial", "partial of a partial", "function", "namespace", "class func", "itself func"],
)
def test_handlers_are_named_by_their_class(handler, name):
    assert handler_name(handler) == name
