"""The client's side of WebSockets, by hand: what a test sends, and how it reads what comes."""

from __future__ import annotations

from collections.abc import Iterator

from reqtable.http.frames import BINARY, CLOSE, PING, PONG, TEXT, build_frame, close_payload, parse_frame_head

MASK = b"\x01\x80\x7f\xfe"
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455, 1.3
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def handshake(*fields: bytes, path: bytes = b"/") -> bytes:
    own = [b"Host: example.com", b"Upgrade: websocket", b"Connection: keep-alive, Upgrade"]
    own += [b"Sec-WebSocket-Key: " + KEY, b"Sec-WebSocket-Version: 13", *fields]
    return b"GET %s HTTP/1.1\r\n" % path + b"".join(each + b"\r\n" for each in own) + b"\r\n"


def frame(opcode: int, payload: bytes = b"", is_last: bool = True, rsv1: bool = False) -> bytes:
    return build_frame(opcode, payload, is_last=is_last, rsv1=rsv1, mask=MASK)


def text(words: str) -> bytes:
    return frame(TEXT, words.encode())


def binary(data: bytes) -> bytes:
    return frame(BINARY, data)


def ping(data: bytes = b"") -> bytes:
    return frame(PING, data)


def pong(data: bytes = b"") -> bytes:
    return frame(PONG, data)


def close(code: int | None = 1000, reason: str = "") -> bytes:
    return frame(CLOSE, b"" if code is None else close_payload(code, reason))


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the opcodes and payloads of a server's frames."""
    while data:
        head = parse_frame_head(data, may_deflate=True, masked=False)
        assert head is not None, data
        end = head.size + head.length
        assert end <= len(data)
        yield head.opcode, data[head.size : end]
        data = data[end:]


def code_of(payload: bytes) -> int:
    return int.from_bytes(payload[:2], "big")
