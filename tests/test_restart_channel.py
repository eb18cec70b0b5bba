"""The pair between the processes of a restart: what breaks it, and what does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from reqtable.handover import channel, messages
from reqtable.handover.channel import Channel
from reqtable.server.engine import Engine
from tests.support import open_descriptors


class Ends:
    """Is one end in a loop, which notes what comes, and the other end by hand."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.engine.loop.open()
        ours, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.came: list[Any] = []
        self.channel = Channel(
            self.engine.loop.poller,
            ours,
            lambda message, descriptors: self.came.append((message, descriptors)),
            lambda: self.came.append("end"),
            lambda why: self.came.append(why),
        )

    def run(self, times: int = 10) -> list[Any]:
        for _ in range(times):
            self.engine.loop.run_once(0)
        return self.came


@pytest.fixture
def ends() -> Iterator[Ends]:
    before = open_descriptors()
    own = Ends()
    yield own
    own.channel.close()
    own.other.close()
    own.engine.close()
    assert open_descriptors() == before


def test_what_was_sent_before_the_end_is_read_although_the_other_end_had_unread_messages(ends: Ends) -> None:
    """The kernel says ECONNRESET first."""
    ends.channel.send(messages.Listen())
    ends.run()
    ends.other.send(channel.packets_of(messages.Refuse("no"), ())[0][0])
    ends.other.close()
    assert ends.run() == [(messages.Refuse("no"), []), "end"]


@pytest.mark.parametrize("packet", [b".", b".\xc1", b".\x80", b"+"])
def test_a_packet_that_is_no_message_is_a_problem_and_not_the_end(ends: Ends, packet: bytes) -> None:
    ends.other.send(packet)
    is_whole = packet[:1] == b"."
    assert len(ends.run()) == is_whole
    assert "end" not in ends.came
    ends.channel.send(messages.Refuse("what?"))
    ends.run()
    assert ends.other.recv(100)
    ends.other.send(b".")
    ends.run()
    assert len(ends.came) == 1  # said once


def test_descriptors_of_a_message_that_never_comes_whole_are_closed(ends: Ends) -> None:
    read, write = os.pipe()
    socket.send_fds(ends.other, [b"+half"], [write])
    os.close(write)
    ends.run()
    ends.other.close()
    assert ends.run() == ["end"]
    assert os.read(read, 1) == b""  # nobody has the other end of the pipe
    os.close(read)


def test_a_message_with_many_descriptors_and_bytes_goes_in_several_packets(ends: Ends) -> None:
    pipes = [os.pipe() for _ in range(300)]
    sent = messages.Send([bytes(range(256)) * 1000])
    packets = channel.packets_of(sent, [read for read, _ in pipes])
    assert len(packets) > 2
    for data, descriptors in packets:
        socket.send_fds(ends.other, [data], descriptors)
        ends.run(2)
    [(message, descriptors)] = ends.came
    assert message == sent
    assert [os.fstat(each).st_ino for each in descriptors] == [os.fstat(read).st_ino for read, _ in pipes]
    for each in (*descriptors, *(end for pair in pipes for end in pair)):
        os.close(each)


def test_what_the_kernel_does_not_take_at_once_goes_later_and_then_is_called_once(ends: Ends) -> None:
    done: list[str] = []
    ends.channel.send(messages.Send([b"x" * 2**22]), then=lambda: done.append("sent"))
    ends.run()
    assert done == []
    received = channel.Assembler()
    found = None
    ends.other.setblocking(False)
    while found is None:
        found = received.add(*channel.receive_packet(ends.other))
        ends.run(1)
    assert found[0] == messages.Send([b"x" * 2**22])
    assert done == ["sent"]
