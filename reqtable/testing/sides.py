"""The ends of a request's connections that a test plays: its client, and the peers of its outgoing connections."""

from __future__ import annotations

from typing import Any, Self

from reqtable.loop.step import Steps
from reqtable.net.connect import Connector
from reqtable.net.outgoing import Outgoing, OutgoingDatagrams
from reqtable.table.connecting import Connect, StartTLS
from reqtable.table.connection import ConnectionRow
from reqtable.table.parts import NoTransport
from reqtable.table.states import State
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.testing.client import as_bytes
from reqtable.testing.wire import Wire

try:
    from reqtable.testing.start_tls import BegunAtOnce
except ImportError:  # this Python has no ssl
    BegunAtOnce = None  # type: ignore[assignment,misc]

__tracebackhide__ = True  # see exercise

# Reserved for documentation (RFC 5737).
OTHER_HOST = "192.0.2.2"  # where every peer of a request is
OWN_ADDRESS = ("192.0.2.3", 50_000)  # of the request's end of each outgoing connection


class Side:
    """Plays one end of one connection of a request. Calls can be chained."""

    _wire: Wire
    _where = ""  # " at ADDRESS", for messages

    def _go_on(self) -> Self:
        """Run the loop until the request waits for a peer or for time to pass."""
        raise NotImplementedError

    def _said(self) -> str:
        """Return what the request waits for, in words."""
        raise NotImplementedError

    def _said_of_end(self) -> str:
        """Return that the handler has ended, on this connection at least, in words."""
        return "has ended"

    # -- actions ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> Self:
        """Send `data`. It arrives in one piece as soon as the handler reads."""
        data = as_bytes("send", data)
        wire = self._wire
        if wire.end_sent or self.is_over:
            ended = "peer has ended" if wire.end_sent else f"handler {self._said_of_end()}"
            raise AssertionError(f"{data!r} can't be sent{self._where}: the {ended}")
        if data or wire.datagrams:
            wire.unread.append(data)
        return self._go_on()

    def end(self) -> Self:
        """Half-close: the handler sees the end of file, and its output still arrives. Datagrams have no end."""
        self._wire.end_sent = not self._wire.datagrams
        return self._go_on()

    def reset(self) -> Self:
        """Reset the connection. Unread input is lost."""
        self._wire.is_reset = True
        return self._go_on()

    def read_nothing(self) -> Self:
        """Stop reading: from here on, output stays in the handler's buffer until `read_on()`."""
        self._wire.is_blocked = True
        return self

    def read_on(self) -> Self:
        """Resume reading."""
        self._wire.is_blocked = False
        return self._go_on()

    def refuse_tls(self, reason: str = "refused by the test") -> Self:
        """Have `start_tls()` of this connection fail. Without this call it succeeds at once."""
        self._wire.tls_refusal = reason
        return self

    # -- findings -----------------------------------------------------------------------------------------------------

    @property
    def output(self) -> bytes:
        """Output that has arrived and was not yet expected; with datagrams, all of them joined."""
        return b"".join(self._wire.received)

    @property
    def output_ended(self) -> bool:
        """Whether the handler has ended its output on this connection, which may go on the other way."""
        return self._wire.output_ended

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection is encrypted: by `start_tls()`, or because its address begins with tls://."""
        return self._wire.is_encrypted

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended."""
        raise NotImplementedError

    def expect(self, data: bytes) -> Self:
        """Take the output so far (with datagrams, the next one), which must be exactly `data`."""
        data = as_bytes("expect", data)
        received = self._wire.received
        if self._wire.datagrams:
            found = received.pop(0) if received else None
        else:
            found = self.output
            received.clear()
        if found != data:
            raise AssertionError(f"expected {data!r}{self._where}, found {found!r}; the request {self._said()}")
        return self

    def expect_end(self) -> Self:
        """Check that the handler has ended its output on this connection, and that no output is left."""
        if self.output or not self.output_ended:
            raise AssertionError(f"expected the end{self._where}, found {self.output!r}; the request {self._said()}")
        return self


class Other(Side):
    """Plays the peer of one outgoing connection of a request. `Exercise.accept` returns it."""

    def __init__(self, client: Side, row: ConnectionRow, wire: Wire) -> None:
        self.row = row  # of the table
        self._client = client
        self._wire = wire
        self._where = f" at {row.address}"

    def __repr__(self) -> str:
        return f"<Other{self._where}>"

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended: the handler has closed it or is done, or this side has reset it."""
        return self._wire.is_reset or self.row.state is State.CLOSED

    @property
    def is_released(self) -> bool:
        """Whether the handler has given the connection back, for a later `connect(…, reuse=True)`."""
        return not self.is_over and self.row.parent is None

    def _go_on(self) -> Self:
        self._client._go_on()
        return self

    def _said(self) -> str:
        return self._client._said()


class Others(Connector):
    """Leaves each connect of a request to the test, which accepts or refuses it."""

    def attempt(self, row: ConnectionRow, want: Connect) -> None:
        row.transport = NoTransport()

    def begin(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        if isinstance(want, StartTLS) and BegunAtOnce is not None:
            return BegunAtOnce(self.steps, entry, want)
        return super().begin(entry, want)

    def asked(self, address: str) -> ConnectionRow | None:
        """Return the oldest connection to `address` that the test has neither accepted nor refused."""
        for row in self.steps.table.connections.values():
            if isinstance(row, ConnectionRow) and row.state is State.CONNECTING and row.address == address:
                return row
        return None

    def accept(self, row: ConnectionRow, wire: Wire) -> None:
        """Have the request go on with its connection."""
        target = row.target
        is_unix = target.scheme == "unix"
        row.peer, row.local = (target.host, "") if is_unix else ((OTHER_HOST, target.port), OWN_ADDRESS)
        wire.is_encrypted = target.scheme == "tls"
        steps: Steps = self.steps
        if wire.datagrams:
            transport = OutgoingDatagrams(steps, wire)
            transport.attach(row)
            self.connected(row, transport)
        else:
            self.connected(row, Outgoing(steps, wire))
