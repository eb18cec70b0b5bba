"""Two engines in one process, stepped by hand, between which requests move: real sockets, and one fake clock."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import reqtable
from reqtable import Limits, State
from reqtable.loop.platform import System
from reqtable.table.table import Entry
from reqtable.testing import FakeClock

PASSES_MAX = 200


class Host:
    """Serves `handler` by a server class at `address`, one pass at a time."""

    def __init__(
        self,
        clock: FakeClock,
        handler: Any,
        kind: Any = reqtable.TCPServer,
        address: Any = ("127.0.0.1", 0),
        dispatch: str | None = None,
        config: Any = None,
        **limits: Any,
    ) -> None:
        self.clock = clock
        self.server = kind(address, handler, dispatch=dispatch, config=config)
        self.engine = reqtable.Engine(limits=Limits(**limits), system=System(clock=clock)).add(self.server)
        self.engine.loop.open()
        self.table = self.engine.table

    def passes(self, count: int = 5) -> None:
        for _ in range(count):
            self.engine.loop.run_once(0)

    def until(self, condition: Any) -> None:
        """Run passes until `condition()` holds."""
        for _ in range(PASSES_MAX):
            if condition():
                return
            self.engine.loop.run_once(0.05)
        raise AssertionError("the condition did not come to hold")

    def take(self) -> Entry:
        """Take the next request of a client. Returns its row."""
        self.server._handle_request_noblock()
        entry = list(self.table)[-1]
        self.passes()
        return entry

    def only(self) -> Entry:
        [entry] = self.table
        return entry

    def freeze(self, entry: Entry) -> tuple[bytes, list[Any]]:
        """Freeze a request. Returns its record, and duplicates of what goes beside it, as another process gets them."""
        movable = self.engine.mover.record(entry)
        self.engine.mover.freezer.freeze([entry])
        assert entry.state is State.MOVING
        return movable.record, [doubled(each) for each in movable.attachments]

    def let_go(self, entry: Entry) -> None:
        self.engine.mover.freezer.let_go(entry)
        self.passes()
        assert self.table.get(entry.id) is None

    def close(self) -> None:
        self.server.server_close()


def doubled(holder: Any) -> Any:
    """Return a duplicate of a socket, or of the descriptor of a file."""
    return holder.dup() if isinstance(holder, socket.socket) else os.dup(holder.fileno())


def move(first: Host, second: Host, entry: Entry, seconds: float = 0.0) -> Entry:
    """Move a request, which takes some time on its way. Returns its row in the second table."""
    record, sockets = first.freeze(entry)
    first.clock.jump(seconds)
    second.passes(1)
    [id] = second.table.restore([record], sockets)
    found = second.table.get(id)
    first.let_go(entry)
    second.passes()
    assert found is not None
    return found


@contextlib.contextmanager
def hosts(handler: Any, *, after: Any = None, **options: Any) -> Iterator[tuple[Host, Host]]:
    """Make two hosts. The second serves `after`, if that is given."""
    clock = FakeClock()
    second_address = options.pop("second_address", None)
    first = Host(clock, handler, **options)
    try:
        if second_address is not None:
            options["address"] = second_address
        second = Host(clock, after or handler, **options)
        try:
            yield first, second
        finally:
            second.close()
    finally:
        first.close()


def client_of(host: Host) -> socket.socket:
    """Return a client's socket, connected to a stream server."""
    address = host.server.server_address
    made = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    made.connect(address)
    made.settimeout(5)
    return made
