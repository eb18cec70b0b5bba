"""Wants for more than the client's own input: `either`, `told`, `disconnected`, `end_output`, and a connection's wants.

A request that waits for one of them is WAITING. Each has `pairs`: what it waits for, as pairs of a want and the row of
the connection that the want reads from (None: the client).

`take` asks the wants. An end of file is an item here: `b""`, once. The loop begins what has to be begun, and polls.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple

from reqtable.table.errors import HandlerError, IncompleteRead, InvalidTransition, LimitExceeded
from reqtable.table.input import MISSING, Missing
from reqtable.table.reach import Connected, Reach
from reqtable.table.states import Event, State
from reqtable.table.want import Waiting, Want, WantOf, want_type
from reqtable.table.wants import Call, HandOff, Posted, Sleep, T_co

Pairs = tuple[tuple[Want[Any], Connected | None], ...]

_AWAITS_INPUT: Final = Event.AWAITS_INPUT
_arrived: Final = tuple.__new__  # what `Arrived(index, item)` calls, without a Python function in between
_OUTPUT_BLOCKED: Final = Event.OUTPUT_BLOCKED


class Arrived(NamedTuple):
    """The first want of an `either` that was satisfied: its place among the wants, from 0, and its item."""

    index: int  # type: ignore[assignment]  # `tuple.index` is of no use here
    item: Any


class Never(Exception):
    """Raised where a want can't be satisfied any more: the handler knows of the end of that side."""


class Reaching(WantOf[T_co]):
    """The base of the wants during which a request is WAITING."""

    __slots__ = ()

    awaits: ClassVar[Event] = Event.AWAITS_ANY
    is_begun: ClassVar[bool] = True  # False: the loop must begin something, such as a call, before it waits

    @property
    def pairs(self) -> Pairs:
        """The wants that it consists of, each with its connection."""
        return ((self, None),)

    def arrive(self, reach: Reach, side: object, data: Any) -> Any:
        """Return the item if `data`, which has just come from `side`, is all of it; else MISSING.

        `side` is the row of a connection, None for the client, or `Told`. Nothing of that side is unread.
        """
        return MISSING


@want_type
class Told(Reaching[Any]):
    """Waits for the next item that was told to the request."""

    def take(self, entry: Waiting) -> Any:
        reach = entry.reach
        if reach is None or not reach.told:
            return MISSING
        if reach.is_full_beside(self, entry.output.held, entry.table.limits.high_water_bytes):
            reach.held_back = True
            return MISSING
        return reach.told.popleft()


@want_type
class Disconnected(Reaching[None]):
    """Waits until the client has ended its output."""

    def take(self, entry: Waiting) -> Missing | None:
        gone = entry.input.ended or (entry.reach is not None and entry.reach.peer_ended)
        return None if gone else MISSING


@want_type
class EndOutput(WantOf[None]):
    """Ends the output to the client after what is queued. Satisfied at once."""

    def take(self, entry: Waiting) -> Missing | None:
        if not entry.input.is_stream:
            raise HandlerError("end_output() is for streams: each datagram is whole by itself")
        reach = entry.reach = entry.reach or Reach()
        if not reach.output_ended:
            reach.output_ended = True
            entry.output.append_end()
        return None

    def __repr__(self) -> str:
        return "end_output()"


class OfConnection(Reaching[T_co]):
    """Waits for `want` of another connection than the client's."""

    __slots__ = ("pairs", "row", "want")

    def __init__(self, want: Want[T_co], row: Connected) -> None:
        self.want = want
        self.row = row
        self.pairs: Pairs = ((want, row),)  # a slot in place of the property

    def take(self, entry: Waiting) -> T_co | Missing:
        reach = entry.reach = entry.reach or Reach()
        try:
            return _take_of(entry, reach, self.want, self.row)  # type: ignore[no-any-return]
        except Never:
            raise InvalidTransition(
                f"{self.row.address} has ended, and the handler has been told (b''): it can't wait for {self.want!r}"
            ) from None

    def arrive(self, reach: Reach, side: object, data: Any) -> Any:
        return self.want.whole(data) if side is self.row else MISSING

    def __eq__(self, other: object) -> bool:
        return type(other) is OfConnection and (self.want, self.row) == (other.want, other.row)

    def __hash__(self) -> int:
        return hash((self.want, self.row))

    def __repr__(self) -> str:
        return f"{self.want!r} of {self.row.address}"


