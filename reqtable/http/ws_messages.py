"""`ws_message()`: a want for a whole WebSocket message. Half a message is part of the unread input, and plain data.

A frame stays in the input until its head is whole. From then on its payload is moved, unmasked and checked, into
`WebSocketInput.half` as it comes: at most one `recv` of it in one pass. So a large message does not hold up the loop,
and bad UTF-8 is refused as soon as it comes. `save` has the half message beside the bytes that are still unread.

Pings are answered while a request waits for a message. A client that sends frames without end is served in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from reqtable.http.deflate import inflate
from reqtable.http.frames import (
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    PROTOCOL_ERROR,
    TEXT,
    FrameHead,
    WebSocketClosed,
    WebSocketError,
    build_frame,
    parse_close,
    parse_frame_head,
    text_of,
    turned,
    unmask,
    whole_characters,
)
from reqtable.table.arguments import whole_bytes
from reqtable.table.errors import HandlerError, LimitExceeded
from reqtable.table.input import MISSING, Input, Missing
from reqtable.table.output import Output
from reqtable.table.reaching import Either
from reqtable.table.states import Event, State
from reqtable.table.want import Waiting, Want, WantOf, want_type

MESSAGE_BYTES_MAX = 2**20
_FRAMES_AT_ONCE = 256  # that one `take` looks at without finding a message; then others have their turn


@dataclass(slots=True)
class HalfMessage:
    """Holds what has come of a message. It is plain data."""

    opcode: int  # TEXT or BINARY
    is_compressed: bool
    is_last: bool = False  # the frame that is coming, or came last, is the last of the message
    left: int = 0  # bytes of the frame that are still to come
    mask: bytes = b""  # for the next byte of the frame
    payload: bytearray = field(default_factory=bytearray)
    checked: int = 0  # bytes of the payload that are known to be whole characters of UTF-8


class WebSocketInput(Input):
    """Holds the unread input of a request that is, or may become, a WebSocket, with the message that has half come."""

    __slots__ = ("deflates", "half", "is_behind", "is_closed", "limit")

    def __init__(self, limit: int = MESSAGE_BYTES_MAX) -> None:
        super().__init__()
        self.limit = limit  # bytes of a message, for a `ws_message()` without a limit of its own
        self.half: HalfMessage | None = None
        self.deflates = False  # the client may send compressed messages
        self.is_behind = False  # the last `message` has left frames that have come
        self.is_closed = False  # the client's close frame has come

    def __len__(self) -> int:
        unread = len(self.data) - self._start
        return unread if self.half is None else unread + len(self.half.payload)

    def message(self, limit: int, output: Output) -> str | bytes | Missing:
        """Take the next message, at most `limit` bytes of it. Pongs are added to `output`.

        Raises LimitExceeded, WebSocketError, and WebSocketClosed at the client's close frame.
        """
        self.is_behind = False
        for _ in range(_FRAMES_AT_ONCE):
            half = self.half
            if half is not None:
                if half.left and not self._take_payload(half):
                    return MISSING
                if half.is_last:
                    return self._whole(half, limit)
            if self.is_closed:
                self.leftover()  # nothing that follows a close frame counts
                return MISSING
            head = parse_frame_head(self.data, self._start, may_deflate=self.deflates)
            if head is None:
                return MISSING
            if head.opcode >= CLOSE:
                if len(self.data) - self._start < head.size + head.length:
                    return MISSING
                self._control(head, output)
                continue
            self._check_data(head, limit)
            start = self._start + head.size
            if half is None and head.is_last and not head.rsv1 and start + head.length <= len(self.data):
                payload = unmask(self._take_to(start + head.length)[head.size :], head.mask)  # all of it at once
                return text_of(payload) if head.opcode == TEXT else payload
            self._take_to(start)
            self._begin_frame(head)
        self.is_behind = True
        return MISSING

    def _check_data(self, head: FrameHead, limit: int) -> None:
        """Check that a data frame fits what came before it, and the limit."""
        half = self.half
        if (head.opcode == CONTINUATION) != (half is not None):
            what = "begins before the last one has ended" if half else "goes on that has not begun"
            raise WebSocketError(PROTOCOL_ERROR, f"a message {what}")
        compressed = head.rsv1 if half is None else half.is_compressed
        # Compressed data that can't be made smaller is a little larger. The limit holds for what becomes of it.
        most = limit + (limit >> 10) + 64 if compressed else limit
        if head.length + (0 if half is None else len(half.payload)) > most:
            raise LimitExceeded("a message", limit)

    def _begin_frame(self, head: FrameHead) -> None:
        """Note that a frame is coming. Its head is taken."""
        half = self.half
        if half is None:
            half = self.half = HalfMessage(head.opcode, head.rsv1)
        half.is_last, half.left, half.mask = head.is_last, head.length, head.mask

    def _take_payload(self, half: HalfMessage) -> bool:
        """Move what has come of a frame's payload to its message. Returns whether that was all of it."""
        piece = self.chunk(half.left)
        if piece is MISSING:
            return False
        half.payload += unmask(piece, half.mask)
        half.left -= len(piece)
        half.mask = turned(half.mask, len(piece))
        self._check_text(half)
        return not half.left

    @staticmethod
    def _check_text(half: HalfMessage) -> None:
        """Raise WebSocketError if a text can't become UTF-8, as far as it has come."""
        if half.opcode == TEXT and not half.is_compressed:
            with memoryview(half.payload) as payload:
                half.checked += whole_characters(payload[half.checked :])

    def _whole(self, half: HalfMessage, limit: int) -> str | bytes:
        """Return the message, which has come whole."""
        payload = inflate(half.payload, limit) if half.is_compressed else half.payload
        item = text_of(payload) if half.opcode == TEXT else bytes(payload)
        self.half = None
        return item

    def _control(self, head: FrameHead, output: Output) -> None:
        """Take a control frame: answer a ping, raise WebSocketClosed for a close frame."""
        payload = unmask(self._take_to(self._start + head.size + head.length)[head.size :], head.mask)
        if head.opcode == PING:
            output.append(build_frame(PONG, payload))
        elif head.opcode == CLOSE:
            code, reason = parse_close(payload)
            self.is_closed = True
            raise WebSocketClosed(ws_message(), code, reason)

    def leftover(self) -> bytes:
        half, self.half = self.half, None
        rest = super().leftover()
        return rest if half is None else bytes(half.payload) + rest

    def save(self) -> dict[str, Any]:
        half = self.half
        saved = None if half is None else asdict(half) | {"payload": bytes(half.payload)}
        return super().save() | {"half": saved, "is_closed": self.is_closed}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        half = saved["half"]
        self.half = None if half is None else HalfMessage(**{**half, "payload": bytearray(half["payload"])})
        self.is_closed = saved["is_closed"]


