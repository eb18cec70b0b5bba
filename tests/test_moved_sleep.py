"""A request that sleeps goes on sleeping in another table, and wakes when it would have woken."""

from __future__ import annotations

import socket
from dataclasses import fields

from reqtable import State, StateRequestHandler, Transition, line, sleep, state
from reqtable.table import plain
from reqtable.table.saving import Head
from tests.support import WAIT_S, Client, served, wait_until

TIME = [each.name for each in fields(Head)].index("time")


class Sleeper(StateRequestHandler):
    @state(line())
    def ask(self, text: bytes) -> Transition:
        return self.awake, sleep(float(text))

    @state()
    def awake(self, _: None) -> Transition:
        self.send(b"awake\n")
        return self.ask


def older(record: bytes, seconds: float) -> bytes:
    """Return a record as if it had been made earlier."""
    head = plain.decode(record)
    head[TIME] -= seconds
    return plain.encode(head)


def wakes(sleep_s: float, record_age_s: float) -> bytes:
    with served(Sleeper) as first, served(Sleeper) as second:
        with Client(first.server_address).send(b"%f\n" % sleep_s):
            wait_until(first, lambda: [each.state for each in first.engine.table] == [State.SLEEPING])
            [record] = first.engine.table.save()
        client, theirs = socket.socketpair()
        with client:
            client.settimeout(WAIT_S)
            second.engine.table.restore([older(record, record_age_s)], [theirs])
            return client.recv(100)


def test_a_sleep_that_was_long_on_its_way_is_no_timeout() -> None:
    assert wakes(sleep_s=0.6, record_age_s=0.3) == b"awake\n"


def test_a_sleep_that_ended_on_its_way_is_over() -> None:
    assert wakes(sleep_s=100, record_age_s=200) == b"awake\n"
