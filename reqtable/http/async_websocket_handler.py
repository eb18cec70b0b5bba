"""`AsyncWebSocketHandler`: a WebSocket as a coroutine. Derive a class, and define `async def handle(self)`."""

from __future__ import annotations

import contextlib
from typing import Any

from reqtable.handlers.coroutine import AsyncRequestHandler
from reqtable.http.answer import head_of, phrase_of
from reqtable.http.frames import ABNORMAL, GOING_AWAY, INTERNAL_ERROR, TOO_BIG, WebSocketClosed, WebSocketError
from reqtable.http.handshake import asks_for_websocket, parse_handshake, refusal_fields
from reqtable.http.head import BadRequest
from reqtable.http.messages import Request
from reqtable.http.wants import head
from reqtable.http.websocket import WebSocketMethods
from reqtable.table.errors import IncompleteRead, LimitExceeded, TimedOut
from reqtable.table.table import Entry
from reqtable.table.want import Want


class AsyncWebSocketHandler(WebSocketMethods, AsyncRequestHandler):
    """Serves a WebSocket with the coroutine `handle`, which begins when the handshake is done.

    `await self.read(ws_message())` returns the next message, and raises WebSocketClosed when the client has closed. Any
    request that does not ask for a WebSocket is answered with 426.
    """

    _needs_stream = True

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self._install_input(entry)
        self._handling = self._coroutine
        self._coroutine = self._serve()

    async def _serve(self) -> None:
        if not await self._handshake():
            return
        try:
            await self._handling
        except WebSocketClosed:
            return
        except LimitExceeded as error:
            self.close_ws(TOO_BIG, str(error))
            raise
        except TimedOut:
            self.close_ws(GOING_AWAY, "timeout")
            raise
        except Exception:
            self.close_ws(INTERNAL_ERROR)
            raise
        self.close_ws()

    async def _handshake(self) -> bool:
        """Answer the first request. Returns whether a WebSocket is open."""
        status, why = 426, "this is a WebSocket"
        try:
            self.request = Request(await self.read(head()))
            if asks_for_websocket(self.request.head):
                asked = parse_handshake(self.request.head, self.subprotocols)
                if self.allow_origin(asked.origin):
                    await self.send(head_of(101, self._open(asked)))
                    return True
                status, why = 403, f"pages of {asked.origin} may not open it"
        except BadRequest as error:
            status, why = error.status, error.reason
        except IncompleteRead:
            return False
        body = f"{status} {phrase_of(status)}: {why}\n".encode()
        fields = dict(refusal_fields(status)) | {"Connection": "close", "Content-Length": str(len(body))}
        await self.send(head_of(status, fields.items()) + body)
        return False

    # -- for the engine -----------------------------------------------------------------------------------------------

    def _resume(self, item: Any) -> Want[Any] | None:
        want = super()._resume(item)
        if self.ping_s is not None and self.websocket is not None:
            self._note_wait(want)
        return want

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if self.websocket is not None and getattr(error, "connection", None) is None:
            if isinstance(error, TimedOut) and self._pings_on():
                return self._waits
            if isinstance(error, WebSocketClosed):
                self._note_close(error)
            elif isinstance(error, IncompleteRead):
                self._note_end()
                error = WebSocketClosed(error.waited_for, ABNORMAL, partial=error.partial)
            elif isinstance(error, WebSocketError):
                self.close_ws(error.code, error.reason)
        want = super()._throw(error)
        if self.ping_s is not None and self.websocket is not None:
            self._note_wait(want)
        return want

    def _close(self) -> None:
        try:
            super()._close()
        finally:
            self._handling.close()

    def _leave(self) -> None:
        super()._leave()
        with contextlib.suppress(Exception):  # see AsyncRequestHandler
            self._handling.close()
