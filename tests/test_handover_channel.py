"""The pair between two processes that move requests: what goes over it, and what is left if one of them fails."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import reqtable
from reqtable.handover import channel as channels
from reqtable.handover import messages
from reqtable.handover.channel import Channel, packets_of


class End:
    """One end of a pair, and what it hears."""

    def __init__(self, own: socket.socket) -> None:
        self.engine = reqtable.Engine()
        self.engine.loop.open()
        self.heard: list[tuple[Any, list[int]]] = []
        self.ends = 0
        self.problems: list[str] = []
        self.channel = Channel(
            self.engine.loop.poller, own, lambda *found: self.heard.append(found), self._end, self.problems.append
        )

    def _end(self) -> None:
        self.ends += 1

    def passes(self, count: int = 20) -> None:
        for _ in range(count):
            self.engine.loop.run_once(0)

    def close(self) -> None:
        self.channel.close()
        self.engine.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    before = sorted(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_packets_that_the_giver_has_not_read_do_not_hide_its_abort(pair: Any) -> None:
    """A past bug: ECONNRESET counted as the death of the giver, so both processes went on with the same requests."""
    ours, theirs = pair
    taker = End(ours)
    taker.channel.send(messages.Prepared([]))
    for data, _ in packets_of(messages.Abort("it was told to end"), ()):
        theirs.send(data)
    theirs.close()
    taker.passes()
    assert taker.heard == [(messages.Abort("it was told to end"), [])]
    assert taker.ends == 1
    taker.close()


def test_too_few_descriptors_are_no_death_of_the_giver(pair: Any) -> None:
    """A past bug: the taker went on with what was prepared, beside a giver that was alive."""
    ours, theirs = pair
    taker = End(ours)
    with open(os.devnull, "rb") as file:
        socket.send_fds(theirs, [packets_of(messages.Send([]), ())[0][0]], [file.fileno()] * 3)
        open_now = len(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(file.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # room for one of the three
        try:
            taker.passes(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert taker.problems == ["the process has too few descriptors left to receive those of the requests"]
        assert (taker.heard, taker.ends) == ([], 0)
        assert len(os.listdir("/proc/self/fd")) == open_now  # the one that has come is closed
    taker.close()


def test_the_descriptors_of_a_message_that_never_becomes_whole_are_closed(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A past bug: a connection stayed open, and nobody served it."""
    monkeypatch.setattr(channels, "_PACKET_DESCRIPTORS", 1)
    ours, theirs = pair
    taker = End(ours)
    with open(os.devnull, "rb") as file:
        data, descriptors = packets_of(messages.Send([]), [file.fileno()] * 2)[0]
        socket.send_fds(theirs, [data], descriptors)
        theirs.close()
        taker.passes()
    assert (taker.heard, taker.ends) == ([], 1)
    taker.close()


def test_a_descriptor_that_waits_is_not_that_of_a_later_file(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A past bug: a waiting packet had only the number of a descriptor, which may come to stand for another file."""
    monkeypatch.setattr(channels, "_PACKET_BYTES", 2000)
    ours, theirs = pair
    giver, taker = End(ours), End(theirs)
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        place, number = first.getsockname(), first.fileno()
        giver.channel.send(messages.Send([bytes(2_000_000)]))
        giver.channel.send(messages.Send([]), [first])
    with socket.socket() as other:
        assert other.fileno() == number
        for _ in range(2000):
            if len(taker.heard) == 2:
                break
            giver.passes(1)
            taker.passes(1)
    [descriptor] = taker.heard[1][1]
    with socket.socket(fileno=descriptor) as found:
        assert found.getsockname() == place
    giver.close()
    taker.close()


def test_what_is_sent_after_the_end_is_dropped(pair: Any) -> None:
    ours, _ = pair
    giver = End(ours)
    giver.channel.close()
    giver.channel.send(messages.Listen(), then=lambda: pytest.fail("it was sent"))
    assert not giver.channel._waiting
    giver.close()
