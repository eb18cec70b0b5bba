"""WebSocket frames as data (RFC 6455, section 5): parse and build frames, mask them, check close codes and UTF-8.

A client masks its frames, a server does not. A breach of the protocol raises a `WebSocketError`, which has the code of
the close frame that answers it.
"""

from __future__ import annotations

import codecs
from typing import Any, Final, NamedTuple

from reqtable.table.errors import IncompleteRead, PeerError

CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

CONTROL_BYTES_MAX = 125  # of a payload that close, ping and pong may have
HEAD_BYTES_MAX = 14

# Close codes (RFC 6455, 7.4.1).
NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
NO_CODE: Final = 1005  # never sent: the peer's close frame had none
ABNORMAL: Final = 1006  # never sent: the connection ended without a close frame
BAD_DATA: Final = 1007
TOO_BIG: Final = 1009
INTERNAL_ERROR: Final = 1011

_OPCODES = {CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG}
_UNASSIGNED = {1004, NO_CODE, ABNORMAL}  # between 1000 and 1014: reserved, or never sent
_XOR_AT_ONCE = 4096  # bytes; a longer whole number is slower than four strides
_XORED: list[bytes] = []  # for each byte of a mask, what becomes of all 256 bytes: made when it is first needed


class WebSocketError(PeerError):
    """The client broke the rules of WebSockets. `code` is that of the close frame that it gets."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.reason)


class WebSocketClosed(IncompleteRead):
    """The client has closed the WebSocket: no message follows.

    `code` is 1005 if its close frame had none, and 1006 if the connection ended without a close frame.
    """

    def __init__(self, waited_for: object, code: int, reason: str = "", partial: bytes = b"") -> None:
        super().__init__(waited_for, partial)
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.waited_for, self.code, self.reason, self.partial)

    def __str__(self) -> str:
        return f"the client has closed the WebSocket: {self.code} {self.reason}".rstrip()


class FrameHead(NamedTuple):
    """The head of a frame, which stands before the payload. `size` is the number of bytes of the head itself."""

    is_last: bool  # of the fragments of its message
    rsv1: bool  # the message is compressed (RFC 7692)
    opcode: int
    length: int  # of the payload
    mask: bytes  # 4 bytes; b"" in a frame of a server
    size: int


def parse_frame_head(
    data: bytes | bytearray, start: int = 0, *, may_deflate: bool = False, masked: bool = True
) -> FrameHead | None:
    """Return the head of the frame that begins at `data[start]`; None if more bytes must come.

    Raises WebSocketError for a frame that may not be sent here, as soon as its first two bytes show it.
    """
    if len(data) - start < 2:
        return None
    first, second = data[start], data[start + 1]
    opcode, length = first & 15, second & 127
    if first & 0x70:
        _check_reserved(first, may_deflate)
    if opcode not in _OPCODES:
        raise WebSocketError(PROTOCOL_ERROR, f"a frame with the reserved opcode {opcode}")
    if opcode >= CLOSE and (length > CONTROL_BYTES_MAX or not first & 128):
        raise WebSocketError(PROTOCOL_ERROR, "a control frame that is fragmented, or has more than 125 bytes")
    if bool(second & 128) != masked:
        raise WebSocketError(PROTOCOL_ERROR, "a frame that is not masked" if masked else "a frame that is masked")
    at = start + 2
    if length >= 126:
        width = 2 if length == 126 else 8
        if len(data) < at + width:
            return None
        length = int.from_bytes(data[at : at + width], "big")
        at += width
        if length < (126 if width == 2 else 65_536) or length >= 2**63:
            raise WebSocketError(PROTOCOL_ERROR, "a length that is not in its shortest form, or is too large")
    mask = b""
    if masked:
        if len(data) < at + 4:
            return None
        mask = bytes(data[at : at + 4])
        at += 4
    return FrameHead(first > 127, first & 64 > 0, opcode, length, mask, at - start)


def build_frame(
    opcode: int, payload: bytes = b"", *, is_last: bool = True, rsv1: bool = False, mask: bytes = b""
) -> bytes:
    """Return a frame as bytes. With a `mask` of 4 bytes it is a client's, without one a server's."""
    first = (128 if is_last else 0) | (64 if rsv1 else 0) | opcode
    length = len(payload)
    bit = 128 if mask else 0
    if mask:
        payload = mask + unmask(payload, mask)
    if length < 126:
        return bytes((first, bit | length)) + payload
    if length < 65_536:
        return bytes((first, bit | 126)) + length.to_bytes(2, "big") + payload
    return bytes((first, bit | 127)) + length.to_bytes(8, "big") + payload


def unmask(data: bytes | bytearray, mask: bytes) -> bytes:
    """Return `data` with its mask taken off, or put on: both are the same (RFC 6455, 5.3)."""
    length = len(data)
    if length <= _XOR_AT_ONCE:
        key = (mask * ((length + 3) >> 2))[:length]
        return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(length, "little")
    if not _XORED:
        _XORED.extend(bytes([value ^ each for value in range(256)]) for each in range(256))
    out = bytearray(length)
    for place in range(4):
        out[place::4] = data[place::4].translate(_XORED[mask[place]])
    return bytes(out)


def turned(mask: bytes, count: int) -> bytes:
    """Return the mask for what follows the first `count` bytes of a payload."""
    count &= 3
    return mask[count:] + mask[:count]


def whole_characters(data: bytes | bytearray | memoryview) -> int:
    """Return how many of these bytes are whole characters of UTF-8. Raises WebSocketError if they can't become text.

    At most 3 bytes are left: the beginning of a character.
    """
    try:
        return codecs.utf_8_decode(data, "strict", False)[1]
    except UnicodeDecodeError as error:
        raise WebSocketError(BAD_DATA, f"a text that is not UTF-8: {error.reason}") from None


def text_of(data: bytes | bytearray) -> str:
    """Return the text of a whole message. Raises WebSocketError if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WebSocketError(BAD_DATA, f"a text that is not UTF-8: {error.reason}") from None


def parse_close(payload: bytes) -> tuple[int, str]:
    """Return the code and the reason of a close frame; 1005 if it has no code. Raises WebSocketError."""
    if not payload:
        return NO_CODE, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not may_be_sent(code):
        raise WebSocketError(PROTOCOL_ERROR, "a close frame without a valid code")
    return code, text_of(payload[2:])


def close_payload(code: int, reason: str = "") -> bytes:
    """Return the payload of a close frame. A reason of more than 123 bytes is cut. Raises ValueError for a bad code."""
    if not isinstance(code, int) or not may_be_sent(code):
        raise ValueError(f"a WebSocket can't be closed with the code {code!r}: use 1000, or one from 3000 to 4999")
    said = reason.encode()
    if len(said) > CONTROL_BYTES_MAX - 2:
        said = said[: CONTROL_BYTES_MAX - 2].decode("utf-8", "ignore").encode()
    return code.to_bytes(2, "big") + said


def may_be_sent(code: int) -> bool:
    """Return whether a close frame may have that code (RFC 6455, 7.4; 1012 to 1014 are registered with IANA)."""
    return 3000 <= code < 5000 or (1000 <= code <= 1014 and code not in _UNASSIGNED)


def _check_reserved(first: int, may_deflate: bool) -> None:
    """Check the reserved bits: RSV1 belongs to the first frame of a message, where compression was agreed upon."""
    if first & 0x30 or not may_deflate or first & 15 not in (TEXT, BINARY):
        raise WebSocketError(PROTOCOL_ERROR, "a frame with a reserved bit that means nothing here")
