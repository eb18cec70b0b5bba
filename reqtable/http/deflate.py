"""Compressed messages (permessage-deflate, RFC 7692), without context takeover: each message stands for itself.

So nothing of zlib's outlives a step. A message that has half come is kept as it came, and inflated once it is whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from reqtable.http.frames import BAD_DATA, WebSocketError
from reqtable.table.errors import LimitExceeded

_NAME = "permessage-deflate"
_TAIL = b"\x00\x00\xff\xff"  # what the sender takes away, and the receiver puts back (RFC 7692, 7.2)
_LEVEL = 1  # a message must not hold up the loop; higher levels take several times as long
_WINDOW_BITS = 15
_BLOCKS_MAX = 16  # that each end a stream of zlib's (RFC 7692, 7.2.3.5)


def agree(offers: str | None) -> tuple[int, str | None]:
    """Choose from the value of Sec-WebSocket-Extensions. Returns the bits of our window, and the field of the answer.

    The bits are 0 and the field is None if no offer can be accepted.
    """
    for offer in (offers or "").split(","):
        name, *words = [each.strip() for each in offer.split(";")]
        bits = _bits_of(words) if name.lower() == _NAME else 0
        if bits:
            field = f"{_NAME}; server_no_context_takeover; client_no_context_takeover"
            return bits, field + (f"; server_max_window_bits={bits}" if bits < _WINDOW_BITS else "")
    return 0, None


def _bits_of(words: Iterable[str]) -> int:
    """Return the bits of our window that the parameters of an offer allow; 0: the offer can't be accepted."""
    bits = _WINDOW_BITS
    seen = set()
    for word in words:
        name, is_set, value = word.partition("=")
        name, value = name.strip().lower(), value.strip().strip('"')
        if name in seen:
            return 0
        seen.add(name)
        if name in ("server_no_context_takeover", "client_no_context_takeover"):
            if is_set:
                return 0
        elif name == "client_max_window_bits":
            if is_set and not _is_width(value):
                return 0
        elif name == "server_max_window_bits":
            if not _is_width(value) or value == "8":  # zlib has no window of 8 bits
                return 0
            bits = int(value)
        else:
            return 0
    return bits


def _is_width(value: str) -> bool:
    return value in ("8", "9", "10", "11", "12", "13", "14", "15")


def deflate(data: bytes, window_bits: int) -> bytes:
    """Return a message compressed, with a window of at most 2**`window_bits` bytes."""
    bits = max(9, min(window_bits, len(data).bit_length()))  # a small window is made faster
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -bits, min(9, max(1, bits - 6)))
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))[: -len(_TAIL)]


def inflate(data: bytes | bytearray, limit: int) -> bytes:
    """Return a compressed message as it was. Raises LimitExceeded above `limit` bytes, WebSocketError if it is broken.

    It makes at most `limit` + 1 bytes, whatever the message says.
    """
    left = bytes(data) + _TAIL
    found = b""
    try:
        for _ in range(_BLOCKS_MAX):
            unpacker = zlib.decompressobj(-_WINDOW_BITS)
            found += unpacker.decompress(left, limit + 1 - len(found))
            if len(found) > limit:
                raise LimitExceeded("a message", limit)
            left = unpacker.unused_data
            if not unpacker.eof or not left:
                return found
    except zlib.error as error:
        raise WebSocketError(BAD_DATA, f"a compressed message that is broken: {error}") from None
    raise WebSocketError(BAD_DATA, "a compressed message of too many parts")