@want_type
class WSMessage(WantOf[str | bytes]):
    limit: int | None
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> str | bytes | Missing:
        unread = entry.input
        if not isinstance(unread, WebSocketInput):
            raise HandlerError("ws_message() is for a WebSocketHandler, or an AsyncWebSocketHandler")
        item = unread.message(self.limit or unread.limit, entry.output)
        if item is MISSING:
            row: Any = entry
            if unread.half is not None and not row.held:
                row.table.hold(row, len(unread))  # the engine counts the bytes of a request that holds some already
            if unread.is_behind:
                row.table.owner.post(_go_on, row)
        return item

    def __repr__(self) -> str:
        return "ws_message()" if self.limit is None else f"ws_message({self.limit})"


def ws_message(limit: int | None = None) -> WantOf[str | bytes]:
    """Wait for a whole WebSocket message, at most `limit` bytes: `str` if it is text, `bytes` if it is binary.

    The item is the message. `limit` is None for the handler's `message_bytes_max`. Pings are answered meanwhile. A
    longer message ends the WebSocket with the code 1009 (RFC 6455, 7.4.1). Raises TypeError or ValueError for a limit
    that is not a whole number of bytes.
    """
    return _WS_MESSAGE if limit is None else _ws_message(limit)


def waits_for_message(want: Want[Any]) -> bool:
    """Return whether `want` waits for a message, perhaps among other things."""
    return isinstance(want, WSMessage) or (isinstance(want, Either) and any(map(waits_for_message, want.wants)))


def may_wait_again(want: Want[Any]) -> bool:
    """Return whether a request may go on waiting for `want` after a timeout: a sleep or a call would begin anew."""
    return not isinstance(want, Either) or want.is_begun


def _go_on(entry: Any) -> None:
    """Have `entry` ask its want again: there are more frames than one `take` looks at."""
    if entry.state is State.READING:
        entry.table.owner.step(entry, Event.INPUT_ARRIVED)
    elif entry.state is State.WAITING:
        entry.table.owner.waiting.wake(entry, Event.INPUT_ARRIVED)


@lru_cache(maxsize=64, typed=True)
def _ws_message(limit: int) -> WantOf[str | bytes]:
    return WSMessage(whole_bytes("limit", limit, 1))


_WS_MESSAGE = WSMessage(None)
