"""Attacks on a server: slow clients, clients that do not read, no free descriptors, a drain under load.


Runs `tests/faults.py` at sizes that take about a second. Leaves out the checks of how long other clients wait, which
need an idle machine; `make faults` runs everything. `pytest -s` shows the figures.
"""

from __future__ import annotations

import contextlib
import select
from pathlib import Path

import pytest

import reqtable
from reqtable import State, line, state
from tests.faults import (
    BACKPRESSURE,
    MIB,
    Finding,
    drain_under_load,
    long_answer,
    no_descriptors,
    program,
    slow_loris,
    unread_answers,
)
from tests.support import Client, served, wait_until

STYLES = ["state", "async", "blocking"]

pytestmark = pytest.mark.slow


def holds(found: Finding) -> None:
    print(f"\n{found}")
    assert not found.broken


@pytest.mark.parametrize("style", ["state", "async"])
def test_slow_loris_are_gone_and_not_before_their_deadline(style: str) -> None:
    holds(slow_loris(style, 500, timeout_s=1.2, every_s=0.5, quiet_s=0.5))


@pytest.mark.parametrize("style", STYLES)
def test_readers_that_never_read_cost_no_more_than_the_high_water_mark(style: str) -> None:
    holds(unread_answers(style, 100, quiet_s=0.5))


def test_with_no_descriptors_left_it_waits_without_spinning_and_serves_all_in_the_end() -> None:
    holds(no_descriptors(64, 300, full_s=1))


@pytest.mark.parametrize(("style", "dispatch"), BACKPRESSURE)
def test_a_long_answer_is_made_as_fast_as_it_is_taken(style: str, dispatch: str) -> None:
    holds(long_answer(style, dispatch, 64 * MIB))


@pytest.mark.parametrize("style", STYLES)
def test_a_drain_under_load_cuts_no_request_before_its_deadline(style: str) -> None:
    holds(drain_under_load(style, "greenlet", 0.7))


class Echo(reqtable.StateRequestHandler):
    @state(line())
    def echo(self, text: bytes) -> object:
        self.send(text)
        return self.echo


class Words(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line()):
            await self.send(text)


class Lines(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(text)


@pytest.mark.parametrize("handler", [Echo, Words, Lines])
def test_a_peer_that_does_not_read_is_not_read_from(handler: type) -> None:
    """The peer can send only until the kernel's buffers are full. When it reads, it gets all the output."""
    with served(handler, "greenlet") as server, Client(server.server_address) as client:
        client.socket.setblocking(False)
        text = bytes(9999) + b"\n"
        sent = 0
        while select.select([], [client.socket], [], 0.2)[1]:
            with contextlib.suppress(BlockingIOError):
                sent += client.socket.send(text[sent % len(text) :])
        wait_until(server, lambda: all(entry.state is State.WRITING for entry in server.table))
        (entry,) = server.table
        taken = entry.bytes_in
        wait_until(server, lambda: True)
        assert (entry.state, entry.bytes_in) == (State.WRITING, taken)
        assert entry.output.held + len(entry.input) < server.engine.limits.recv_bytes * 3
        client.socket.settimeout(20)
        whole = sent - sent % len(text)
        assert len(client.receive(whole)) == whole


def test_the_table_of_descriptors_does_not_grow_while_it_serves() -> None:
    """If the process has a second thread, each doubling of the kernel's table stops the server for 10 ms or more."""
    with program(style="state") as server, Client(server.address) as client:
        client.ask(b"a\n")
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert int(status.partition("FDSize:")[2].split()[0]) >= 1024
