"""The base of the handlers of WebSockets: the state of a WebSocket as data, its sends, its pings, its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from reqtable.http.deflate import agree, deflate
from reqtable.http.frames import (
    ABNORMAL,
    BINARY,
    CLOSE,
    GOING_AWAY,
    NO_CODE,
    NORMAL,
    PING,
    TEXT,
    WebSocketClosed,
    build_frame,
    close_payload,
)
from reqtable.http.handshake import Asked, answer_fields, is_same_origin
from reqtable.http.messages import Request
from reqtable.http.ws_messages import MESSAGE_BYTES_MAX, WebSocketInput, may_wait_again, waits_for_message
from reqtable.table.errors import HandlerError
from reqtable.table.table import Entry
from reqtable.table.want import Want

_LEAST_S = 1e-6  # a timeout with less than this left is over


@dataclass(slots=True)
class WebSocket:
    """Describes an open WebSocket, or one that was open (RFC 6455). It is plain data."""

    is_open: bool = True  # true: neither side has sent a close frame
    subprotocol: str | None = None  # the chosen subprotocol
    window_bits: int = 0  # of the messages that we compress; 0: the client did not offer compression
    # The code of the client's close frame: 1005 if that had none, 1006 if the connection ended without one, 0 before.
    close_code: int = 0
    close_reason: str = ""
    pings: bool = False  # a ping is sent when `ping_s` have passed in this wait
    left_s: float | None = None  # of the handler's own timeout for this wait, at the beginning of this interval
    seen: int = -1  # the bytes that had come when the last ping was sent; -1: none was, in this wait


class WebSocketMethods:
    """Sends messages, pings and close frames. A handler of WebSockets derives from it.

    The request of the handshake is in `request`. `websocket` is None before the handshake is done.
    """

    request: Request
    websocket: WebSocket | None = None
    entry: Entry

    message_bytes_max: ClassVar[int] = MESSAGE_BYTES_MAX  # the longest incoming message, in bytes
    subprotocols: ClassVar[Sequence[str]] = ()  # the subprotocols of the handler, the best one first
    compressed_bytes: ClassVar[range] = range(1024, 262_145)  # sizes in bytes: such messages are sent compressed
    ping_s: ClassVar[float | None] = None  # seconds: a silent client gets a ping, and is lost after twice that

    send: Any

    # -- for the author of a handler ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent: the handshake is done, and neither side has sent a close frame."""
        return self.websocket is not None and self.websocket.is_open

    def allow_origin(self, origin: str | None) -> bool:
        """Return whether a page of `origin`, such as "https://example.com", may open the WebSocket (403 if not).

        The default allows pages of this host itself, and programs that are no browsers, whose origin is None.
        """
        return is_same_origin(origin, self.request.get("host"))

    def send_text(self, text: str) -> Any:
        """Queue a text message; drop it unless `is_open`. Other requests may call this too. Raises TypeError for
        bytes."""
        if not isinstance(text, str):
            raise TypeError(f"send_text() takes str, not {type(text).__name__}: bytes are sent by send_bytes()")
        return self._send_message(TEXT, text.encode())

    def send_bytes(self, data: bytes | bytearray | memoryview) -> Any:
        """Queue a binary message; drop it unless `is_open`. Other requests may call this too. Raises TypeError for
        str."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"send_bytes() takes bytes, not {type(data).__name__}: text is sent by send_text()")
        return self._send_message(BINARY, bytes(data))

    def ping(self, data: bytes = b"") -> Any:
        """Queue a ping, unless the WebSocket is closed. The client answers by a pong (RFC 6455, 5.5.2).

        Raises ValueError for more than 125 bytes of data.
        """
        if len(data) > 125:
            raise ValueError(f"a ping takes at most 125 bytes, not {len(data)}")
        return self.send(build_frame(PING, data) if self.is_open else b"")

    def close_ws(self, code: int = NORMAL, reason: str = "") -> None:
        """Send a close frame, unless one was sent or has come. After this, no message is sent (RFC 6455, 5.5.1).

        To end the request, go to no other state. Raises ValueError for a code that can't be sent (RFC 6455, 7.4).
        """
        payload = close_payload(code, reason)
        if self.websocket is not None and self.websocket.is_open:
            self.websocket.is_open = False
            self.send(build_frame(CLOSE, payload))

    # -- for the handlers ---------------------------------------------------------------------------------------------

    def _install_input(self, entry: Entry) -> None:
        """Give the entry an input that can hold half a message. Called before anything is read from it."""
        old = entry.input
        if old.is_stream and not isinstance(old, WebSocketInput):
            entry.input = WebSocketInput(self.message_bytes_max)
            entry.input.restore(old.save() | {"half": None, "is_closed": False})

    def _open(self, asked: Asked) -> list[tuple[str, str]]:
        """Begin the WebSocket. Returns the fields of the answer with the status 101."""
        bits, extensions = agree(asked.extensions) if self.compressed_bytes else (0, None)
        self.websocket = WebSocket(True, asked.subprotocol, bits)
        self._tell_input()
        return answer_fields(asked, extensions)

    def _tell_input(self) -> None:
        """Tell the input what was agreed upon."""
        unread = self.entry.input
        if isinstance(unread, WebSocketInput):
            unread.deflates = self.websocket is not None and self.websocket.window_bits > 0

    def _send_message(self, opcode: int, payload: bytes) -> Any:
        websocket = self.websocket
        if websocket is None or not websocket.is_open:
            return self.send(b"")
        is_compressed = False
        if websocket.window_bits and len(payload) in self.compressed_bytes:
            packed = deflate(payload, websocket.window_bits)
            is_compressed = len(packed) < len(payload)
            payload = packed if is_compressed else payload
        # One piece: what other threads send meanwhile can't come in between.
        return self.send(build_frame(opcode, payload, rsv1=is_compressed))

    def _note_close(self, error: WebSocketClosed) -> None:
        """Note the client's close frame, and answer it."""
        websocket = self.websocket
        assert websocket is not None
        websocket.close_code, websocket.close_reason = error.code, error.reason
        if websocket.is_open:
            websocket.is_open = False
            self.send(build_frame(CLOSE, b"" if error.code == NO_CODE else close_payload(error.code)))

    def _note_end(self) -> None:
        """Note that the input has ended without a close frame. If that is a drain, the client still hears of it."""
        websocket = self.websocket
        assert websocket is not None
        websocket.close_code = websocket.close_code or ABNORMAL
        self.close_ws(GOING_AWAY)

    # -- pings to a silent client -------------------------------------------------------------------------------------

    def _note_wait(self, want: Want[Any] | None) -> None:
        """Bound a wait for a message by `ping_s`. `entry.timeout` is the handler's own for this wait."""
        websocket, entry = self.websocket, self.entry
        assert websocket is not None
        websocket.pings = False
        is_here = entry.table.owner is not None  # another process, which runs this one step, knows nothing of the rest
        if self.ping_s is None or not is_here or not websocket.is_open or want is None:
            return
        if waits_for_message(want) and may_wait_again(want):
            websocket.pings = True
            websocket.left_s, websocket.seen = entry.timeout, -1
            entry.timeout = self.ping_s if entry.timeout is None else min(self.ping_s, entry.timeout)

    def _pings_on(self) -> bool:
        """At a timeout: return whether the wait goes on, with a ping. It does not if the client seems lost."""
        websocket, entry = self.websocket, self.entry
        if websocket is None or not websocket.pings or not websocket.is_open or entry.timeout is None:
            return False
        if self.ping_s is None:
            raise HandlerError(f"{type(self).__name__}.ping_s was changed while a request waited")
        if websocket.left_s is not None:
            websocket.left_s -= entry.timeout
            if websocket.left_s < _LEAST_S:
                return False
        is_half = isinstance(entry.input, WebSocketInput) and entry.input.half is not None
        # The rest of a message must come as fast as that of any other item.
        least = entry.table.limits.read_bytes_per_s_min * entry.timeout if is_half else 1
        if websocket.seen >= 0 and entry.bytes_in - websocket.seen < least:
            return False
        self.ping()
        websocket.seen = entry.bytes_in
        entry.timeout = self.ping_s if websocket.left_s is None else min(self.ping_s, websocket.left_s)
        return True