class Either(Reaching[Arrived]):
    """Waits for the first of several wants."""

    __slots__ = ("_places", "_reads", "is_begun", "pairs", "wants")

    def __init__(self, wants: tuple[Want[Any], ...], is_begun: bool) -> None:
        self.wants = wants
        self.is_begun = is_begun  # type: ignore[misc]
        self.pairs: Pairs = tuple(  # a slot in place of the property
            [(each.want, each.row) if type(each) is OfConnection else (each, None) for each in wants]
        )
        self._places: dict[object, int] | None = None  # made when it is first needed
        self._reads = [want.needs_bytes and want.awaits is _AWAITS_INPUT for want, _ in self.pairs]

    def take(self, entry: Waiting) -> Arrived | Missing:
        reach = entry.reach
        if reach is None:
            reach = entry.reach = Reach()
        pairs, reads = self.pairs, self._reads
        count = len(pairs)
        over = 0
        first = reach.turn
        for index in range(first, first + count):
            if index >= count:
                index -= count
            want, row = pairs[index]
            if reads[index]:  # fast path of _take_of: nothing has come from that side
                side = entry if row is None else row
                unread = side.input
                is_empty = not unread.data and not unread.ended and unread.is_stream
                if is_empty and (row is None or (row.parent is entry and row.failure is None)):
                    continue
            try:
                item = _take_of(entry, reach, want, row)
            except Never:
                over += 1
                continue
            except BaseException:
                reach.give_up()
                raise
            if item is not MISSING:
                reach.turn = index + 1 if index + 1 < count else 0
                if reach.begun:
                    reach.give_up()
                return _arrived(Arrived, (index, item))
        if over == count:
            reach.give_up()
            raise InvalidTransition(f"{self!r} can't be satisfied: every input has ended, and the handler knows")
        return MISSING

    def arrive(self, reach: Reach, side: object, data: Any) -> Any:
        index = (self._places or self._found_places()).get(side, -1)
        item = MISSING if index < 0 else data if side is Told else self.pairs[index][0].whole(data)
        if item is MISSING:
            return MISSING
        reach.turn = index + 1 if index + 1 < len(self.pairs) else 0
        return _arrived(Arrived, (index, item))

    def _found_places(self) -> dict[object, int]:
        """Return the place of the want that waits for each side, if there is only one."""
        places: dict[object, int] = {}
        for index, (want, row) in enumerate(self.pairs):
            side = Told if type(want) is Told else row
            if want.awaits is _AWAITS_INPUT or type(want) is Told:
                places[side] = -1 if side in places else index
        self._places = places
        return places

    def __eq__(self, other: object) -> bool:
        return type(other) is Either and self.wants == other.wants

    def __hash__(self) -> int:
        return hash(self.wants)

    def __repr__(self) -> str:
        return f"either({', '.join(map(repr, self.wants))})"


def _take_of(entry: Waiting, reach: Reach, want: Want[Any], row: Connected | None) -> Any:
    """Take the item of `want` from its side; MISSING if it has not come. Raises Never if it never will."""
    if row is None:
        if want.awaits is not _AWAITS_INPUT:
            if want.awaits is _OUTPUT_BLOCKED:
                reach.held_back = True
            return want.take(entry)
        side: Waiting = entry
    else:
        if row.parent is not entry:
            raise HandlerError(not_own(row, row.parent is None))
        side = row
    unread = side.input
    if want.awaits is not _AWAITS_INPUT:
        item = want.take(side)
        if item is MISSING:
            if row is not None and row.failure is not None:
                raise failure_of(row)
            reach.held_back = True
        return item
    if not unread.data and want.needs_bytes and unread.is_stream and not unread.ended:
        if row is not None and row.failure is not None:
            raise failure_of(row)
        return MISSING
    return _take_input(entry, reach, want, row, side)


