"""The wants that no handler names: the engine, a transport or a policy has a request wait for them."""

from __future__ import annotations

from typing import Any, ClassVar

from reqtable.table.input import MISSING, Missing
from reqtable.table.states import Event
from reqtable.table.want import Waiting, Want, want_type
from reqtable.table.wants import Posted


@want_type
class Ended(Want[None]):
    """Waits for the peer to take the last output of a finished request. Never satisfied: the engine ends the entry."""

    awaits: ClassVar[Event] = Event.OUTPUT_BLOCKED

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING


class _Opening(Want[None]):
    """Waits for something that comes before the request itself. The engine handles it, so `take` finds nothing."""

    __slots__ = ()

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING


@want_type
class ProxyHeader(_Opening):
    """Waits for the header in which a proxy names its client."""


@want_type
class Handshake(_Opening):
    """Waits for the end of the TLS handshake."""


@want_type
class Sleeping(Want[None]):
    """Waits until `wakes_at`: a `sleep` that has begun. Times are seconds on the table's clock."""

    seconds: float
    wakes_at: float
    awaits: ClassVar[Event] = Event.AWAITS_TIMER

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING if self.wakes_at > entry.table.now else None

    def __repr__(self) -> str:
        return f"sleep(seconds={self.seconds!r})"


@want_type
class Elsewhere(Posted[None]):
    """Waits until the thread or the child that owns the rest of the request is done."""

    awaits: ClassVar[Event] = Event.HANDED_OFF
    is_timed: ClassVar[bool] = False


@want_type
class Vacancy(Posted[None]):
    """Waits for a free thread or child: as many as allowed are busy."""

    awaits: ClassVar[Event] = Event.AWAITS_RESULT
    is_timed: ClassVar[bool] = False


@want_type
class Step(Posted[Any]):
    """Waits for the request's own step, which runs elsewhere. A timeout would start a second step, so none runs."""

    awaits: ClassVar[Event] = Event.AWAITS_RESULT
    is_timed: ClassVar[bool] = False


@want_type
class Turn(Posted[None]):
    """Waits for a turn in the next pass. For handlers that do their own I/O and could go on without end."""

    awaits: ClassVar[Event] = Event.AWAITS_TURN


@want_type
class Readable(Want[None]):
    """Waits until the request's own socket is readable. For handlers that do their own I/O (policy `greenlet`).

    The unread bytes stay in the kernel, so `take` finds nothing: the transport itself resumes the handler.
    """

    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING


@want_type
class Writable(Posted[None]):
    """Waits until the request's own socket is writable."""

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
