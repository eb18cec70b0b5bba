"""The wants that no handler names: what the engine, a transport or a policy has a request wait for."""

from __future__ import annotations

from typing import Any, ClassVar

from reqtable.table.buffers import MISSING, Missing
from reqtable.table.states import Event
from reqtable.table.wants import Posted, Waiting, Want, want_type


@want_type
class Ended(Want[None]):
    """The request is done; only its output is still to be taken. Never satisfied: the engine ends the entry."""

    awaits: ClassVar[Event] = Event.OUTPUT_BLOCKED

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING


class _Opening(Want[None]):
    """What comes before the request itself; the engine sees to it."""

    __slots__ = ()

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING


@want_type
class ProxyHeader(_Opening):
    """The header by which a proxy says for whom it connects."""


@want_type
class Handshake(_Opening):
    """The TLS handshake to be done."""


@want_type
class Elsewhere(Posted[None]):
    """The thread or the child that owns the rest of the request to be done."""

    awaits: ClassVar[Event] = Event.HANDED_OFF
    is_timed: ClassVar[bool] = False


@want_type
class Vacancy(Posted[None]):
    """A thread or a child to be free: as many as there may be are busy."""

    awaits: ClassVar[Event] = Event.AWAITS_RESULT
    is_timed: ClassVar[bool] = False


@want_type
class Step(Posted[Any]):
    """Its own step, which runs elsewhere, to return. No timeout runs: it would have the next step overlap this one."""

    awaits: ClassVar[Event] = Event.AWAITS_RESULT
    is_timed: ClassVar[bool] = False


@want_type
class Turn(Posted[None]):
    """Its next turn, in the next pass: for handlers that do their own I/O and could go on and on."""

    awaits: ClassVar[Event] = Event.AWAITS_TURN


@want_type
class Readable(Want[None]):
    """The request's own socket can be read: for handlers that do their own I/O (policy `greenlet`).

    The kernel keeps what is unread: as long as nobody has been told of it, something stands in for it as its input.
    """

    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Missing | None:
        if not entry.input.data:
            return MISSING
        entry.input.data = b""
        return None


@want_type
class Writable(Posted[None]):
    """The request's own socket can be written."""

    awaits: ClassVar[Event] = Event.OUTPUT_BLOCKED


ENDED = Ended()
ELSEWHERE = Elsewhere()
VACANCY = Vacancy()
STEP = Step()
TURN = Turn()
READABLE = Readable()
WRITABLE = Writable()
PROXY_HEADER = ProxyHeader()
HANDSHAKE = Handshake()