def _take_input(entry: Waiting, reach: Reach, want: Want[Any], row: Connected | None, side: Waiting) -> Any:
    """Take the item of an input want. At the end of the input, the rest of it and then `b""` are items."""
    if reach.is_full_beside(row, entry.output.held, entry.table.limits.high_water_bytes):
        reach.held_back = True
        return MISSING
    unread = side.input
    teller: Any = reach if row is None else row
    if unread.ended and not unread.data and teller.end_told:
        raise Never
    try:
        item = want.take(side)
        if item is MISSING and unread.ended:
            item = unread.leftover()
            if not want.takes_partial:
                teller.end_told = True
                raise IncompleteRead(want, item)
    except (LimitExceeded, IncompleteRead) as error:
        if row is not None:
            error.connection = row.connection
        raise
    finally:
        # A connection that has ended is no longer counted, but what it has received is still read.
        if row is not None and (row.held or unread.data) and row.state is not State.CLOSED:
            row.table.hold(row, len(unread) + row.output.held)
    if item == b"" and unread.ended and want.takes_partial:
        teller.end_told = True
    if item is MISSING and row is not None and row.failure is not None:
        raise failure_of(row)
    return item


def failure_of(row: Connected) -> Exception:
    """Return what ended the connection, once; after that, an error that says so."""
    if row.failure_told or row.failure is None:
        return HandlerError(f"the connection to {row.address} has ended ({row.failure}): wait for something else")
    row.failure_told = True
    return row.failure


def not_own(row: Connected, is_over: bool) -> str:
    """Return the words of an error: the connection is not, or no longer, the request's own."""
    if is_over:
        return f"the connection to {row.address} was closed or released: open another one with connect()"
    return f"the connection to {row.address} belongs to request {row.parent.id}: each request opens its own"


# What the loop must begin before a request can wait for it: the loop's own classes replace these wants.
def _is_begun(want: Want[Any]) -> bool:
    return not isinstance(want, Call | Sleep) and getattr(want, "is_begun", True)


def either(*wants: Want[Any]) -> WantOf[Arrived]:
    """Wait for the first of `wants` that is satisfied. The item is `Arrived(index, item)`.

    If several are ready, they are taken in turn. The others keep their bytes and items. A `sleep` is dropped, a `call`
    is given up, and a `connect` is closed. At the end of an input, `chunk`, `line` and `rest` give the remaining bytes,
    and then `b""`, once. If no want can be satisfied any more, the handler gets InvalidTransition.

    Raises TypeError for no want, for another `either`, and for `hand_off`.
    """
    if not wants:
        raise TypeError("either() takes one want or more, as in either(line(), sleep(5))")
    for each in wants:
        if not isinstance(each, Want):
            raise TypeError(f"either() takes wants, as in either(line(), sleep(5)), not {each!r}")
        if isinstance(each, Either):
            raise TypeError(f"either() in an either(): put the wants of {each!r} into the outer one")
        if isinstance(each, HandOff):
            raise TypeError(f"either() can't wait for {each!r}: wait for it alone")
        if isinstance(each, Posted) and not isinstance(each, Call):
            raise TypeError(f"either() can't wait for {each!r}, whose item is posted to the whole request")
    return Either(wants, all(map(_is_begun, wants)))


def told() -> Want[Any]:
    """Wait for the next item that `handler.tell(item)` has given the request. It may be of any type."""
    return _TOLD


def disconnected() -> WantOf[None]:
    """Wait until the client has ended its output, even if input is still unread. The item is None.

    A client may end its output and still read. If a client resets the connection, its request ends without this want.
    """
    return _DISCONNECTED


def end_output() -> WantOf[None]:
    """End the output to the client after what is queued: the client sees end of file. The item is None, at once.

    The client may go on sending. Nothing can be sent to the client after this. The handler gets HandlerError if the
    request has datagrams, not a stream.
    """
    return _END_OUTPUT


_TOLD = Told()
_DISCONNECTED = Disconnected()
_END_OUTPUT = EndOutput()
