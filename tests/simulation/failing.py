"""Handlers, wants and hooks that raise while other requests are served."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, ClassVar

import reqtable
from reqtable import line, nothing, state
from reqtable.config import Config
from reqtable.table.errors import PeerError
from reqtable.table.input import MISSING
from reqtable.testing import Client, Report

PLACES = [b"step", b"take", b"call", b"timeout", b"close", b"hook", b"report"]


class Bug(PeerError):
    """Raised at every place. A simulation tolerates errors that are the peer's fault, so this pretends to be one."""


raised: list[Bug] = []


def fail() -> Any:
    raised.append(Bug(f"bug {len(raised)}"))
    raise raised[-1]


class Refusing(reqtable.Want[None]):
    __slots__ = ()

    def take(self, entry: Any) -> Any:
        fail()


class Never(reqtable.Want[None]):
    __slots__ = ()

    def take(self, entry: Any) -> Any:
        return MISSING


class Failing(reqtable.StateRequestHandler):
    """Echoes each line. A line that names a place makes the request fail at that place."""

    closes_badly: bool = False
    hook_fails: ClassVar[set[Any]] = set()
    report_fails: ClassVar[set[Any]] = set()

    @state(line(limit=100), timeout=60)
    def command(self, text: bytes) -> Any:
        place = text.strip()
        if place not in PLACES:
            self.send(text)
            return self.command
        return getattr(self, "at_" + place.decode())()

    def at_step(self) -> Any:
        return fail()

    def at_take(self) -> Any:
        return self.other, Refusing()

    def at_call(self) -> Any:
        return self.other, reqtable.call(fail)

    def at_timeout(self) -> Any:
        return self.other, Never()

    def at_close(self) -> Any:
        self.closes_badly = True
        return None

    def at_hook(self) -> Any:
        self.hook_fails.add(self.client_address)
        return None

    def at_report(self) -> Any:
        self.report_fails.add(self.client_address)
        return fail()

    @state(nothing(), timeout=1)
    def other(self, item: Any) -> Any:
        return self.command

    def on_timeout(self) -> Any:
        return fail() if self.state_name == "other" else None

    def on_error(self, error: Exception) -> Any:
        raise error

    def on_close(self) -> None:
        if self.closes_badly:
            fail()


class Server(reqtable.TCPServer):
    def close_request(self, request: Any) -> None:
        peer = request.file.peer
        super().close_request(request)
        if peer in Failing.hook_fails:
            fail()

    def handle_error(self, request: Any, client_address: Any) -> None:
        super().handle_error(request, client_address)
        if client_address in Failing.report_fails:
            raise ZeroDivisionError


def clients(rng: Random) -> list[Client]:
    made = []
    for _ in range(rng.randrange(2, 8)):
        client = Client()
        for _ in range(rng.randrange(6)):
            text = rng.randbytes(rng.choice([1, 20])).hex().encode() + b"\n"
            client.send(text).expect(text)
            if rng.random() < 0.3:
                client.pause(rng.uniform(0, 3))
        if rng.random() < 0.7:
            client.may_fail().send(rng.choice(PLACES) + b"\n" + b"more\n" * rng.randrange(3)).pause(rng.choice([0, 3]))
        else:
            client.end().expect_end()
        made.append(client)
    return made


def server(dispatch: str, config: Config, handler: Any) -> Any:
    del raised[:]
    Failing.hook_fails.clear()
    Failing.report_fails.clear()
    return Server(("127.0.0.1", 7000), handler, dispatch=dispatch, config=config)


def check(report: Report) -> Iterator[str]:
    """Check that each exception was reported once."""
    # If the process stands still, a call may fail after the timeout of its request: its result is then dropped.
    least = 0 if report.faults_by_kind["stalled"] else 1
    for bug in raised:
        count = report.errors.count(bug)
        if not least <= count <= 1:
            yield f"{bug!r} was reported {count} times"
