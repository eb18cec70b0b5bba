"""`WebSocketHandler`: a WebSocket as a state machine. Derive a class, and override `on_message` or declare states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from reqtable.handlers.declaration import state
from reqtable.handlers.finding import Finding
from reqtable.handlers.transition import Transition
from reqtable.http.frames import GOING_AWAY, INTERNAL_ERROR, TOO_BIG, WebSocketClosed, WebSocketError
from reqtable.http.handler import HTTPRequestHandler
from reqtable.http.handshake import asks_for_websocket, parse_handshake, refusal_fields
from reqtable.http.head import BadRequest
from reqtable.http.websocket import WebSocketMethods
from reqtable.http.ws_messages import waits_for_message, ws_message
from reqtable.table.errors import HandlerError, IncompleteRead, LimitExceeded, TimedOut
from reqtable.table.places import place_of
from reqtable.table.table import Entry
from reqtable.table.want import Want

_CLOSING_S = 10.0
_NO_FIELDS: tuple[tuple[str, str], ...] = ()


class WebSocketHandler(WebSocketMethods, HTTPRequestHandler):
    """Serves WebSockets, and ordinary requests by `do_GET` and so on.

    Override `on_message`, or declare states that wait for `ws_message()`. When a WebSocket opens, it goes to the first
    such state. A state that returns None closes the WebSocket with the code 1000.
    """

    _hooks = HTTPRequestHandler._hooks | {
        "on_upgrade": ("self",),
        "on_open": ("self",),
        "on_message": ("self", "message"),
    }

    _awaiting = "write the handler as a reqtable.http.AsyncWebSocketHandler"

    _opens_in: ClassVar[str] = "message"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [name for name, each in cls._declared().items() if waits_for_message(each.want)]
        if cls.on_message is WebSocketHandler.on_message:
            cls._opens_in = next((name for name in own if not hasattr(WebSocketHandler, name)), "message")

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self._install_input(entry)

    # -- for the author of a handler ----------------------------------------------------------------------------------

    def on_upgrade(self) -> Transition:
        """Called when a client asks for a WebSocket. May refuse it, as by `return self.answer(401)`; None accepts."""
        return None

    def on_open(self) -> Transition:
        """Called when the WebSocket is open. May return a transition; None goes to the first state for messages.

        The header fields of the request are dropped after this, for an open WebSocket lives long.
        """
        return None

    def on_message(self, message: str | bytes) -> Transition:
        """Called with each message: `str` if it is text, `bytes` if it is binary.

        May return a transition. None waits for the next message, or ends the request after `close_ws`.
        """
        raise HandlerError(str(self._unfit()))

    def on_head(self) -> Transition:
        head = self.request.head
        if not asks_for_websocket(head):
            return None
        try:
            asked = parse_handshake(head, self.subprotocols)
        except BadRequest as error:
            self.request.is_whole = False  # so that the connection closes
            return self.answer(error.status, f"{error}\n", refusal_fields(error.status))
        if not self.allow_origin(asked.origin):
            return self.answer(403, f"403: pages of {asked.origin} may not open this WebSocket\n")
        refused = self.on_upgrade()
        if refused is not None:
            self._checked(refused, self.on_upgrade)
        if refused is not None or self.reply.status >= 200:
            return refused
        self.begin_answer(101, self._open(asked))
        target = self.on_open()
        self.request.head = replace(head, fields=_NO_FIELDS)
        if target is not None:
            self._checked(target, self.on_open)
            return target
        return getattr(self, self._opens_in) if self.is_open else self.closing

    def respond(self) -> Transition:
        if self.request.method == "GET" and not hasattr(self, "do_GET"):
            return self.answer(426, "426: this is a WebSocket\n", refusal_fields(426))
        return super().respond()

    # -- the states ---------------------------------------------------------------------------------------------------

    @state(ws_message())
    def message(self, message: str | bytes) -> Transition:
        """A message has come."""
        target = self.on_message(message)
        return self.message if target is None and self.is_open else target

    @state(ws_message(), timeout=_CLOSING_S)
    def closing(self, message: str | bytes) -> Transition:
        """Drop messages after `close_ws`, until the client closes too."""
        return self.closing

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def on_timeout(self) -> Transition:
        if self.websocket is None:
            return super().on_timeout()
        self.close_ws(GOING_AWAY, "timeout")
        return None

    def on_eof(self, partial: bytes) -> Transition:
        return super().on_eof(partial) if self.websocket is None else None

    def on_limit(self, error: LimitExceeded) -> Transition:
        if self.websocket is None:
            return super().on_limit(error)
        self.close_ws(TOO_BIG, str(error))
        raise error

    def on_error(self, error: Exception) -> Transition:
        if self.websocket is None:
            return super().on_error(error)
        self.close_ws(INTERNAL_ERROR)
        raise error

    # -- for the engine -----------------------------------------------------------------------------------------------

    def _source_of(self, by: Callable[..., Any]) -> tuple[str, str]:
        return super()._source_of(self.on_message if by.__name__ == "message" else by)

    def _returns(self) -> str:
        if self.websocket is None:
            return super()._returns()
        return "a state of this handler, a pair of a state and a want, or None"

    @classmethod
    def _unfit(cls) -> Finding | None:
        if cls._opens_in != "message" or cls.on_message is not WebSocketHandler.on_message:
            return None
        mend = "define on_message(self, message), or a state that waits for ws_message()"
        return Finding("no-state", place_of(cls), f"{cls.__name__} takes no message", mend)

    @classmethod
    def _entered(cls) -> set[str]:
        return {*super()._entered(), cls._opens_in}

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool], made_at: float) -> None:
        super()._restore(saved, made_at)
        self._tell_input()

    def _resume(self, item: Any) -> Want[Any] | None:
        want = super()._resume(item)
        return want if self.websocket is None else self._after(want)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if self.websocket is None or getattr(error, "connection", None) is not None:
            return super()._throw(error)
        if isinstance(error, TimedOut) and self._pings_on():
            return self._state.want
        if isinstance(error, WebSocketClosed):
            self._note_close(error)
        elif isinstance(error, IncompleteRead):
            self._note_end()
        elif isinstance(error, WebSocketError):
            self.close_ws(error.code, error.reason)
            raise error
        return self._after(super()._throw(error))

    def _after(self, want: Want[Any] | None) -> Want[Any] | None:
        """Close the WebSocket of a request that is done; bound the wait of any other by its pings."""
        if want is None:
            self.close_ws()
        elif self.ping_s is not None:
            self.entry.timeout = self._state.timeout
            # A want that a step returned beside its state is not known when the wait is over.
            self._note_wait(want if want is self._state.want else None)
        return want
