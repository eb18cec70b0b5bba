"""`ConnectionRow`: an outgoing connection as a row of the table."""

from __future__ import annotations

from typing import Any, ClassVar

from reqtable.table.connecting import Target
from reqtable.table.parts import OVER, RELEASED, Transport
from reqtable.table.states import State
from reqtable.table.table import Entry


class ConnectionRow(Entry):
    """Holds everything about one outgoing connection. It runs no steps: the request `parent` waits for its input.

    `parent` is None once the request has given the connection back for reuse, or has closed it.
    """

    kind: ClassVar[str] = "connection"

    __slots__ = (
        "address",
        "connection",
        "end_told",
        "failure",
        "failure_told",
        "key",
        "output_ended",
        "parent",
        "target",
        "wants_input",
    )

    def __init__(self, parent: Entry, target: Target) -> None:
        transport: Transport = RELEASED
        super().__init__(parent.table, parent.server, parent.policy, None, None, transport)
        self.parent: Entry | None = parent
        self.handler = type(parent.handler) if not isinstance(parent.handler, type) else parent.handler
        self.resumable = OVER
        self.state = State.CONNECTING
        self.target = target
        self.address = target.text  # as given to `connect`
        self.connection: Any = None  # the `Connection` that the handler has
        self.key: Any = None  # what a later `connect` must be equal to for reuse; None: none may reuse it
        self.end_told = False  # an item has told the handler of its end of file
        self.output_ended = False  # the request has ended the output
        self.failure: Exception | None = None  # why the connection ended, unless its request ended it
        self.failure_told = False
        self.wants_input = False  # the request waits for its input

    @property
    def parent_id(self) -> int | None:
        return None if self.parent is None else self.parent.id

    def watch(self, interest: int) -> None:
        """Have the selector watch the connection for exactly `interest`."""
        self.transport.watch(interest)

    def flush(self) -> bool:
        """Give the kernel as much output as it takes. Returns whether that was all of it."""
        return self.transport.flush()
