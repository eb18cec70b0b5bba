"""Connections whose requests are in the journal, and the steps that write it.

The order decides: a step is noted in the journal before its output is sent. A connection receives into the memory of
the journal. So after a crash the kernel's totals say whether the step was done, and how much of its output was sent.

A step that changes nothing else than its connection's totals writes the page of the journal only: that costs least.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any, Final

from reqtable.handlers.state import StateRequestHandler
from reqtable.handover.journal import IN_DOUBT, INPUT_AT, INPUT_COUNT, OUTPUT_MAX, Journal, Slot
from reqtable.handover.packed import SCALARS, Origin, pack, pack_lost, pack_origin
from reqtable.handover.totals import Totals, cookie_of, has_totals, totals
from reqtable.loop.step import Steps
from reqtable.net.stream import Stream
from reqtable.table import plain
from reqtable.table.engine_wants import ENDED
from reqtable.table.errors import NotMovable
from reqtable.table.input import NO_INPUT, Input
from reqtable.table.output import END, FileSlice, Output
from reqtable.table.record import save_reach
from reqtable.table.snapshot import handler_name
from reqtable.table.states import Event, State
from reqtable.table.want import Want

_NOT_NOW: Final = (BlockingIOError, InterruptedError)
_step: Final = Steps.step
_flush: Final = Stream.flush
_are_scalars: Final = SCALARS.issuperset
_AWAITS_INPUT: Final = Event.AWAITS_INPUT
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_CLOSED: Final = State.CLOSED
_INPUT_ARRIVED: Final = Event.INPUT_ARRIVED
_INPUT_ENDED: Final = Event.INPUT_ENDED
_ELSEWHERE: Final = {Event.AWAITS_RESULT, Event.HANDED_OFF}
_NEW: Final = object()  # unlike every state


class Kind:
    """Reads the fields of the handlers of one class."""

    def __init__(self, handler: type) -> None:
        names: tuple[str, ...] = handler._fields  # type: ignore[attr-defined]
        self.names = names * 2 if len(names) == 1 else names  # `attrgetter` returns a tuple for two names or more
        self.get: Callable[[Any], tuple[Any, ...]] = attrgetter(*self.names) if names else _nothing
        # A handler may have more to save than its fields.
        self.has_own_save: bool = handler._save is not StateRequestHandler._save  # type: ignore[attr-defined]
        self.no_data: dict[str, str] = dict(handler._no_data)  # type: ignore[attr-defined]


class JournalledStream(Stream):
    """Receives and sends for a TCP connection whose request is in `journal`."""

    __slots__ = (
        "_is_simple",
        "_kind",
        "_receive_into",
        "_recorded_to",
        "_state",
        "_values",
        "_want",
        "attempt",
        "journal",
        "noted",
        "origin",
        "received_before",
        "sent_before",
        "slot",
    )

    def __init__(self, steps: Steps, request: Any, journal: Journal, kind: Kind) -> None:
        super().__init__(steps, request)
        self.journal = journal
        self._kind = kind
        self._receive_into: Callable[[Any], int] = request.recv_into
        self.slot: Slot | None = None  # None: no record was written
        self.noted = False  # what the last steps have done is in the journal
        self.attempt = 0  # how many crashes have cut the present step off
        self.origin = b""
        self.received_before = self.sent_before = 0
        self._recorded_to = -1  # the totals that the connection has when all output of the last record is sent
        # The contents of the last record. `_is_simple`: the next record is the same if these are.
        self._is_simple = False
        self._state: Any = _NEW
        self._want: Want[Any] | None = None
        self._values: tuple[Any, ...] | None = None

    def enter(self, server: int) -> None:
        """Write the first record of a new request. `server` is the index of its server."""
        entry, request = self.entry, self.request
        received, sent = self._totals()
        # At least 0: of a connection that is reset already, the totals lack an end of file that never came.
        self.received_before, self.sent_before = max(0, received - entry.bytes_in), max(0, sent - entry.bytes_out)
        self.origin = pack_origin(
            Origin(
                server,
                handler_name(entry.handler),
                entry.peer,
                entry.local,
                entry.created_at,
                self.received_before,
                self.sent_before,
            )
        )
        self.slot = Slot(entry.id, cookie_of(request))
        self.record()

    def _totals(self) -> Totals:
        return totals(self.request)

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        if entry.state is not _READING:
            super().on_ready(mask)
            return
        steps, journal = self.steps, self.journal
        # As in `_receive`, without a call: this is the hot path.
        journal.open(entry.id, entry.bytes_in + self.received_before, entry.bytes_out + self.sent_before)
        try:
            count = self._receive_into(journal.input)
        except _NOT_NOW:
            journal.run(0)
            return
        except OSError as error:
            self._unreadable(error)
            return
        self.noted = False
        if count:
            steps.take_in(entry, journal.memory[INPUT_AT : INPUT_AT + count])
        else:
            entry.active_at = steps.table.now
            entry.own_input().ended = True
            _step(steps, entry, _INPUT_ENDED)  # not by JournalledSteps: the page says which row's step runs
        self.note_at_last()

    def _receive(self) -> None:
        entry, journal = self.entry, self.journal
        journal.open(entry.id, entry.bytes_in + self.received_before, entry.bytes_out + self.sent_before)
        try:
            count = self._receive_into(journal.input)
        except _NOT_NOW:
            journal.run(0)
            return
        except OSError as error:
            self._unreadable(error)
            return
        self.noted = False
        self._take_in(journal.memory[INPUT_AT : INPUT_AT + count])
        self.note_at_last()

    def flush(self) -> bool:
        entry = self.entry
        output = entry.output
        size = output.size
        self.noted = True
        in_page = False
        if entry.state is _WRITING and entry.bytes_out + size == self._recorded_to:
            pass  # the record has it: a page would say that a step runs
        elif size < OUTPUT_MAX and size == output.held:
            in_page = self.note(output.front() if output.more else output.first)
        else:
            self.record()
        is_taken = _flush(self)
        if in_page and not is_taken and entry.state is not _CLOSED:
            self.record()  # the page may soon be another row's
        return is_taken

    def finish(self) -> None:
        self.noted = True
        if self._want is not ENDED:
            self.record()
        super().finish()

    def release(self) -> None:
        super().release()  # first: a connection without a record would begin anew
        if self.slot is not None:
            self.journal.free(self.slot)

    def give_to_tls(self) -> None:
        """Leave the journal: its keys die with the process, so no successor can continue the connection."""
        super().give_to_tls()
        assert self.slot is not None
        self.journal.free(self.slot)
        self.slot = None
        self.journal.run(0)  # the page may be this row's
        self.noted = True  # the step that runs has nothing more to note

    # -- the journal --------------------------------------------------------------------------------------------------

    def note(self, output: bytes | None) -> bool:
        """Note what the steps have done, and the output that is sent next. Returns whether the page was enough."""
        entry = self.entry
        handler = entry.handler
        unread = entry.input
        if (
            self._is_simple
            and handler._state is self._state
            and entry.want is self._want
            and not unread.data
            and all(map(is_, self._kind.get(handler), self._values))  # type: ignore[arg-type]
            and not unread.ended
            and entry.reach is None
            and not entry.table.touched
        ):
            journal = self.journal
            if journal.open_row != entry.id:
                journal.open(entry.id, entry.bytes_in + self.received_before, entry.bytes_out + self.sent_before)
            journal.close(output)
            return True
        self.record()
        return False

    def begin_steps(self) -> None:
        """Note that the request's steps run. If they have received something, the page says so already."""
        self.noted = False
        if self.journal.open_row != self.entry.id:
            self.journal.run(self.entry.id)

    def end_steps(self, has_changed: bool) -> None:
        """Note what the steps have done, and that they are over. If the page is open, `_receive` does this."""
        if self.journal.open_row == self.entry.id:
            return
        if has_changed:
            self.note_at_last()
        self.journal.run(0)

    def note_at_last(self) -> None:
        """Note what the steps have done, unless a flush has done so, or the request has ended."""
        if not self.noted and self.entry.state is not _CLOSED:
            self.noted = True
            self.note(None)

    def record(self) -> None:
        """Write the whole record, and those of the rows to which the step has sent something."""
        self.attempt = 0
        self.write()
        touched = self.entry.table.touched
        if touched:
            for other in dict.fromkeys(touched):
                transport = other.transport
                if other is not self.entry and other.state is not _CLOSED and isinstance(transport, JournalledStream):
                    transport.write()
        self.journal.commit()

    def write(self) -> None:
        """Write the record. It is valid from the journal's next commit on."""
        entry = self.entry
        handler, unread, output, want = entry.handler, entry.input, entry.output, entry.want
        self._state, self._want = state, _ = handler._state, want
        self._recorded_to = entry.bytes_out + output.size
        self._is_simple = False
        is_plain = entry.reach is None and not unread.data and output.size == output.held
        why = "" if is_plain and want.awaits is _AWAITS_INPUT and not self._kind.no_data else self._why_lost()
        if why:
            payload = pack_lost(self.origin, why)
        else:
            if self._kind.has_own_save:
                values, are_scalars = handler._save()[1], False
            else:
                try:
                    values = self._values = self._kind.get(handler)
                    are_scalars = _are_scalars(map(type, values))
                    self._is_simple = is_plain and are_scalars and not unread.ended and not self.attempt
                except AttributeError:  # a field is not set
                    values, are_scalars = handler.fields(), False
            first = output.first
            changing = (
                None if state.name == "start" else state.name,
                handler._ended,
                entry.timeout,
                unread.ended,
                b"" if is_plain else unread.save()["data"],
                () if first is None else (first,) if type(first) is bytes and not output.more else _bytes_of(output),
                not is_plain and bool(output.pieces) and output.pieces[-1] is END,
                self._is_simple,
                self.attempt,
                entry.steps,
                entry.began_at,
                entry.moves,
                entry.table.now,
                None if entry.reach is None else plain.encode(save_reach(entry.reach, 0.0)),
                None if unread is NO_INPUT or type(unread) is Input else _beside_unread(unread),
            )
            try:
                payload = pack(self.origin, values, are_scalars, None if want is state.want else want, changing)
            except NotMovable as error:
                self._is_simple = False
                payload = pack_lost(self.origin, str(error))
        assert self.slot is not None
        self.journal.write(
            self.slot, payload, entry.bytes_in + self.received_before, entry.bytes_out + self.sent_before
        )

    def _why_lost(self) -> str:
        """Return why the request can't be continued if the process dies now; "" if it can."""
        entry = self.entry
        if entry.resumable is not entry.handler:
            return "steps elsewhere"
        reach = entry.reach
        if reach is not None and reach.connections:
            return "with other connections"
        if entry.want.awaits in _ELSEWHERE or (
            reach is not None and any(hasattr(each, "give_up") for each in reach.begun)
        ):
            return "calls in flight"
        if entry.output.size != entry.output.held and any(type(piece) is FileSlice for piece in entry.output.pieces):
            return "files half sent"
        for name, why in self._kind.no_data.items():
            if getattr(entry.handler, name, None) is not None:
                return why
        return ""


