"""Clients that reset their connections while their requests wait: each must end at once, and not when its wait is over.

`check` compares the time at which a client has reset its connection with the time at which its handler was closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import reqtable
from reqtable import AsyncRequestHandler, StateRequestHandler, Transition, call, line, sleep, state
from reqtable.testing import Client, Peer, Report

WAIT_S = 100.0
NOTICE_S = 0.5  # a step under `pool` may take 0.2 s; the poll may be late
left: dict[int, float] = {}  # by number of the client: when it has reset its connection
waiting: set[int] = set()  # the clients whose requests wait: an earlier reset meets a request that is not there yet
closed: dict[int, float] = {}  # by number of the client: when its handler was closed


class Waits(StateRequestHandler):
    """Waits as it is told, and then answers."""

    number: int = -1

    @state(line())
    def command(self, text: bytes) -> Transition:
        number, what = text.split()
        self.number = int(number)
        waiting.add(self.number)
        if what == b"sleep":
            return self.done, sleep(WAIT_S)
        if what == b"call":
            return self.done, call(bool)
        return self.nap, sleep(1)

    @state()
    def nap(self, _: None) -> Transition:
        return self.nap, sleep(1)

    @state()
    def done(self, _: object) -> Transition:
        self.send(b"done\n")
        return self.command

    def on_close(self) -> None:
        closed[self.number] = self.entry.table.clock()


class AsyncWaits(AsyncRequestHandler):
    number: int = -1

    async def handle(self) -> None:
        while text := await self.read(line()):
            number, what = text.split()
            self.number = int(number)
            waiting.add(self.number)
            while what == b"nap":
                await self.sleep(1)
            if what == b"sleep":
                await self.sleep(WAIT_S)
            else:
                await self.call(bool)
            await self.send(b"done\n")

    def on_close(self) -> None:
        closed[self.number] = self.entry.table.clock()


def clients(rng: Random) -> list[Client]:
    left.clear()
    waiting.clear()
    closed.clear()
    return [_client(rng, number) for number in range(rng.randrange(1, 7))]


def _client(rng: Random, number: int) -> Client:
    """Make a client that leaves during its wait, or that half-closes and gets its answer all the same."""
    what = rng.choice([b"sleep", b"sleep", b"call", b"nap"])
    client = Client().send(b"%d %b\n" % (number, what))
    if what != b"nap" and rng.random() < 0.3:
        return client.end().expect(b"done\n").expect_end()
    # bytes that the request does not read must not hide the reset; the smallest buffer has room for them
    return client.pause(rng.uniform(0, 5)).send(bytes(rng.choice([0, 10]))).pause(2).then(_leaving(number)).reset()


def _leaving(number: int) -> Callable[[Peer], Any]:
    def play(peer: Peer) -> Any:
        if number in waiting and not peer.ended:
            left[number] = peer.network.clock.now
        return
        yield

    return play


def check(report: Report) -> Iterator[str]:
    for number, at in left.items():
        took = closed.get(number, at + WAIT_S) - at
        peer = report.clients[number]
        if took > NOTICE_S and not peer.was_hit and closed.get(number, at) >= at:
            yield f"{peer} has reset its connection, which was noticed after {took:.1f} s"


HANDLERS: list[type[reqtable.StateRequestHandler] | type[reqtable.AsyncRequestHandler]] = [Waits, AsyncWaits]
