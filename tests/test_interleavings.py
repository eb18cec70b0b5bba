"""Random interleavings of clients, through the real loop: whatever the order, each sees its own dialogue."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.echo import AsyncEcho, StateEcho
from examples.notes import Notes
from reqtable import State
from tests.conftest import FakeClock
from tests.test_loop import World

COMMANDS = st.one_of(
    st.just((b"count\n", None)),
    st.binary(max_size=40).map(lambda note: (b"put %d\n" % len(note) + note, note)),
)


def answers_of(commands: list[tuple[bytes, bytes | None]]) -> bytes:
    """What the notes protocol must answer."""
    words, answers = 0, b""
    for _, note in commands:
        if note is None:
            answers += b"%d\n" % words
        else:
            words += len(note.split())
    return answers


def take(peer: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while more := peer.recv(65536):
            data += more
    return data


def run(handler: Any, scripts: list[bytes], order: st.DataObject, share: int) -> list[bytes]:
    """Each client sends its script in pieces, in an order that hypothesis chooses; what each received."""
    with contextlib.closing(World(FakeClock(), handler, steps_per_pass=share)) as world:
        peers = [world.connect() for _ in scripts]
        left = list(scripts)
        received = [b"" for _ in scripts]
        while any(left):
            number = order.draw(st.sampled_from([n for n, script in enumerate(left) if script]))
            count = order.draw(st.integers(1, len(left[number])))
            peers[number][0].send(left[number][:count])
            left[number] = left[number][count:]
            if not left[number]:
                peers[number][0].shutdown(socket.SHUT_WR)
            if order.draw(st.booleans()):
                world.passes()
            if order.draw(st.booleans()):
                received[number] += take(peers[number][0])
        for _ in range(2000):
            if not len(world.engine.table):
                break
            world.passes()
            for number, (peer, _) in enumerate(peers):
                received[number] += take(peer)
        assert len(world.engine.table) == 0
        for number, (peer, entry) in enumerate(peers):
            received[number] += take(peer)
            assert entry.state is State.CLOSED
            assert (entry.bytes_in, entry.bytes_out) == (len(scripts[number]), len(received[number]))
        return received


WORLD = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@WORLD
@given(st.lists(st.lists(COMMANDS, min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 5), st.data())
def test_notes(dialogues: list[Any], share: int, order: st.DataObject) -> None:
    scripts = [b"".join(command for command, _ in dialogue) for dialogue in dialogues]
    assert run(Notes, scripts, order, share) == [answers_of(dialogue) for dialogue in dialogues]


@WORLD
@given(
    st.sampled_from([StateEcho, AsyncEcho]),
    st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=6),
    st.integers(1, 5),
    st.data(),
)
def test_echo(handler: Any, scripts: list[bytes], share: int, order: st.DataObject) -> None:
    assert run(handler, scripts, order, share) == scripts