class JournalledUnixStream(JournalledStream):
    """Does the same for a Unix connection, whose bytes the kernel does not count: the journal counts them.

    While a call sends, the journal does not know how much was sent. A request whose process dies just then is lost.
    """

    __slots__ = ()

    def __init__(self, steps: Steps, request: Any, journal: Journal, kind: Kind) -> None:
        super().__init__(steps, request, journal, kind)
        self._receive_into = self._count_received

    def on_ready(self, mask: int) -> None:
        self.journal.numbers[INPUT_COUNT] = 0  # not known, before the page is opened
        super().on_ready(mask)

    def _count_received(self, memory: Any) -> int:
        count: int = self.request.recv_into(memory)
        self.journal.numbers[INPUT_COUNT] = count + 1
        return count

    def _totals(self) -> Totals:
        return Totals(self.entry.bytes_in, self.entry.bytes_out)

    def flush(self) -> bool:
        entry, numbers = self.entry, self.journal.numbers
        self.noted = True
        if entry.state is not _WRITING or entry.bytes_out + entry.output.size != self._recorded_to:
            self.record()
        assert self.slot is not None
        numbers[IN_DOUBT] = entry.id
        is_taken = _flush(self)
        self.journal.reach(self.slot, entry.bytes_out)
        numbers[IN_DOUBT] = 0
        return is_taken

    def note(self, output: bytes | None) -> bool:
        self.record()
        return False


def stream_for(steps: Steps, request: Any, journal: Journal, kind: Kind) -> JournalledStream:
    """Return the transport of a connection whose handler is of `kind`."""
    make = JournalledStream if has_totals(request) else JournalledUnixStream
    return make(steps, request, journal, kind)


def _beside_unread(unread: Input) -> bytes:
    return plain.encode({name: value for name, value in unread.save().items() if name not in ("data", "ended")})


def _bytes_of(output: Output) -> list[bytes]:
    return [bytes(piece) for piece in output.pieces if piece is not END]


def _nothing(handler: Any) -> tuple[Any, ...]:
    return ()
